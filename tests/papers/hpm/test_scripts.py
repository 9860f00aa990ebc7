"""The four scripts: killed and resumed, on two ranks, on official trees, with bad input; what they print and draw."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import cli, runtime
from common.checkpoints import checkpoints
from common.datasets import person_reid
from common.errors import UserError
from common.results.claims import load_paper
from common.results.verdicts import judge
from papers.hpm import bench, descriptors, evaluate, extract, rank, reproduce, train
from papers.hpm.kernels.bench import SHAPES
from papers.hpm.model import pyramid_loss

FOLDER = Path(train.__file__).parent
TINY = {
    "dataset": "synthetic_people",
    "height": 32,
    "identities": 6,  # 96 images, six batches
    "test_identities": 4,
    "backbone": "small",
    "dim": 4,
    "erasing": 0.5,
    "epochs": 2,
    "batch_size": 16,
    "milestones": [1],
    "log_every": 1,
}


def tiny(**changed) -> train.Config:
    return cli.build_config(train.Config, {**TINY, **changed}, "test")


def plant(root: Path) -> Path:
    """A small Market-1501: 4 people on 3 cameras, two images each, one colour a person; junk and distractors."""
    folder = root / person_reid.OFFICIAL["market1501"].folder
    for split, name in person_reid.FOLDERS.items():
        (folder / name).mkdir(parents=True)
        people = range(1, 5) if split == "train" else range(5, 9)
        for person in people:
            for camera in (1, 2, 3) if split != "query" else (1,):
                for k in range(2 if split != "query" else 1):
                    colour = (60 * (person % 4), 255 - 60 * (person % 4), 80 + 20 * camera)
                    Image.new("RGB", (10, 24), colour).save(folder / name / f"{person:04}_c{camera}s1_00000{k}_00.jpg")
    for name in ("-1_c1s1_000001_00.jpg", "0000_c2s1_000002_00.jpg"):
        Image.new("RGB", (10, 24)).save(folder / "bounding_box_test" / name)
    return root


TREE = {
    "dataset": "market1501",
    "partial": True,
    "height": 32,
    "width": 16,
    "workers": 0,
    "batch_size": 8,
    "scales": [1, 2],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(work dir of train.py, of extract.py), made once; nobody writes there."""
    folder = tmp_path_factory.mktemp("trained")
    job = cli.Job(0, runtime.World(0, 1, torch.device("cpu")), folder / "train", folder / "data")
    train.run(tiny(), job)
    extract.run(extract.Config(str(folder / "train")), job.sub("../descriptors"))
    return folder / "train", folder / "descriptors"


# ---------------------------------------------------------------------------------------------- runs
def test_killed_trainings_end_with_bit_identical_weights(survives_kills):
    """With erasing, whose draws come from the generators that a checkpoint keeps."""
    settings = " ".join(f"{key}={str(value).replace(' ', '')}" for key, value in TINY.items())
    found = survives_kills("papers.hpm.train", f"{settings} save_every=4", 12, every=4, timeless=("train_seconds",))
    assert [line["lr"] for line in found["curve"]] == pytest.approx([0.3, 0.03]), "a tenth after the milestone"


def test_nan_stops_the_training(stops_at_nan, job):
    stops_at_nan(train, "pyramid_loss", lambda folder: train.run(tiny(save_every=3), job(folder)))


def test_learns(job, tmp_path):
    curve = train.run(tiny(epochs=12, erasing=0.0, lr=0.3, backbone_lr=0.03), job(tmp_path)).curve
    assert curve[-1]["train_loss"] < 0.6 * curve[0]["train_loss"]


def test_backbone_and_head_have_rates_of_their_own(job, tmp_path):
    train.run(tiny(lr=1e-12), job(tmp_path))
    runtime.seed_everything(0)
    before = train.build(tiny(), 6).state_dict()
    after = torch.load(checkpoints(tmp_path)[0], weights_only=True)["state"]["parts"]["model"]
    moved = {key.split(".")[0] for key in before if "running" not in key and "batches" not in key
             if (before[key] - after[key]).abs().max() > 1e-6}  # fmt: skip
    assert moved == {"backbone"}


