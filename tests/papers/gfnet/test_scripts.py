"""The four scripts: killed and resumed, on two ranks, with bad input; what each stage takes, and what it must leave."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from common import cli, runtime
from common.checkpoints import checkpoints
from common.errors import UserError
from common.results import stages
from common.results.claims import load_paper
from papers.gfnet import evaluate, finetune, places, reproduce, train, train_policy
from papers.gfnet.encoders import FAMILY
from papers.gfnet.losses import sequence_loss
from papers.gfnet.model import Step
from papers.gfnet.policy import Locator

FOLDER = Path(train.__file__).parent
DATA = {"dataset": "cluttered_digits", "image_size": 16, "train_images": 116, "held_out": 20, "test_images": 40}
TINY = {**DATA, "encoder": "tiny", "patch": 8, "steps": 3, "hidden": 8, "epochs": 2, "batch_size": 16, "log_every": 1}
TINY_2 = {"conv": 8, "hidden": 32, "epochs": 2, "log_every": 1}
TINY_3 = {"epochs": 2, "log_every": 1}
SAVED = "log_every=1 save_every=4"


def tiny(**changed) -> train.Config:
    return train.Config(**{**TINY, **changed})


def tiny_2(checkpoint, **changed) -> train_policy.Config:
    return train_policy.Config(**{**TINY_2, "checkpoint": str(checkpoint), **changed})


def tiny_3(checkpoint, **changed) -> finetune.Config:
    return finetune.Config(**{**TINY_3, "checkpoint": str(checkpoint), **changed})


def parts(folder: Path) -> dict:
    """The state dicts in the newest checkpoint of a work dir."""
    return torch.load(checkpoints(folder)[0], weights_only=True)["state"]["parts"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(work dir of Stage I, of Stage II), made once; nobody writes there."""
    folder = tmp_path_factory.mktemp("trained")
    job = cli.Job(0, runtime.World(0, 1, torch.device("cpu")), folder / "stage_1", folder / "data")
    train.run(tiny(), job)
    train_policy.run(tiny_2(folder / "stage_1"), job.sub("../stage_2"))
    return folder / "stage_1", folder / "stage_2"


# ---------------------------------------------------------------------------------------------- runs
def test_killed_trainings_end_with_bit_identical_weights(survives_kills):
    settings = " ".join(f"{key}={value}" for key, value in {**TINY, "train_images": 68, "batch_size": 8}.items())
    survives_kills("papers.gfnet.train", f"{settings} {SAVED}", 12, every=4, timeless=("train_seconds",))


def test_killed_policies_end_with_bit_identical_weights(trained, survives_kills):
    settings = f"checkpoint={trained[0]} conv=8 hidden=32 epochs=2 {SAVED}"
    survives_kills("papers.gfnet.train_policy", settings, 12, every=4, timeless=("policy_seconds",))


def test_killed_fine_tunings_end_with_bit_identical_weights(trained, survives_kills):
    settings = f"checkpoint={trained[1]} epochs=2 {SAVED}"
    survives_kills("papers.gfnet.finetune", settings, 12, every=4, timeless=("finetune_seconds",))


def test_every_stage_reports_every_step_and_evaluate_agrees(trained, job, tmp_path):
    """The same crops at the same test images: random for Stage I, the policy's after."""
    runs = {
        "stage_1": train.run(tiny(), job(tmp_path / "stage_1")),
        "stage_2": train_policy.run(tiny_2(tmp_path / "stage_1"), job(tmp_path / "stage_2")),
        "policy": finetune.run(tiny_3(tmp_path / "stage_2"), job(tmp_path / "policy")),
        "centre": finetune.run(tiny_3(tmp_path / "stage_2", locations="centre"), job(tmp_path / "centre")),
    }
    for name, found in runs.items():
        again = evaluate.run(evaluate.Config(str(tmp_path / name)), job(tmp_path / "evaluate"))
        for metric in ("step1_accuracy", "step2_accuracy", "step3_accuracy", "last_step_accuracy"):
            assert again.metrics[metric]["n"] == 40
            assert again.metrics[metric]["last"] == pytest.approx(found.metrics[metric]["last"], abs=1e-4), (
                name,
                metric,
            )
        assert again.weights_sha256 == found.weights_sha256
        costs = again.artifacts["step_mult_adds"]
        assert [again.metrics[f"step{t}_mult_adds"]["last"] for t in (1, 2, 3)] == costs
        assert len(again.artifacts["budget_curve"]) == 39
        assert all(costs[0] <= point["mult_adds"] <= costs[-1] for point in again.artifacts["budget_curve"])
        where = torch.tensor(again.artifacts["places"])
        assert where.shape == (16, 2, 2)
        assert (where == 0.5).all() == (name == "centre")
    assert again.metrics["spread"]["last"] == 0


