"""The scripts: killed and resumed, on two ranks, on damaged and strange images, with bad input; the paper's recipes."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.cli import load_config
from common.results.claims import load_paper
from papers.centernet import bench, detect, evaluate, losses, reproduce, train
from papers.centernet.kernels.bench import OPS, SHAPES
from papers.centernet.measure import batches

FOLDER = Path(train.__file__).parent
TINY = {"dataset": "digit_scenes", "test_split": "test", "train_images": 24, "test_images": 6, "scene_size": 48, "workers": 0,
        "scene_classes": 2, "side": 47, "border": 8, "dims": (8, 12, 16), "modules": (1, 1, 1), "steps": 12, "batch_size": 4,
        "milestones": (8,), "lr": 1e-3, "log_every": 1, "test_batch": 3, "top_k": 20}  # fmt: skip


def tiny(**changed) -> train.Config:
    return train.Config(**{**TINY, **changed})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, object]:
    """Work dir of a training, and what it measured."""
    from common.cli import Job
    from common.runtime import World

    folder = tmp_path_factory.mktemp("trained")
    return folder, train.run(tiny(), Job(0, World(0, 1, torch.device("cpu")), folder, folder / "data"))


def voc_tree(root: Path, sizes: list[tuple[int, int]], damaged: tuple[int, ...] = (), name: str = "cells") -> Path:
    """A VOC folder of grey squares with one box each; train and test hold the same images."""
    folder = root / name
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for i, (width, height) in enumerate(sizes):
        image = Image.new("RGB", (width, height), (90, 90, 90))
        image.paste((220, 40, 40), (10, 8, 30, 26))
        path = folder / "JPEGImages" / f"{i}.jpg"
        image.save(path)
        if i in damaged:
            path.write_bytes(path.read_bytes()[:-200])
        (folder / "Annotations" / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.jpg</filename><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
            "<object><name>cell</name><bndbox><xmin>10</xmin><ymin>8</ymin><xmax>30</xmax><ymax>26</ymax></bndbox></object>"
            "</annotation>"
        )
    for split in ("train", "test"):
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(map(str, range(len(sizes)))))
    return root


def voc(**changed) -> train.Config:
    generated = {"train_images": 0, "test_images": 0, "scene_size": 0}
    return tiny(dataset="cells", **generated, **changed)


# ---------------------------------------------------------------------------------------------- runs
def test_killed_trainings_end_with_bit_identical_weights(survives_kills):
    """Random crops, mirroring and colour; six steps an epoch; the rate falls after the eighth."""
    settings = " ".join(f"{key}={list(v) if isinstance(v, tuple) else v}".replace(" ", "") for key, v in TINY.items())
    survives_kills(
        "papers.centernet.train",
        f"{settings} save_every=4",
        12,
        every=4,
        timeless=("train_seconds", "images_per_second"),
    )


def test_training_is_the_same_for_any_number_of_workers(trained, job, tmp_path):
    assert train.run(tiny(workers=2), job(tmp_path)).weights_sha256 == trained[1].weights_sha256


def test_the_loss_falls(job, tmp_path):
    """On eight scenes seen again and again."""
    easy = {"scene_classes": 1, "colour": False, "flip": False, "scales": (1.0,), "dims": (16, 24, 32)}
    found = train.run(tiny(train_images=8, batch_size=8, steps=30, milestones=(), lr=1e-2, **easy), job(tmp_path))
    assert found.curve[-1]["train_loss"] < 0.5 * found.curve[0]["train_loss"]


def test_a_training_may_end_within_an_epoch(job, tmp_path, monkeypatch):
    """And reads no batch beyond its last step."""
    read, loader_of = [], train.folder_loader
    monkeypatch.setattr(
        train, "folder_loader", lambda *a, **share: (read.append(1) or x for x in loader_of(*a, **share))
    )
    found = train.run(tiny(steps=8, milestones=()), job(tmp_path))
    assert [(line["epoch"], line["step"]) for line in found.curve] == [(0, 6), (1, 8)]
    assert len(read) == 8


def test_a_nan_stops_the_run(job, stops_at_nan):
    config = tiny(save_every=1)
    stops_at_nan(losses, "focal_loss", lambda folder: train.run(config, job(folder)))


def test_evaluate_agrees_with_the_training(trained, job, tmp_path):
    folder, found = trained
    again = evaluate.run(evaluate.Config(str(folder)), job(tmp_path)).metrics
    for name, value in again.items():
        assert value == found.metrics[name], name
    assert {"triplets_ap", "pairs_ap", "oracle_ap", "triplets_fd", "pairs_fd50"} <= set(again)
    unflipped = evaluate.run(evaluate.Config(str(folder), flip=False, scales=(1.0, 1.5)), job(tmp_path)).metrics
    assert unflipped["pairs_boxes"] != again["pairs_boxes"]


@pytest.mark.parametrize(("center", "ways"), [("none", {"pairs"}), ("plain", {"triplets", "pairs", "oracle"})])
def test_ablations_train(center, ways, job, tmp_path):
    found = train.run(tiny(corner="plain", center=center, steps=6, milestones=()), job(tmp_path)).metrics
    assert {name.split("_")[0] for name in found if name.endswith("_fd")} == ways


def test_two_stacks_recomputed_in_bfloat16(job, tmp_path):
    """A smoke test of the options together, and they are in the record."""
    config = tiny(stacks=2, recompute=True, amp=True, channels_last=True, steps=6, milestones=())
    found = train.run(config, job(tmp_path))
    assert found.numerics == {"amp": True, "channels_last": True}
    assert found.config["recompute"]


def test_two_ranks_share_the_batch_and_end_with_the_same_weights(torchrun):
    """DDP: the gradient is the mean of the halves'; then a training whole, tested on both ranks together."""
    out = torchrun(
        f"""
        import torch
        from pathlib import Path
        from common import runtime
        from common.cli import Job
        from papers.centernet import train
        from papers.centernet.losses import detection_loss
        from papers.centernet.targets import render_targets
        world = runtime.set_up_world("cpu")
        runtime.seed_everything(0)
        config = train.Config(**{TINY!r})
        model = train.build(config, 2).double()
        x, ends = torch.randn(4, 3, 47, 47).double(), torch.rand(4, 3, 2, 2).sort(2).values * 45
        boxes, labels = ends.flatten(2).double(), torch.randint(2, (4, 3))
        def loss(model, r):
            wanted = render_targets(boxes[r::2], labels[r::2], torch.tensor([3, 2]), 2, 3, (12, 12))
            return detection_loss(model(x[r::2], wanted.cells), wanted).total
        halves = [torch.autograd.grad(loss(model, r), list(model.parameters())) for r in (0, 1)]
        forward = torch.nn.parallel.DistributedDataParallel(model)
        loss(forward, world.rank).backward()
        for p, a, b in zip(model.parameters(), *halves, strict=True):
            assert torch.allclose(p.grad, (a + b) / 2, rtol=1e-6, atol=1e-9)
        found = train.run(config, Job(0, world, Path("train"), Path("data")))
        values = [found.metrics[k]["last"] for k in ("pairs_ap", "pairs_boxes", "triplets_fd")]
        print(f"rank {{world.rank}}: {{found.weights_sha256}} {{found.scale['steps']}} {{values}} end", flush=True)
        """
    )
    ends = re.findall(r"rank (\d): (\S+) (\d+) (\[.*\]) end", out)
    assert sorted(e[0] for e in ends) == ["0", "1"]
    assert len({e[1:] for e in ends}) == 1
    assert ends[0][2] == "12", "the global batch is shared, not doubled"