def test_extract_and_evaluate_give_what_training_printed(trained, job, tmp_path, capsys):
    found = train.run(tiny(), job(tmp_path / "train"))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mAP")]
    again = evaluate.run(evaluate.Config(str(trained[1])), job(tmp_path / "evaluate"))
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("mAP")] == told
    for setting in descriptors.SETTINGS:
        for name in ("map_a", "map_b", "rank1", "rank5", "rank10"):
            key = f"{setting}_{name}"
            assert again.metrics[key] == {"last": pytest.approx(found.metrics[key]["last"], abs=1e-9), "n": 16}
        assert again.metrics[f"{setting}_map_b"]["last"] <= again.metrics[f"{setting}_map_a"]["last"]
    assert len(told) == 4
    for line, flip, l2 in zip(told, ("off", "off", "on", "on"), ("off", "on", "off", "on"), strict=True):
        pattern = rf"mAP [\d.]+ \(A, rectangle\) [\d.]+ \(B, trapezoid\), Rank-1 .* flip test {flip}, L2 norm {l2}, "
        assert re.match(pattern + "single query, no re-ranking; 0 of 16 queries skipped", line), line


def test_descriptors_are_those_of_the_network(trained, job, tmp_path):
    """In the order of the split; flipped ones of the mirrored images; combined as the settings say."""
    model, config, steps = extract.trained_model(str(trained[0]))
    assert steps == 12
    gallery, about = descriptors.read(str(trained[1]), "gallery")
    people = train.open_split(config, job(tmp_path), "gallery")
    assert about["data"] == people.digest
    mean, std = (torch.tensor(t)[:, None, None] for t in (people.mean, people.std))
    x = (people.images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        expected = model.eval()(x), model(x.flip(3))
    assert gallery.plain.shape == (48, 60)
    assert torch.allclose(gallery.plain, expected[0], atol=1e-5)
    assert torch.allclose(gallery.mirrored, expected[1], atol=1e-5)
    both = (expected[0] + expected[1]) / 2
    assert torch.allclose(gallery.combined(flip=True, l2=False), both, atol=1e-5)
    unit = gallery.combined(flip=True, l2=True)
    assert torch.allclose(unit, both / both.norm(dim=1, keepdim=True), atol=1e-5)
    assert torch.equal(gallery.combined(flip=False, l2=False), gallery.plain)


def test_rank_draws_hits_green_and_misses_red(trained, job, tmp_path):
    found = rank.run(rank.Config(str(trained[1]), query=3, top=10), job(tmp_path))
    query, gallery = (descriptors.read(str(trained[1]), split)[0] for split in ("query", "gallery"))
    order, hits = found.artifacts["gallery"], found.artifacts["hits"]
    assert len(order) == 10
    assert found.metrics["hits"]["last"] == sum(hits)
    junk = (gallery.ids == query.ids[3]) & (gallery.cameras == query.cameras[3])
    assert not junk[order].any()
    assert hits == [bool(gallery.ids[k] == query.ids[3]) for k in order]
    distances = (query.combined(True, True)[3] - gallery.combined(True, True)).norm(dim=1)
    assert (distances[order].diff() >= -1e-6).all()
    with Image.open(tmp_path / "rank-3.png") as figure:
        pixels = torch.from_numpy(np.asarray(figure.convert("RGB")).copy())
    framed = {}
    for name, colour in (("hits", rank.HIT), ("misses", rank.MISS)):
        wanted = torch.tensor([int(colour[k : k + 2], 16) for k in (1, 3, 5)])
        columns = (pixels == wanted).all(2).float().mean(0) > 0.3  # the upright sides of the frames
        framed[name] = int((columns.int().diff() == 1).sum())
    assert framed == {"hits": 2 * sum(hits), "misses": 2 * (10 - sum(hits))}


def test_rank_with_fewer_images_than_asked_for(trained, job, tmp_path):
    found = rank.run(rank.Config(str(trained[1]), top=100, flip=False, l2=False), job(tmp_path))
    assert len(found.artifacts["gallery"]) == 45, "48 less three of the same person on the same camera"
    assert found.metrics["hits"] == {"last": 9, "n": 45}


def test_official_tree_from_training_to_figure(job, tmp_path):
    data = plant(tmp_path / "data")
    config = tiny(**TREE)
    found = train.run(config, job(tmp_path / "train", data=data))
    assert found.scale["steps"] == 6  # 24 images in eights, twice
    assert found.metrics["flip_l2_map_a"]["n"] == 4
    extract.run(extract.Config(str(tmp_path / "train")), job(tmp_path / "out", data=data))
    gallery, _ = descriptors.read(str(tmp_path / "out"), "gallery")
    assert sorted(gallery.ids.tolist()) == [-1, 0] + [p for p in range(5, 9) for _ in range(6)]
    again = evaluate.run(evaluate.Config(str(tmp_path / "out")), job(tmp_path / "e", data=data))
    assert again.metrics["plain_map_a"]["last"] == pytest.approx(found.metrics["plain_map_a"]["last"])
    drawn = rank.run(rank.Config(str(tmp_path / "out"), top=30), job(tmp_path / "r", data=data))
    assert drawn.metrics["hits"] == {"last": 4, "n": 23}, "26 less -1 and two of its own camera; 0 stays"
    folder = data / "Market-1501-v15.09.15/query"
    (folder / "0005_c1s1_000000_00.jpg").rename(folder / "0005_c1s1_000009_00.jpg")
    with pytest.raises(UserError, match="query is not what .* was extracted from"):
        rank.run(rank.Config(str(tmp_path / "out")), job(tmp_path / "r", data=data))


def test_a_query_without_a_match_is_skipped_or_refused(job, tmp_path, monkeypatch):
    """Counted in a tree that is known to be partial; an error in one that claims to be the official set."""
    data = plant(tmp_path / "data")
    for path in (data / "Market-1501-v15.09.15/bounding_box_test").glob("0007_c[23]*"):
        path.unlink()
    found = train.run(tiny(**TREE, epochs=1), job(tmp_path / "1", data=data))
    assert found.metrics["plain_rank1"]["n"] == 3
    counts = {"train": (24, 4), "query": (4, 4), "gallery": (22, 4)}
    official = person_reid.Official("Market-1501-v15.09.15", counts, {-1: 1, 0: 1})
    monkeypatch.setitem(person_reid.OFFICIAL, "market1501", official)
    with pytest.raises(
        UserError, match=r"1 queries have no match: none of the gallery shows identity 7 on another camera"
    ):
        train.run(tiny(**{**TREE, "partial": False}, epochs=1), job(tmp_path / "2", data=data))


# ---------------------------------------------------------------------------------------------- ranks
def test_two_ranks_share_the_batch_and_end_with_the_same_weights(torchrun):
    """Through DDP the gradient is the mean of the halves'; both end alike; their descriptors are those of one process."""
    out = torchrun(
        f"""
        import torch
        from pathlib import Path
        from common import runtime
        from common.cli import Job, build_config
        from papers.hpm import extract, train
        from papers.hpm.model import pyramid_loss
        world = runtime.set_up_world("cpu")
        runtime.seed_everything(0)
        config = build_config(train.Config, {TINY!r} | {{"erasing": 0.0}}, "test")
        model = train.build(config, 6).double()
        x, y = torch.randn(8, 3, 32, 12).double(), torch.arange(8) % 6
        loss = lambda model, r: pyramid_loss(model(x[r::2]), y[r::2])
        halves = [torch.autograd.grad(loss(model, r), list(model.parameters())) for r in (0, 1)]
        forward = torch.nn.parallel.DistributedDataParallel(model)  # a name, or its hooks die before backward
        loss(forward, world.rank).backward()
        for p, a, b in zip(model.parameters(), *halves, strict=True):
            assert torch.allclose(p.grad, (a + b) / 2, rtol=1e-9, atol=1e-12)

        job = Job(0, world, Path("train"), Path("data"))
        found = train.run(config, job)
        model = extract.trained_model("train")[0]
        query = train.open_split(config, job, "query")
        both = train.describe(config, job, model, query)
        weights = [None, None]
        torch.distributed.all_gather_object(weights, (found.weights_sha256, found.metrics["flip_map_a"]))
        assert weights[0] == weights[1]
        torch.distributed.destroy_process_group()
        one = Job(0, runtime.World(0, 1, torch.device("cpu")), Path("train"), Path("data"))
        alone = train.describe(config, one, model, query)
        assert torch.allclose(both.plain, alone.plain, atol=1e-6)
        assert torch.allclose(both.mirrored, alone.mirrored, atol=1e-6)
        print("AGREE", found.scale["steps"])
        """
    )
    assert out.count("AGREE 12") == 2


def test_uneven_batches_are_refused_and_order_is_shared(job, tmp_path):
    two = cli.Job(0, runtime.World(0, 2, torch.device("cpu")), tmp_path, tmp_path)
    people = train.open_split(tiny(), two, "train")
    with pytest.raises(UserError, match="batch_size 15 cannot be shared by 2 processes"):
        train.loader_of(tiny(batch_size=15), two, people, train=True)
    one = train.loader_of(tiny(), job(tmp_path), people, train=True)
    half = train.loader_of(tiny(), two, people, train=True)
    x, _ = next(iter(one.epoch(0)))
    a, _ = next(iter(half.epoch(0)))
    assert torch.equal(x[::2], a)


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["batch_size=1"], "batch_size is 1; expected at least 2"),
        (["batch_size=5000"], "batch size 5000 does not fit synthetic_people train"),
        (["epochs=0"], "must be at least 1"),
        (["scales=[3]"], "do not divide"),
        (["scales=[]"], "do not divide"),
        (["scales=[0,8]"], "do not divide"),
        (["scales=[1,3,8]"], "do not divide"),
        (["height=72"], "images of height 72 give maps of 18 rows, which scales [1, 2, 4, 8] do not divide"),
        (["height=60"], "size 60; expected a multiple of 8"),
        (["pool=sum"], "pool: Input should be 'avg+max', 'avg' or 'max'"),
        (["erasing=2"], "erasing with probability 2.0, expected 0 to 1"),
        (["backbone=vgg"], "backbone: Input should be 'resnet50' or 'small'"),
        (["weights=x.pth"], "weights are for the ResNet-50"),
        (
            ["backbone=resnet50", "height=128", "weights=nowhere.pth"],
            "weights nowhere.pth does not open (FileNotFoundError)",
        ),
        (["dataset=market"], "unknown person re-identification set 'market'; expected one of market1501"),
        (["dataset=market1501"], "bounding_box_train is missing or has no images"),
        (["dim=0"], "dim is 0 and smoothing 0.0; expected dim >= 1"),
        (["smoothing=1.5"], "smoothing 1.5; expected"),
    ],
)
def test_train_refuses(refused, argv, message):
    assert message in refused(train, "--set", "identities=8", "test_identities=4", *argv)


