"""Convert a checkpoint of train.py into the network for use: index and grouped convolution, condensed classifier.

    python -m papers.condensenet.convert --set checkpoint=runs/condensenet/train-full-s0

Writes `condensed.pt` into the work dir; `load_condensed(path)` of this folder opens it with torch alone. Reports the test
error before and after. Official file main.py, option --convert-from.
"""

import dataclasses
from dataclasses import dataclass

import torch

from common import cli, runtime
from common.checkpoints import write_atomic
from common.cli import Job
from common.datasets.classification import part
from common.errors import UserError
from common.results.records import Measured, metric

from . import evaluate, train
from .conversion import condense


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, or its work dir (the newest one there)
    classifier: bool = True  # keep only half of the classifier's features; no: exact, nothing is lost


def run(config: Config, job: Job) -> Measured:
    """Both test errors, and how much the logits of the first test batch changed (0 up to rounding if not classifier)."""
    model, settings, payload = evaluate.trained_model(config.checkpoint)
    try:
        converted = condense(model, config.classifier)
    except ValueError as error:
        raise UserError(f"{config.checkpoint}: {error}") from None
    tests = part(settings, job, "test")
    before, _ = train.error_rates(settings, model.to(job.device), tests.loader, job.world)
    after, _ = train.error_rates(settings, converted.to(job.device), tests.loader, job.world)
    with torch.inference_mode():
        x, _ = next(iter(tests.loader.epoch(0)))
        expected, found = model.eval()(x), converted.eval()(x)
    content = {"arguments": train.arguments(settings, tests.classes), "classifier": config.classifier}
    content["weights"] = converted.cpu().state_dict()
    if job.world.is_main:
        write_atomic(job.work_dir / "condensed.pt", lambda file: torch.save(content, file))
    costs = evaluate.costs(converted, tests.size)
    return Measured(
        metrics={
            "test_error": metric(before, tests.samples),
            "condensed_test_error": metric(after, tests.samples),
            "largest_change": metric((found - expected).abs().max() / expected.abs().max()),
        }
        | Measured.of(costs).metrics,
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"epochs": settings.epochs, "steps": payload["position"]},
        data=tests.digests,
        weights_sha256=runtime.weights_sha256(converted),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
