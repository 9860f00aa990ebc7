"""Stage 0: the ResNet whose blocks will be dropped, trained as usual; or torchvision's weights, taken in.

    python -m papers.blockdrop.train --tier full
    python -m papers.blockdrop.train --tier full --config full-imagenet --set weights=resnet101.pth

With epochs=0 nothing is trained: the weights file is read, evaluated, and becomes the checkpoint that the next stage asks for.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress
from common.cli import Job
from common.datasets.classification import part
from common.errors import UserError
from common.metrics.accuracy import accuracies, evaluating
from common.results.records import Measured, metric

from .cost import costs
from .model import DroppableResNet, from_torchvision, load_torchvision, resnet_cifar

SCRIPT = "blockdrop.train"
TORCHVISION_DEPTHS = (18, 34, 50, 101, 152)


@dataclass
class Config:
    dataset: str = "cifar10"  # any set of common.datasets, or imagenet
    train_images: int = 0  # the first n of the split; 0: all
    test_images: int = 0
    held_out: int = 0  # training images kept out of all stages, to choose static subsets by
    image_size: int = 0  # 0: as it is; smaller: averaged down (generated sets: drawn at this size)
    workers: int = 4  # imagenet: loader processes a rank
    crop_pad: int = 4
    flip: bool = True
    network: Literal["cifar", "torchvision"] = "cifar"
    depth: int = 110  # cifar: 6n + 2; torchvision: 18, 34, 50, 101 or 152
    widths: tuple[int, ...] = (16, 32, 64)  # cifar: channels of the stages
    weights: str = ""  # torchvision: its state dict file, to start from
    epochs: int = 164
    batch_size: int = 128  # over all ranks
    lr: float = 0.1
    milestones: tuple[int, ...] = (82, 123)  # epochs at whose start the rate falls to a tenth
    momentum: float = 0.9
    weight_decay: float = 1e-4
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = False
    test_every: int = 0  # epochs between looks at the test set, for the curve; 0: only at the end
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if self.batch_size < 1 or self.log_every < 1 or self.save_every < 1:
            raise ValueError("batch_size, log_every and save_every must be at least 1")
        if self.epochs < 0 or (self.epochs == 0 and not self.weights):
            raise ValueError(f"epochs is {self.epochs}; expected at least 1, or 0 with weights=FILE")
        if self.weights and self.network == "cifar":
            raise ValueError("weights is for network=torchvision; a cifar network is trained here")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m >= self.epochs for m in self.milestones):
            raise ValueError(f"milestones are rising epochs below {self.epochs}; they are {list(self.milestones)}")


def build(config: Config, classes: int) -> DroppableResNet:
    """The network of a config, without its weights file; UserError where its numbers do not fit."""
    if config.network == "cifar":
        try:
            return resnet_cifar(config.depth, classes, config.widths)
        except ValueError as error:
            raise UserError(str(error)) from None
    if config.depth not in TORCHVISION_DEPTHS:
        raise UserError(f"depth is {config.depth}; torchvision has {', '.join(map(str, TORCHVISION_DEPTHS))}")
    net = getattr(torchvision.models, f"resnet{config.depth}")(weights=None, num_classes=classes)
    return from_torchvision(net)


def take_weights(load, network: torch.nn.Module, name: str) -> None:
    """`load(network, state dict)` from a file of torchvision that the user has; nothing is downloaded."""
    if not Path(name).is_file():
        raise UserError(f"no weights file {name!r}; expected a state dict of torchvision, such as resnet101-*.pth")
    try:
        state_dict = torch.load(name, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file raises
        raise UserError(f"{name} does not open ({type(error).__name__}); fetch it again") from None
    try:
        load(network, state_dict)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def learning_rate(config, epoch: int) -> float:
    """A tenth of it after each milestone."""
    return config.lr * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)


def accuracy(config: Config, model: DroppableResNet, loader, world) -> float:
    """Top-1 accuracy of the whole network in percent, over all ranks."""
    with evaluating(model, config.amp):
        return accuracies(((model(x), y) for x, y in loader.epoch(0)), world).item()


def run(config: Config, job: Job) -> Measured:
    """Train the ResNet; returns its accuracy on the test split after the last epoch, and the curve."""
    runtime.seed_everything(job.seed, job.deterministic)
    train, tests = (part(config, job, which) for which in ("train", "test"))
    model = build(config, train.classes)
    if config.weights:
        take_weights(load_torchvision, model, config.weights)
    cost = costs(model, None, train.size)
    model = model.to(job.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True
    )
    forward = DistributedDataParallel(model) if job.world.size > 1 else model

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
                loss = F.cross_entropy(forward(x), y)
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
                if config.test_every and (epoch + 1) % config.test_every == 0:
                    runtime.broadcast_from_main(model.buffers())
                    line["accuracy"] = accuracy(config, model, tests.loader, job.world)
                progress.log(f"train epoch {epoch + 1}/{config.epochs}", **line)
                progress.save(lr)
            elif progress.step % config.save_every == 0:
                progress.save(lr)
            if stop.at(progress.step):
                progress.save(lr)
                raise runtime.Stopped(f"training at step {progress.step} of {per_epoch * config.epochs}")

    if not config.epochs:
        progress.save(config.lr)
    runtime.broadcast_from_main(model.buffers())
    return Measured(
        metrics={
            "accuracy": metric(accuracy(config, model, tests.loader, job.world), tests.samples),
            "mult_adds": metric(cost.fixed + sum(cost.blocks), tests.samples),
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
