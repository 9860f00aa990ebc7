"""train.py, evaluate.py, convert.py: killed and resumed, on two ranks, with bad input; what a training must leave."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch

from common import cli, runtime
from common.errors import UserError
from common.results.claims import load_paper
from papers.condensenet import condense, convert, evaluate, load_condensed, reproduce, train

FOLDER = Path(train.__file__).parent
TINY = {
    "dataset": "cluttered_digits",
    "image_size": 16,
    "train_images": 96,
    "test_images": 40,
    "batch_size": 16,
    "blocks": (1, 1),
    "growth": (4, 8),
    "groups": 2,
    "condense_factor": 4,
    "groups_3x3": 2,
    "epochs": 2,
    "log_every": 1,
}

KILLED = (
    "dataset=cluttered_digits image_size=12 train_images=96 test_images=40 blocks=[1,1] growth=[4,8] groups=2 "
    "condense_factor=4 groups_3x3=2 epochs=2 batch_size=16 conv=random dropout=0.1 curve_every=5 log_every=1 save_every=4"
)


def tiny(**changed) -> train.Config:
    return train.Config(**{**TINY, **changed})


# ---------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize("conv", ["learned", "random"])
def test_killed_runs_end_with_bit_identical_weights(conv, survives_kills):
    """Prunings at steps 2, 4 and 6 of 12, dropout, and random scores: all of it must come back."""
    whole = survives_kills(
        "papers.condensenet.train", f"{KILLED} conv={conv}", 12, every=4, timeless=("train_seconds",)
    )
    assert [line["density"] for line in whole["curve"] if "density" in line] == [0.75, 0.5, 0.25]


def test_training_condenses_in_time_and_the_converted_network_is_the_same(job, tmp_path):
    """12 steps, C = 4: prunings before steps 2, 4, 6; the conversion keeps every answer, and convert.py the network."""
    found = train.run(tiny(), job(tmp_path / "train"))
    pruned = [line for line in found.curve if "loss_after" in line]
    assert [(line["step"], line["density"]) for line in pruned] == [(2, 0.75), (4, 0.5), (6, 0.25)]
    assert all(line["loss_after"] != line["loss_before"] for line in pruned)
    assert found.artifacts["densities"] == [0.25]
    assert found.metrics["converted_test_error"]["last"] == found.metrics["test_error"]["last"]

    again = evaluate.run(evaluate.Config(str(tmp_path / "train")), job(tmp_path / "evaluate")).metrics
    assert again["test_error"] == {"last": found.metrics["test_error"]["last"], "n": 40}
    assert again["condensed_test_error"]["last"] == found.metrics["condensed_test_error"]["last"]
    assert again["condensed_mult_adds"]["last"] < again["mult_adds"]["last"]

    exact = convert.run(convert.Config(str(tmp_path / "train"), classifier=False), job(tmp_path / "exact"))
    assert exact.metrics["largest_change"]["last"] < 1e-5
    half = convert.run(convert.Config(str(tmp_path / "train")), job(tmp_path / "half"))
    assert half.metrics["condensed_test_error"]["last"] == found.metrics["condensed_test_error"]["last"]
    model, _, _ = evaluate.trained_model(str(tmp_path / "train"))
    opened, images = load_condensed(tmp_path / "half" / "condensed.pt"), torch.randn(2, 3, 16, 16)
    assert torch.equal(opened(images), condense(model)(images))


def test_loss_curve_points_partition_the_training(job, tmp_path):
    """Means over steps between points, prunings included: weighted by their steps they give the mean of the whole."""
    config = {"crop_pad": 0, "flip": False, "lr": 1e-9}  # nothing moves: every split of the steps has the same mean
    means = []
    for every in (0, 5):
        curve = train.run(
            tiny(**config, curve_every=every, conv="static", condense_factor=2), job(tmp_path / str(every))
        ).curve
        steps = [0, *(line["step"] for line in curve)]
        assert steps[-1] == 12
        widths = [b - a for a, b in itertools.pairwise(steps)]
        means.append(sum(w * line["train_loss"] for w, line in zip(widths, curve, strict=True)) / 12)
    assert means[0] == pytest.approx(means[1], rel=1e-4)


@pytest.mark.parametrize("conv", ["static", "dense"])
def test_baselines_are_never_pruned(conv, job, tmp_path):
    found = train.run(tiny(conv=conv, condense_factor=2), job(tmp_path))
    assert found.artifacts["densities"] == []
    assert not [line for line in found.curve if "loss_after" in line]


def test_group_lasso_ends_with_the_last_pruning(job, tmp_path, monkeypatch):
    calls, lasso = [], train.CondenseNet.group_lasso
    monkeypatch.setattr(train.CondenseNet, "group_lasso", lambda self: calls.append(1) or lasso(self))
    with_lasso = train.run(tiny(group_lasso=1e-2), job(tmp_path / "a"))
    assert len(calls) == 6
    assert with_lasso.weights_sha256 != train.run(tiny(), job(tmp_path / "b")).weights_sha256


def test_learns(job, tmp_path):
    config = tiny(train_images=64, epochs=30, crop_pad=0, flip=False, blocks=(2, 2), growth=(16, 16))
    curve = train.run(config, job(tmp_path)).curve
    losses = [line["train_loss"] for line in curve if "loss_after" not in line]
    assert losses[-1] < 0.6 * losses[0]


def test_imagenet_form_on_a_tiny_tree(imagenet_tree, job, tmp_path):
    settings = {"dataset": "imagenet", "image_size": 32, "workers": 0, "stem_stride": 2, "batch_size": 6, "held_out": 6}
    here = job(tmp_path / "train", data=imagenet_tree)
    found = train.run(tiny(**settings, group_lasso=1e-5, condense_factor=2), here)
    assert found.scale["steps"] == 10  # 30 of 36 images in sixes, twice
    again = evaluate.run(evaluate.Config(str(tmp_path / "train")), job(tmp_path / "e", data=imagenet_tree)).metrics
    assert again["test_error"]["last"] == pytest.approx(found.metrics["test_error"]["last"], abs=1e-4)


def test_two_ranks_share_the_batch_and_end_with_the_same_weights(torchrun):
    """DDP: the gradient is the mean of the halves'; after a run with random pruning the ranks hold equal weights."""
    out = torchrun(
        f"""
        import torch, torch.nn.functional as F
        from pathlib import Path
        from common import runtime
        from common.cli import Job
        from papers.condensenet import train
        world = runtime.set_up_world("cpu")
        runtime.seed_everything(0)
        config = train.Config(**{TINY!r})
        model = train.build(config, 10).double()
        x, y = torch.randn(8, 3, 16, 16).double(), torch.arange(8)
        halves = [torch.autograd.grad(F.cross_entropy(model(x[r::2]), y[r::2]), list(model.parameters())) for r in (0, 1)]
        forward = torch.nn.parallel.DistributedDataParallel(model)  # a name, or its hooks die before backward
        F.cross_entropy(forward(x[world.rank::2]), y[world.rank::2]).backward()
        for p, a, b in zip(model.parameters(), *halves):
            assert torch.allclose(p.grad, (a + b) / 2, rtol=1e-9, atol=1e-12)
        config.conv = "random"
        torch.manual_seed(world.rank)
        found = train.run(config, Job(0, world, Path("work"), Path("data")))
        print(f"rank {{world.rank}}: {{found.weights_sha256}} {{found.scale['steps']}} end", flush=True)
        """
    )
    ends = re.findall(r"rank (\d): (\S+) (\d+) end", out)
    assert sorted(e[0] for e in ends) == ["0", "1"]
    assert ends[0][1] == ends[1][1]
    assert [e[2] for e in ends] == ["12", "12"], "the global batch is shared, not doubled"


