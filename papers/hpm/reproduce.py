"""Which experiment measures which claim of paper.yaml.

python -m papers.hpm.reproduce --tier quick
"""

import dataclasses
from pathlib import Path

from common.cli import Job, load_config
from common.results.records import Measured
from common.results.reproduce import Experiment, main

from . import train
from .descriptors import match
from .extract import trained_model

FOLDER = Path(__file__).parent


def metric(value: float, n: int | None = None) -> dict:
    return {"last": value} | ({"n": n} if n else {})


# ------------------------------------------------------------------------------------------------ trainings
ARMS = {  # descriptors of 480 numbers (three scales: 476), equal epochs
    "global": {"scales": (1,), "dim": 480},
    "two": {"scales": (1, 2), "dim": 160},
    "three": {"scales": (1, 2, 4), "dim": 68},
    "pyramid": {},
    "stripes": {"scales": (8,), "dim": 60},
    "avg": {"pool": "avg"},
    "max": {"pool": "max"},
    "erasing": {"erasing": 0.5},
}
QUERIES = {  # the same people in the same pose, light and noise; the gallery has obstacles and shifts of its own
    "clean": {"occlusion": 0.0, "shift": 0.0},
    "occluded": {"occlusion": 1.0, "shift": 0.0},
    "shifted": {"occlusion": 0.0},
}


def arms(tier: str, job: Job) -> Measured:
    """All arms on drawn people from the same seed; mAP (A, flip test, L2) and Rank-1 on three kinds of queries."""
    metrics, configs, found = {}, {}, None
    for arm, changed in ARMS.items():
        config = load_config(train.Config, FOLDER, tier, "train", **changed)
        found = train.run(config, job.sub(arm))
        configs[arm] = found.config
        metrics |= {f"{arm}_{key}": value for key, value in found.metrics.items()}
        model = trained_model(str(job.work_dir / arm))[0].to(job.device)
        gallery = train.describe(config, job, model, train.open_split(config, job, "gallery"))
        for kind, options in QUERIES.items():
            people = train.open_split(config, job, "query", **options)
            result = match(train.describe(config, job, model, people), gallery, flip=True, l2=True)
            metrics |= {f"{arm}_{kind}_map": metric(result.map_a, len(people))}
            metrics |= {f"{arm}_{kind}_rank1": metric(result.cmc(1), len(people))}
    return Measured(metrics, config=configs, scale=found.scale)


EXPERIMENTS = {
    "arms": Experiment(arms, ("quick",)),
}

if __name__ == "__main__":
    main(EXPERIMENTS, __file__)