# ---------------------------------------------------------------------------------------------- images of any kind
def test_images_are_tested_in_batches_of_one_size(job, tmp_path):
    """Each image once, and batches give what single images give."""
    root = voc_tree(tmp_path, [(64, 48), (48, 64), (64, 48), (50, 50), (64, 48), (48, 64)])
    work = job(tmp_path / "work", data=root)
    tests = train.open_set(voc(), work, train=False)
    chosen = batches(tests, 2, work.world)
    assert sorted(i for batch in chosen for i in batch) == list(range(6))
    assert sorted(map(len, chosen)) == [1, 1, 2, 2]
    assert all(len({tests.size(i) for i in batch}) == 1 for batch in chosen)
    found = train.run(voc(steps=4, milestones=(), batch_size=2), work)
    again = evaluate.run(evaluate.Config(str(tmp_path / "work"), batch=1), job(tmp_path / "e", data=root))
    for name, value in again.metrics.items():
        assert value["last"] == pytest.approx(found.metrics[name]["last"], abs=0.5), name


def test_damaged_images_are_counted_and_stop_neither_training_nor_test(job, tmp_path, capsys):
    """1 of 6 images does not open: 5 others a epoch and one of them twice; in the test it has no detections."""
    root = voc_tree(tmp_path, [(64, 48)] * 6, damaged=(2,))
    found = train.run(voc(steps=12, batch_size=2, milestones=()), job(tmp_path / "work", data=root))
    assert found.metrics["unreadable"]["last"] == 4, "once an epoch of three steps"
    assert found.metrics["untested"]["last"] == 1
    told = capsys.readouterr().out
    assert told.count("passed over: ") == 4
    assert "2.jpg" in told
    assert "4 times an image did not open and another took its place" in told
    assert "no detections: " in told


