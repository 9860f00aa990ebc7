"""Which experiment measures which claim.

python -m papers._template.reproduce --tier quick
"""

from pathlib import Path

from common.cli import Job, load_config
from common.metrics.compute import parameters
from common.results.records import Measured
from common.results.reproduce import Experiment, main

from . import train
from .model import Network

FOLDER = Path(__file__).parent


def costs(tier: str, job: Job) -> Measured:
    return Measured({"parameters": {"last": parameters(Network())}})


def digits(tier: str, job: Job) -> Measured:
    return train.run(load_config(train.Config, FOLDER, tier, "train"), job.sub("train"))


EXPERIMENTS = {
    "costs": Experiment(costs, ("quick",)),
    "digits": Experiment(digits, ("quick", "short", "full")),
}

if __name__ == "__main__":
    main(EXPERIMENTS, __file__)
