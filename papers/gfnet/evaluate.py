"""Evaluate a network of any stage: accuracy after every step, and accuracy under a budget of multiply-adds.

    python -m papers.gfnet.evaluate --set checkpoint=runs/gfnet/finetune-full-s0
    python -m papers.gfnet.evaluate --set checkpoint=... budget=1.5e+9

Thresholds come from the held-out training images (without augmentation) and are applied to the test split. Costs are those of
the encoders, the classifier and the policy together.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common import cli, runtime
from common.checkpoints import read_checkpoint
from common.cli import Job, config_of
from common.datasets.classification import part
from common.errors import UserError
from common.metrics.accuracy import evaluating
from common.metrics.early_exit import anytime, budget_curve, budget_grid, budgeted, confidence, thresholds_for_budget
from common.results.records import Measured, metric

from . import finetune, train, train_policy
from .cost import step_costs
from .places import Places, by_image, noted, places

EXAMPLES = 16  # test images whose places are kept, for figures


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, train_policy.py or finetune.py, or its work dir
    locations: Literal["auto", "policy", "random", "centre"] = "auto"  # auto: as trained; random for Stage I
    budget: float = 0.0  # multiply-adds an image, on average; 0: the curve over all budgets alone
    test_images: int = -1  # -1: as in its own training; 0: all


def trained_model(name: str):
    """(GFNet, Policy or None, config of Stage I, identity, steps trained) of a checkpoint; networks in eval mode."""
    payload = read_checkpoint(name, train.SCRIPT, train_policy.SCRIPT, finetune.SCRIPT)
    identity, weights = payload["identity"], payload["state"]["parts"]
    config = config_of(train.Config, identity.get("trained", identity), name)
    model = train.build(config, identity["classes"])
    model.load_state_dict(weights["model"])
    model.eval()
    policy = None
    if "policy" in weights:
        chosen = config_of(train_policy.Config, identity.get("policy", identity), name)
        policy = train_policy.build(chosen, model)
        policy.load_state_dict(weights["policy"])
        policy.eval()
    return model, policy, config, identity, payload["position"]


def all_logits(config: train.Config, model, loader, crops: Places) -> tuple[Tensor, Tensor]:
    """Of every image of a loader and every step: logits (N, T, classes) and labels (N,), on the CPU."""
    logits, labels = [], []
    with evaluating(model, config.amp):
        for number, (x, y) in enumerate(loader.epoch(0)):
            logits.append(torch.stack([step.logits.float() for step in model(x, crops(number))], 1).cpu())
            labels.append(y.cpu())
    return torch.cat(logits), torch.cat(labels)


def run(config: Config, job: Job) -> Measured:
    """Accuracy and cumulative cost of every step; the budget curve; with a budget, its thresholds and what they buy."""
    runtime.require_one_process(job.world, "evaluate.py")
    model, policy, settings, identity, position = trained_model(config.checkpoint)
    kind = config.locations
    if kind == "auto":
        kind = identity.get("locations", "policy" if policy else "random")
    if kind == "policy" and not policy:
        raise UserError(
            f"{config.checkpoint} has no policy: it is of Stage I; train one with papers.{train_policy.SCRIPT}"
        )
    if config.test_images >= 0:
        settings = dataclasses.replace(settings, test_images=config.test_images)
    if not settings.held_out:
        raise UserError(
            f"{config.checkpoint} was trained with held_out=0: no image is left to choose thresholds on; train it with "
            "--set held_out=<images>"
        )
    held, tests = part(settings, job, "held_out"), part(settings, job, "test")
    tests.require_classes(identity["classes"])
    costs = step_costs(model, policy if kind == "policy" else None)
    model, found = model.to(job.device), []
    policy = policy and policy.to(job.device)
    crops = {use: places(kind, job, use, policy) for use in ("held_out", "test")}
    held_out = confidence(all_logits(settings, model, held.loader, crops["held_out"])[0])
    logits, labels = all_logits(settings, model, tests.loader, noted(crops["test"], found))

    accuracies = anytime(logits, labels).tolist()
    label = logits.softmax(-1).gather(2, labels[:, None, None].expand(-1, len(costs), 1))[..., 0]  # p_t[y], (N, T)
    metrics = train.step_metrics(train.by_step(accuracies), tests.samples)
    metrics |= {f"step{t}_mult_adds": metric(cost) for t, cost in enumerate(costs, 1)}
    metrics |= {"mean_reward": metric((label[:, -1] - label[:, 0]).double().mean(), tests.samples)}
    artifacts = {"budget_curve": budget_curve(held_out, logits, labels, costs, budget_grid()), "step_mult_adds": costs}
    if settings.steps > 1:
        where = by_image(found, settings.steps).float().cpu()
        metrics |= {"spread": metric(where.std(0).mean(), tests.samples)}
        artifacts |= {"places": where[:EXAMPLES].tolist()}
    if config.budget:
        try:
            chosen, p, _ = thresholds_for_budget(held_out, costs, config.budget)
        except ValueError as error:
            raise UserError(str(error)) from None
        bought = budgeted(logits, labels, chosen, costs)
        metrics |= {"budgeted_accuracy": metric(bought.accuracy, tests.samples)}
        metrics |= {"budgeted_mult_adds": metric(bought.cost)}
        artifacts |= {
            "thresholds": chosen.clamp(-1, 2).tolist(),
            "p": p,  # 2: nobody stops there
            "exit_fractions": bought.fractions.tolist(),
        }
    return Measured(
        metrics=metrics,
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"epochs": settings.epochs, "steps": position, "of": identity["script"]},
        data=held.digests | tests.digests,
        artifacts=artifacts,
        weights_sha256=runtime.weights_sha256(model, policy) if policy else runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
