"""Train Horizontal Pyramid Matching: the sum of the cross entropies of all bins, SGD, the new layers at ten times the rate.

    python -m papers.hpm.train --tier full --set weights=resnet50-19c8e357.pth
    torchrun --nproc-per-node 2 -m papers.hpm.train --tier full --config full-duke

Ends with mAP (both conventions) and CMC of queries against the gallery, with and without flip test and L2 norm.
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
from common.datasets import person_reid
from common.datasets.person_reid import OFFICIAL, SYNTHETIC, People
from common.errors import UserError
from common.results.records import Measured, metric

from . import descriptors
from .backbones import resnet50, small
from .model import HPM, pyramid_loss

SCRIPT = "hpm.train"


@dataclass
class Config:
    dataset: str = "market1501"  # a name of common.datasets.person_reid
    partial: bool = False  # accept other numbers of images than the official ones
    height: int = 384  # of the images
    width: int = 128  # of files; generated people are 3/8 of their height wide
    identities: int = 0  # generated people to train on; 0: the set's own number
    test_identities: int = 0
    workers: int = 8  # loader processes a rank (files)
    backbone: Literal["resnet50", "small"] = "resnet50"
    weights: str = ""  # torchvision's file of ImageNet weights for the ResNet-50; empty: from scratch
    scales: tuple[int, ...] = (1, 2, 4, 8)
    dim: int = 256  # of each bin
    pool: Literal["avg+max", "avg", "max"] = "avg+max"
    erasing: float = 0.0  # probability of horizontal random erasing; HPM+HRE: 0.5
    smoothing: float = 0.0  # of the labels
    epochs: int = 60
    batch_size: int = 64  # over all ranks
    lr: float = 0.1  # of the head
    backbone_lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = (40,)  # epochs after which both rates fall to a tenth
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = False
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if min(self.epochs, self.batch_size, self.log_every, self.save_every) < 1:
            raise ValueError("epochs, batch_size, log_every and save_every must be at least 1")
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 2: batch norm needs two images")
        if self.dim < 1 or not 0 <= self.smoothing < 1:
            raise ValueError(
                f"dim is {self.dim} and smoothing {self.smoothing}; expected dim >= 1 and 0 <= smoothing < 1"
            )
        if self.weights and self.backbone != "resnet50":
            raise ValueError(
                f"weights are for the ResNet-50, not for backbone={self.backbone}; leave one of the two out"
            )


def open_split(config: Config, job: Job, split: str, **options) -> People:
    """A split of the config's data set; options go to the generated one."""
    if config.dataset == SYNTHETIC:
        count = config.identities if split == "train" else config.test_identities
        return person_reid.load(SYNTHETIC, split, identities=count or None, size=config.height, **options)
    return person_reid.load(config.dataset, split, job.data, config.partial)


def loader_of(config: Config, job: Job, people: People, train: bool = False):
    size = (config.height, config.width)
    more = {"size": size, "workers": config.workers, "channels_last": config.channels_last}
    return person_reid.batches(people, config.batch_size, job.seed, job.world, train, **more)


def build(config: Config, identities: int) -> HPM:
    """The network of a config; UserError where its numbers do not fit each other."""
    stride, scales = (4 if config.backbone == "small" else 16), config.scales
    largest = max(scales, default=0)
    if min(scales, default=0) < 1 or config.height % (stride * largest) or any(largest % scale for scale in scales):
        raise UserError(
            f"images of height {config.height} give maps of {config.height / stride:g} rows, which scales {list(scales)} do not "
            f"divide; expected each scale to divide the largest, and height to be a multiple of {stride} x the largest"
        )
    if config.backbone == "small":
        backbone, channels = small(), 64
    else:
        weights = _weights(config.weights)
        try:
            backbone, channels = resnet50(weights), 2048
        except ValueError as error:
            raise UserError(f"{config.weights}: {error}") from None
    try:
        return HPM(backbone, channels, identities, config.dim, scales, config.pool, config.erasing)
    except ValueError as error:
        raise UserError(str(error)) from None


def _weights(name: str) -> dict | None:
    try:
        return torch.load(name, map_location="cpu", weights_only=True) if name else None
    except Exception as error:  # whatever a file that is not one of weights raises
        raise UserError(
            f"weights {name} does not open ({type(error).__name__}); expected torchvision's resnet50-19c8e357.pth"
        ) from None


def describe(config: Config, job: Job, model: HPM, people: People) -> descriptors.Descriptors:
    return descriptors.describe(model, people, loader_of(config, job, people), job.world, config.amp)


def run(config: Config, job: Job) -> Measured:
    """Returns mAP and CMC after the last epoch, and the curve."""
    runtime.seed_everything(job.seed, job.deterministic)
    people, query, gallery = (open_split(config, job, split) for split in person_reid.SPLITS)
    loader = loader_of(config, job, people, train=True)
    model = build(config, len(people.identities))
    identity = {"script": SCRIPT, "seed": job.seed, **dataclasses.asdict(config), "classes": len(people.identities)}
    if config.weights:  # the weights themselves, not the name of their file, are what a resume must agree on
        identity |= {"weights": "", "weights_sha256": runtime.weights_sha256(model.backbone)}
    model = model.to(job.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    groups = [
        {"params": list(model.backbone.parameters()), "base": config.backbone_lr},
        {"params": list(model.head.parameters()), "base": config.lr},
    ]
    optimiser = torch.optim.SGD(groups, config.lr, config.momentum, weight_decay=config.weight_decay, fused=True)
    forward = DistributedDataParallel(model) if job.world.size > 1 else model
    progress = Progress(job, identity, model=model, optimiser=optimiser)
    per_epoch, stop = len(loader), runtime.StopFlag(job.world)

    for epoch in range(progress.step // per_epoch, config.epochs):
        for group in optimiser.param_groups:
            group["lr"] = group["base"] * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)
        lr, start = optimiser.param_groups[1]["lr"], progress.step % per_epoch
        batches = loader.epoch(epoch, start)
        for x, y in tqdm(batches, f"train {epoch}", per_epoch - start, leave=False, disable=None):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
                logits = forward(x)
            loss = pyramid_loss(logits.float(), y, config.smoothing)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            progress.loss_sum += loss.detach()
            progress.step += 1
            if progress.step % config.log_every == 0:
                runtime.require_finite(loss, progress.step, lr)
            if progress.step % per_epoch == 0:
                mean = runtime.require_finite(progress.loss_sum / per_epoch, progress.step, lr)
                progress.log(f"epoch {epoch + 1}/{config.epochs}", epoch=epoch, lr=lr, train_loss=round(mean, 5))
                progress.save(lr)
            elif progress.step % config.save_every == 0:
                progress.save(lr)
            if stop.at(progress.step):
                progress.save(lr)
                raise runtime.Stopped(f"train at step {progress.step} of {per_epoch * config.epochs}")

    runtime.broadcast_from_main(model.buffers())
    found = [describe(config, job, model, part) for part in (query, gallery)]
    metrics, lines = descriptors.all_settings(*found, complete=config.dataset in OFFICIAL and not config.partial)
    if job.world.is_main:
        print("\n".join(lines), flush=True)
    return Measured(
        metrics=metrics | {"train_seconds": metric(round(progress.seconds, 2))},
        config=dataclasses.asdict(config),
        scale={"epochs": config.epochs, "steps": progress.step, "batch": config.batch_size},
        data={f"{part.name}/{part.split}": part.digest for part in (people, query, gallery)},
        numerics={"amp": config.amp, "channels_last": config.channels_last},
        curve=progress.curve,
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
