"""Stage 1: train an MSDNet, all exits at once, with or without gradient equilibrium.

    python -m papers.msdnet_training.train --tier full
    python -m papers.msdnet_training.train --tier full --set equilibrium=none          (the baseline)
    torchrun --nproc-per-node 4 -m papers.msdnet_training.train --tier full --config full-imagenet

The loss is the sum of the exits' cross-entropies. Ends with the accuracy of every exit. Official file main_GE.py.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress
from common.cli import Job
from common.datasets.classification import part
from common.errors import UserError
from common.metrics.accuracy import accuracies, evaluating
from common.results.records import Measured, metric

from .distillation import sum_of_cross_entropies
from .model import MSDNet

SCRIPT = "msdnet_training.train"


@dataclass
class Config:
    dataset: str = "cifar100"  # any set of common.datasets, or imagenet
    train_images: int = 0  # the first n of the split; 0: all
    test_images: int = 0
    held_out: int = 5000  # training images kept for the thresholds of budgeted evaluation
    image_size: int = 0  # 0: as it is; smaller: averaged down (cluttered_digits: drawn at this size)
    workers: int = 4  # imagenet: loader processes a rank
    crop_pad: int = 4
    flip: bool = True
    stem: Literal["cifar", "imagenet"] = "cifar"
    exits: int = 7
    base: int = 4  # layers before the first exit
    step: int = 2  # layers between exits
    step_mode: Literal["even", "lin_grow"] = "even"
    channels: int = 16  # of the first layer
    growth: int = 6
    growth_factor: tuple[int, ...] = (1, 2, 4)  # one a scale
    bottleneck_factor: tuple[int, ...] = (1, 2, 4)
    equilibrium: Literal["none", "all", "last"] = "all"  # all scales: the paper's formula; last: the official code
    epochs: int = 300
    batch_size: int = 64  # over all ranks
    lr: float = 0.1
    milestones: tuple[int, ...] = (150, 225)  # epochs at whose start the rate falls to a tenth
    momentum: float = 0.9
    weight_decay: float = 1e-4
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = False
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    test_every: int = 0  # epochs between looks at the test set, for the curve; 0: only at the end
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1 or self.log_every < 1 or self.save_every < 1:
            raise ValueError("epochs, batch_size, log_every and save_every must be at least 1")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m >= self.epochs for m in self.milestones):
            raise ValueError(f"milestones are rising epochs below {self.epochs}; they are {list(self.milestones)}")


def build(config: Config, classes: int) -> MSDNet:
    """The network of a config; UserError where its numbers do not fit each other."""
    sizes = ("exits", "base", "step", "step_mode", "channels", "growth", "growth_factor", "bottleneck_factor", "stem")
    equilibrium = None if config.equilibrium == "none" else config.equilibrium
    try:
        return MSDNet(**{key: getattr(config, key) for key in sizes}, classes=classes, equilibrium=equilibrium)
    except ValueError as error:
        raise UserError(str(error)) from None


def learning_rate(config, epoch: int) -> float:
    """A tenth of it after each milestone."""
    return config.lr * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)


def exit_accuracies(config: Config, model, loader, world) -> dict[str, float]:
    """`named` top-1 accuracies of all exits in percent, over all ranks."""
    with evaluating(model, config.amp):
        return named(accuracies(((torch.stack(model(x)), y) for x, y in loader.epoch(0)), world)[:, 0].tolist())


def named(percent: list[float]) -> dict[str, float]:
    """Of exits 1 .. k: {"exit1_accuracy": ..., "last_exit_accuracy": ..., "mean_accuracy": ...}."""
    found = {f"exit{i}_accuracy": value for i, value in enumerate(percent, 1)}
    return found | {"last_exit_accuracy": percent[-1], "mean_accuracy": sum(percent) / len(percent)}


def exit_metrics(line: dict[str, float], samples: int) -> dict[str, dict]:
    """The metrics of the accuracies in a line of the curve."""
    return {name: metric(value, samples) for name, value in line.items() if name.endswith("_accuracy")}


def run(config: Config, job: Job) -> Measured:
    """Train all exits; returns the accuracy of each on the test split after the last epoch, and the curve."""
    runtime.seed_everything(job.seed, job.deterministic)
    train, tests = (part(config, job, which) for which in ("train", "test"))
    model = build(config, train.classes).to(job.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True
    )
    forward = DistributedDataParallel(model) if job.world.size > 1 else model
    forward = forward if config.compile == "off" else torch.compile(forward, mode=config.compile)

    identity = {"script": SCRIPT, "seed": job.seed, "classes": train.classes}
    progress = Progress(job, identity | dataclasses.asdict(config), model=model, optimiser=optimiser)
    per_epoch = len(train.loader)
    stop = runtime.StopFlag(job.world)

    for epoch in range(progress.step // per_epoch, config.epochs):
        lr = learning_rate(config, epoch)
        for group in optimiser.param_groups:
            group["lr"] = lr
        start = progress.step % per_epoch
        batches = train.loader.epoch(epoch, start)
        for x, y in tqdm(batches, f"train {epoch}", per_epoch - start, leave=False, disable=None):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
                loss = sum_of_cross_entropies(forward(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            progress.loss_sum += loss.detach()
            progress.step += 1
            if progress.step % config.log_every == 0:
                runtime.require_finite(loss, progress.step, lr)
            if progress.step % per_epoch == 0:
                line = {"epoch": epoch, "lr": lr}
                line["train_loss"] = round(runtime.require_finite(progress.loss_sum / per_epoch, progress.step, lr), 5)
                if epoch + 1 == config.epochs or (config.test_every and (epoch + 1) % config.test_every == 0):
                    runtime.broadcast_from_main(model.buffers())
                    line |= exit_accuracies(config, model, tests.loader, job.world)
                progress.log(f"train epoch {epoch + 1}/{config.epochs}", **line)
                progress.save(lr)
            elif progress.step % config.save_every == 0:
                progress.save(lr)
            if stop.at(progress.step):
                progress.save(lr)
                raise runtime.Stopped(f"training at step {progress.step} of {per_epoch * config.epochs}")

    metrics = exit_metrics(progress.curve[-1], tests.samples)
    return Measured(
        metrics=metrics | {"train_seconds": metric(round(progress.seconds, 2))},
        config=dataclasses.asdict(config),
        scale={"epochs": config.epochs, "steps": progress.step, "batch": config.batch_size},
        data=train.digests | tests.digests,
        numerics={"amp": config.amp, "compile": config.compile, "channels_last": config.channels_last},
        curve=progress.curve,
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
