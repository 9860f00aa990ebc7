"""Train the network; ends with the test error of the last epoch.

    python -m papers._template.train --tier quick --seed 0
    torchrun --nproc-per-node 2 -m papers._template.train --tier quick

Name the official file that this follows.
"""

import dataclasses
from dataclasses import dataclass

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

from .model import Network

SCRIPT = "_template.train"


@dataclass
class Config:
    dataset: str = "cluttered_digits"  # any set of common.datasets, or imagenet
    train_images: int = 0  # the first n of the split; 0: all
    test_images: int = 0
    held_out: int = 0  # training images that are not trained on
    image_size: int = 0  # 0: as it is; smaller: averaged down (generated sets: drawn at this size)
    workers: int = 4  # imagenet: loader processes a rank
    crop_pad: int = 4
    flip: bool = True
    width: int = 16
    norm: bool = True
    epochs: int = 30
    batch_size: int = 64  # over all ranks
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = False
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if min(self.epochs, self.batch_size, self.log_every, self.save_every) < 1:
            raise ValueError("epochs, batch_size, log_every and save_every must be at least 1")


def build(config: Config, classes: int) -> Network:
    """The network of a config; UserError where its numbers do not fit each other."""
    try:
        return Network(config.width, classes, config.norm)
    except ValueError as error:
        raise UserError(str(error)) from None


def error_rate(config: Config, model: torch.nn.Module, loader, world: runtime.World) -> float:
    """Top-1 error in percent over all ranks."""
    with evaluating(model, config.amp):
        return 100 - accuracies(((model(x), y) for x, y in loader.epoch(0)), world).item()


def run(config: Config, job: Job) -> Measured:
    """Train; returns the error on the test split after the last epoch, and the curve."""
    runtime.seed_everything(job.seed, job.deterministic)
    train, tests = (part(config, job, which) for which in ("train", "test"))
    model = build(config, train.classes).to(job.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True
    )
    forward = DistributedDataParallel(model) if job.world.size > 1 else model

    identity = {"script": SCRIPT, "seed": job.seed, "classes": train.classes, **dataclasses.asdict(config)}
    progress = Progress(job, identity, model=model, optimiser=optimiser)
    per_epoch = len(train.loader)
    stop = runtime.StopFlag(job.world)

    for epoch in range(progress.step // per_epoch, config.epochs):
        start = progress.step % per_epoch
        batches = train.loader.epoch(epoch, start)
        for x, y in tqdm(batches, f"train {epoch}", per_epoch - start, leave=False, disable=None):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
                loss = F.cross_entropy(forward(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            progress.loss_sum += loss.detach()
            progress.step += 1
            if progress.step % config.log_every == 0:
                runtime.require_finite(loss, progress.step, config.lr)
            if progress.step % per_epoch == 0:
                mean = runtime.require_finite(progress.loss_sum / per_epoch, progress.step, config.lr)
                progress.log(f"train epoch {epoch + 1}/{config.epochs}", epoch=epoch, train_loss=round(mean, 5))
                progress.save(config.lr)
            elif progress.step % config.save_every == 0:
                progress.save(config.lr)
            if stop.at(progress.step):
                progress.save(config.lr)
                raise runtime.Stopped(f"training at step {progress.step} of {per_epoch * config.epochs}")

    runtime.broadcast_from_main(model.buffers())
    return Measured(
        metrics={
            "test_error": metric(error_rate(config, model, tests.loader, job.world), tests.samples),
            "train_seconds": metric(round(progress.seconds, 2)),
        },
        config=dataclasses.asdict(config),
        scale={"epochs": config.epochs, "steps": progress.step, "batch": config.batch_size},
        data=train.digests | tests.digests,
        numerics={"amp": config.amp, "channels_last": config.channels_last},
        curve=progress.curve,
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