def test_weights_of_another_network_are_refused(refused, tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "odd.pth")
    said = refused(train, "--set", "identities=8", "height=128", "backbone=resnet50", f"weights={tmp_path / 'odd.pth'}")
    assert "odd.pth: not the weights of torchvision's ResNet-50" in said


def test_the_others_refuse(refused, trained, tmp_path):
    assert "no checkpoint at '(empty)'" in refused(extract)
    assert "no descriptors at '(empty)'; give the work dir of papers.hpm.extract" in refused(evaluate)
    assert "no descriptors at" in refused(rank, "--set", f"descriptors={tmp_path}")
    out = f"descriptors={trained[1]}"
    assert "query 16 does not exist; expected 0 to 15" in refused(rank, "--set", out, "query=16")
    assert "expected query >= 0 and top >= 1" in refused(rank, "--set", out, "top=0")
    shutil.copytree(trained[1], tmp_path / "cut")
    path = tmp_path / "cut" / "gallery.pt"
    path.write_bytes(path.read_bytes()[:500])
    assert "gallery.pt does not open" in refused(evaluate, "--set", f"descriptors={tmp_path / 'cut'}")


def test_a_resume_with_other_settings_is_refused(trained, job, tmp_path):
    shutil.copytree(trained[0], tmp_path / "train")
    with pytest.raises(UserError, match="belongs to another configuration .*pool"):
        train.run(tiny(pool="max"), job(tmp_path / "train"))