def test_only_a_policy_costs_something_beside_the_networks(trained, job, tmp_path):
    found = {
        k: evaluate.run(evaluate.Config(str(trained[1]), k), job(tmp_path)) for k in ("policy", "random", "centre")
    }
    costs = {kind: run.artifacts["step_mult_adds"] for kind, run in found.items()}
    assert costs["random"] == costs["centre"] == [t * costs["random"][0] for t in (1, 2, 3)]
    policy = 64 * 8 + 8 * 32 + 2 * 3 * 32 * 32 + 3 * 32  # 1x1 convolution, linear, GRU, actor and critic, on a 1x1 map
    assert costs["policy"] == [t * costs["random"][0] + (t - 1) * policy for t in (1, 2, 3)]
    assert len({run.metrics["step1_accuracy"]["last"] for run in found.values()}) == 1, "the glance is the same"


def test_mean_reward_is_what_the_label_gains_from_first_to_last_step(trained, job, tmp_path):
    """In evaluate.py, and in Stage II, where a rate of 0 keeps the policy and the batches are the training images."""
    found = evaluate.run(evaluate.Config(str(trained[1])), job(tmp_path / "a")).metrics
    model, policy, settings, _, _ = evaluate.trained_model(str(trained[1]))
    tests = evaluate.part(settings, job(tmp_path), "test").loader
    (x, y), model = next(tests.epoch(0)), model.eval()
    with torch.no_grad():
        steps = model(x, Locator(policy))
    gain = [step.logits.softmax(1).gather(1, y[:, None]).mean().item() for step in (steps[-1], steps[0])]
    assert found["mean_reward"]["last"] == pytest.approx(gain[0] - gain[1], abs=1e-6)


def test_stage_2_moves_the_policy_alone_and_stage_3_the_networks_alone(trained, job, tmp_path):
    before, after = parts(trained[0])["model"], parts(trained[1])["model"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before), "parameters and statistics"
    finetune.run(tiny_3(trained[1]), job(tmp_path))
    policy, tuned = parts(trained[1])["policy"], parts(tmp_path)
    assert all(torch.equal(policy[key], tuned["policy"][key]) for key in policy)
    moved = {key.split(".")[0] for key in after if not torch.equal(after[key], tuned["model"][key])}
    assert moved == {"global_encoder", "local_encoder", "classifier"}


def test_stage_3_draws_around_the_mean_and_its_baselines_see_other_crops(trained, job, tmp_path):
    runs = {k: finetune.run(tiny_3(trained[1], locations=k), job(tmp_path / k)) for k in ("policy", "random", "centre")}
    assert len({run.weights_sha256 for run in runs.values()}) == 3
    _, policy, _, _, _ = evaluate.trained_model(str(trained[1]))
    e = torch.randn(400, 64, 1, 1)
    mean, sampled = (places.places("policy", job(tmp_path), "x", policy, s)(0)(1, e) for s in (False, True))
    assert (sampled - mean).std().item() == pytest.approx(0.1, rel=0.1)


def test_crops_are_a_pure_function_of_seed_use_batch_and_rank(job, tmp_path):
    def draw(job, use="train", number=3):
        return torch.stack([places.places("random", job, use)(number)(t, torch.empty(5, 1, 1, 1)) for t in (1, 1)])

    first = job(tmp_path)
    other = cli.Job(0, runtime.World(1, 2, torch.device("cpu")), tmp_path, tmp_path)
    assert torch.equal(draw(first), draw(first))
    drawn = [draw(first), draw(job(tmp_path, 1)), draw(other), draw(first, "test"), draw(first, number=4)]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    locate = places.places("random", first, "train")(0)
    assert not torch.equal(locate(1, torch.empty(5, 1, 1, 1)), locate(2, torch.empty(5, 1, 1, 1)))


