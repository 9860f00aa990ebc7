"""Which experiment measures which claim.

python -m papers._template.reproduce --tier quick
"""

from common.cli import Job
from common.metrics.compute import parameters
from common.results.records import Measured
from common.results.reproduce import Experiment, main
from common.results.stages import run_stage

from . import train
from .model import Network


def costs(tier: str, job: Job) -> Measured:
    return Measured.of({"parameters": parameters(Network())})


def digits(tier: str, job: Job) -> Measured:
    return run_stage(train, tier, job, "train")


EXPERIMENTS = {
    "costs": Experiment(costs, ("quick",)),
    "digits": Experiment(digits, ("quick", "short", "full")),
}

if __name__ == "__main__":
    main(EXPERIMENTS, __file__)