# ---------------------------------------------------------------------------------------------- protocols
def test_learning_rate_falls_as_a_cosine_to_zero_step_by_step(job, tmp_path):
    lrs = [line["lr"] for line in train.run(tiny(curve_every=1), job(tmp_path)).curve if "loss_after" not in line]
    assert lrs[0] == 0.1
    assert lrs[6] == pytest.approx(0.05)
    assert lrs[-1] == pytest.approx(0.1 * 0.017037, rel=1e-4)  # (1 + cos(11 pi / 12)) / 2


def test_full_configs_are_the_papers_recipe():
    """The numbers of the paper, one by one; the networks of the full experiments have the paper's counts."""
    cifar = {"epochs": 300, "batch_size": 64, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "group_lasso": 0, "groups": 4,
             "condense_factor": 4, "groups_3x3": 4, "crop_pad": 4, "flip": True, "stem_stride": 1, "dropout": 0, "reduction": 0,
             "train_images": 0, "test_images": 0, "held_out": 0, "image_size": 0, "conv": "learned"}  # fmt: skip
    big = {"epochs": 600, "dropout": 0.1}
    imagenet = {"epochs": 120, "batch_size": 256, "group_lasso": 1e-5, "stem_stride": 2, "crop_pad": 4}
    expected = {
        "full": (cifar | {"blocks": (14, 14, 14)}, 1_451_594),
        "full-182": (cifar | big, 13_792_906),
        "full-light": (cifar | {"reduction": 0.5}, None),
        "full-light160": (cifar | big | {"reduction": 0.5}, None),
        "full-imagenet": (cifar | imagenet, 11_922_680),
    }
    for name, (values, weights) in expected.items():
        config = cli.load_config(train.Config, FOLDER, name, "train")
        assert {key: getattr(config, key) for key in values} == values, name
        with torch.device("meta"):
            model = train.build(config, 1000 if "imagenet" in name else 10)
        assert weights in (None, sum(p.numel() for p in model.parameters())), name