def test_more_updates_a_batch_change_the_policy(trained, job, tmp_path):
    once = train_policy.run(tiny_2(trained[0], epochs=1), job(tmp_path / "1"))
    four = train_policy.run(tiny_2(trained[0], epochs=1, ppo_epochs=4), job(tmp_path / "4"))
    assert four.scale["steps"] == once.scale["steps"] == 6, "batches played"
    assert four.weights_sha256 != once.weights_sha256
    steps = [int(parts(tmp_path / name)["optimiser"]["state"][0]["step"]) for name in "14"]
    assert steps == [6, 24]


def test_the_glance_alone_is_a_network_of_one_step(job, tmp_path):
    found = train.run(tiny(steps=1, patch=16), job(tmp_path / "glance"))
    assert found.metrics["last_step_accuracy"] == found.metrics["step1_accuracy"]
    again = evaluate.run(evaluate.Config(str(tmp_path / "glance")), job(tmp_path / "e"))
    assert again.metrics["step1_accuracy"]["last"] == pytest.approx(found.metrics["step1_accuracy"]["last"], abs=1e-4)
    assert {point["accuracy"] for point in again.artifacts["budget_curve"]} == {again.metrics["step1_accuracy"]["last"]}
    small = evaluate.run(evaluate.Config(str(tmp_path / "glance")), job(tmp_path / "e")).artifacts["step_mult_adds"]
    assert len(small) == 1


def test_type_b_trains_its_glance_alone_and_freezes_it_after(job, tmp_path):
    """As in the paper's code: f_G is fine-tuned on small whole images first, then rests while f_L and f_C are trained."""
    settings = {"encoder": "mobilenet_v3_large", "patch": 32, "image_size": 40, "train_images": 36, "batch_size": 8}
    config = tiny(**settings, epochs=1, steps=1)
    train.run(config, job(tmp_path / "glance"))
    started = parts(tmp_path / "glance")["model"]
    fresh = train.build(config, 10).state_dict()
    assert not torch.equal(started["global_encoder.fc.weight"], fresh["global_encoder.fc.weight"])
    train.run(tiny(**settings, epochs=1, global_weights=str(tmp_path / "glance")), job(tmp_path / "stage_1"))
    after = parts(tmp_path / "stage_1")["model"]
    assert all(torch.equal(value, after[key]) for key, value in started.items() if key.startswith("global_encoder."))


def test_weights_of_torchvision_and_of_a_glance_are_started_from(job, tmp_path):
    from torchvision.models import densenet121

    torch.manual_seed(5)
    net = densenet121(num_classes=10)
    torch.save(net.state_dict(), tmp_path / "densenet.pth")
    settings = {"encoder": "densenet121", "patch": 32, "image_size": 32, "hidden": 8}
    model = train.build(tiny(**settings), 10)
    train.load_encoder(tiny(**settings), 10, model.local_encoder, str(tmp_path / "densenet.pth"))
    x = torch.randn(2, 3, 32, 32)
    encoder = model.local_encoder.eval()
    assert torch.allclose(encoder.fc(encoder(x)[1]), net.eval()(x), atol=1e-5)

    train.run(tiny(steps=1, patch=16), job(tmp_path / "glance"))
    weights = parts(tmp_path / "glance")["model"]
    config = tiny(global_weights=str(tmp_path / "glance"), local_weights=str(tmp_path / "glance"), lr=1e-12)
    train.run(config, job(tmp_path / "stage_1"))
    after = parts(tmp_path / "stage_1")["model"]
    for key in ("trunk.features.0.weight", "fc.weight"):
        for encoder in ("global_encoder", "local_encoder"):
            assert torch.allclose(after[f"{encoder}.{key}"], weights[f"global_encoder.{key}"], atol=1e-6)


def test_loss_is_the_mean_over_steps_of_both_heads():
    labels = torch.tensor([1, 0])
    logits = torch.tensor([[[2.0, -1.0], [0.5, 0.0]], [[0.0, 3.0], [1.0, 1.0]]])
    steps = [Step(logits[t], logits[1 - t], None) for t in (0, 1)]
    minus = -logits.log_softmax(-1)
    each = [(minus[t, 0, 1] + minus[t, 1, 0]) / 2 for t in (0, 1)]
    for own_weight in (0.0, 1.0, 5.0):
        expected = ((each[0] + own_weight * each[1]) + (each[1] + own_weight * each[0])) / 2
        assert sequence_loss(steps, labels, own_weight).item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="no steps"):
        sequence_loss([], labels, 1.0)


