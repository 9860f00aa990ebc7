"""train.py, finetune.py, evaluate.py: killed and resumed, on two ranks, with bad input; what the two stages must leave."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from common import cli, runtime
from common.checkpoints import checkpoints
from common.errors import UserError
from common.results import stages
from common.results.claims import load_paper
from papers.msdnet_training import evaluate, finetune, reproduce, train

FOLDER = Path(train.__file__).parent
SMALL = {
    "exits": 3,
    "base": 1,
    "step": 1,
    "channels": 4,
    "growth": 2,
    "growth_factor": (1, 2),
    "bottleneck_factor": (1, 2),
}
TINY = {"dataset": "cluttered_digits", "image_size": 16, "train_images": 116, "held_out": 20, "test_images": 40, **SMALL,
        "epochs": 2, "milestones": (1,), "batch_size": 16, "log_every": 1}  # fmt: skip
TINY_2 = {"epochs": 2, "milestones": (1,), "log_every": 1}
KILLED = (
    "dataset=cluttered_digits image_size=12 train_images=116 held_out=20 test_images=40 exits=3 base=1 step=1 channels=4 "
    "growth=2 growth_factor=[1,2] bottleneck_factor=[1,2] epochs=2 milestones=[1] batch_size=16 log_every=1 save_every=4"
)


def tiny(**changed) -> train.Config:
    return train.Config(**{**TINY, **changed})


def tiny_2(checkpoint, **changed) -> finetune.Config:
    return finetune.Config(**{**TINY_2, "checkpoint": str(checkpoint), **changed})


@pytest.fixture
def stage_1(job, tmp_path) -> Path:
    """Work dir of a trained network."""
    train.run(tiny(), job(tmp_path / "stage_1"))
    return tmp_path / "stage_1"


# ---------------------------------------------------------------------------------------------- runs
def test_killed_trainings_end_with_bit_identical_weights(survives_kills):
    survives_kills("papers.msdnet_training.train", KILLED, 12, every=4, timeless=("train_seconds",))


def test_killed_second_stages_end_with_bit_identical_weights(stage_1, survives_kills):
    """With the official choices, where the frozen network's statistics move too and must come back."""
    settings = f"checkpoint={stage_1} freeze_norm=false detach=false epochs=2 milestones=[1] log_every=1 save_every=4"
    survives_kills("papers.msdnet_training.finetune", settings, 12, every=4, timeless=("finetune_seconds",))


def test_both_stages_report_every_exit_and_evaluate_agrees(stage_1, job, tmp_path):
    first = evaluate.run(evaluate.Config(str(stage_1)), job(tmp_path / "e1")).metrics
    found = finetune.run(tiny_2(stage_1), job(tmp_path / "stage_2"))
    second = evaluate.run(evaluate.Config(str(tmp_path / "stage_2"), budget=0), job(tmp_path / "e2"))
    names = [*(f"exit{i}_accuracy" for i in (1, 2, 3)), "mean_accuracy", "last_exit_accuracy"]
    for name in names:
        assert second.metrics[name]["last"] == pytest.approx(found.metrics[name]["last"], abs=1e-4)
        assert second.metrics[name]["n"] == 40
    assert second.metrics["exit3_mult_adds"]["last"] > first["exit3_mult_adds"]["last"], "ISC reads twice the features"
    assert second.metrics["exit1_mult_adds"] == first["exit1_mult_adds"]
    curve = second.artifacts["budget_curve"]
    assert len(curve) == 40
    costs = second.artifacts["exit_mult_adds"]
    assert all(costs[0] <= point["mult_adds"] <= costs[-1] for point in curve)


def test_second_stage_leaves_the_backbone_alone_unless_asked(stage_1, job, tmp_path):
    before = torch.load(checkpoints(stage_1)[0], weights_only=True)["state"]["parts"]["model"]
    for freeze, name in ((True, "rest"), (False, "drift")):
        finetune.run(tiny_2(stage_1, freeze_norm=freeze), job(tmp_path / name))
        after = torch.load(checkpoints(tmp_path / name)[0], weights_only=True)["state"]["parts"]["model"]
        changed = {key for key, value in before.items() if not torch.equal(value, after[f"backbone.{key}"])}
        assert bool(changed) is not freeze
        assert all("running_" in key or "num_batches" in key for key in changed), "weights never move"


