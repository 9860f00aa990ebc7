"""Evaluate a checkpoint of train.py as the end-to-end network that it is: the auxiliary nets are left behind.

    python -m papers.infopro.evaluate --set checkpoint=runs/infopro/train-full-s0

Loads the network's weights alone into a network that was never cut, and holds it against the trained modules, run one by one.
"""

import dataclasses
from dataclasses import dataclass

import torch

from common import cli, runtime
from common.checkpoints import read_checkpoint
from common.cli import Job, config_of
from common.datasets.classification import part
from common.metrics.compute import mult_adds, parameters
from common.results.records import Measured, metric

from . import train
from .local import InfoPro
from .model import ResNet, network


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, or its work dir (the newest one there)
    test_images: int = -1  # -1: as in its own training; 0: all


def trained_model(name: str) -> tuple[InfoPro, ResNet, train.Config, dict]:
    """(modules with their auxiliary nets, the network alone, config, payload) of a checkpoint, both in eval mode."""
    payload = read_checkpoint(name, train.SCRIPT)
    classes, weights = payload["identity"]["classes"], payload["state"]["parts"]["model"]
    settings = config_of(train.Config, payload["identity"], name)
    model = train.build(settings, classes)
    model.load_state_dict(weights)
    alone = network(settings.network, classes, settings.widths)
    own = {key.removeprefix("network."): value for key, value in weights.items() if key.startswith("network.")}
    alone.load_state_dict(own)  # strict: nothing is missing and nothing is left over
    return model.eval(), alone.eval(), settings, payload


@torch.inference_mode()
def largest_difference(model: InfoPro, alone: ResNet, loader) -> float:
    """Between the logits of the modules, one after the other, and of the network alone, over all images; in float32."""
    worst = 0.0
    for x, _ in loader.epoch(0):
        h = x
        for k in range(model.K):
            h = model.network.run(h, model.bounds[k], model.bounds[k + 1])
        worst = max(worst, (h - alone(x)).abs().max().item())
    return worst


def run(config: Config, job: Job) -> Measured:
    """Error of the network alone; its size and multiply-adds, those of an end-to-end network; the auxiliary nets' size."""
    runtime.require_one_process(job.world, "evaluate.py")
    model, alone, settings, payload = trained_model(config.checkpoint)
    if config.test_images >= 0:
        settings = dataclasses.replace(settings, test_images=config.test_images)
    tests = part(settings, job, "test")
    tests.require_classes(alone.classes)
    with torch.device("meta"):
        fresh = network(settings.network, tests.classes, settings.widths)
        macs = mult_adds(fresh, torch.empty(1, 3, tests.size, tests.size))
    model, alone = model.to(job.device), alone.to(job.device)
    if settings.channels_last:
        model, alone = (m.to(memory_format=torch.channels_last) for m in (model, alone))
    return Measured(
        metrics={
            "error": metric(train.error_rate(settings, alone, tests.loader, job.world), tests.samples),
            "difference": metric(largest_difference(model, alone, tests.loader), tests.samples),
            "params": metric(parameters(alone)),
            "end_to_end_params": metric(parameters(fresh)),
            "auxiliary_params": metric(parameters(model) - parameters(alone)),
            "mult_adds": metric(macs),
        },
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"steps": payload["position"]},
        data=tests.digests,
        weights_sha256=runtime.weights_sha256(alone),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
