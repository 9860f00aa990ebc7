"""Train a network end to end (modules=1), or in gradient-isolated modules: InfoPro, greedy supervised learning, DGL.

    python -m papers.infopro.train --tier full                                             (InfoPro*, K = 2)
    python -m papers.infopro.train --tier full --set modules=1                             (end to end)
    python -m papers.infopro.train --tier full --set loss=softmax head=0c1f lambda1=[0,0] lambda2=[1,1]    (greedy)

Ends with the error of the network, without its auxiliary nets, on the test split. Official file train.py.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress
from common.cli import Job
from common.datasets import DeviceLoader, imagenet
from common.datasets.classification import part, per_rank
from common.errors import UserError
from common.metrics.accuracy import accuracies, evaluating
from common.results.records import Measured, metric

from .auxiliary import Decoder, ImageNetDecoder, head, imagenet_head
from .checkpointing import checkpointed, require_segments
from .cost import auxiliary_mult_adds, saved_mib
from .cuts import cut_points
from .local import InfoPro
from .losses import restore
from .model import TORCHVISION, network

SCRIPT = "infopro.train"


@dataclass
class Config:
    dataset: str = "cifar10"  # any set of common.datasets, or imagenet
    train_images: int = 0  # the first n of the split; 0: all
    test_images: int = 0
    held_out: int = 0
    image_size: int = 0  # 0: as it is; smaller: averaged down (generated sets: drawn at this size)
    workers: int = 4  # imagenet: loader processes a rank
    crop_pad: int = 4
    flip: bool = True
    network: str = "r110"  # r<6n+2>, or resnet101, resnet152, resnext101_32x8d
    widths: tuple[int, int, int] = (16, 32, 64)  # of r<6n+2>: channels of the stages
    modules: int = 1  # K; 1: end to end
    equal_memory: bool = False  # InfoPro*: the paper's other cuts
    cuts: tuple[tuple[int, int], ...] = ()  # (stage, block) to cut after, instead of the tables
    loss: Literal["contrast", "softmax"] = "contrast"
    head: Literal["0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f"] = "1c2f"  # of r<6n+2>
    lambda1: tuple[float, float] = (5.0, 5.0)  # reconstruction, of module 1 and of module K - 1; 0: no decoder
    lambda2: tuple[float, float] = (0.1, 0.1)  # contrastive loss or cross-entropy, likewise
    training: Literal["simultaneous", "asynchronous"] = "simultaneous"  # asynchronous: one module after the other
    checkpoint_segments: int = 0  # of modules=1: gradient checkpointing; 0: none
    epochs: int = 160  # asynchronous: of each module
    batch_size: int = 1024  # over all ranks
    lr: float = 0.8
    warm_up: int = 10  # epochs
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 1e-4
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = False
    test_every: int = 1  # epochs between looks at the test set; 0: only at the end
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if min(self.epochs, self.batch_size, self.log_every, self.save_every) < 1 or self.warm_up < 0:
            raise ValueError("epochs, batch_size, log_every and save_every must be at least 1, warm_up at least 0")
        if self.cuts and len(self.cuts) != self.modules - 1:
            raise ValueError(f"{len(self.cuts)} cuts for modules={self.modules}; expected {self.modules - 1}")
        if self.checkpoint_segments and self.modules > 1:
            raise ValueError("checkpoint_segments is for modules=1; local modules free their graphs anyway")
        pairs = zip(self.lambda1, self.lambda2, strict=True)
        if self.modules > 1 and any(max(pair) <= 0 for pair in pairs):
            raise ValueError("lambda1 and lambda2 are both 0 for a module, which would never learn; raise one")


def build(config: Config, classes: int) -> InfoPro:
    """The network of a config in its modules; UserError where its numbers do not fit each other."""
    try:
        net = network(config.network, classes, config.widths)
        if config.checkpoint_segments:
            require_segments(net, config.checkpoint_segments)
        cuts = config.cuts or cut_points(config.network, net, config.modules, config.equal_memory)
        if config.network in TORCHVISION:
            if config.modules > 1 and config.loss == "contrast":
                raise ValueError("the heads of the ImageNet networks are classifiers; set loss=softmax")
            nets = (ImageNetDecoder, partial(imagenet_head, classes=classes))
        else:
            outputs = 128 if config.loss == "contrast" else classes
            nets = (Decoder, lambda c: head(config.head, c, outputs, config.widths[-1]))
        return InfoPro(net, cuts, *nets, config.lambda1, config.lambda2, config.loss)
    except ValueError as error:
        raise UserError(str(error)) from None


def require_positives(config: Config, classes: int, world) -> None:
    """More images than classes: then two of them share a class in every batch. A rank's loss sees its own share."""
    batch = per_rank(config.batch_size, world)
    if config.modules > 1 and config.loss == "contrast" and max(config.lambda2) > 0 and batch <= classes:
        raise UserError(
            f"batch_size gives {batch} images a rank for {classes} classes: a batch may have no two of one class for the "
            f"contrastive loss; expected more than {classes} a rank, or loss=softmax"
        )


