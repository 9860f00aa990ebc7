"""Stage III: train the networks once more, now on the crops the policy chooses; the policy itself rests.

    python -m papers.gfnet.finetune --tier full --set checkpoint=runs/gfnet/train_policy-full-s0

`locations=random` and `locations=centre` give the same fine-tuning, from the same weights, to crops that nothing chose: the
baselines. Ends with the accuracy of every step. Official file train.py.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from common import cli, runtime
from common.checkpoints import read_checkpoint
from common.cli import Job, config_of
from common.datasets.classification import part
from common.results.records import Measured

from . import train, train_policy
from .places import places

SCRIPT = "gfnet.finetune"


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train_policy.py, or its work dir (the newest one there)
    locations: Literal["policy", "random", "centre"] = "policy"  # of the crops; of the policy's, drawn around its mean
    epochs: int = 60
    lr: float = 0.01  # of the encoders; both rates follow a cosine to 0, epoch by epoch
    classifier_lr: float = 0.01
    test_every: int = 0  # epochs between looks at the test set, for the curve; 0: only at the end
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if self.epochs < 1 or self.log_every < 1 or self.save_every < 1:
            raise ValueError("epochs, log_every and save_every must be at least 1")


def run(config: Config, job: Job) -> Measured:
    """Fine-tune on chosen crops; returns the accuracy of each step on the test split after the last epoch."""
    runtime.seed_everything(job.seed, job.deterministic)
    payload = read_checkpoint(config.checkpoint, train_policy.SCRIPT)
    before, weights = payload["identity"], payload["state"]["parts"]
    settings = config_of(train.Config, before["trained"], config.checkpoint)
    data, tests = (part(settings, job, which) for which in ("train", "test"))
    data.require_classes(before["classes"])
    model = train.build(settings, data.classes)
    model.load_state_dict(weights["model"])
    chosen = config_of(train_policy.Config, before, config.checkpoint)
    policy = train_policy.build(chosen, model).requires_grad_(False)
    policy.load_state_dict(weights["policy"])
    identity = {"script": SCRIPT, "seed": job.seed, "classes": data.classes, **dataclasses.asdict(config)}
    # The networks themselves, not the name of their file, are what a resume must agree on.
    identity |= {"checkpoint": "", "network": runtime.weights_sha256(model, policy)}
    identity |= {"trained": dataclasses.asdict(settings), "policy": dataclasses.asdict(chosen)}

    policy = policy.to(job.device)
    crops = places(config.locations, job, "finetune", policy, sampled=True)
    test = places(config.locations, job, "test", policy)
    # This stage's epochs and rates, Stage I's all else.
    own = ("epochs", "lr", "classifier_lr", "test_every", "log_every", "save_every")
    recipe = dataclasses.replace(settings, **{key: getattr(config, key) for key in own})
    progress, metrics = train.fit(recipe, job, identity, model, data, tests, crops, test, policy=policy)
    return Measured(
        metrics=metrics,
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"epochs": config.epochs, "steps": progress.step, "batch": settings.batch_size},
        data=data.digests | tests.digests,
        numerics={"amp": settings.amp, "channels_last": settings.channels_last},
        curve=progress.curve,
        weights_sha256=runtime.weights_sha256(model, policy),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
