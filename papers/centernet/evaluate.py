"""Evaluate a trained detector: as triplets, as pairs, and with the centres of the true boxes as the bound.

python -m papers.centernet.evaluate --set checkpoint=runs/centernet/train-quick-s0
python -m papers.centernet.evaluate --set checkpoint=... scales="[0.6, 1, 1.2, 1.5, 1.8]"      (multi-scale)
"""

import dataclasses
from dataclasses import dataclass

from common import cli, runtime
from common.checkpoints import read_checkpoint
from common.cli import Job
from common.errors import UserError
from common.results.records import Measured

from . import train
from .measure import measured
from .model import CenterNet


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, or its work dir (the newest one there)
    scales: tuple[float, ...] = ()  # empty: as in its own training
    flip: bool = True
    top_k: int = 0  # 0: as in its own training
    batch: int = 0


def trained_model(name: str) -> tuple[CenterNet, train.Config, dict]:
    """(the model in eval mode, the config it was trained with, payload of the checkpoint)."""
    payload = read_checkpoint(name, train.SCRIPT)
    settings = cli.config_of(train.Config, payload["identity"], name)
    model = train.build(settings, len(payload["identity"]["classes"]))
    model.load_state_dict(payload["state"]["parts"]["model"])
    return model.eval(), settings, payload


def run(config: Config, job: Job) -> Measured:
    """Average precision, recall and false discovery on the test split of its training."""
    model, settings, payload = trained_model(config.checkpoint)
    try:
        settings = dataclasses.replace(
            settings,
            test_scales=config.scales or settings.test_scales,
            test_flip=config.flip and settings.test_flip,
            top_k=config.top_k or settings.top_k,
            test_batch=config.batch or settings.test_batch,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    tests = train.open_set(settings, job, train=False)
    if list(tests.classes) != payload["identity"]["classes"]:
        raise UserError(
            f"the checkpoint was trained on {len(payload['identity']['classes'])} classes, {tests.name} {tests.split} has "
            f"{len(tests.classes)}, or others; use the data that it was trained on"
        )
    model = model.to(job.device)
    metrics, artifacts = measured(model, tests, settings.settings(), settings.test_batch, job.world, settings.amp)
    return Measured(
        metrics=metrics,
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"steps": payload["position"], "batch": settings.batch_size},
        data={f"{tests.name}/{tests.split}": tests.digest},
        numerics={"amp": settings.amp, "channels_last": settings.channels_last},
        artifacts=artifacts,
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
