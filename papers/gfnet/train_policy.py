"""Stage II: the networks of Stage I rest; a policy learns by PPO where to crop, rewarded by what the label gains.

    python -m papers.gfnet.train_policy --tier full --set checkpoint=runs/gfnet/train-full-s0

Every epoch tells the mean reward p_T[y] - p_1[y], both losses, the spread of the greedy places over the test images and the
accuracy of every step there. A policy that sends all images to one place stops the run. Official files train.py, network.py.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress, read_checkpoint
from common.cli import Job, config_of
from common.datasets.classification import part
from common.errors import UserError
from common.results.records import Measured, metric

from . import train
from .model import GFNet
from .places import by_image, draws, guarded, noted, places
from .policy import Locator, Policy
from .ppo import ENTROPY, ppo_loss, replay, returns, rewards, standardised

SCRIPT = "gfnet.train_policy"
COLLAPSED = 1e-4  # spread over the images below which all get the same crop; that of an untrained policy is larger


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py with steps > 1, or its work dir (the newest one there)
    conv: int = 0  # channels of the policy's 1x1 convolution, on e_t; 0: `wide` linear units instead (ResNet, DenseNet)
    wide: int = 2048
    hidden: int = 1024  # of the policy's GRU
    discount: float = 0.7  # gamma
    clip: float = 0.2
    ppo_epochs: int = 1  # updates a batch; 1, as released, is actor-critic: the clipping never acts
    value_weight: float = 0.5
    entropy_weight: float = 0.01  # without effect while the deviation is fixed: the entropy is a constant
    epochs: int = 15
    lr: float = 3e-4  # Adam, betas 0.9 and 0.999
    log_every: int = 20  # steps between looks at the reward and the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if min(self.epochs, self.ppo_epochs, self.log_every, self.save_every) < 1:
            raise ValueError("epochs, ppo_epochs, log_every and save_every must be at least 1")
        if self.conv < 0 or self.wide < 1 or self.hidden < 1:
            raise ValueError(f"conv={self.conv}, wide={self.wide}, hidden={self.hidden}; expected 0 or more, 1, 1")
        if not 0 <= self.discount <= 1 or not 0 < self.clip < 1:
            raise ValueError(f"discount is {self.discount} and clip {self.clip}; expected 0..1 and between 0 and 1")


def build(config: Config, model: GFNet) -> Policy:
    """The policy of a config for the feature maps of a network."""
    e = model.global_encoder.channels, model.global_encoder.map_size(model.patch)
    if config.conv:
        return Policy.conv(*e, config.conv, config.hidden)
    return Policy.linear(*e, (config.wide, config.hidden))


class Sums:
    """Of reward, policy loss and value loss over the steps of an epoch, on the device; a part of the checkpoint."""

    def __init__(self, device: torch.device):
        self.total = torch.zeros(3, device=device)

    def state_dict(self) -> dict:
        return {"total": self.total}

    def load_state_dict(self, state: dict) -> None:
        self.total.copy_(state["total"])


def improve(config: Config, policy: Policy, optimiser, locator: Locator, target: Tensor) -> Tensor:
    """PPO on one batch that `locator` has played, with standardised returns `target` (T-1, B).

    Returns the policy's and the critic's part of the loss, (2,), of the last update.
    """
    played = torch.stack(locator.log_probs)
    for _ in range(config.ppo_epochs):
        log_probs, values = replay(policy, locator.es, locator.locations)
        loss = ppo_loss(log_probs, played, values, target, config.clip, config.value_weight, config.entropy_weight)
        optimiser.zero_grad()
        loss.backward()
        runtime.average_gradients([p.grad for p in policy.parameters()])
        optimiser.step()
    value_loss = config.value_weight * F.mse_loss(values, target)
    return torch.stack([loss - value_loss + config.entropy_weight * ENTROPY, value_loss]).detach()


def run(config: Config, job: Job) -> Measured:
    """Train the policy; returns reward, spread and the accuracy of each step with greedy places, and the curve."""
    runtime.seed_everything(job.seed, job.deterministic)
    payload = read_checkpoint(config.checkpoint, train.SCRIPT)
    classes = payload["identity"]["classes"]
    settings = config_of(train.Config, payload["identity"], config.checkpoint)
    if settings.steps == 1:
        raise UserError(
            f"{config.checkpoint} was trained with steps=1: there is no crop to place; train it with 2 or more"
        )
    data, tests = (part(settings, job, which) for which in ("train", "test"))
    data.require_classes(classes)
    model = train.build(settings, classes)
    model.load_state_dict(payload["state"]["parts"]["model"])
    policy = build(config, model)
    # The networks themselves, not the name of their file, are what a resume must agree on.
    identity = {"script": SCRIPT, "seed": job.seed, "classes": classes, **dataclasses.asdict(config), "checkpoint": ""}
    identity |= {"network": runtime.weights_sha256(model), "trained": dataclasses.asdict(settings)}
    model = model.to(job.device).requires_grad_(False).eval()
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    policy = policy.to(job.device)
    runtime.broadcast_from_main(policy.parameters())
    optimiser = torch.optim.Adam(policy.parameters(), config.lr, betas=(0.9, 0.999), fused=True)

    sums = Sums(job.device)
    progress = Progress(job, identity, model=model, policy=policy, optimiser=optimiser, sums=sums)
    per_epoch = len(data.loader)
    stop = runtime.StopFlag(job.world)
    greedy = places("policy", job, "test", policy)

    for epoch in range(progress.step // per_epoch, config.epochs):
        start = progress.step % per_epoch
        batches = data.loader.epoch(epoch, start)
        for x, y in tqdm(batches, f"policy {epoch}", per_epoch - start, leave=False, disable=None):
            locator = Locator(policy, draws(job, "policy", progress.step, torch.randn))
            with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=settings.amp):
                steps = model(x, guarded(locator))
            label = torch.stack([s.logits.float().softmax(1).gather(1, y[:, None])[:, 0] for s in steps])
            reward = rewards(label)
            losses = improve(config, policy, optimiser, locator, standardised(returns(reward, config.discount)))
            mean_reward = reward.sum(0).mean()
            sums.total += torch.cat([mean_reward[None], losses])
            progress.step += 1
            if progress.step % config.log_every == 0 or progress.step % per_epoch == 0:
                runtime.require_finite(mean_reward, progress.step, config.lr, "mean reward")
                runtime.require_finite(losses.sum(), progress.step, config.lr, "policy loss")
            if progress.step % per_epoch == 0:
                total = runtime.sum_over_ranks(sums.total.clone()) / (per_epoch * job.world.size)
                names = ("mean_reward", "policy_loss", "value_loss")
                line = {"epoch": epoch} | dict(zip(names, total.tolist(), strict=True))
                found = []
                accuracies = train.step_accuracies(settings, model, tests.loader, job.world, noted(greedy, found))
                spread = runtime.gather_rows(by_image(found, settings.steps)).std(0)
                line |= {"spread": spread.mean().item()} | train.by_step(accuracies)
                progress.log(f"policy epoch {epoch + 1}/{config.epochs}", **line)
                sums.total.zero_()
                if (spread < COLLAPSED).all():
                    raise runtime.Collapsed(
                        f"after epoch {epoch + 1} the policy sends all {tests.samples} test images to the same places "
                        f"(standard deviation below {COLLAPSED:g}); lower lr (now {config.lr:g}), or train Stage I longer"
                    )
                progress.save(config.lr)
            elif progress.step % config.save_every == 0:
                progress.save(config.lr)
            if stop.at(progress.step):
                progress.save(config.lr)
                raise runtime.Stopped(f"the policy at step {progress.step} of {per_epoch * config.epochs}")

    last = progress.curve[-1]
    metrics = train.step_metrics(last, tests.samples) | {name: metric(last[name]) for name in ("mean_reward", "spread")}
    return Measured(
        metrics=metrics | {"policy_seconds": metric(round(progress.seconds, 2))},
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"epochs": config.epochs, "steps": progress.step, "batch": settings.batch_size},
        data=data.digests | tests.digests,
        numerics={"amp": settings.amp, "channels_last": settings.channels_last},
        curve=progress.curve,
        weights_sha256=runtime.weights_sha256(model, policy),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
