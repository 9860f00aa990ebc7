"""Evaluate a network of train.py or finetune.py: anytime accuracy, and accuracy under a budget of multiply-adds.

    python -m papers.msdnet_training.evaluate --set checkpoint=runs/msdnet_training/finetune-full-s0
    python -m papers.msdnet_training.evaluate --set checkpoint=... budget=40.0e+6

Thresholds come from the held-out training images (without augmentation) and are applied to the test split.
"""

import dataclasses
from dataclasses import dataclass

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

from . import finetune, train
from .collaboration import IMTA
from .cost import exit_costs
from .model import MSDNet


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py or finetune.py, or its work dir (the newest one there)
    budget: float = 0.0  # multiply-adds an image, on average; 0: the curve over all budgets alone
    test_images: int = -1  # -1: as in its own training; 0: all


def trained_model(name: str) -> tuple[MSDNet | IMTA, train.Config, dict]:
    """(the network with its weights, the config of stage 1, payload) of a checkpoint of either stage."""
    payload = read_checkpoint(name, train.SCRIPT, finetune.SCRIPT)
    identity = payload["identity"]
    config = config_of(train.Config, identity.get("trained", identity), name)
    if identity["script"] == train.SCRIPT:
        model = train.build(config, identity["classes"])
    else:
        model = finetune.build(config_of(finetune.Config, identity, name), config, identity["classes"])
    model.load_state_dict(payload["state"]["parts"]["model"])
    return model, config, payload


def all_logits(config: train.Config, model, loader) -> tuple[Tensor, Tensor]:
    """Of every image of a loader and every exit: logits (N, k, classes) and labels (N,), on the CPU."""
    with evaluating(model, config.amp):
        found = [(torch.stack(model(x), 1).float().cpu(), y.cpu()) for x, y in loader.epoch(0)]
    logits, labels = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(labels)


def run(config: Config, job: Job) -> Measured:
    """Accuracy and cumulative cost of every exit; the budget curve; with a budget, its thresholds and what they buy."""
    runtime.require_one_process(job.world, "evaluate.py")
    model, settings, payload = trained_model(config.checkpoint)
    if config.test_images >= 0:
        settings = dataclasses.replace(settings, test_images=config.test_images)
    if not settings.held_out:
        raise UserError(
            f"{config.checkpoint} was trained with held_out=0: no image is left to choose thresholds on; train it with "
            "--set held_out=<images>"
        )
    held, tests = part(settings, job, "held_out"), part(settings, job, "test")
    tests.require_classes(payload["identity"]["classes"])
    costs = exit_costs(model, tests.size)
    model = model.to(job.device)
    held_out = confidence(all_logits(settings, model, held.loader)[0])
    logits, labels = all_logits(settings, model, tests.loader)
    curve = budget_curve(held_out, logits, labels, costs, budget_grid(40))  # up to 40/20, as in the official code
    metrics = train.exit_metrics(train.named(anytime(logits, labels).tolist()), tests.samples)
    metrics |= {f"exit{i}_mult_adds": metric(cost) for i, cost in enumerate(costs, 1)}
    artifacts = {"budget_curve": curve, "exit_mult_adds": costs}
    if config.budget:
        try:
            chosen, p, _ = thresholds_for_budget(held_out, costs, config.budget)
        except ValueError as error:
            raise UserError(str(error)) from None
        found = budgeted(logits, labels, chosen, costs)
        metrics["budgeted_accuracy"] = metric(found.accuracy, tests.samples)
        metrics["budgeted_mult_adds"] = metric(found.cost)
        artifacts |= {"thresholds": chosen.clamp(min=-1).tolist(), "p": p, "exit_fractions": found.fractions.tolist()}
    return Measured(
        metrics=metrics,
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"epochs": settings.epochs, "steps": payload["position"], "of": payload["identity"]["script"]},
        data=held.digests | tests.digests,
        artifacts=artifacts,
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
