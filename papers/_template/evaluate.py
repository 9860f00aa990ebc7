"""Evaluate a checkpoint of train.py: test error, and what the network costs.

python -m papers._template.evaluate --set checkpoint=runs/_template/train-quick-s0
"""

import dataclasses
from dataclasses import dataclass

import torch

from common import cli
from common.checkpoints import read_checkpoint
from common.cli import Job, config_of
from common.datasets.classification import part
from common.metrics.compute import mult_adds, parameters
from common.results.records import Measured, metric

from . import train
from .model import Network


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, or its work dir (the newest one there)
    test_images: int = -1  # -1: as in its own training; 0: all


def trained_model(name: str) -> tuple[Network, train.Config, dict]:
    """(the network, the config it was trained with, payload) of a checkpoint of train.py."""
    payload = read_checkpoint(name, train.SCRIPT)
    config = config_of(train.Config, payload["identity"], name)
    model = train.build(config, payload["identity"]["classes"])
    model.load_state_dict(payload["state"]["parts"]["model"])
    return model, config, payload


def run(config: Config, job: Job) -> Measured:
    """The metrics of one checkpoint on the test split; its multiply-adds for an image of that size."""
    model, settings, payload = trained_model(config.checkpoint)
    if config.test_images >= 0:
        settings = dataclasses.replace(settings, test_images=config.test_images)
    tests = part(settings, job, "test")
    tests.require_classes(payload["identity"]["classes"])
    with torch.device("meta"):
        macs = mult_adds(train.build(settings, tests.classes), torch.empty(1, 3, tests.size, tests.size))
    error = train.error_rate(settings, model.to(job.device), tests.loader, job.world)
    return Measured(
        metrics={
            "test_error": metric(error, tests.samples),
            "parameters": metric(parameters(model)),
            "mult_adds": metric(macs),
        },
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"epochs": settings.epochs, "steps": payload["position"]},
        data=tests.digests,
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