def test_detect_draws_any_image_and_counts_those_that_do_not_open(trained, job, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    grey = Image.new("L", (40, 30), 128)
    grey.save(folder / "grey.png")
    Image.new("RGBA", (40, 30), (9, 99, 200, 128)).save(folder / "rgba.png")
    Image.new("I;16", (40, 30), 40_000).save(folder / "sixteen.png")
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    Image.new("RGB", (700, 20), (1, 2, 3)).save(folder / "wide.jpg")
    (folder / "broken.jpg").write_bytes(b"not a picture")
    config = detect.Config(str(trained[0]), images=str(folder), out=str(tmp_path / "out"), threshold=0.0)
    found = detect.run(config, job(tmp_path / "work")).metrics
    assert found["images"]["last"] == 5
    assert found["unreadable"]["last"] == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "grey.png", "rgba.png", "sixteen.png", "tiny.png", "wide.png"]  # fmt: skip
    assert capsys.readouterr().out.count("passed over: ") == 1
    assert Image.open(tmp_path / "out" / "grey.png").size == (640, 480), "small images are enlarged"


def test_detect_marks_boxes_and_keypoints():
    from papers.centernet.detector import Detections

    image = torch.zeros(3, 120, 120, dtype=torch.uint8)
    found = Detections(
        torch.tensor([[20.0, 30, 80, 90]]), torch.tensor([0.9]), torch.tensor([0]), torch.tensor([[50.0, 60]])
    )
    drawn = detect.draw(image, found, ["cell"], 0.5)
    assert drawn.shape == (3, 600, 600)
    for (x, y), colour in zip(((20, 30), (80, 90), (50, 60)), detect.KEYPOINTS, strict=True):
        expected = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]  # enlarged five times
        assert drawn[:, 5 * y, 5 * x].tolist() == expected
    assert detect.draw(image, found, ["cell"], 0.95).sum() == 0


def test_detect_without_images_takes_test_images(trained, job, tmp_path):
    found = detect.run(detect.Config(str(trained[0]), number=2), job(tmp_path))
    assert found.metrics["images"]["last"] == 2
    assert len(list((tmp_path / "detections").iterdir())) == 2


# ---------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["side=60"], r"side is 60; .* multiples of 16 less one; the nearest are 47 and 63"),
        (["batch_size=0"], "must be at least 1"),
        (["batch_size=25"], "batch_size 25 exceeds the 24 images"),
        (["milestones=[12]"], "milestones are rising steps below 12"),
        (["scales=[0]"], "expected positive ones"),
        (["test_scales=[0.6]"], "1 among them"),
        (["radius_overlap=1"], "radius_overlap is 1"),
        (["dims=[8]", "modules=[1]"], "at least two"),
        (["corner=round"], "corner: Input should be 'plain' or 'cascade'"),
        (["dataset=nowhere"], "nowhere"),
        (["dataset=bccd", "train_images=0", "test_images=0", "scene_size=0"], "bccd"),
        (["dataset=bccd"], "train_images, test_images and scene_size are of digit_scenes"),
        (["test_split=val"], "val"),
    ],
)
def test_refused_settings_of_train(argv, message, refused):
    settings = [f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in TINY.items()]
    assert re.search(message, refused(train, "--set", *settings, *argv))


def test_refused_checkpoints_and_images(trained, refused, tmp_path):
    assert "no checkpoint at" in refused(evaluate)
    assert "no checkpoint at" in refused(detect, "--set", "checkpoint=nowhere")
    (tmp_path / "checkpoint-000000001.pt").write_bytes(b"broken")
    assert "does not open" in refused(evaluate, "--set", f"checkpoint={tmp_path}/checkpoint-000000001.pt")
    name = f"checkpoint={trained[0]}"
    assert "does not exist" in refused(detect, "--set", name, "images=nowhere.jpg")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refused(detect, "--set", name, f"images={tmp_path / 'empty'}")
    (tmp_path / "bad.jpg").write_bytes(b"no")
    assert "threshold lie between" in refused(detect, "--set", name, "threshold=2")
    assert "1 among them" in refused(evaluate, "--set", name, "scales=[0.6]")