def test_every_reported_number_has_the_metric_its_experiment_returns(job, tmp_path, monkeypatch):
    """The full experiments on tiny settings: the metrics that the claims name are there."""
    settings = lambda *_, conv="learned", **changed: tiny(conv=conv, condense_factor=2)  # noqa: E731
    monkeypatch.setattr("common.results.stages.load_config", settings)
    monkeypatch.setattr(reproduce, "IMAGES_SEEN", {"cluttered_digits": 300 * 50_000})
    paper = load_paper(FOLDER)
    trained = {name: None for name in ("arms", "imagenet-g4")}
    for name in trained:
        trained[name] = reproduce.EXPERIMENTS[name].measure("quick", dataclasses.replace(job(tmp_path / name))).metrics
    trained["c10-arms"] = trained["arms"]
    for claim in paper.claims:
        if claim.run and claim.run.experiment not in ("costs", "speed", "kernels", "gpu-tests"):
            metrics = trained.get(claim.run.experiment, trained["imagenet-g4"])
            assert {claim.metric.name, claim.against} - {None} <= set(metrics), claim.id


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        (train, "groups=3 dataset=cluttered_digits train_images=128", "R=16, O=32, G=3, C=4: expected R divisible by G and by C"),
        (train, "condense_factor=5 dataset=cluttered_digits train_images=128", "C=5: expected R divisible"),
        (train, "conv=static condense_factor=2 dataset=cluttered_digits train_images=128", "expected C = G"),
        (train, "blocks=[2,2] dataset=cluttered_digits train_images=128", "expected as many blocks as growths"),
        (train, "dataset=cifar10", "make data DATASET=cifar10"),
        (train, "dataset=cluttered_digits train_images=100 epochs=3", "3 condensing stages do not fit the first half of 3 steps"),
        (train, "dataset=cluttered_digits train_images=40", "batch size 64 does not fit"),
        (train, "dataset=cluttered_digits held_out=10000", "held_out is 10000 of 10000 training images"),
        (train, "dataset=digits", "digits has 1 channel"),
        (train, "dropout=1", "dropout is 1.0"),
        (train, "grps=4", "unknown config key 'grps'; did you mean groups?"),
        (evaluate, "checkpoint=nowhere", "no checkpoint at 'nowhere'; give a work dir of papers.condensenet.train"),
        (convert, "checkpoint=bad.pt", "bad.pt does not open"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(script, settings, message, tmp_path, refused):
    (tmp_path / "bad.pt").write_bytes(b"PK not a checkpoint")
    told = refused(script, *(["--tier", "full"] if script is train else []), "--set", *settings.split())
    assert re.search(message, told), told


def test_unfinished_and_foreign_checkpoints_are_refused(job, tmp_path):
    train.run(tiny(conv="static", condense_factor=2), job(tmp_path / "static"))
    with pytest.raises(UserError, match=r"lr: 0.1 there, 0.5 here"):
        train.run(tiny(conv="static", condense_factor=2, lr=0.5), job(tmp_path / "static"))
    early = job(tmp_path / "early")
    config = tiny(epochs=50, condense_factor=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.StopFlag, "at", lambda self, step: step == 3)
        with pytest.raises(runtime.Stopped, match="at step 3 of 300"):
            train.run(config, early)
    with pytest.raises(UserError, match="expected 1/C = 0.25 in every group; finish the condensing stages first"):
        convert.run(convert.Config(str(tmp_path / "early")), job(tmp_path / "c"))
    assert (
        "condensed_test_error"
        not in evaluate.run(evaluate.Config(str(tmp_path / "early")), job(tmp_path / "e")).metrics
    )


def test_non_finite_loss_stops_with_the_last_good_checkpoint(job, stops_at_nan):
    stops_at_nan(train.F, "cross_entropy", lambda folder: train.run(tiny(conv="dense", save_every=2), job(folder)))
