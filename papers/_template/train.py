"""Train the network; ends with the test error of the last epoch.

python -m papers._template.train --tier quick --seed 0
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import cli, datasets, runtime
from common.checkpoints import Progress
from common.cli import Job
from common.metrics.accuracy import accuracies, evaluating
from common.results.records import Measured, metric

from .model import Network


@dataclass
class Config:
    dataset: str = "digits"  # a set of common.datasets with 8x8 grey images
    width: int = 16
    epochs: int = 2
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    save_every: int = 100  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1 or self.save_every < 1:
            raise ValueError("epochs, batch_size and save_every must be at least 1")


def error_rate(model: Network, loader: datasets.DeviceLoader, world: runtime.World) -> float:
    """Top-1 error in percent."""
    with evaluating(model):
        return 100 - accuracies(((model(x), y) for x, y in loader.epoch(0)), world).item()


def run(config: Config, job: Job) -> Measured:
    runtime.seed_everything(job.seed, job.deterministic)
    images, tests = (datasets.load(config.dataset, split, job.data) for split in ("train", "test"))
    loader = datasets.DeviceLoader(images, config.batch_size, job.seed, job.device)
    test_loader = datasets.DeviceLoader(tests, 256, job.seed, job.device, shuffle=False, drop_last=False)
    model = Network(config.width, images.classes).to(job.device)
    optimiser = torch.optim.SGD(model.parameters(), config.lr, config.momentum)

    identity = {"script": "_template.train", "seed": job.seed, **dataclasses.asdict(config)}
    progress = Progress(job, identity, model=model, optimiser=optimiser)
    stop = runtime.StopFlag(job.world)

    for epoch in range(progress.step // len(loader), config.epochs):
        for x, y in loader.epoch(epoch, progress.step % len(loader)):
            loss = F.cross_entropy(model(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            progress.step += 1
            if progress.step % len(loader) == 0:
                train_loss = runtime.require_finite(loss, progress.step, config.lr)
                progress.log(f"train epoch {epoch + 1}/{config.epochs}", epoch=epoch, train_loss=train_loss)
                progress.save(config.lr)
            elif progress.step % config.save_every == 0:
                progress.save(config.lr)
            if stop.at(progress.step):
                progress.save(config.lr)
                raise runtime.Stopped(f"training at step {progress.step} of {len(loader) * config.epochs}")

    return Measured(
        metrics={
            "test_error": metric(error_rate(model, test_loader, job.world), len(tests)),
            "chance": metric(90.0),
        },
        config=dataclasses.asdict(config),
        scale={"epochs": config.epochs, "steps": progress.step, "batch": config.batch_size},
        data={f"{s.name}/{s.split}": s.digest for s in (images, tests)},
        curve=progress.curve,
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