def test_learns(job, tmp_path):
    config = tiny(train_images=84, epochs=25, flip=False, hidden=32, lr=0.05, classifier_lr=0.05)
    curve = train.run(config, job(tmp_path)).curve
    assert curve[-1]["train_loss"] < 0.7 * curve[0]["train_loss"]


def test_the_policy_finds_the_place_that_pays(trained, job, tmp_path, monkeypatch):
    """The reward of every crop is made 1 minus its distance to one corner: the greedy places must move there."""
    model = train.build(tiny(), 10)
    played = []
    monkeypatch.setattr(train_policy, "Locator", lambda *a: played.append(Locator(*a)) or played[-1])
    corner = torch.tensor([0.1, 0.9])
    monkeypatch.setattr(
        train_policy, "rewards", lambda label: 1 - (torch.stack(played[-1].locations) - corner).abs().sum(-1)
    )
    monkeypatch.setattr(train_policy, "COLLAPSED", 0.0)
    assert model.steps == 3
    train_policy.run(tiny_2(trained[0], epochs=30, lr=0.01), job(tmp_path / "corner"))
    where = evaluate.run(evaluate.Config(str(tmp_path / "corner")), job(tmp_path / "e")).artifacts["places"]
    assert (torch.tensor(where) - corner).abs().max() < 0.2


def test_budget_thresholds_come_from_the_held_out_images(trained, job, tmp_path):
    """By hand, from the logits of both sets."""
    from common.metrics.early_exit import budgeted, confidence, thresholds_for_budget

    name = str(trained[1])
    costs = evaluate.run(evaluate.Config(name), job(tmp_path / "a")).artifacts["step_mult_adds"]
    middle = (costs[0] + costs[-1]) / 2
    again = evaluate.run(evaluate.Config(name, budget=middle), job(tmp_path / "b"))
    model, policy, settings, _, _ = evaluate.trained_model(name)
    held, test = (
        evaluate.all_logits(
            settings,
            model,
            evaluate.part(settings, job(tmp_path), which).loader,
            places.places("policy", job(tmp_path), which, policy),
        )
        for which in ("held_out", "test")
    )
    assert (len(held[1]), len(test[1])) == (20, 40)
    chosen, _, cost = thresholds_for_budget(confidence(held[0]), costs, middle)
    assert cost <= middle
    expected = budgeted(*test, chosen, costs)
    assert again.metrics["budgeted_accuracy"] == {"last": expected.accuracy, "n": 40}
    assert again.metrics["budgeted_mult_adds"]["last"] == expected.cost
    for budget in (costs[0] - 1, costs[-1] + 1):
        with pytest.raises(UserError, match="budget .* cannot be met: the first exit costs"):
            evaluate.run(evaluate.Config(name, budget=budget), job(tmp_path / "c"))


def test_imagenet_form_on_a_tiny_tree(imagenet_tree, job, tmp_path):
    """All stages; and the last, partial batch counts as many images as it has."""
    settings = {"dataset": "imagenet", "image_size": 24, "workers": 0, "batch_size": 6, "held_out": 6}
    found = train.run(tiny(**settings), job(tmp_path / "1", data=imagenet_tree))
    assert found.scale["steps"] == 10  # 30 of 36 images in sixes, twice
    train_policy.run(tiny_2(tmp_path / "1", epochs=1), job(tmp_path / "2", data=imagenet_tree))
    tuned = finetune.run(tiny_3(tmp_path / "2", epochs=1), job(tmp_path / "3", data=imagenet_tree))
    again = evaluate.run(evaluate.Config(str(tmp_path / "3")), job(tmp_path / "e", data=imagenet_tree)).metrics
    for name in ("step1_accuracy", "step2_accuracy", "step3_accuracy"):
        assert again[name]["last"] == pytest.approx(tuned.metrics[name]["last"], abs=1e-4)
        assert again[name]["last"] * 12 / 100 == pytest.approx(round(again[name]["last"] * 12 / 100), abs=1e-6)


