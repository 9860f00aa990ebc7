"""What a policy network decides on a whole split, what that costs, and whether it still decides anything."""

from collections.abc import Callable

import torch
from torch import Tensor

from common import runtime
from common.metrics.accuracy import evaluating
from common.results.records import metric

from .cost import Cost, mult_adds
from .model import DroppableResNet
from .policy import PolicyNet
from .reinforce import forced, greedy


def greedy_policies(policy_net: PolicyNet, loader, decided: int | None = None) -> Tensor:
    """u~ of every image of this rank's share of a split, in its order: bool (N, K), on the CPU."""
    with evaluating(policy_net):
        found = [greedy(policy_net(x)).cpu() for x, _ in loader.epoch(0)]
    return forced(torch.cat(found), policy_net.num_blocks if decided is None else decided)


def right_answers(answer: Callable[[Tensor, Tensor], Tensor], policies: Tensor, loader) -> Tensor:
    """Is each image classified right under its row of policies (N, K)? bool (N,), on the CPU; this rank's share.

    answer: images and their policies -> logits.
    """
    found, first = [], 0
    for x, y in loader.epoch(0):
        u = policies[first : first + len(x)].to(x.device)
        found.append(answer(x, u).argmax(1).eq(y).cpu())
        first += len(x)
    return torch.cat(found)


def evaluate_policies(model: DroppableResNet, policies: Tensor, loader, amp: bool = False) -> Tensor:
    """`right_answers` of the masked form."""
    with evaluating(model, amp):
        return right_answers(model, policies, loader)


def policy_metrics(policies: Tensor, correct: Tensor, cost: Cost) -> dict[str, dict]:
    """What the paper reports of policies (N, K), correct (N,), of all ranks: means and spreads over images."""
    policies, correct = runtime.gather_rows(policies), runtime.gather_rows(correct)
    blocks, each = policies.sum(1).double(), mult_adds(cost, policies)
    whole = cost.fixed + sum(cost.blocks)  # the ResNet alone: what the paper compares with
    found = {
        "accuracy": 100 * correct.double().mean(),
        "blocks": blocks.mean(),
        "blocks_std": blocks.std(correction=0),
        "unique_policies": len(policies.unique(dim=0)),
        "mult_adds": each.mean(),
        "mult_adds_std": each.std(correction=0),
        "mult_adds_share": each.mean() / whole,
        "mult_adds_share_min": each.amin() / whole,
    }
    return {name: metric(value, len(policies)) for name, value in found.items()}


def require_decisions(policies: Tensor, when: str) -> None:
    """Raise Collapsed when every image, on all ranks, keeps every block, or drops every one."""
    share = runtime.gather_rows(policies).double().mean()
    if share in (0, 1):
        what, cure = ("drops", "raise") if share == 0 else ("keeps", "lower")
        raise runtime.Collapsed(
            f"the policy collapsed {when}: every image {what} all {policies.shape[1]} blocks; the last checkpoint is "
            f"kept: {cure} gamma, or lower the learning rate, and start again"
        )
