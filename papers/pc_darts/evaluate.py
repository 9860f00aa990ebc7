"""Evaluate a checkpoint of train.py: test error, parameters, multiply-adds in both conventions.

python -m papers.pc_darts.evaluate --tier full --set checkpoint=runs/pc_darts/train-full-s0
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from common import cli
from common.cli import Job, build_config
from common.errors import UserError
from common.metrics import compute
from common.results.records import Measured

from . import train
from .data import test_loader
from .genotypes import Genotype
from .model import NetworkCIFAR, NetworkImageNet


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


def read_checkpoint(name: str) -> dict:
    path = Path(name)
    if path.is_dir():
        path = max(path.glob("checkpoint-*.pt"), default=path / "checkpoint-*.pt")
    if not name or not path.is_file():
        raise UserError(f"no checkpoint at {name or '(empty)'!r}; give --set checkpoint=<work dir of train.py>")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file raises
        raise UserError(f"{path} does not open ({type(error).__name__}); use another checkpoint of that run") from None
    if payload.get("identity", {}).get("script") != "pc_darts.train":
        raise UserError(f"{path} was not written by papers.pc_darts.train")
    return payload


def run(config: Config, job: Job) -> Measured:
    """The metrics of one checkpoint on the test split."""
    payload = read_checkpoint(config.checkpoint)
    known = {field.name for field in dataclasses.fields(train.Config)}
    trained = {key: value for key, value in payload["identity"].items() if key in known}
    trained |= {"dataset": config.dataset} if config.dataset else {}
    trained |= {"test_images": config.test_images} if config.test_images >= 0 else {}
    genotype = Genotype.from_json(trained["genotype"])
    settings = build_config(train.Config, {**trained, "batch_size": max(trained["batch_size"], 128)}, config.checkpoint)
    loader, test_size, classes, digests = test_loader(settings, job)
    network = NetworkImageNet if settings.dataset == "imagenet" else NetworkCIFAR
    if classes != payload["identity"]["classes"]:
        raise UserError(
            f"the checkpoint has {payload['identity']['classes']} classes, {settings.dataset} has {classes}"
        )
    model = train.build(settings, genotype, classes)
    model.load_state_dict(payload["state"]["parts"]["model"])
    top1, top5 = train.error_rates(settings, model.to(job.device), loader, job.world)
    x, _ = next(loader.epoch(0))
    found = cost(network, classes, genotype, settings.C, settings.layers, x.shape[-1])
    return Measured(
        metrics={"test_error": {"last": top1, "n": test_size}, "test_error_top5": {"last": top5, "n": test_size}}
        | {name: {"last": value} for name, value in found.items()},
        config=dataclasses.asdict(config) | {"trained": trained},
        scale={"epochs": settings.epochs, "steps": payload["position"]},
        data=digests,
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