def normalisation(loader, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3, 1, 1) that a loader's images are normalised with."""
    if isinstance(loader, DeviceLoader):
        return loader.mean, loader.std
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (imagenet.MEAN, imagenet.STD))


def learning_rate(config: Config, epoch: int) -> float:
    """Cosine, and a warm-up from 0.01 that blends into it; epoch from 0, as of the end of it: the last one has 0."""
    e = epoch + 1
    lr = 0.5 * config.lr * (1 + math.cos(math.pi * e / config.epochs))
    if e <= config.warm_up:
        lr = lr * (e - 1) / config.warm_up + 0.01 * (config.warm_up + 1 - e) / config.warm_up
    return lr


def error_rate(config: Config, net, loader, world) -> float:
    """Top-1 error of the network in percent, over all ranks; auxiliary nets have no part in it."""
    with evaluating(net, config.amp):
        return 100 - accuracies(((net(x), y) for x, y in loader.epoch(0)), world).item()


def step_losses(config: Config, model: InfoPro, k: int, x: Tensor, pixels: Tensor, y: Tensor) -> Tensor:
    """Gradients of one step, and the losses behind them: of all modules, or asynchronously of module k."""
    if config.training == "asynchronous":
        return model.backward_of(k, x, pixels, y, config.amp)
    if not config.checkpoint_segments:
        return model.backward(x, pixels, y, config.amp)[0]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
        loss = F.cross_entropy(checkpointed(model.network, x, config.checkpoint_segments), y)
    loss.backward()
    return loss.detach()[None]


def run(config: Config, job: Job) -> Measured:
    """Train; returns the network's error on the test split after the last epoch and the best, its memory, and the curve."""
    runtime.seed_everything(job.seed, job.deterministic)
    train, tests = (part(config, job, which) for which in ("train", "test"))
    require_positives(config, train.classes, job.world)
    model = build(config, train.classes).to(job.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    momentum = {"momentum": config.momentum, "nesterov": config.momentum > 0}
    optimiser = torch.optim.SGD(model.parameters(), config.lr, **momentum, weight_decay=config.weight_decay, fused=True)
    mean, std = normalisation(train.loader, job.device)

    identity = {"script": SCRIPT, "seed": job.seed, "classes": train.classes, "size": train.size}
    progress = Progress(job, identity | dataclasses.asdict(config), model=model, optimiser=optimiser)
    per_epoch, stop = len(train.loader), runtime.StopFlag(job.world)
    epochs = config.epochs * (model.K if config.training == "asynchronous" else 1)

    for epoch in range(progress.step // per_epoch, epochs):
        k, round_ = divmod(epoch, config.epochs)  # asynchronous: epoch round_ of module k
        lr = learning_rate(config, round_)
        for group in optimiser.param_groups:
            group["lr"] = lr
        start = progress.step % per_epoch
        batches = train.loader.epoch(epoch, start)
        model.train_only(k if config.training == "asynchronous" else 0)
        for x, y in tqdm(batches, f"train {epoch}", per_epoch - start, leave=False, disable=None):
            optimiser.zero_grad()
            loss = step_losses(config, model, k, x, restore(x, mean, std), y).sum()
            runtime.average_gradients(p.grad for p in model.parameters())
            optimiser.step()
            progress.loss_sum += loss
            progress.step += 1
            if progress.step % config.log_every == 0:
                runtime.require_finite(loss, progress.step, lr)
            if progress.step % per_epoch == 0:
                line = {"epoch": epoch, "lr": lr}
                line["train_loss"] = round(runtime.require_finite(progress.loss_sum / per_epoch, progress.step, lr), 5)
                runtime.broadcast_from_main(model.buffers())
                if epoch + 1 == epochs or (config.test_every and (epoch + 1) % config.test_every == 0):
                    line["error"] = error_rate(config, model.network, tests.loader, job.world)
                progress.log(f"train epoch {epoch + 1}/{epochs}", **line)
                progress.save(lr)
            elif progress.step % config.save_every == 0:
                progress.save(lr)
            if stop.at(progress.step):
                progress.save(lr)
                raise runtime.Stopped(f"training at step {progress.step} of {per_epoch * epochs}")

    errors = [line["error"] for line in progress.curve if "error" in line]
    with torch.device("meta"):
        sizes = build(config, train.classes)
    return Measured(
        metrics={
            "error": {**metric(errors[-1], tests.samples), "best_test": min(errors)},
            "saved_mib": metric(saved_mib(sizes, train.size)),
            "auxiliary_mult_adds": metric(auxiliary_mult_adds(sizes, train.size)),
            "train_seconds": metric(round(progress.seconds, 2)),
        },
        config=dataclasses.asdict(config),
        scale={"epochs": epochs, "steps": progress.step, "batch": config.batch_size},
        data=train.digests | tests.digests,
        numerics={"amp": config.amp, "channels_last": config.channels_last},
        curve=progress.curve,
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