def test_a_partial_batch_counts_as_many_images_as_it_has(trained, job, tmp_path, monkeypatch):
    """40 images in batches of 16: 16, 16, 8."""
    from common.datasets import classification

    whole = evaluate.run(evaluate.Config(str(trained[1])), job(tmp_path / "a")).metrics
    monkeypatch.setattr(classification, "EVALUATION_BATCH", 16)
    model, policy, settings, _, _ = evaluate.trained_model(str(trained[1]))
    here = job(tmp_path)
    tests = classification.part(settings, here, "test")
    assert [len(y) for _, y in tests.loader.epoch(0)] == [16, 16, 8]
    found = train.step_accuracies(
        settings, model, tests.loader, here.world, places.places("policy", here, "test", policy)
    )
    assert found == pytest.approx([whole[f"step{t}_accuracy"]["last"] for t in (1, 2, 3)], abs=1e-4)


# ---------------------------------------------------------------------------------------------- ranks
def test_two_ranks_share_the_batch_and_end_with_the_same_weights(torchrun):
    """Stage I through DDP, Stage II without: the gradient is the mean of the halves'; then all stages whole."""
    out = torchrun(
        f"""
        import torch
        from pathlib import Path
        from common import runtime
        from common.cli import Job
        from papers.gfnet import finetune, train, train_policy
        from papers.gfnet.losses import sequence_loss
        from papers.gfnet.policy import Locator, uniform
        from papers.gfnet.ppo import ppo_loss, replay
        world = runtime.set_up_world("cpu")
        runtime.seed_everything(0)
        config, policy_config = train.Config(**{TINY!r}), train_policy.Config(checkpoint="train", **{TINY_2!r})
        model = train.build(config, 10).double()
        x, y, where = torch.randn(8, 3, 16, 16).double(), torch.arange(8), torch.rand(8, 2)
        def loss(model, r):
            return sequence_loss(model(x[r::2], uniform(lambda B: where[r::2])), y[r::2], 1.0)
        halves = [torch.autograd.grad(loss(model, r), list(model.parameters())) for r in (0, 1)]
        forward = torch.nn.parallel.DistributedDataParallel(model)  # a name, or its hooks die before backward
        loss(forward, world.rank).backward()
        for p, a, b in zip(model.parameters(), *halves, strict=True):
            assert torch.allclose(p.grad, (a + b) / 2, rtol=1e-9, atol=1e-12)

        policy = train_policy.build(policy_config, model).double()
        model.requires_grad_(False).eval()
        runtime.broadcast_from_main(model.buffers())
        noise, target = torch.randn(8, 2).double(), torch.randn(2, 8).double()
        def played(r):
            locator = Locator(policy, lambda B: noise[r::2])
            model(x[r::2], locator)
            return locator
        def policy_loss(r):
            locator = played(r)
            new, values = replay(policy, locator.es, locator.locations)
            return ppo_loss(new, torch.stack(locator.log_probs), values, target[:, r::2])
        halves = [torch.autograd.grad(policy_loss(r), list(policy.parameters())) for r in (0, 1)]
        optimiser = torch.optim.SGD(policy.parameters(), 0.0)
        train_policy.improve(policy_config, policy, optimiser, played(world.rank), target[:, world.rank::2])
        for p, a, b in zip(policy.parameters(), *halves, strict=True):
            assert torch.allclose(p.grad, (a + b) / 2, rtol=1e-9, atol=1e-12)

        stages = (train, config), (train_policy, policy_config), (finetune, finetune.Config("train_policy", **{TINY_3!r}))
        for script, config in stages:
            name = script.__name__.split(".")[-1]
            found = script.run(config, Job(0, world, Path(name), Path("data")))
            print(f"{{name}} rank {{world.rank}}: {{found.weights_sha256}} {{found.scale['steps']}} end", flush=True)
        """
    )
    ends = re.findall(r"(\w+) rank (\d): (\S+) (\d+) end", out)
    assert sorted(e[:2] for e in ends) == [(s, r) for s in ("finetune", "train", "train_policy") for r in "01"]
    for script in ("train", "train_policy", "finetune"):
        assert len({e[2] for e in ends if e[0] == script}) == 1, script
    assert {e[3] for e in ends} == {"12"}, "the global batch is shared, not doubled"


