"""Stage 1: the policy network learns, block by block from the last, which blocks of the frozen ResNet to drop.

    python -m papers.blockdrop.curriculum --tier full --set checkpoint=runs/blockdrop/train-full-s0

Self-critical REINFORCE; at epoch e the last e + 1 blocks are decided. Ends with accuracy, blocks kept and unique policies
on the test split. Official file cl_training.py.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress, read_checkpoint
from common.cli import Job, config_of
from common.datasets.classification import part
from common.results.records import Measured, metric

from . import reinforce, train
from .cost import costs
from .policy import PolicyNet, load_resnet18, policy_cifar, policy_imagenet
from .usage import evaluate_policies, greedy_policies, policy_metrics, require_decisions

SCRIPT = "blockdrop.curriculum"


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, or its work dir (the newest one there)
    policy_widths: tuple[int, ...] = (16, 32, 64)  # cifar: channels of the policy network
    policy_weights: str = ""  # torchvision networks: state dict file of a ResNet-18 to start the policy network from
    epochs: int = 5000
    batch_size: int = 2048  # over all ranks
    lr: float = 1e-3
    gamma: float = 1.0  # penalty of a wrong prediction
    alpha: float = 0.8  # keep probabilities are bounded to [1 - alpha, alpha]
    beta: float = 0.1  # weight of the entropy term
    test_every: int = 0  # epochs between looks at the test set, for the curve; 0: only at the end
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1 or self.log_every < 1 or self.save_every < 1:
            raise ValueError("epochs, batch_size, log_every and save_every must be at least 1")
        if not 0.5 < self.alpha <= 1 or self.beta < 0 or self.gamma < 0:
            raise ValueError(f"alpha is {self.alpha}, beta {self.beta}, gamma {self.gamma}; expected 0.5 < alpha <= 1, "
                             "beta >= 0 and gamma >= 0")  # fmt: skip


def build_policy(config: Config, settings: train.Config, num_blocks: int) -> PolicyNet:
    """The policy network that goes with a ResNet, untrained."""
    if settings.network == "torchvision":
        return policy_imagenet(num_blocks)
    return policy_cifar(num_blocks, config.policy_widths)


def draws(job: Job, step: int, shape: tuple[int, ...], what: str = "policy") -> Tensor:
    """Uniform numbers of a step and rank: a pure function, so that a resumed run draws the same."""
    generator = runtime.keyed_generator(job.seed, what, step, job.world.rank)
    return torch.rand(shape, generator=generator).to(job.device, non_blocking=True)


def zero_gradients(*networks: torch.nn.Module) -> None:
    """Zeros, not None: a block that one rank's batch drops and another's keeps must still be averaged."""
    for network in networks:
        for p in network.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()


def run(config: Config, job: Job) -> Measured:
    """Train the policy network; returns accuracy and cost under its greedy policies on the test split, and the curve."""
    runtime.seed_everything(job.seed, job.deterministic)
    payload = read_checkpoint(config.checkpoint, train.SCRIPT)
    settings = config_of(train.Config, payload["identity"], config.checkpoint)
    data = part(dataclasses.replace(settings, batch_size=config.batch_size), job, "train")
    tests = part(settings, job, "test")
    watched = part(settings, job, "held_out").loader if settings.held_out else tests.loader  # images alone, no labels
    classes = payload["identity"]["classes"]
    data.require_classes(classes)
    model = train.build(settings, classes)
    model.load_state_dict(payload["state"]["parts"]["model"])
    K = model.num_blocks
    identity = {"script": SCRIPT, "seed": job.seed, **dataclasses.asdict(config), "checkpoint": ""}
    identity |= {"resnet": runtime.weights_sha256(model), "classes": classes}
    identity |= {"trained": dataclasses.asdict(settings)}
    policy_net = build_policy(config, settings, K)
    if config.policy_weights:
        train.take_weights(load_resnet18, policy_net, config.policy_weights)
    cost = costs(model, policy_net, data.size)
    model, policy_net = model.to(job.device).eval().requires_grad_(False), policy_net.to(job.device)
    if settings.channels_last:
        model, policy_net = (net.to(memory_format=torch.channels_last) for net in (model, policy_net))
    optimiser = torch.optim.Adam(policy_net.parameters(), config.lr, fused=True)

    progress = Progress(job, identity, model=model, policy=policy_net, optimiser=optimiser)
    runtime.broadcast_from_main([*policy_net.parameters(), *policy_net.buffers()])
    per_epoch = len(data.loader)
    stop = runtime.StopFlag(job.world)

    for epoch in range(progress.step // per_epoch, config.epochs):
        decided = min(K, epoch + 1)
        start = progress.step % per_epoch
        batches = data.loader.epoch(epoch, start)
        for x, y in tqdm(batches, f"curriculum {epoch}", per_epoch - start, leave=False, disable=None):
            s = policy_net(x)
            with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=settings.amp):
                u = reinforce.sample(reinforce.bounded(s, config.alpha), draws(job, progress.step, s.shape))
                both = torch.cat([reinforce.forced(u, decided), reinforce.forced(reinforce.greedy(s), decided)])
                shared = model.features(x, K - decided)  # both passes keep these blocks
                logits = model.forward_from(torch.cat([shared, shared]), both, K - decided)
                sampled, baseline = reinforce.rewards(both, logits.argmax(1) == y.repeat(2), config.gamma).chunk(2)
            u, advantage = both[: len(x)], sampled - baseline
            loss = reinforce.curriculum_loss(s, u, advantage, decided, config.alpha, config.beta)
            zero_gradients(policy_net)
            loss.backward()
            runtime.average_gradients(p.grad for p in policy_net.parameters())
            optimiser.step()
            progress.loss_sum += sampled.mean()
            progress.step += 1
            if progress.step % config.log_every == 0:
                runtime.require_finite(loss, progress.step, config.lr)
            if progress.step % per_epoch == 0:
                reward = runtime.require_finite(progress.loss_sum / per_epoch, progress.step, config.lr, "mean reward")
                runtime.broadcast_from_main(policy_net.buffers())
                policies = greedy_policies(policy_net, watched, decided)
                line = {"epoch": epoch, "decided": decided, "reward": round(reward, 5)}
                line |= {"blocks": policies.sum(1).double().mean().item()}
                if config.test_every and (epoch + 1) % config.test_every == 0:
                    chosen = greedy_policies(policy_net, tests.loader, decided)
                    correct = evaluate_policies(model, chosen, tests.loader, settings.amp)
                    line["accuracy"] = policy_metrics(chosen, correct, cost)["accuracy"]["last"]
                progress.log(f"curriculum epoch {epoch + 1}/{config.epochs}", **line)
                progress.save(config.lr)
                if decided == K:
                    require_decisions(policies, f"after epoch {epoch + 1}")
            elif progress.step % config.save_every == 0:
                progress.save(config.lr)
            if stop.at(progress.step):
                progress.save(config.lr)
                raise runtime.Stopped(f"the curriculum at step {progress.step} of {per_epoch * config.epochs}")

    policies = greedy_policies(policy_net, tests.loader, min(K, config.epochs))
    correct = evaluate_policies(model, policies, tests.loader, settings.amp)
    return Measured(
        metrics=policy_metrics(policies, correct, cost) | {"curriculum_seconds": metric(round(progress.seconds, 2))},
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"epochs": config.epochs, "steps": progress.step, "batch": config.batch_size},
        data=data.digests | tests.digests,
        numerics={"amp": settings.amp, "channels_last": settings.channels_last},
        curve=progress.curve,
        weights_sha256=runtime.weights_sha256(policy_net),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
