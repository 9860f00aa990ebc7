"""Stage 2: the ResNet learns to work with dropped blocks; the policy network goes on learning with it.

    python -m papers.blockdrop.finetune --tier full --set checkpoint=runs/blockdrop/curriculum-full-s0
    python -m papers.blockdrop.finetune --tier full --set checkpoint=... policy=static blocks=17      (a baseline)

With policy=random, first, spread or static the ResNet alone is fine-tuned, as long and at the same rate, under policies
of `blocks` blocks that do not look at the image. Official file finetune.py.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress, read_checkpoint
from common.cli import Job, config_of
from common.datasets.classification import part
from common.errors import UserError
from common.results.records import Measured, metric

from . import curriculum, reinforce, subsets, train
from .cost import costs
from .model import DroppableResNet
from .usage import evaluate_policies, greedy_policies, policy_metrics, require_decisions

SCRIPT = "blockdrop.finetune"


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of curriculum.py, or its work dir (the newest one there)
    policy: Literal["learned", "random", "first", "spread", "static"] = "learned"
    blocks: float = 0.0  # baselines: blocks kept, in the mean over images
    epochs: int = 2000
    batch_size: int = 256  # over all ranks
    lr: float = 1e-4
    milestones: tuple[int, ...] = (1600,)  # epochs at whose start the rate falls to a tenth
    gamma: float = 10.0  # penalty of a wrong prediction
    alpha: float = 0.8  # keep probabilities are bounded to [1 - alpha, alpha]
    test_every: int = 0  # epochs between looks at the test set, for the curve; 0: only at the end
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1 or self.log_every < 1 or self.save_every < 1:
            raise ValueError("epochs, batch_size, log_every and save_every must be at least 1")
        if not 0.5 < self.alpha <= 1 or self.gamma < 0:
            raise ValueError(f"alpha is {self.alpha} and gamma {self.gamma}; expected 0.5 < alpha <= 1 and gamma >= 0")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m >= self.epochs for m in self.milestones):
            raise ValueError(f"milestones are rising epochs below {self.epochs}; they are {list(self.milestones)}")
        if (self.policy == "learned") != (self.blocks == 0):
            raise ValueError(f"policy={self.policy} with blocks={self.blocks:g}; a learned policy chooses how many itself "
                             "(blocks=0), the others are told")  # fmt: skip


class Told(nn.Module):
    """The policies of a baseline, the same for all images, or random for each; `blocks` of them in the mean.

    kept (2, K) bool: a policy of floor(blocks) blocks and one of a block more; with a fraction in `blocks` so many images,
    drawn at random, get the second that the mean comes out.
    """

    def __init__(self, config: Config, num_blocks: int):
        super().__init__()
        if not 0 < config.blocks <= num_blocks:
            raise UserError(f"blocks is {config.blocks:g}; expected more than 0, at most {num_blocks}")
        self.random, self.blocks, self.fewer = config.policy == "random", config.blocks, math.floor(config.blocks)
        choose = subsets.spread_k if config.policy == "spread" else subsets.first_k  # static: `choose` replaces it
        self.register_buffer("kept", torch.stack([choose(num_blocks, k) for k in self._sizes(num_blocks)]))

    def _sizes(self, num_blocks: int) -> tuple[int, int]:
        return self.fewer, min(self.fewer + 1, num_blocks)

    def choose(self, model: DroppableResNet, held_out) -> None:
        """The best subsets on held-out images, for this network as it is."""
        if held_out is None:
            raise UserError("policy=static is chosen on held-out images; train stage 0 with held_out=<images>")
        batches = list(held_out.epoch(0))
        for row, k in zip(self.kept, self._sizes(model.num_blocks), strict=True):
            row.copy_(subsets.best_subset(model.eval(), batches, k))

    def policies(self, n: int, job: Job, what: str = "test", step: int = 0) -> Tensor:
        """bool (n, K); what is drawn is a pure function of the seed, `what` and the step."""
        uniform = curriculum.draws(job, step, (n, self.kept.shape[1] + 1), what)
        if self.random:
            return subsets.random_k(uniform, self.blocks)
        return self.kept[(uniform[:, -1] < self.blocks - self.fewer).long()]


def run(config: Config, job: Job) -> Measured:
    """Fine-tune; returns accuracy and cost on the test split under the policies of the test, and the curve."""
    runtime.seed_everything(job.seed, job.deterministic)
    payload = read_checkpoint(config.checkpoint, curriculum.SCRIPT)
    before = payload["identity"]
    settings = config_of(train.Config, before["trained"], config.checkpoint)
    stage_1 = config_of(curriculum.Config, before, config.checkpoint)
    data = part(dataclasses.replace(settings, batch_size=config.batch_size), job, "train")
    tests = part(settings, job, "test")
    held_out = part(settings, job, "held_out").loader if settings.held_out else None
    model = train.build(settings, before["classes"])
    K, learned = model.num_blocks, config.policy == "learned"
    model.load_state_dict(payload["state"]["parts"]["model"])
    if learned:
        policy = curriculum.build_policy(stage_1, settings, K)
        policy.load_state_dict(payload["state"]["parts"]["policy"])
    else:
        policy = Told(config, K)
    identity = {"script": SCRIPT, "seed": job.seed, **dataclasses.asdict(config), "checkpoint": ""}
    identity |= {"networks": runtime.weights_sha256(model, policy), "classes": before["classes"]}
    identity |= {"trained": before["trained"], "curriculum": dataclasses.asdict(stage_1) | {"checkpoint": ""}}
    cost = costs(model, policy if learned else None, data.size)
    model, policy = model.to(job.device), policy.to(job.device)
    if settings.channels_last:
        model, policy = (net.to(memory_format=torch.channels_last) for net in (model, policy))
    if config.policy == "static":
        policy.choose(model, held_out)
    trained = [*model.parameters(), *policy.parameters()]
    optimiser = torch.optim.Adam(trained, config.lr, fused=True)

    progress = Progress(job, identity, model=model.train(), policy=policy.train(), optimiser=optimiser)
    runtime.broadcast_from_main([*trained, *model.buffers(), *policy.buffers()])
    per_epoch = len(data.loader)
    stop = runtime.StopFlag(job.world)

    def tested() -> dict[str, dict]:
        """On the test split, under greedy policies or those of the baseline."""
        share = len(range(job.world.rank, tests.samples, job.world.size))
        policies = greedy_policies(policy, tests.loader) if learned else policy.policies(share, job).cpu()
        return policy_metrics(policies, evaluate_policies(model, policies, tests.loader, settings.amp), cost)

    for epoch in range(progress.step // per_epoch, config.epochs):
        lr = train.learning_rate(config, epoch)
        for group in optimiser.param_groups:
            group["lr"] = lr
        start = progress.step % per_epoch
        batches = data.loader.epoch(epoch, start)
        for x, y in tqdm(batches, f"finetune {epoch}", per_epoch - start, leave=False, disable=None):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.amp):
                if learned:
                    s = policy(x)
                    u = reinforce.sample(
                        reinforce.bounded(s, config.alpha), curriculum.draws(job, progress.step, s.shape)
                    )
                    with torch.no_grad():  # in training mode too, so that batch norm moves a second time
                        greedy = reinforce.greedy(s)
                        baseline = reinforce.rewards(greedy, model(x, greedy).argmax(1) == y, config.gamma)
                else:
                    u = policy.policies(len(x), job, "policy", progress.step)
                logits = model(x, u)
                loss = cross_entropy = F.cross_entropy(logits, y)
            if learned:
                advantage = reinforce.rewards(u, logits.argmax(1) == y, config.gamma) - baseline
                # The sum over the batch of all ranks; average_gradients divides by their number.
                loss = loss + job.world.size * reinforce.policy_loss(s, u, advantage, config.alpha)
            curriculum.zero_gradients(model, policy)
            loss.backward()
            runtime.average_gradients(p.grad for p in trained)
            optimiser.step()
            progress.loss_sum += cross_entropy.detach()
            progress.step += 1
            if progress.step % config.log_every == 0:
                runtime.require_finite(loss, progress.step, lr)
            if progress.step % per_epoch == 0:
                line = {"epoch": epoch, "lr": lr}
                line["train_loss"] = round(runtime.require_finite(progress.loss_sum / per_epoch, progress.step, lr), 5)
                runtime.broadcast_from_main([*model.buffers(), *policy.buffers()])
                if learned:
                    policies = greedy_policies(policy, held_out or tests.loader)  # images alone, no labels
                    line["blocks"] = policies.sum(1).double().mean().item()
                if config.test_every and (epoch + 1) % config.test_every == 0:
                    line["accuracy"] = tested()["accuracy"]["last"]
                progress.log(f"finetune epoch {epoch + 1}/{config.epochs}", **line)
                progress.save(lr)
                if learned:
                    require_decisions(policies, f"after epoch {epoch + 1}")
            elif progress.step % config.save_every == 0:
                progress.save(lr)
            if stop.at(progress.step):
                progress.save(lr)
                raise runtime.Stopped(f"fine-tuning at step {progress.step} of {per_epoch * config.epochs}")

    return Measured(
        metrics=tested() | {"finetune_seconds": metric(round(progress.seconds, 2))},
        config=dataclasses.asdict(config) | {"trained": before["trained"], "curriculum": dataclasses.asdict(stage_1)},
        scale={"epochs": config.epochs, "steps": progress.step, "batch": config.batch_size},
        data=data.digests | tests.digests,
        numerics={"amp": settings.amp, "channels_last": settings.channels_last},
        curve=progress.curve,
        artifacts={} if learned else {"kept": policy.kept.int().tolist()},
        weights_sha256=runtime.weights_sha256(model, policy),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