# ---------------------------------------------------------------------------------------------- recipes
RECIPES = {  # card: encoder, P, T, backbone lr, weight decay, epochs of I and III, lambda; policy: conv, hidden
    "full": ("resnet50", 96, 5, 0.01, 1e-4, 60, 1, 0, 1024),
    "full-densenet": ("densenet121", 96, 5, 0.01, 1e-4, 60, 1, 0, 1024),
    "full-regnet": ("regnet_y_800mf", 96, 5, 0.02, 5e-5, 60, 1, 32, 256),
    "full-mobilenet": ("mobilenet_v3_large", 128, 3, 0.005, 1e-4, 90, 5, 32, 256),
    "full-efficientnet": ("efficientnet_b2", 128, 4, 0.005, 1e-4, 30, 5, 32, 256),
}


@pytest.mark.parametrize("name", RECIPES)
def test_full_configs_are_the_papers_recipes(name):
    encoder, patch, steps, lr, decay, epochs, own_weight, conv, hidden = RECIPES[name]
    one = cli.load_config(train.Config, FOLDER, name, "train")
    assert (one.dataset, one.train_images, one.test_images, one.image_size) == ("imagenet", 0, 0, 0)
    assert (one.encoder, one.patch, one.steps) == (encoder, patch, steps)
    assert (one.lr, one.classifier_lr, one.momentum, one.weight_decay) == (lr, 0.1, 0.9, decay)
    assert (one.epochs, one.batch_size, one.own_weight, one.flip, one.hidden) == (epochs, 256, own_weight, True, 1024)
    two = cli.load_config(train_policy.Config, FOLDER, name, "train_policy")
    assert (two.epochs, two.lr, two.discount, two.clip, two.ppo_epochs) == (15, 3e-4, 0.7, 0.2, 1)
    assert (two.value_weight, two.entropy_weight, two.conv, two.hidden, two.wide) == (0.5, 0.01, conv, hidden, 2048)
    three = cli.load_config(finetune.Config, FOLDER, name, "finetune")
    assert (three.epochs, three.lr, three.classifier_lr, three.locations) == (epochs, lr, 0.01, "policy")
    assert cli.load_config(evaluate.Config, FOLDER, name, "evaluate").locations == "auto"
    assert FAMILY[encoder] == ("concat" if own_weight == 5 else "recurrent"), "MobileNetV3 and EfficientNet: f_G rests"


def test_every_claim_on_trained_networks_has_the_metric_its_experiment_returns(job, tmp_path, monkeypatch):
    """Also: the bigger glance costs at least what the sequence costs, and all encoders start from the same one."""
    made = {
        "train": (train.Config, TINY),
        "train_policy": (train_policy.Config, TINY_2),
        "finetune": (finetune.Config, TINY_3),
    }

    def settings(config, folder, name, section, **changed):
        start = {"steps": 1} if name.endswith("-start") else {}
        return made[section][0](**made[section][1] | start | changed)

    for module in (stages, reproduce):
        monkeypatch.setattr(module, "load_config", settings)
    canvas = reproduce.EXPERIMENTS["canvas"].measure("quick", job(tmp_path / "canvas"))
    whole = reproduce.EXPERIMENTS["imagenet-densenet"].measure("full", job(tmp_path / "imagenet"))
    metrics, configs = canvas.metrics, canvas.config
    assert metrics["bigger_step1_mult_adds"]["last"] >= metrics["policy_step3_mult_adds"]["last"]
    assert metrics["bigger_patch"]["last"] == configs["bigger"]["patch"] > 8
    assert {configs[s]["global_weights"] for s in ("stage1", "bigger")} == {str(tmp_path / "canvas" / "start")}
    assert len(canvas.artifacts["policy"]["timed_budgets"]) == 6
    found = {"canvas": set(metrics), "objects": set(metrics), "imagenet-densenet": set(whole.metrics)}
    for claim in load_paper(FOLDER).claims:
        if claim.run and claim.run.experiment in found:
            needed = {claim.metric.name, claim.against} - {None}
            needed -= {f"policy_step{t}_accuracy" for t in (4, 5)}  # of five steps there, three here
            assert needed <= found[claim.run.experiment], claim.id