# ---------------------------------------------------------------------------------------------- experiments
@pytest.mark.parametrize("name", ["costs", "checks"])
def test_exact_claims_hold(name, job, tmp_path):
    """Every claim of the experiment, by its own tolerance."""
    torch.manual_seed(0)
    found = reproduce.EXPERIMENTS[name].measure("quick", job(tmp_path))
    record = {"experiment": name, "tier": "quick", "seed": 0, "status": "ok", "metrics": found.metrics, "code_digest": "",
              "hardware": {"device": "cpu"}}  # fmt: skip
    paper = load_paper(FOLDER)
    mine = [claim for claim in paper.claims if claim.run and claim.run.experiment == name]
    assert mine
    assert set(found.metrics) == {claim.metric.name for claim in mine}, "nothing is measured for no claim"
    for claim in mine:
        assert judge(claim, [record], {"quick": ""}).kind == "matches", (claim.id, found.metrics[claim.metric.name])


def test_arms_share_seed_data_and_size(job, tmp_path, monkeypatch):
    short = lambda *a, **changed: tiny(**{"epochs": 1, "erasing": 0.0, "dim": 32, **changed})  # noqa: E731
    monkeypatch.setattr("common.results.stages.load_config", short)
    found = reproduce.arms("quick", job(tmp_path))
    sizes = {arm: sum(config["scales"]) * config["dim"] for arm, config in found.config.items()}
    assert set(sizes) == set(reproduce.ARMS)
    assert {arm: size for arm, size in sizes.items() if size != 480} == {"three": 476}
    needed = {claim.metric.name for claim in load_paper(FOLDER).claims if claim.run and claim.run.experiment == "arms"}
    needed |= {c.against for c in load_paper(FOLDER).claims if c.run and c.run.experiment == "arms"}
    assert needed <= set(found.metrics)
    gap = found.metrics["pyramid_occluded_map"]["last"] - found.metrics["global_occluded_map"]["last"]
    assert found.metrics["occluded_gap"]["last"] == gap
    assert {line["stage"] for line in found.curve} == set(reproduce.ARMS)


