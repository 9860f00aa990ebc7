"""Evaluate a checkpoint of train.py: test error before and after conversion, and what the network costs.

python -m papers.condensenet.evaluate --set checkpoint=runs/condensenet/train-full-s0
"""

import copy
import dataclasses
from dataclasses import dataclass

import torch

from common import cli
from common.checkpoints import read_checkpoint
from common.cli import Job, config_of
from common.datasets.classification import part
from common.metrics import compute
from common.results.records import Measured

from . import train
from .conversion import condense
from .cost import authors_mult_adds, counted_parameters


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, or its work dir (the newest one there)
    dataset: str = ""  # empty: the one it was trained on
    test_images: int = -1  # -1: as in its own training; 0: all


def trained_model(name: str, **changed):
    """(model, the config it was trained with and `changed`, payload) of a checkpoint of train.py."""
    payload = read_checkpoint(name, train.SCRIPT)
    config = config_of(train.Config, payload["identity"] | changed, name)
    model = train.build(config, payload["identity"]["classes"])
    model.load_state_dict(payload["state"]["parts"]["model"])
    return model, config, payload


def costs(model, size: int) -> dict[str, float]:
    """Of one image: multiply-adds (all), as the authors count them, and both counts of parameters."""
    image = torch.empty(1, 3, size, size, device="meta")
    return {
        "parameters": compute.parameters(model),
        "parameters_paper": counted_parameters(model),
        "mult_adds": compute.mult_adds(copy.deepcopy(model).to("meta"), image),
        "mult_adds_paper": authors_mult_adds(model, size),
    }


def run(config: Config, job: Job) -> Measured:
    """The metrics of one checkpoint on the test split; those of the converted network where it has been condensed."""
    changed = {"dataset": config.dataset} if config.dataset else {}
    changed |= {"test_images": config.test_images} if config.test_images >= 0 else {}
    model, settings, payload = trained_model(config.checkpoint, **changed)
    tests = part(settings, job, "test")
    tests.require_classes(payload["identity"]["classes"])
    errors = train.error_rates(settings, model.to(job.device), tests.loader, job.world)
    metrics = train.error_metrics(*errors, tests.samples)
    found = {}
    if min(model.densities(), default=0) == 1 / settings.condense_factor:
        metrics |= train.converted_errors(settings, model, tests, job)
        found = {f"condensed_{name}": value for name, value in costs(condense(model), tests.size).items()}
    found |= costs(model, tests.size)
    return Measured(
        metrics=metrics | Measured.of(found).metrics,
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"epochs": settings.epochs, "steps": payload["position"]},
        data=tests.digests,
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
