"""Stage I: train both encoders and the classifier, on a glance and T - 1 crops at random places.

    python -m papers.gfnet.train --tier full --set steps=1 global_weights=resnet50.pth --work-dir runs/gfnet/glance
    python -m papers.gfnet.train --tier full --set global_weights=runs/gfnet/glance local_weights=resnet50.pth

With steps=1 it trains the glance alone: the start of f_G in the paper, and the baseline that only sees the small image.
Ends with the accuracy of every step. Official file train.py.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress, read_checkpoint
from common.cli import Job
from common.datasets.classification import Part, part
from common.errors import UserError
from common.metrics.accuracy import accuracies, evaluating
from common.results.records import Measured, metric

from .losses import sequence_loss
from .model import GFNet
from .places import Places, places

SCRIPT = "gfnet.train"


@dataclass
class Config:
    dataset: str = "imagenet"  # or any set of common.datasets
    train_images: int = 0  # the first n of the split; 0: all
    test_images: int = 0
    held_out: int = 50000  # training images kept for the thresholds of budgeted evaluation
    image_size: int = 0  # 0: as it is (imagenet: 224); generated sets are drawn at this size
    workers: int = 8  # imagenet: loader processes a rank
    crop_pad: int = 0
    flip: bool = True
    channels_last: bool = False
    encoder: str = "resnet50"  # a name of encoders.NETWORKS
    patch: int = 96  # P: side of the glance and of the crops
    steps: int = 5  # T: the glance and T - 1 crops; 1: the glance alone
    hidden: int = 1024  # of the classifier's GRU; ResNet, DenseNet and RegNet have one
    own_weight: float = 1.0  # lambda: of the encoders' own heads in the loss
    epochs: int = 60
    batch_size: int = 256  # over all ranks
    lr: float = 0.01  # of the encoders; both rates follow a cosine to 0, epoch by epoch
    classifier_lr: float = 0.1
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 1e-4
    amp: bool = False  # bfloat16 autocast
    global_weights: str = ""  # start of f_G: a torchvision weights file, or the work dir of a run with steps=1
    local_weights: str = ""  # start of f_L, likewise
    test_every: int = 0  # epochs between looks at the test set, for the curve; 0: only at the end
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1 or self.log_every < 1 or self.save_every < 1:
            raise ValueError("epochs, batch_size, log_every and save_every must be at least 1")
        if self.own_weight < 0:
            raise ValueError(f"own_weight is {self.own_weight}; expected 0 or more")
        if self.steps == 1 and self.local_weights:
            raise ValueError("local_weights with steps=1: the glance has no local encoder; leave one of the two out")


def build(config: Config, classes: int) -> GFNet:
    """The network of a config; UserError where its numbers do not fit each other."""
    frozen = False if config.steps == 1 else None  # the glance alone is always trained
    try:
        return GFNet(config.encoder, classes, config.patch, config.steps, config.hidden, global_frozen=frozen)
    except ValueError as error:
        raise UserError(str(error)) from None


def load_encoder(config: Config, classes: int, encoder: nn.Module, name: str) -> None:
    """Start an encoder from a torchvision file or from f_G of a run with steps=1; UserError where it does not fit."""
    if Path(name).is_dir():
        payload = read_checkpoint(name, SCRIPT)
        found = [payload["identity"][key] for key in ("steps", "encoder", "classes")]
        if found != [1, config.encoder, classes]:
            raise UserError(
                f"{name} trained steps={found[0]} of {found[1]} with {found[2]} classes; expected steps=1 of "
                f"{config.encoder} with {classes}"
            )
        weights, prefix = payload["state"]["parts"]["model"], "global_encoder."
        encoder.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        return
    try:
        encoder.load_torchvision(torch.load(name, map_location="cpu", weights_only=True))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # whatever a file that is not one of weights raises
        raise UserError(f"{name} does not open as a file of weights ({type(error).__name__})") from None


def cosine(epoch: int, epochs: int) -> float:
    """Share of the learning rate in an epoch, from 1 towards 0."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def step_accuracies(config, model, loader, world, places: Places) -> list[float]:
    """Top-1 accuracy of every step in percent, over all ranks and the true number of images."""
    with evaluating(model, config.amp):
        predictions = (
            (torch.stack([step.logits for step in model(x, places(number))]), y)
            for number, (x, y) in enumerate(loader.epoch(0))
        )
        return accuracies(predictions, world)[:, 0].tolist()


