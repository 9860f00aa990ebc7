"""What the units of a trained network keep: how well image and label can be read off each one's output.

    python -m papers.infopro.probe --tier quick --set checkpoint=runs/infopro/train-quick-s0

The network rests. On the output h of every unit are trained, as estimates of information (section 2 and figure 3 of the
paper): a decoder, whose cross-entropy falls as I(h, x) grows; a small convolutional classifier (head 1c2f), whose error falls
as I(h, y) grows; and a linear classifier on the mean over pixels, which is the part of I(h, y) that greedy training asks for.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress
from common.cli import Job
from common.datasets.classification import part
from common.errors import UserError
from common.metrics.accuracy import evaluating
from common.results.records import Measured, metric

from .auxiliary import Decoder, head
from .evaluate import trained_model
from .losses import reconstruction_loss, restore
from .model import TORCHVISION, ResNet, initialise, width
from .train import normalisation

SCRIPT = "infopro.probe"


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, or its work dir (the newest one there)
    points: int = 10  # units to look at, at equal distances: the stem's output to the last block's
    epochs: int = 5
    batch_size: int = 128
    lr: float = 3e-3  # of Adam; falls to 0 along a half cosine, epoch by epoch
    log_every: int = 20
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if min(self.points, self.epochs, self.batch_size, self.log_every, self.save_every) < 1:
            raise ValueError("points, epochs, batch_size, log_every and save_every must be at least 1")


class Probes(nn.Module):
    """Of one network: at each point a decoder, a convolutional and a linear classifier."""

    def __init__(self, network: ResNet, points: list[int]):
        super().__init__()
        self.points, widths = points, [width(network.units[i]) for i in points]
        self.decoders = nn.ModuleList(Decoder(c) for c in widths)
        self.heads = nn.ModuleList(head("1c2f", c, network.classes, max(widths)) for c in widths)
        self.linears = nn.ModuleList(head("0c1f", c, network.classes) for c in widths)
        initialise(self)

    @torch.no_grad()
    def features(self, network: ResNet, x: Tensor) -> list[Tensor]:
        found = []
        for i, unit in enumerate(network.units[:-1]):
            x = unit(x)
            if i in self.points:
                found.append(x)
        return found

    def forward(self, h: list[Tensor], size) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        restored = [net(x, size) for net, x in zip(self.decoders, h, strict=True)]
        said = ([net(x) for net, x in zip(nets, h, strict=True)] for nets in (self.heads, self.linears))
        return restored, *said


def loss_of(probes: Probes, h: list[Tensor], pixels: Tensor, y: Tensor) -> Tensor:
    """A sum over probes, which share no weight: each is trained as if alone."""
    restored, *said = probes(h, pixels.shape[-2:])
    loss = sum(reconstruction_loss(r, pixels) for r in restored)
    return loss + sum(F.cross_entropy(logits, y) for some in said for logits in some)


def measure(probes: Probes, network: ResNet, loader, mean: Tensor, std: Tensor) -> dict[str, list[float]]:
    """On a split, one number a point: "bce" (nats a pixel value), "head_error" and "linear_error" in percent."""
    bce, wrong, samples = 0, 0, 0
    with evaluating(probes):
        for x, y in loader.epoch(0):
            pixels = restore(x, mean, std)
            restored, *said = probes(probes.features(network, x), x.shape[-2:])
            bce = bce + torch.stack([reconstruction_loss(r, pixels) for r in restored]) * len(y)
            wrong = wrong + torch.stack([torch.stack([(p.argmax(1) != y).sum() for p in some]) for some in said])
            samples += len(y)
    errors = (100 * wrong / samples).tolist()
    return {"bce": (bce / samples).tolist(), "head_error": errors[0], "linear_error": errors[1]}


def run(config: Config, job: Job) -> Measured:
    """Train the probes on the training split of the network, measure them on its test split."""
    runtime.require_one_process(job.world, "probe.py")
    _, net, settings, payload = trained_model(config.checkpoint)
    if settings.network in TORCHVISION:
        raise UserError(f"probe.py reads r<6n+2>; the checkpoint is {settings.network}")
    runtime.seed_everything(job.seed, job.deterministic)
    settings = dataclasses.replace(settings, batch_size=config.batch_size)
    data, tests = (part(settings, job, which) for which in ("train", "test"))
    mean, std = normalisation(data.loader, job.device)
    units = len(net.units) - 1  # all but the head
    count = min(config.points, units)
    points = sorted({round(i * (units - 1) / max(count - 1, 1)) for i in range(count)})
    net = net.to(job.device).requires_grad_(False)
    probes = Probes(net, points).to(job.device)
    if settings.channels_last:
        net, probes = (m.to(memory_format=torch.channels_last) for m in (net, probes))
    optimiser = torch.optim.Adam(probes.parameters(), config.lr, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs)
    identity = {"script": SCRIPT, "seed": job.seed, **dataclasses.asdict(config)}
    identity |= {"checkpoint": runtime.weights_sha256(net), "trained": payload["identity"]}
    progress = Progress(job, identity, probes=probes, optimiser=optimiser, cosine=cosine)
    per_epoch, stop = len(data.loader), runtime.StopFlag(job.world)

    for epoch in range(progress.step // per_epoch, config.epochs):
        lr, start = cosine.get_last_lr()[0], progress.step % per_epoch
        probes.train()
        for x, y in tqdm(
            data.loader.epoch(epoch, start), f"probe {epoch}", per_epoch - start, leave=False, disable=None
        ):
            loss = loss_of(probes, probes.features(net, x), restore(x, mean, std), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            progress.loss_sum += loss.detach()
            progress.step += 1
            if progress.step % config.log_every == 0:
                runtime.require_finite(loss, progress.step, lr)
            if progress.step % per_epoch == 0:
                mean_loss = runtime.require_finite(progress.loss_sum / per_epoch, progress.step, lr)
                progress.log(f"probe epoch {epoch + 1}/{config.epochs}", epoch=epoch, train_loss=round(mean_loss, 5))
                cosine.step()
                progress.save(lr)
            elif progress.step % config.save_every == 0:
                progress.save(lr)
            if stop.at(progress.step):
                progress.save(lr)
                raise runtime.Stopped(f"probing at step {progress.step} of {per_epoch * config.epochs}")

    found = measure(probes, net, tests.loader, mean, std)
    metrics = {
        f"unit{i}_{name}": metric(value, tests.samples)
        for name, values in found.items()
        for i, value in zip(points, values, strict=True)
    }
    metrics |= {f"last_{name}": metric(values[-1], tests.samples) for name, values in found.items()}
    return Measured(
        metrics=metrics,
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"epochs": config.epochs, "steps": progress.step, "batch": config.batch_size},
        data=data.digests | tests.digests,
        curve=progress.curve,
        artifacts={"points": points, **{name: [round(v, 5) for v in values] for name, values in found.items()}},
        weights_sha256=runtime.weights_sha256(probes),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
