"""Descriptors of the queries and the gallery, of the images and of their mirror images: query.pt and gallery.pt in the work dir.

    python -m papers.hpm.extract --set checkpoint=runs/hpm/train-full-s0 --work-dir runs/hpm/descriptors

They are what evaluate.py and rank.py read. Torch files of plain tensors: plain, mirrored (N, d), ids, cameras (N,).
"""

import dataclasses
import time
from dataclasses import dataclass

from common import cli, runtime
from common.checkpoints import read_checkpoint
from common.cli import Job
from common.errors import UserError
from common.results.records import Measured

from . import descriptors, train
from .model import HPM

SPLITS = ("query", "gallery")


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, or its work dir


def trained_model(name: str) -> tuple[HPM, train.Config, int]:
    """(network with its weights, config of its training, steps trained) of a checkpoint."""
    payload = read_checkpoint(name, train.SCRIPT)
    identity = payload["identity"]
    fields = [field.name for field in dataclasses.fields(train.Config)]
    config = cli.build_config(train.Config, {key: identity[key] for key in fields}, name)
    model = train.build(dataclasses.replace(config, weights=""), identity["classes"])
    model.load_state_dict(payload["state"]["parts"]["model"])
    return model, config, payload["position"]


def run(config: Config, job: Job) -> Measured:
    """Returns how many images, how long a descriptor is, and images a second (two passes each, loading included)."""
    model, trained, position = trained_model(config.checkpoint)
    if job.world.size > 1:
        raise UserError("extract.py runs in one process; start it without torchrun")
    model = model.to(job.device)
    parts, started = {split: train.open_split(trained, job, split) for split in SPLITS}, time.perf_counter()
    metrics = {}
    for split, people in parts.items():
        found = train.describe(trained, job, model, people)
        about = {"split": split, "data": people.digest, "trained": dataclasses.asdict(trained), "steps": position}
        descriptors.save(job.work_dir / f"{split}.pt", found, about)
        metrics[f"{split}_images"] = {"last": len(people)}
    seconds = time.perf_counter() - started
    metrics["dimensions"] = {"last": found.plain.shape[1]}
    metrics["images_s"] = {"last": sum(map(len, parts.values())) / seconds}
    return Measured(
        metrics=metrics,
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(trained)},
        scale={"steps": position},
        data={f"{people.name}/{split}": people.digest for split, people in parts.items()},
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
