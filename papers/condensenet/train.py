"""Train a CondenseNet: the first half condenses in stages, the second half trains what is left.

    python -m papers.condensenet.train --tier full
    python -m papers.condensenet.train --tier full --set conv=static        (a baseline: plain grouped convolutions)
    torchrun --nproc-per-node 8 -m papers.condensenet.train --tier full --config full-imagenet

Ends with the test error of the last epoch, before and after conversion. Official file main.py.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress
from common.cli import Job
from common.datasets.classification import part
from common.errors import UserError
from common.metrics.accuracy import accuracies, evaluating
from common.results.records import Measured, metric

from .conversion import condense
from .layers import stage_of
from .model import CondenseNet

SCRIPT = "condensenet.train"


@dataclass
class Config:
    dataset: str = "cifar10"  # any set of common.datasets, or imagenet
    train_images: int = 0  # the first n of the split; 0: all
    test_images: int = 0
    held_out: int = 0  # training images that are not trained on
    image_size: int = 0  # 0: as it is; smaller: averaged down (cluttered_digits: drawn at this size)
    workers: int = 4  # imagenet: loader processes a rank
    crop_pad: int = 4
    flip: bool = True
    blocks: tuple[int, ...] = (14, 14, 14)  # layers of each
    growth: tuple[int, ...] = (8, 16, 32)  # of each block
    reduction: float = 0.0  # light variant: 0.5, a transition convolution as in DenseNet-BC; 0: pools alone
    conv: Literal["learned", "static", "random", "dense"] = "learned"  # what the 1x1 convolutions are; three baselines
    groups: int = 4  # G
    condense_factor: int = 4  # C
    groups_3x3: int = 4
    stem_stride: int = 1  # imagenet: 2
    dropout: float = 0.0  # before each 1x1 convolution
    group_lasso: float = 0.0  # lambda, until the last pruning
    epochs: int = 300
    batch_size: int = 64  # over all ranks
    lr: float = 0.1  # cosine to 0, a step at a time
    momentum: float = 0.9  # Nesterov
    weight_decay: float = 1e-4
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = True
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    test_every: int = 0  # epochs between looks at the test set, for the curve; 0: only at the end
    curve_every: int = 0  # steps between points of the loss curve; 0: one an epoch
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1 or self.log_every < 1 or self.save_every < 1:
            raise ValueError("epochs, batch_size, log_every and save_every must be at least 1")
        if self.curve_every < 0 or self.test_every < 0 or self.group_lasso < 0:
            raise ValueError("curve_every, test_every and group_lasso must not be negative")
        if not 0 <= self.dropout < 1 or not 0 <= self.reduction <= 1:
            raise ValueError(f"dropout is {self.dropout}, reduction {self.reduction}; expected 0..1, dropout below 1")


def arguments(config: Config, classes: int) -> dict:
    """What CondenseNet is called with."""
    names = ("blocks", "growth", "groups", "condense_factor", "groups_3x3", "conv", "dropout", "stem_stride")
    chosen = {name: getattr(config, name) for name in names}
    return {**chosen, "classes": classes, "reduction": config.reduction or None}


def build(config: Config, classes: int) -> CondenseNet:
    """The network of a config; UserError where its numbers do not fit each other (G that does not divide, ...)."""
    try:
        return CondenseNet(**arguments(config, classes))
    except ValueError as error:
        raise UserError(str(error)) from None


@torch.no_grad()
def batch_loss(model, x, y) -> float:
    """Cross-entropy of one batch, normalised by its own statistics as in training; the model's are left alone."""
    return F.cross_entropy(copy.deepcopy(model)(x), y).item()


def error_rates(config, model, loader, world) -> list[float]:
    """Top-1 and top-5 error in percent over all ranks."""
    with evaluating(model, config.amp):
        return (100 - accuracies(((model(x), y) for x, y in loader.epoch(0)), world, (1, 5))).tolist()


def point(progress: Progress, epoch: int, lr: float) -> dict:
    """A point of the loss curve: where, and the mean training loss since the point before (if a step lies between)."""
    line = {"epoch": epoch, "step": progress.step, "lr": lr}
    since = progress.step - (progress.curve[-1]["step"] if progress.curve else 0)
    if since:
        line["train_loss"] = round(runtime.require_finite(progress.loss_sum / since, progress.step, lr), 5)
    return line