def test_equilibrium_changes_the_training_and_not_the_start(job, tmp_path):
    runs = {e: train.run(tiny(equilibrium=e), job(tmp_path / e)) for e in ("none", "last", "all")}
    assert len({run.weights_sha256 for run in runs.values()}) == 3
    models = []
    for equilibrium in ("none", "all"):
        runtime.seed_everything(0)
        models.append(train.build(tiny(equilibrium=equilibrium), 10))
    x = torch.randn(2, 3, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(models[0](x), models[1](x), strict=True))


def test_learns(job, tmp_path):
    config = tiny(train_images=84, epochs=25, milestones=(20,), crop_pad=0, flip=False, channels=8, growth=4)
    curve = train.run(config, job(tmp_path)).curve
    assert curve[-1]["train_loss"] < 0.5 * curve[0]["train_loss"]


def test_budget_thresholds_come_from_the_held_out_images(stage_1, job, tmp_path):
    """By hand, from the logits of both sets."""
    from common.metrics.early_exit import budgeted, confidence, thresholds_for_budget

    found = evaluate.run(evaluate.Config(str(stage_1)), job(tmp_path / "a"))
    costs = found.artifacts["exit_mult_adds"]
    middle = (costs[0] + costs[-1]) / 2
    again = evaluate.run(evaluate.Config(str(stage_1), budget=middle), job(tmp_path / "b"))
    model, config, _ = evaluate.trained_model(str(stage_1))
    here = job(tmp_path)
    held, test = (
        evaluate.all_logits(config, model, evaluate.part(config, here, which).loader) for which in ("held_out", "test")
    )
    assert len(held[0]) == 20
    chosen, _, cost = thresholds_for_budget(confidence(held[0]), costs, middle)
    assert cost <= middle
    expected = budgeted(*test, chosen, costs)
    assert again.metrics["budgeted_accuracy"] == {"last": expected.accuracy, "n": 40}
    assert again.metrics["budgeted_mult_adds"]["last"] == expected.cost


def test_timed_budgets_answer_as_the_thresholds_say(stage_1, job, tmp_path):
    """The engine on the test set, p by p: the accuracy that evaluate.py computes from all exits' logits."""
    found = reproduce.timed_budgets(str(stage_1), job(tmp_path), budgets=(0.5, 1.0))
    curve = evaluate.run(evaluate.Config(str(stage_1)), job(tmp_path / "e")).artifacts["budget_curve"]
    expected = {point["p"]: point["accuracy"] for point in curve}
    assert [point["accuracy"] for point in found] == pytest.approx([expected[0.5], expected[1.0]], abs=2.6)  # one of 40
    assert all(point["ms"] > 0 for point in found)


def test_imagenet_form_on_a_tiny_tree(imagenet_tree, job, tmp_path):
    settings = {
        "dataset": "imagenet",
        "image_size": 32,
        "workers": 0,
        "stem": "imagenet",
        "batch_size": 6,
        "held_out": 6,
    }
    found = train.run(tiny(**settings), job(tmp_path / "train", data=imagenet_tree))
    assert found.scale["steps"] == 10  # 30 of 36 images in sixes, twice
    again = evaluate.run(evaluate.Config(str(tmp_path / "train")), job(tmp_path / "e", data=imagenet_tree)).metrics
    assert again["exit2_accuracy"]["last"] == pytest.approx(found.metrics["exit2_accuracy"]["last"], abs=1e-4)