def test_cheapest_budget_that_is_as_good():
    curve = [{"mult_adds": c, "accuracy": a} for c, a in ((1, 50.0), (2, 61.0), (3, 60.0), (4, 62.0))]
    assert [reproduce.cheapest_as_good(curve, a) for a in (50, 60, 61.5, 63)] == [1, 2, 4, float("inf")]


def test_optimiser_is_nesterovs_and_both_rates_follow_a_cosine(job, tmp_path, monkeypatch):
    made, optimiser = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **k: made.append(optimiser(*a, **k)) or made[-1])
    curve = train.run(tiny(epochs=4, lr=0.02, classifier_lr=0.1), job(tmp_path)).curve
    assert [line["lr"] for line in curve] == pytest.approx([0.02, 0.02 * 0.8535534, 0.01, 0.02 * 0.1464466])
    encoders, classifier = made[0].param_groups
    assert classifier["lr"] == pytest.approx(0.1 * 0.1464466)
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in made[0].param_groups)
    counts = [sum(p.numel() for p in group["params"]) for group in (encoders, classifier)]
    assert counts[1] == 3 * 8 * (64 + 8) + 2 * 3 * 8 + 10 * 8 + 10, "the GRU and its linear layer"
    assert counts[0] == sum(p.numel() for p in train.build(tiny(), 10).parameters()) - counts[1]


# ---------------------------------------------------------------------------------------------- stopping
def test_non_finite_loss_stops_with_the_last_good_checkpoint(job, stops_at_nan):
    stops_at_nan(train, "sequence_loss", lambda folder: train.run(tiny(save_every=2), job(folder)))


def test_non_finite_reward_stops_with_the_last_good_policy(trained, job, tmp_path, stops_at_nan):
    stops_at_nan(
        train_policy, "rewards", lambda folder: train_policy.run(tiny_2(trained[0], save_every=2), job(folder))
    )
    assert all(torch.isfinite(value).all() for value in parts(tmp_path)["policy"].values())


@pytest.mark.parametrize("stage", ["policy", "finetune"])
def test_a_network_that_diverged_is_told_by_the_loop_even_steps_later(stage, trained, job, tmp_path, monkeypatch):
    """NaN reaches the places first; the next look at the loss tells it."""
    if stage == "policy":
        monkeypatch.setattr(train_policy, "ppo_loss", lambda new, *_: new.mean() * float("nan"))
        with pytest.raises(runtime.NotFinite, match="policy loss is nan at step 6, learning rate 0.0003"):
            train_policy.run(tiny_2(trained[0], log_every=20), job(tmp_path))
    else:
        monkeypatch.setattr(train, "sequence_loss", lambda steps, *_: steps[0].logits.mean() * float("nan"))
        with pytest.raises(runtime.NotFinite, match="loss is nan at step 4, learning rate 0.01"):
            finetune.run(tiny_3(trained[1], log_every=4), job(tmp_path))


def test_a_policy_that_sends_all_images_to_one_place_stops(trained, job, tmp_path, monkeypatch):
    build = train_policy.build

    def saturated(*args):
        policy = build(*args)
        torch.nn.init.constant_(policy.actor.bias, 20.0)
        return policy

    monkeypatch.setattr(train_policy, "build", saturated)
    told = "after epoch 1 the policy sends all 40 test images to the same places .* lower lr"
    for _ in range(2):  # and again when started again
        with pytest.raises(runtime.Collapsed, match=told):
            train_policy.run(tiny_2(trained[0]), job(tmp_path))
    assert checkpoints(tmp_path) == []
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["spread"] < 1e-4


