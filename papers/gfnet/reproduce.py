"""Which experiment measures which claim of paper.yaml.

python -m papers.gfnet.reproduce --tier quick
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.cli import Job, load_config
from common.datasets.classification import part
from common.metrics.compute import latency, parameters
from common.metrics.early_exit import (
    accuracy_at,
    budgeted,
    confidence,
    exit_fractions,
    thresholds,
    thresholds_for_budget,
)
from common.results.records import Measured, metric
from common.results.reproduce import Experiment, main
from common.results.stages import by_stage, one_record, run_stage, share_of, tier_config

from . import evaluate, finetune, train, train_policy
from .bench import BUDGETS, crop_bench, early_exit_bench
from .classifiers import ConcatClassifier, RecurrentClassifier
from .cost import step_costs
from .crop import crop
from .encoders import FAMILY, encoder
from .engine import GlanceFocusEngine
from .model import GFNet
from .places import places
from .policy import Locator, Policy
from .ppo import ENTROPY, log_prob, ppo_loss, replay, returns, rewards, standardised

IMAGES_SEEN = 135 * 1_231_167  # 60 + 15 + 60 epochs of ImageNet, less the held-out images


# ------------------------------------------------------------------------------------------------ costs and properties
NETWORKS = {  # encoder, P, T of the rows that paper.yaml has
    "resnet50_96": ("resnet50", 96, 5),
    "resnet50_128": ("resnet50", 128, 5),
    "densenet121_96": ("densenet121", 96, 5),
    "mobilenet_96": ("mobilenet_v3_large", 96, 3),
    "mobilenet_128": ("mobilenet_v3_large", 128, 3),
    "mobilenet125_128": ("mobilenet_v3_large_1.25", 128, 3),
    "efficientnet_b2_128": ("efficientnet_b2", 128, 4),
}


def costs(tier: str, job: Job) -> Measured:
    """All claims that need no training: sizes, cumulative costs, crops, identities of PPO."""
    found = {}
    for name, (kind, patch, steps) in NETWORKS.items():
        with torch.device("meta"):
            model = GFNet(kind, patch=patch, steps=steps)
            map_size = model.global_encoder.map_size(patch)
            recurrent = FAMILY[kind] == "recurrent"
            policy = (Policy.linear if recurrent else Policy.conv)(model.global_encoder.channels, map_size)
            # The official classifier of type B has heads for five steps, whatever T.
            feature_dim = model.global_encoder.feature_dim
            full = RecurrentClassifier(feature_dim, 1000) if recurrent else ConcatClassifier(feature_dim, 1000, 5)
            found[f"{name}_params"] = parameters(encoder(kind)) / 1e6
        found[f"{name}_policy_params"] = parameters(policy) / 1e6
        found[f"{name}_classifier_params"] = parameters(full) / 1e6
        for t, cost in enumerate(step_costs(model, policy), 1):
            found[f"{name}_step{t}"] = cost / 1e6
    return Measured.of(found | crops() | ppo_identities())


def crops() -> dict[str, float]:
    """Crops against slices over a grid of places, and where those of the claims start."""
    rows = torch.arange(224.0)[:, None].expand(224, 224)
    images = torch.stack([rows, rows.T, torch.randn(224, 224)])[None]
    found, wrong = {}, 0
    for name, place in {"mid": (0.5, 0.25), "edge": (0.999, 0.0), "end": (1.0, 1.0)}.items():
        patch = crop(images, torch.tensor([place]), 96)[0]
        found |= {f"crop_{name}_top": patch[0, 0, 0].item(), f"crop_{name}_left": patch[1, 0, 0].item()}
    grid = torch.cartesian_prod(torch.linspace(0, 1, 33), torch.linspace(0, 1, 33))
    for place, patch in zip(grid, crop(images.expand(len(grid), -1, -1, -1), grid, 96), strict=True):
        top, left = (place * 128).floor().long().tolist()
        wrong += not torch.equal(patch, images[0, :, top : top + 96, left : left + 96])
    return found | {"crops_unequal": wrong}


def ppo_identities() -> dict[str, float]:
    """On a small untrained network: ratio, gradient, rewards and the sequence evaluated again, float64."""
    torch.manual_seed(0)
    model = GFNet("tiny", 10, patch=24, steps=4, hidden=32).eval().double()
    policy = Policy.conv(64, 3, conv=8, hidden=16).double()
    locator, images, y = Locator(policy, lambda B: torch.randn(B, 2).double()), torch.randn(32, 3, 72, 72).double(), 3
    with torch.no_grad():
        steps = model(images, locator)
    label = torch.stack([s.logits.softmax(1)[:, y] for s in steps])
    played, target = torch.stack(locator.log_probs), standardised(returns(rewards(label)))
    again, values = replay(policy, locator.es, locator.locations)
    weights = list(policy.parameters())
    ppo = torch.autograd.grad(ppo_loss(again, played, values, target), weights, retain_graph=True)
    plain = -((target - values.detach()) * again).mean() + 0.5 * (values - target).square().mean()
    plain = torch.autograd.grad(plain, weights)
    mean = torch.tensor([[0.3, 0.6]])
    return {
        "ratio_error": ((again - played).exp() - 1).abs().max().item(),
        "replay_error": (again - played).abs().max().item(),
        "gradient_error": max(((a - b).norm() / b.norm()).item() for a, b in zip(ppo, plain, strict=True)),
        "telescoping_error": (rewards(label).sum(0) - (label[-1] - label[0])).abs().max().item(),
        "log_prob_at_mean": log_prob(mean, mean).item(),
        "entropy": ENTROPY,
    }


def exits(tier: str, job: Job) -> Measured:
    """Shares of time and multiply-adds that stopping early saves; crops at once against one slice an image."""
    found, rows = {}, []
    for batch in (256, 32, 1):
        figures = early_exit_bench(batch, rounds=3, min_run_time=0.5, device=job.device)
        found[f"b{batch}_images_per_second"] = figures["full_images_per_second"]
        for p in BUDGETS:
            row = {"batch": batch, "p": p, "mult_adds": figures[f"mult_adds_{p:g}"], "time": figures[f"time_{p:g}"]}
            found |= {f"b{batch}_p{p:g}_{name}_saved": 1 - row[name] for name in ("mult_adds", "time")}
            found[f"b{batch}_p{p:g}_images_per_second"] = figures[f"images_per_second_{p:g}"]
            rows.append(row)
    found |= {f"crop_{name}": value for name, value in crop_bench(rounds=3, device=job.device).items()}
    settings = {"encoder": "tiny", "size": 72, "patch": 24, "steps": 3, "threads": torch.get_num_threads()}
    return Measured.of(found, config=settings, artifacts={"rows": rows})


# ------------------------------------------------------------------------------------------------ trainings
LOCATIONS = ("policy", "random", "centre")


def cheapest_as_good(curve: list[dict], accuracy: float) -> float:
    """Least mean multiply-adds of a budget curve with at least this accuracy; infinite where it has none."""
    return min((point["mult_adds"] for point in curve if point["accuracy"] >= accuracy), default=float("inf"))


def early_exits(checkpoint: str, job: Job) -> tuple[list[dict], list[dict]]:
    """What stopping early costs and gives, on the test images, by thresholds from the held-out ones.

    First: {mult_adds, accuracy} at 40 budgets, up to all steps; second: {p, images_s, accuracy} of the engine, measured in
    batches of 256, in turns.
    """
    model, policy, settings, *_ = evaluate.trained_model(checkpoint)
    model, policy = model.to(job.device), policy.to(job.device)
    held, tests = (part(dataclasses.replace(settings, batch_size=256), job, which) for which in ("held_out", "test"))
    crops_of = places("policy", job, "test", policy)
    held_out = confidence(evaluate.all_logits(settings, model, held.loader, crops_of)[0])
    logits, labels = evaluate.all_logits(settings, model, tests.loader, crops_of)
    costs, curve = step_costs(model, policy), []
    for budget in np.linspace(costs[0], costs[-1], 40):
        chosen, _, _ = thresholds_for_budget(held_out, costs, float(budget))
        found = budgeted(logits, labels, chosen, costs)
        curve.append({"mult_adds": round(found.cost), "accuracy": found.accuracy})

    engines = {"all steps": GlanceFocusEngine(model, policy)}
    for p in (0.5, 1, 2, 4, 8):
        engines[p] = GlanceFocusEngine(model, policy, thresholds(held_out, exit_fractions(p, model.steps)))
    batches, timed = list(tests.loader.epoch(0)), []
    times = latency({str(p): lambda e=e: [e(x) for x, _ in batches] for p, e in engines.items()}, 0.1, 3)
    for p, engine in engines.items():
        right = sum((engine(x)[0].argmax(1) == y).sum().item() for x, y in batches)
        speed = tests.samples / times[str(p)].median
        timed.append({"p": p, "images_s": speed, "accuracy": 100 * right / tests.samples})
    return curve, timed


def bigger_patch(settings: train.Config, budget: float, classes: int) -> int:
    """Side of the single glance that costs at least `budget` multiply-adds: the first multiple of 2."""
    patch = settings.patch
    while True:
        patch += 2
        with torch.device("meta"):
            model = GFNet(settings.encoder, classes, patch, steps=1, hidden=settings.hidden)
        if step_costs(model)[0] >= budget:
            return patch


def at(job: Job, stage: str) -> str:
    """Where a stage of the job leaves its checkpoint."""
    return str(job.work_dir / stage)


def evaluated(job: Job, stage: str) -> Measured:
    return evaluate.run(evaluate.Config(at(job, stage)), job.sub(f"{stage}-evaluated"))


def canvas(tier: str, job: Job) -> Measured:
    """Stages I to III; stage III also on random and on centre crops; a bigger single glance of the same multiply-adds.

    All encoders start from one that was trained on images which the object fills.
    """
    name, start = tier_config(tier, job), at(job, "start")
    done = {"start": run_stage(train, f"{name}-start", job, "start")}
    done["stage1"] = run_stage(train, name, job, "stage1", global_weights=start, local_weights=start)
    done["stage2"] = run_stage(train_policy, name, job, "stage2", checkpoint=at(job, "stage1"))
    done["ppo4"] = run_stage(train_policy, name, job, "ppo4", checkpoint=at(job, "stage1"), ppo_epochs=4)
    for locations in LOCATIONS:
        done[locations] = run_stage(finetune, name, job, locations, checkpoint=at(job, "stage2"), locations=locations)
    found = {stage: evaluated(job, stage) for stage in ("stage1", "stage2", *LOCATIONS)}
    artifacts = {stage: measured.artifacts for stage, measured in found.items()}

    _, _, settings, identity, _ = evaluate.trained_model(at(job, "policy"))
    patch = bigger_patch(settings, artifacts["policy"]["step_mult_adds"][-1], identity["classes"])
    changed = {"steps": 1, "patch": patch, "epochs": settings.epochs + done["policy"].scale["epochs"]}
    done["bigger"] = run_stage(train, name, job, "bigger", global_weights=start, **changed)
    found |= {"ppo4": done["ppo4"], "bigger": evaluated(job, "bigger")}
    metrics = by_stage(found) | {"bigger_patch": metric(patch)}

    curve, timed = early_exits(at(job, "policy"), job)
    for slack in (0, 1):  # points that stopping early may cost
        metrics[f"early_exit_mult_adds_{slack}"] = metric(cheapest_as_good(curve, curve[-1]["accuracy"] - slack))
    artifacts["policy"] |= {"by_budget": curve, "timed_budgets": timed}
    share = share_of(IMAGES_SEEN, *(done[stage] for stage in ("stage1", "stage2", "policy")))
    return one_record(metrics, done, "policy", share, artifacts)


def imagenet(config: str, budgets: tuple[str, ...], unit: float) -> Callable[[str, Job], Measured]:
    """The glance network, then stages I to III of one backbone; in one process also the anytime and the budgeted curve.

    budgets: mean multiply-adds an image, in `unit`s, at which the budgeted curve is read off, "budgeted_<budget>".
    """

    def measure(tier: str, job: Job) -> Measured:
        # f_G starts from the weights that f_L starts from, fine-tuned
        start = load_config(train.Config, Path(__file__).parent, config, "train").local_weights
        done = {"glance": run_stage(train, config, job, "glance", steps=1, global_weights=start, local_weights="")}
        done["stage1"] = run_stage(train, config, job, "stage1", global_weights=at(job, "glance"))
        done["stage2"] = run_stage(train_policy, config, job, "stage2", checkpoint=at(job, "stage1"))
        done["policy"] = run_stage(finetune, config, job, "policy", checkpoint=at(job, "stage2"))
        metrics, artifacts = by_stage(done), {}
        if job.world.size == 1:
            found = evaluated(job, "policy")
            metrics |= by_stage({"policy": found})
            artifacts = {"policy": found.artifacts}
            for budget in budgets:
                accuracy = accuracy_at(found.artifacts["budget_curve"], float(budget) * unit)
                metrics[f"budgeted_{budget}"] = metric(accuracy, found.metrics["last_step_accuracy"]["n"])
        return one_record(metrics, done, "policy", 1.0, artifacts)

    return measure


IMAGENET = {"full": ("imagenet",)}
EXPERIMENTS = {
    "costs": Experiment(costs, ("quick",)),
    "exits": Experiment(exits, ("quick",)),
    "canvas": Experiment(canvas, ("quick",)),
    "objects": Experiment(canvas, ("short",), {"short": ("cifar10",)}),
    "imagenet-resnet": Experiment(imagenet("full", ("1.0", "2.0", "3.0"), 1e9), ("full",), IMAGENET),
    "imagenet-densenet": Experiment(imagenet("full-densenet", ("1.0", "2.4"), 1e9), ("full",), IMAGENET),
    "imagenet-regnet": Experiment(imagenet("full-regnet", ("300", "745"), 1e6), ("full",), IMAGENET),
    "imagenet-mobilenet": Experiment(imagenet("full-mobilenet", ("80", "130", "188"), 1e6), ("full",), IMAGENET),
    "imagenet-efficientnet": Experiment(
        imagenet("full-efficientnet", ("0.36", "0.52", "0.75"), 1e9), ("full",), IMAGENET
    ),
}

if __name__ == "__main__":
    main(EXPERIMENTS, __file__)