def test_two_ranks_share_the_batch_and_end_with_the_same_weights(torchrun):
    """DDP, with gradient equilibrium: the gradient is the mean of the halves'; then both stages whole."""
    out = torchrun(
        f"""
        import torch
        from pathlib import Path
        from common import runtime
        from common.cli import Job
        from papers.msdnet_training import finetune, train
        from papers.msdnet_training.distillation import sum_of_cross_entropies as loss
        world = runtime.set_up_world("cpu")
        runtime.seed_everything(0)
        config = train.Config(**{TINY!r})
        model = train.build(config, 10).double()
        x, y = torch.randn(8, 3, 16, 16).double(), torch.arange(8)
        halves = [torch.autograd.grad(loss(model(x[r::2]), y[r::2]), list(model.parameters())) for r in (0, 1)]
        forward = torch.nn.parallel.DistributedDataParallel(model)
        loss(forward(x[world.rank::2]), y[world.rank::2]).backward()
        for p, a, b in zip(model.parameters(), *halves):
            assert torch.allclose(p.grad, (a + b) / 2, rtol=1e-9, atol=1e-12)
        settings = finetune.Config(checkpoint="train", **{TINY_2!r})
        for script, config in ((train, config), (finetune, settings)):
            name = script.__name__.split(".")[-1]
            found = script.run(config, Job(0, world, Path(name), Path("data")))
            print(f"{{name}} rank {{world.rank}}: {{found.weights_sha256}} {{found.scale['steps']}} end", flush=True)
        """
    )
    ends = sorted(re.findall(r"(\w+) rank (\d): (\S+) (\d+) end", out))
    assert [e[:2] for e in ends] == [("finetune", "0"), ("finetune", "1"), ("train", "0"), ("train", "1")]
    assert ends[0][2] == ends[1][2]
    assert ends[2][2] == ends[3][2]
    assert {e[3] for e in ends} == {"12"}, "the global batch is shared, not doubled"