def run(config: Config, job: Job) -> Measured:
    """Train; returns test errors before and after conversion, densities, and the curve with its pruning stages."""
    runtime.seed_everything(job.seed, job.deterministic)
    train, tests = (part(config, job, which) for which in ("train", "test"))
    model = build(config, train.classes).to(job.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=True, fused=True
    )
    forward = DistributedDataParallel(model) if job.world.size > 1 else model
    forward = forward if config.compile == "off" else torch.compile(forward, mode=config.compile)

    per_epoch, steps = len(train.loader), len(train.loader) * config.epochs
    prunes = config.conv in ("learned", "random") and config.condense_factor > 1
    if prunes and steps < 2 * (config.condense_factor - 1):
        raise UserError(
            f"{config.condense_factor - 1} condensing stages do not fit the first half of {steps} steps; "
            "train for more epochs, on more images, or with a smaller condense_factor"
        )
    identity = {"script": SCRIPT, "seed": job.seed, "classes": train.classes, **dataclasses.asdict(config)}
    progress = Progress(job, identity, model=model, optimiser=optimiser)
    stop = runtime.StopFlag(job.world)

    for epoch in range(progress.step // per_epoch, config.epochs):
        start = progress.step % per_epoch
        batches = train.loader.epoch(epoch, start)
        for x, y in tqdm(batches, f"train {epoch}", per_epoch - start, leave=False, disable=None):
            t = progress.step / steps
            lr = 0.5 * config.lr * (1 + math.cos(math.pi * t))
            for group in optimiser.param_groups:
                group["lr"] = lr
            if prunes and stage_of(t, config.condense_factor) > model.learned()[0].stage:
                line = point(progress, epoch, lr) | {"loss_before": batch_loss(model, x, y)}
                model.prune(t)
                runtime.broadcast_from_main(model.buffers())  # random masks: those of rank 0
                line |= {"loss_after": batch_loss(model, x, y), "density": model.densities()[0]}
                progress.log("condensed", **line)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
                loss = F.cross_entropy(forward(x), y)
            objective = loss
            if config.group_lasso and t < 0.5:
                objective = loss + config.group_lasso * model.group_lasso()
            optimiser.zero_grad()
            objective.backward()
            optimiser.step()
            progress.loss_sum += loss.detach()
            progress.step += 1
            if progress.step % config.log_every == 0:
                runtime.require_finite(loss, progress.step, lr)
            ends = progress.step % per_epoch == 0
            if ends or (config.curve_every and progress.step % config.curve_every == 0):
                line = point(progress, epoch, lr)
                if ends and (
                    epoch + 1 == config.epochs or (config.test_every and (epoch + 1) % config.test_every == 0)
                ):
                    runtime.broadcast_from_main(model.buffers())
                    line["test_error"], line["test_error_top5"] = error_rates(config, model, tests.loader, job.world)
                progress.log(f"train epoch {epoch + 1}/{config.epochs}", **line)
            if ends or progress.step % config.save_every == 0:
                progress.save(lr)
            if stop.at(progress.step):
                progress.save(lr)
                raise runtime.Stopped(f"training at step {progress.step} of {steps}")

    looked = [line for line in progress.curve if "test_error" in line]
    metrics = {
        name: {"last": looked[-1][name], "best_test": min(line[name] for line in looked), "n": tests.samples}
        for name in ("test_error", "test_error_top5")
    }
    return Measured(
        metrics=metrics | converted_errors(config, model, tests, job) | {"train_seconds": metric(progress.seconds)},
        config=dataclasses.asdict(config),
        scale={"epochs": config.epochs, "steps": steps, "batch": config.batch_size},
        data=train.digests | tests.digests,
        numerics={"amp": config.amp, "compile": config.compile, "channels_last": config.channels_last},
        curve=progress.curve,
        artifacts={"densities": sorted({round(d, 6) for d in model.densities()})},
        weights_sha256=runtime.weights_sha256(model),
    )


def error_metrics(top1: float, top5: float, samples: int, prefix: str = "") -> dict[str, dict]:
    return {f"{prefix}test_error": metric(top1, samples), f"{prefix}test_error_top5": metric(top5, samples)}


def converted_errors(config: Config, model, tests, job: Job) -> dict[str, dict]:
    """Test errors as grouped convolutions: with the classifier whole (nothing may change), and condensed (lossy)."""
    if config.conv == "static":
        return {}
    found = {}
    for name, classifier in (("converted", False), ("condensed", True)):
        converted = condense(model, classifier).to(job.device)
        top1, top5 = error_rates(config, converted, tests.loader, job.world)
        found |= error_metrics(top1, top5, tests.samples, f"{name}_")
    return found


if __name__ == "__main__":
    cli.main(run, Config, __file__)