def test_times_are_those_that_claims_name(job, tmp_path, monkeypatch):
    """Rows as a GPU gives them: the bfloat16 ones are no times of the claims."""
    ms = {"float32": 2.0, "bfloat16": 1.0}
    rows = [
        {"impl": impl, "mode": mode, "dtype": dtype, "shape": shape, "ms": ms[dtype], "gb_per_s": 6.0, "of_copy": 0.5}
        for shape in SHAPES
        for impl in ("slices", "adaptive", "torch", "triton", "compiled")
        for mode in ("forward", "training")
        for dtype in ms
    ]
    monkeypatch.setattr(reproduce, "kernel_bench", lambda *_, **__: rows)
    monkeypatch.setattr(reproduce, "heads_bench", lambda **_: {"separate_ms": 2.0, "grouped_ms": 1.0})
    monkeypatch.setattr(reproduce, "ranking_bench", lambda: {"seconds": 1.0})
    for name in ("speed", "kernels"):
        metrics = reproduce.EXPERIMENTS[name].measure("quick", job(tmp_path)).metrics
        claims = [claim for claim in load_paper(FOLDER).claims if claim.run and claim.run.experiment == name]
        assert {c.metric.name for c in claims} | {c.against for c in claims} <= set(metrics)
        if name == "speed":
            assert metrics["slices_full_ms"] == {"last": 2.0}
        else:
            assert metrics["triton_forward_bfloat16_ms"] == {"last": 1.0}
            assert metrics["copy_gb_per_s"] == {"last": 12.0}


def test_configs_of_the_full_tier_are_the_recipe():
    for suffix, dataset in (("", "market1501"), ("-duke", "dukemtmc_reid"), ("-cuhk03", "cuhk03_np_detected")):
        for hre in (False, True):
            config = cli.load_config(train.Config, FOLDER, f"full{suffix}{'-hre' if hre else ''}", "train")
            assert config.dataset == dataset
            assert (config.height, config.width, config.batch_size, config.epochs) == (384, 128, 64, 60)
            assert (config.lr, config.backbone_lr, config.momentum, config.weight_decay) == (0.1, 0.01, 0.9, 5e-4)
            assert (config.milestones, config.scales, config.dim, config.pool) == ((40,), (1, 2, 4, 8), 256, "avg+max")
            assert config.erasing == (0.5 if hre else 0)
            assert not config.partial


def test_bench_checks_what_it_times():
    figures = bench.heads_bench(batch=4, identities=5, channels=8, rounds=1)
    assert all(value > 0 for value in figures.values())
    figures = bench.ranking_bench(queries=30, images=200, sample=20)
    assert all(value > 0 for value in figures.values())


def test_loss_of_one_bin_is_plain_cross_entropy():
    logits, labels = torch.randn(1, 5, 7), torch.arange(5)
    assert torch.allclose(pyramid_loss(logits, labels), torch.nn.functional.cross_entropy(logits[0], labels))