# ---------------------------------------------------------------------------------------------- protocols
def test_learning_rate_falls_to_a_tenth_at_each_milestone():
    config = train.Config()
    rates = [train.learning_rate(config, epoch) for epoch in (0, 149, 150, 224, 225, 299)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_full_configs_are_the_papers_recipe():
    """The numbers of the paper and its code, one by one; the networks have the official counts."""
    cifar = {"epochs": 300, "batch_size": 64, "lr": 0.1, "milestones": (150, 225), "momentum": 0.9, "weight_decay": 1e-4,
             "held_out": 5000, "crop_pad": 4, "flip": True, "train_images": 0, "image_size": 0, "equilibrium": "all"}  # fmt: skip
    second = {"gamma": 0.1, "temperature": 1.0, "lr": 0.1, "kl": "batchmean", "detach": True, "freeze_norm": True}
    second |= {"collaboration": True}
    imagenet = {"epochs": 90, "batch_size": 256, "milestones": (30, 60), "held_out": 50_000}
    expected = {
        "full": (cifar, second | {"epochs": 300, "milestones": (150, 225)}, 2_078_924),
        "full-anytime": (cifar, second | {"epochs": 300, "milestones": (150, 225)}, 3_067_960),
        "full-imagenet": (cifar | imagenet, second | {"epochs": 90, "milestones": (30, 60)}, 23_958_440),
    }
    for name, (stage_1, stage_2, weights) in expected.items():
        config = cli.load_config(train.Config, FOLDER, name, "train")
        assert {key: getattr(config, key) for key in stage_1} == stage_1, name
        with torch.device("meta"):
            model = train.build(config, 1000 if "imagenet" in name else 100)
        assert sum(p.numel() for p in model.parameters()) == weights
        config = cli.load_config(finetune.Config, FOLDER, name, "finetune")
        assert {key: getattr(config, key) for key in stage_2} == stage_2, name


def test_every_claim_on_trained_networks_has_the_metric_its_experiment_returns(job, tmp_path, monkeypatch):
    timed = []

    def settings(config, folder, name, section, **changed):
        changed = {key: value for key, value in changed.items() if key != "dataset"}
        return tiny(**changed, exits=5) if section == "train" else finetune.Config(**TINY_2 | changed)

    monkeypatch.setattr(stages, "load_config", settings)
    monkeypatch.setattr(reproduce, "timed_budgets", lambda checkpoint, job: timed.append(checkpoint) or [])
    found = {}
    for name in ("c10-arms", "c100"):
        found[name] = set(reproduce.EXPERIMENTS[name].measure("quick", job(tmp_path / name)).metrics)
    assert len(timed) == 4
    found |= {"arms": found["c10-arms"], "c10": found["c100"], "imagenet": found["c100"]}
    for claim in load_paper(FOLDER).claims:
        if claim.run and claim.run.experiment in found:
            assert {claim.metric.name, claim.against} - {None} <= found[claim.run.experiment], claim.id


def test_gradients_grow_with_the_exits_for_the_sum_alone(job, tmp_path):
    """GE on all scales: the mean over k exits, which is the sum's gradient over k for the first block."""
    found = {name: value["last"] for name, value in reproduce.mechanism("quick", job(tmp_path)).metrics.items()}
    assert found["sum_growth"] > 1.5
    assert found["all_growth"] < 1
    for k in (2, 4, 6, 8):
        assert found[f"all_k{k}_norm"] == pytest.approx(found[f"sum_k{k}_norm"] / k, rel=1e-4)
    norms = np.array([found[f"sum_k{k}_norm"] for k in (2, 4, 6, 8)])
    assert (np.diff(norms) > 0).all()


# ---------------------------------------------------------------------------------------------- bad input
DIGITS = "dataset=cluttered_digits train_images=128 held_out=20"


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        (train, f"{DIGITS} exits=0", "exits=0, base=1, step=1: expected at least 1 of each"),
        (train, f"{DIGITS} growth_factor=[1,2]", "expected one number >= 1 a scale in each"),
        (train, f"{DIGITS} growth=3 growth_factor=[1,1] bottleneck_factor=[1,1]", "expected even products"),
        (train, "milestones=[300]", r"milestones are rising epochs below 300; they are \[300\]"),
        (train, "step_mode=odd", "step_mode: Input should be 'even' or 'lin_grow'"),
        (train, "equilibrium=some", "equilibrium: Input should be 'none', 'all' or 'last'"),
        (train, "dataset=cluttered_digits train_images=128 held_out=128", "held_out is 128 of 128 training images"),
        (train, "dataset=cifar10", "make data DATASET=cifar10"),
        (finetune, "checkpoint=nowhere", "no checkpoint at 'nowhere'; give a work dir of papers.msdnet_training.train"),
        (finetune, "gamma=1.5", r"gamma is 1.5 and temperature 1.0; expected 0..1 and above 0"),
        (evaluate, "checkpoint=bad.pt", "bad.pt does not open"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, settings, message, tmp_path, refused):
    (tmp_path / "bad.pt").write_bytes(b"PK not a checkpoint")
    told = refused(script, *([] if script is evaluate else ["--tier", "full"]), "--set", *settings.split())
    assert re.search(message, told), told


def test_budgets_out_of_range_and_thresholds_on_nothing_are_refused(stage_1, job, tmp_path):
    costs = evaluate.run(evaluate.Config(str(stage_1)), job(tmp_path / "e")).artifacts["exit_mult_adds"]
    for budget in (costs[0] - 1, costs[-1] + 1, 1e12):
        with pytest.raises(UserError, match="^budget .* cannot be met: the first exit costs"):
            evaluate.run(evaluate.Config(str(stage_1), budget=budget), job(tmp_path / "b"))
    train.run(tiny(held_out=0), job(tmp_path / "all"))
    with pytest.raises(UserError, match="was trained with held_out=0: no image is left to choose thresholds on"):
        evaluate.run(evaluate.Config(str(tmp_path / "all")), job(tmp_path / "c"))


def test_checkpoints_of_the_wrong_stage_or_settings_are_refused(stage_1, job, tmp_path):
    finetune.run(tiny_2(stage_1), job(tmp_path / "stage_2"))
    with pytest.raises(UserError, match="was not written by papers.msdnet_training.train"):
        finetune.run(tiny_2(tmp_path / "stage_2"), job(tmp_path / "x"))
    with pytest.raises(UserError, match="gamma: 0.1 there, 0.5 here"):
        finetune.run(tiny_2(stage_1, gamma=0.5), job(tmp_path / "stage_2"))
    train.run(tiny(), job(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="backbone: "):
        finetune.run(tiny_2(tmp_path / "other"), job(tmp_path / "stage_2"))


def test_non_finite_loss_stops_with_the_last_good_checkpoint(job, stops_at_nan):
    stops_at_nan(train, "sum_of_cross_entropies", lambda folder: train.run(tiny(save_every=2), job(folder)))