def by_step(accuracies: list[float]) -> dict[str, float]:
    """{"step1_accuracy": ..., ..., "last_step_accuracy": ...}; the glance is step 1."""
    named = {f"step{t}_accuracy": value for t, value in enumerate(accuracies, 1)}
    return named | {"last_step_accuracy": accuracies[-1]}


def step_metrics(line: dict, samples: int) -> dict[str, dict]:
    """The accuracies that `by_step` named, out of a line of the curve."""
    return {name: metric(value, samples) for name, value in line.items() if name.endswith("_accuracy")}


def fit(
    config: Config,
    job: Job,
    identity: dict,
    model: GFNet,
    data: Part,
    tests: Part,
    train: Places,
    test: Places,
    **parts,
) -> tuple[Progress, dict]:
    """The training of stages I and III: (progress, metrics of the last epoch). train, test: where the crops go.

    parts: what else belongs into the checkpoints. The script that identity names is what lines and messages begin with.
    """
    title = identity["script"].removeprefix("gfnet.")
    if config.patch > data.size:
        raise UserError(f"patch {config.patch} does not fit images of {data.size} pixels; make it smaller")
    model = model.to(job.device).train()
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    encoders = [p for name, p in model.named_parameters() if not name.startswith("classifier.") and p.requires_grad]
    groups = [
        {"params": encoders, "base": config.lr},
        {"params": list(model.classifier.parameters()), "base": config.classifier_lr},
    ]
    optimiser = torch.optim.SGD(
        groups, config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.momentum > 0, fused=True
    )
    forward = DistributedDataParallel(model) if job.world.size > 1 else model
    progress = Progress(job, identity, model=model, optimiser=optimiser, **parts)
    per_epoch = len(data.loader)
    stop = runtime.StopFlag(job.world)

    for epoch in range(progress.step // per_epoch, config.epochs):
        for group in optimiser.param_groups:
            group["lr"] = group["base"] * cosine(epoch, config.epochs)
        lr = optimiser.param_groups[0]["lr"]
        start = progress.step % per_epoch
        batches = data.loader.epoch(epoch, start)
        for x, y in tqdm(batches, f"{title} {epoch}", per_epoch - start, leave=False, disable=None):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
                loss = sequence_loss(forward(x, train(progress.step)), y, config.own_weight)
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
                    line |= by_step(step_accuracies(config, model, tests.loader, job.world, test))
                progress.log(f"{title} epoch {epoch + 1}/{config.epochs}", **line)
                progress.save(lr)
            elif progress.step % config.save_every == 0:
                progress.save(lr)
            if stop.at(progress.step):
                progress.save(lr)
                raise runtime.Stopped(f"{title} at step {progress.step} of {per_epoch * config.epochs}")

    metrics = step_metrics(progress.curve[-1], tests.samples)
    return progress, metrics | {f"{title}_seconds": metric(round(progress.seconds, 2))}


def run(config: Config, job: Job) -> Measured:
    """Train with random crops; returns the accuracy of each step on the test split after the last epoch, and the curve."""
    runtime.seed_everything(job.seed, job.deterministic)
    data, tests = (part(config, job, which) for which in ("train", "test"))
    model = build(config, data.classes)
    identity = {"script": SCRIPT, "seed": job.seed, "classes": data.classes, **dataclasses.asdict(config)}
    for key, encoder in (("global_weights", model.global_encoder), ("local_weights", model.local_encoder)):
        if name := getattr(config, key):
            load_encoder(config, data.classes, encoder, name)
            # The weights themselves, not the name of their file, are what a resume must agree on.
            identity |= {key: "", f"{key}_sha256": runtime.weights_sha256(encoder)}
    train, test = (places("random", job, use) for use in ("train", "test"))
    progress, metrics = fit(config, job, identity, model, data, tests, train, test)
    return Measured(
        metrics=metrics,
        config=dataclasses.asdict(config),
        scale={"epochs": config.epochs, "steps": progress.step, "batch": config.batch_size},
        data=data.digests | tests.digests,
        numerics={"amp": config.amp, "channels_last": config.channels_last},
        curve=progress.curve,
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
