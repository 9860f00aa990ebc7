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
from common.results.records import Measured

from . import descriptors, train
from .model import HPM


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, or its work dir


def trained_model(name: str) -> tuple[HPM, train.Config, int]:
    """(network with its weights, config of its training, steps trained) of a checkpoint."""
    payload = read_checkpoint(name, train.SCRIPT)
    identity = payload["identity"]
    config = cli.config_of(train.Config, identity, name)
    model = train.build(config, identity["classes"])
    model.load_state_dict(payload["state"]["parts"]["model"])
    return model, config, payload["position"]


def run(config: Config, job: Job) -> Measured:
    """Returns how many images, how long a descriptor is, and images a second (two passes each, loading included)."""
    runtime.require_one_process(job.world, "extract.py")
    model, trained, position = trained_model(config.checkpoint)
    model = model.to(job.device)
    parts = {split: train.open_split(trained, job, split) for split in descriptors.SPLITS}
    started, metrics = time.perf_counter(), {}
    for split, people in parts.items():
        found = train.describe(trained, job, model, people)
        about = {"split": split, "data": people.digest, "trained": dataclasses.asdict(trained), "steps": position}
        descriptors.save(job.work_dir / f"{split}.pt", found, about)
        metrics[f"{split}_images"] = len(people)
    seconds = time.perf_counter() - started
    metrics["dimensions"] = found.plain.shape[1]
    metrics["images_per_second"] = sum(map(len, parts.values())) / seconds
    return Measured.of(
        metrics,
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(trained)},
        scale={"steps": position},
        data={f"{people.name}/{split}": people.digest for split, people in parts.items()},
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