# ---------------------------------------------------------------------------------------------- bad input
DIGITS = "dataset=cluttered_digits train_images=128 held_out=20 encoder=tiny patch=8 batch_size=16"


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        (train, f"{DIGITS} encoder=vgg", "unknown encoder 'vgg', expected one of resnet50"),
        (train, f"{DIGITS} steps=0", "steps=0, hidden=1024: expected at least 1 of each"),
        (train, f"{DIGITS} patch=40 local_weights=''", "patch 40 does not fit images of 32 pixels; make it smaller"),
        (train, f"{DIGITS} patch=4", "patch 4: tiny needs at least 8"),
        (train, f"{DIGITS} global_weights=no.pth", r"no.pth does not open as a file of weights"),
        (
            train,
            f"{DIGITS} global_weights=other.pt",
            r"other.pt: weights do not fit this encoder: .* missing",
        ),
        (train, "steps=1 local_weights=a.pth", "the glance has no local encoder"),
        (train, "own_weight=-1", "own_weight is -1.0; expected 0 or more"),
        (train, "epochs=0", "epochs, batch_size, log_every and save_every must be at least 1"),
        (train, "dataset=cifar10", "make data DATASET=cifar10"),
        (train_policy, "epochs=1", r"no checkpoint at '\(empty\)'; give a work dir of papers.gfnet.train"),
        (train_policy, "checkpoint=bad.pt", "bad.pt does not open"),
        (train_policy, "discount=2", "discount is 2.0 and clip 0.2; expected 0..1 and between 0 and 1"),
        (train_policy, "conv=-1", "conv=-1, wide=2048, hidden=1024; expected 0 or more, 1, 1"),
        (train_policy, "ppo_epochs=0", "epochs, ppo_epochs, log_every and save_every must be at least 1"),
        (finetune, "checkpoint=nowhere", "no checkpoint at 'nowhere'; give a work dir of papers.gfnet.train_policy"),
        (finetune, "locations=best", "locations: Input should be 'policy', 'random' or 'centre'"),
        (evaluate, "checkpoint=bad.pt", "bad.pt does not open"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, settings, message, tmp_path, refused):
    (tmp_path / "bad.pt").write_bytes(b"PK not a checkpoint")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    told = refused(script, "--tier", "full", "--set", *settings.split())
    assert re.search(message, told), told


def test_stages_take_the_checkpoint_of_the_stage_before_and_no_other(trained, job, tmp_path):
    stage_1, stage_2 = trained
    with pytest.raises(UserError, match=r"was not written by papers.gfnet.train$"):
        train_policy.run(tiny_2(stage_2), job(tmp_path / "x"))
    with pytest.raises(UserError, match=r"was not written by papers.gfnet.train_policy$"):
        finetune.run(tiny_3(stage_1), job(tmp_path / "x"))
    finetune.run(tiny_3(stage_2, epochs=1), job(tmp_path / "stage_3"))
    for script, config in ((train_policy, tiny_2), (finetune, tiny_3)):
        with pytest.raises(UserError, match="was not written by papers.gfnet.train"):
            script.run(config(tmp_path / "stage_3"), job(tmp_path / "x"))
    train.run(tiny(steps=1, epochs=1), job(tmp_path / "glance"))
    with pytest.raises(UserError, match="was trained with steps=1: there is no crop to place"):
        train_policy.run(tiny_2(tmp_path / "glance"), job(tmp_path / "x"))
    with pytest.raises(UserError, match="has no policy: it is of Stage I"):
        evaluate.run(evaluate.Config(str(stage_1), "policy"), job(tmp_path / "x"))
    with pytest.raises(UserError, match="trained steps=3 of tiny with 10 classes; expected steps=1 of tiny with 10"):
        train.run(tiny(global_weights=str(stage_1)), job(tmp_path / "x"))
    train.run(tiny(held_out=0, epochs=1), job(tmp_path / "all"))
    with pytest.raises(UserError, match="was trained with held_out=0: no image is left to choose thresholds on"):
        evaluate.run(evaluate.Config(str(tmp_path / "all")), job(tmp_path / "x"))


def test_a_resumed_stage_must_have_the_same_start_and_settings(trained, job, tmp_path):
    """By the digest of the weights: the same checkpoint in another place is the same."""
    stage_1, stage_2 = trained
    shutil.copytree(stage_2, tmp_path / "2")
    shutil.copytree(stage_1, tmp_path / "moved")
    train_policy.run(tiny_2(tmp_path / "moved"), job(tmp_path / "2"))
    with pytest.raises(UserError, match="discount: 0.7 there, 0.5 here"):
        train_policy.run(tiny_2(stage_1, discount=0.5), job(tmp_path / "2"))
    train.run(tiny(), job(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="network: "):
        train_policy.run(tiny_2(tmp_path / "other"), job(tmp_path / "2"))
    finetune.run(tiny_3(stage_2, epochs=1), job(tmp_path / "3"))
    with pytest.raises(UserError, match="locations: 'policy' there, 'random' here"):
        finetune.run(tiny_3(stage_2, epochs=1, locations="random"), job(tmp_path / "3"))