def test_a_folder_of_broken_images_alone_is_an_error(trained, job, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no")
    with pytest.raises(Exception, match=r"none of 1 image\(s\) opened"):
        detect.run(detect.Config(str(trained[0]), images=str(tmp_path / "bad.jpg")), job(tmp_path / "work"))


# ---------------------------------------------------------------------------------------------- recipes and claims
@pytest.mark.parametrize(("name", "stacks"), [("full", 1), ("full-104", 2)])
def test_full_protocol_is_that_of_the_card(name, stacks):
    config = load_config(train.Config, FOLDER, name, "train")
    assert (config.dataset, config.train_split, config.test_split) == ("coco", "train", "val")
    assert (config.side, config.border, config.flip, config.colour) == (511, 128, True, True)
    assert config.scales == (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
    assert (config.dims, config.modules) == ((256, 256, 384, 384, 384, 512), (2, 2, 2, 2, 2, 4))
    assert (config.stacks, config.corner, config.center) == (stacks, "cascade", "pool")
    assert (config.radius_overlap, config.proper_radius) == (0.7, False)
    assert (config.steps, config.batch_size, config.lr, config.milestones) == (480_000, 48, 2.5e-4, (450_000,))
    assert (config.pull, config.push, config.top_k, config.test_scales, config.test_flip) == (
        0.1,
        0.1,
        70,
        (1.0,),
        True,
    )
    assert config.longest_side == 0


def test_learning_rate_falls_after_its_milestones():
    config = tiny(milestones=(3, 5), lr=1.0)
    assert [train.learning_rate(config, step) for step in range(6)] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01])


def test_counts_and_properties_are_as_claimed(job, tmp_path):
    """The experiment `costs` against its claims, by their own tolerances."""
    metrics = reproduce.costs("quick", job(tmp_path)).metrics
    claims = [claim for claim in load_paper(FOLDER).claims if claim.run and claim.run.experiment == "costs"]
    assert len(claims) > 20
    for claim in claims:
        value = metrics[claim.metric.name]["last"]
        if claim.kind == "ratio":
            assert value / metrics[claim.against]["last"] >= claim.at_least, claim.id
        else:
            assert value == pytest.approx(claim.reported.value, abs=claim.tolerance.abs, rel=0), claim.id


def test_heads_at_cells_and_recomputation_keep_less_for_the_backward_pass():
    found = bench.memory_bench()
    assert found["recompute_mib"] < found["after_mib"] < found["before_mib"]


def test_times_of_the_pools_are_those_that_claims_name(job, tmp_path, monkeypatch):
    """Rows as a GPU gives them; corners add up milliseconds, and have the GB/s of all four together."""
    rows = [
        {"op": op, "impl": impl, "mode": mode, "dtype": dtype, "shape": shape, "ms": ms, "gb_per_s": 12 / ms, "of_copy": 1 / ms}
        for shape in SHAPES
        for op, ms in zip(OPS, (1.0, 2.0, 3.0, 6.0, 5.0), strict=True)
        for impl in ("cummax", "row_loop", "triton", "compiled")
        for mode in ("forward", "training")
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip
    monkeypatch.setattr(reproduce, "kernel_bench", lambda *_, **__: rows)
    for name in ("pools", "kernels"):
        metrics = reproduce.EXPERIMENTS[name].measure("quick", job(tmp_path)).metrics
        claims = [claim for claim in load_paper(FOLDER).claims if claim.run and claim.run.experiment == name]
        assert {c.metric.name for c in claims} | {c.against for c in claims} <= set(metrics)
        if name == "pools":
            assert metrics["corners_ours_forward_ms"] == {"last": 12.0}
        else:
            assert metrics["corners_triton_training_bfloat16_gb_per_s"]["last"] == pytest.approx(4 * 12 / 12)
            assert metrics["center_triton_forward_float32_ms"]["last"] == 5
            assert metrics["copy_gb_per_s"]["last"] == 12


def test_every_claim_names_a_metric_that_its_experiment_gives():
    """Those of the trainings: arm, way to decode and metric exist."""
    paper = load_paper(FOLDER)
    decodings, values = (
        ("triplets", "pairs", "oracle"),
        ("ap", "ap50", "fd", "fd5", "fd25", "fd50", "fd_small", "fd_medium", "fd_large"),
    )
    known = {f"{way}_{value}" for way in decodings for value in values}
    for claim in paper.claims:
        if claim.run and claim.run.experiment.split("-")[0] in ("digits", "bccd", "coco"):
            for name in filter(None, (claim.metric.name, claim.against)):
                arm = next(a for a in (*reproduce.ABLATION, "center_check", "cascade") if name.startswith(f"{a}_"))
                assert name.removeprefix(f"{arm}_") in known, claim.id
