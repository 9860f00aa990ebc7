"""Evaluate a checkpoint of any stage: accuracy, blocks and multiply-adds an image, unique policies, use of each block.

    python -m papers.blockdrop.evaluate --set checkpoint=runs/blockdrop/finetune-full-s0

With `engine=true` (default) the predictions come from the engine that really skips; false: the masked form of training.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from common import cli, runtime
from common.checkpoints import read_checkpoint
from common.cli import Job, config_of
from common.datasets.classification import part
from common.results.records import Measured

from . import curriculum, finetune, train
from .cost import costs
from .engine import SkippingEngine
from .model import DroppableResNet
from .policy import PolicyNet
from .usage import evaluate_policies, greedy_policies, policy_metrics, right_answers


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of any stage, or its work dir (the newest one there)
    engine: bool = True  # predictions of the engine; false: of the masked training form
    test_images: int = -1  # -1: as in its own training; 0: all


def trained_model(name: str) -> tuple[DroppableResNet, PolicyNet | finetune.Told | None, train.Config, dict]:
    """(ResNet, its policy or None after stage 0, config of stage 0, payload), both networks in eval mode."""
    payload = read_checkpoint(name, finetune.SCRIPT, curriculum.SCRIPT, train.SCRIPT)
    identity, parts = payload["identity"], payload["state"]["parts"]
    settings = config_of(train.Config, identity.get("trained", identity), name)
    model = train.build(settings, identity["classes"])
    model.load_state_dict(parts["model"])
    model.eval()
    if identity["script"] == train.SCRIPT:
        return model, None, settings, payload
    if identity.get("policy", "learned") == "learned":
        stage_1 = config_of(curriculum.Config, identity.get("curriculum", identity), name)
        policy = curriculum.build_policy(stage_1, settings, model.num_blocks)
    else:
        policy = finetune.Told(config_of(finetune.Config, identity, name), model.num_blocks)
    policy.load_state_dict(parts["policy"])
    return model, policy.eval(), settings, payload


def usage(policies: Tensor, labels: Tensor, classes: int) -> dict:
    """Share of the images that keep each block; mean blocks of each class; the ten commonest policies, as bits, with counts."""
    blocks = policies.sum(1).double()
    unique, counts = policies.unique(dim=0, return_counts=True)
    commonest = counts.argsort(descending=True, stable=True)[:10]
    return {
        "block_use": [round(share, 4) for share in policies.double().mean(0).tolist()],
        "class_blocks": [round(blocks[labels == c].mean().item(), 3) for c in range(classes) if (labels == c).any()],
        "commonest": [["".join(map(str, unique[i].int().tolist())), int(counts[i])] for i in commonest],
    }


def run(config: Config, job: Job) -> Measured:
    """Accuracy and cost under the greedy policies (the fixed ones of a baseline, all blocks after stage 0)."""
    runtime.require_one_process(job.world, "evaluate.py")
    model, policy, settings, payload = trained_model(config.checkpoint)
    identity = payload["identity"]
    if config.test_images >= 0:
        settings = dataclasses.replace(settings, test_images=config.test_images)
    tests = part(settings, job, "test")
    tests.require_classes(identity["classes"])
    model = model.to(job.device)
    if policy is None:
        policies = torch.ones(tests.samples, model.num_blocks, dtype=torch.bool)
    elif isinstance(policy, PolicyNet):
        short = identity["script"] == curriculum.SCRIPT  # of fewer epochs than blocks: the first were not decided
        decided = min(model.num_blocks, identity["epochs"]) if short else model.num_blocks
        policies = greedy_policies(policy.to(job.device), tests.loader, decided)
    else:
        policies = policy.policies(tests.samples, job)
    if config.engine:
        engine = SkippingEngine(model)
        correct = right_answers(lambda x, u: engine(x, u)[0], policies, tests.loader)
    else:
        correct = evaluate_policies(model, policies, tests.loader, settings.amp)
    labels = torch.cat([y.cpu() for _, y in tests.loader.epoch(0)])
    cost = costs(model, policy if isinstance(policy, PolicyNet) else None, tests.size)
    return Measured(
        metrics=policy_metrics(policies, correct, cost),
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"epochs": identity["epochs"], "steps": payload["position"], "of": identity["script"]},
        data=tests.digests,
        artifacts=usage(policies, labels, tests.classes),
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
