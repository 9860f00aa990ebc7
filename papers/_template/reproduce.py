"""Which experiment measures which claim of paper.yaml.

python -m papers._template.reproduce --tier quick
"""

import torch

from common.cli import Job
from common.metrics.compute import parameters
from common.results.records import Measured
from common.results.reproduce import Experiment, main
from common.results.stages import by_stage, one_record, run_stage, share_of, tier_config

from . import train
from .bench import step_bench
from .model import Network

IMAGES_SEEN = 30 * 10_000  # in the paper's training
ARMS = {"norm": {}, "plain": {"norm": False}}  # changed settings


def costs(tier: str, job: Job) -> Measured:
    """Everything that needs no training: counts, and what must hold exactly."""
    model, image = Network().eval(), torch.randn(1, 3, 32, 32)
    mirrored = model.features(image.flip(3)).shape == model.features(image).shape
    return Measured.of({"parameters": parameters(model), "shape_differences": int(not mirrored)})


def step(tier: str, job: Job) -> Measured:
    """What the idea costs in time."""
    return Measured.of(step_bench(rounds=3, device=job.device), config={"batch": 64})


def arms(tier: str, job: Job) -> Measured:
    """One training an arm: same seed, schedule and data order."""
    stages = {arm: run_stage(train, tier_config(tier, job), job, arm, **changed) for arm, changed in ARMS.items()}
    return one_record(by_stage(stages), stages, "norm", share_of(IMAGES_SEEN, stages["norm"]))


EXPERIMENTS = {
    "costs": Experiment(costs, ("quick",)),
    "step": Experiment(step, ("quick",)),
    "arms": Experiment(arms, ("quick", "short", "full"), {"short": ("cifar10",), "full": ("cifar10",)}),
}

if __name__ == "__main__":
    main(EXPERIMENTS, __file__)
