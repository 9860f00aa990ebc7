"""Evaluate a checkpoint of train.py: test error, parameters, multiply-adds in both conventions.

python -m papers.pc_darts.evaluate --tier full --set checkpoint=runs/pc_darts/train-full-s0
"""

import dataclasses
from dataclasses import dataclass

import torch

from common import cli
from common.checkpoints import read_checkpoint
from common.cli import Job, config_of
from common.datasets.classification import part
from common.metrics import compute
from common.results.records import Measured, metric

from . import train
from .genotypes import Genotype


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, or its work dir (the newest one there)
    dataset: str = ""  # empty: the one it was trained on
    test_images: int = -1  # -1: as in its own training; 0: all


def cost(network, classes: int, genotype: Genotype, C: int, layers: int, size: int) -> dict[str, int]:
    """Parameters (auxiliary head excluded, as the authors count) and multiply-adds of one image, on the meta device.

    `mult_adds`: convolutions and the linear layer. `mult_adds_paper`: plus 2 per batch-norm output element and 1 per ReLU
    output element; with it the paper's 597M and 586M come out.
    """
    with torch.device("meta"):
        model, image = network(genotype, C, classes, layers), torch.empty(1, 3, size, size)
    products = compute.mult_adds(model, image)
    return {
        "parameters": compute.parameters(model),
        "mult_adds": products,
        "mult_adds_paper": products + compute.element_ops(model, image),
    }


def trained_model(name: str, **changed):
    """(model, the config it was trained with and `changed`, its genotype, payload) of a checkpoint of train.py."""
    payload = read_checkpoint(name, train.SCRIPT)
    config = config_of(train.Config, payload["identity"] | changed, name)
    genotype = Genotype.from_json(config.genotype)
    model = train.build(config, genotype, payload["identity"]["classes"])
    model.load_state_dict(payload["state"]["parts"]["model"])
    return model, config, genotype, payload


def run(config: Config, job: Job) -> Measured:
    """The metrics of one checkpoint on the test split."""
    changed = {"dataset": config.dataset} if config.dataset else {}
    changed |= {"test_images": config.test_images} if config.test_images >= 0 else {}
    model, settings, genotype, payload = trained_model(config.checkpoint, **changed)
    tests = part(settings, job, "test")
    tests.require_classes(payload["identity"]["classes"])
    top1, top5 = train.error_rates(settings, model.to(job.device), tests.loader, job.world)
    found = cost(type(model), tests.classes, genotype, settings.C, settings.layers, tests.size)
    return Measured(
        metrics={"test_error": metric(top1, tests.samples), "test_error_top5": metric(top5, tests.samples)}
        | Measured.of(found).metrics,
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"epochs": settings.epochs, "steps": payload["position"]},
        data=tests.digests,
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
