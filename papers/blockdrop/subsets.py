"""Policies that do not look at the image: what a learned one must beat at the same number of blocks (Table 1).

`best_subset` searches; for small K it looks at the whole space of 2^K policies.
"""

import torch
from torch import Tensor

from .model import DroppableResNet

MOST_BLOCKS = 12  # up to here all 2^K policies are tried


def all_policies(num_blocks: int) -> Tensor:
    """(2^K, K) bool; row i has the bits of i, the first block the highest."""
    if not 1 <= num_blocks <= MOST_BLOCKS:
        raise ValueError(f"all policies of {num_blocks} blocks, expected 1 to {MOST_BLOCKS}")
    powers = 2 ** torch.arange(num_blocks - 1, -1, -1)
    return (torch.arange(2**num_blocks)[:, None] & powers) > 0


def first_k(num_blocks: int, k: int) -> Tensor:
    """The first k blocks. (K,) bool."""
    return torch.arange(num_blocks) < _checked(k, num_blocks)


def spread_k(num_blocks: int, k: int) -> Tensor:
    """k blocks at equal distances, the first among them. (K,) bool."""
    kept = torch.zeros(num_blocks, dtype=torch.bool)
    kept[torch.arange(_checked(k, num_blocks)) * num_blocks // max(k, 1)] = True
    return kept


def random_k(uniform: Tensor, k: float) -> Tensor:
    """For each image k random blocks; with a fraction, so many images keep one more that the mean is k.

    uniform (B, K + 1) in [0, 1) -> bool (B, K).
    """
    B, K = uniform.shape[0], uniform.shape[1] - 1
    if not 0 <= k <= K:
        raise ValueError(f"k={k} of {K} blocks, expected 0 to {K}")
    counts = int(k) + (uniform[:, K] < k - int(k)).long()
    rank = uniform[:, :K].argsort(1).argsort(1)
    return rank < counts.view(B, 1)


def _checked(k: int, num_blocks: int) -> int:
    if not 0 <= k <= num_blocks:
        raise ValueError(f"k={k} of {num_blocks} blocks, expected 0 to {num_blocks}")
    return k


@torch.inference_mode()
def correct_table(model: DroppableResNet, images: Tensor, labels: Tensor) -> Tensor:
    """Is image n classified right under policy i of `all_policies`? (N, 3, H, W), (N,) -> bool (N, 2^K).

    Policies with the same beginning share its work: 2^(K+1) - 2 block runs instead of K 2^K. The model must be in eval mode.
    """
    all_policies(model.num_blocks)  # for its check
    if model.training:
        raise ValueError("the model is in training mode: an image's answer would depend on its batch; call .eval()")
    answers = []

    def walk(x: Tensor, k: int) -> None:
        if k == model.num_blocks:
            answers.append(model.head(x).argmax(1) == labels)
            return
        walk(model.blocks[k].skip(x), k + 1)
        walk(model.blocks[k](x), k + 1)

    walk(model.features(images), 0)
    return torch.stack(answers, 1)


@torch.inference_mode()
def best_subset(model: DroppableResNet, batches: list[tuple[Tensor, Tensor]], k: int) -> Tensor:
    """The one policy of k blocks that is right for most of the given images: (K,) bool.

    batches: (images, labels), held-out ones. Exhaustive up to 12 blocks; beyond, from all blocks on, the one whose loss
    hurts least is taken away, one after the other. The first of equals is taken.
    """
    K = model.num_blocks
    _checked(k, K)
    if K <= MOST_BLOCKS:
        right = sum(correct_table(model, x, y).sum(0) for x, y in batches)
        policies = all_policies(K).to(right.device)
        return policies[right.where(policies.sum(1) == k, -1).argmax()].cpu()
    kept = torch.ones(K, dtype=torch.bool)
    while kept.sum() > k:
        candidates = kept.repeat(int(kept.sum()), 1)
        candidates[torch.arange(len(candidates)), kept.nonzero()[:, 0]] = False
        kept = candidates[torch.stack([_right(model, batches, policy) for policy in candidates]).argmax()]
    return kept


def _right(model: DroppableResNet, batches: list[tuple[Tensor, Tensor]], policy: Tensor) -> Tensor:
    return sum((model(x, policy.to(x.device).expand(len(x), -1)).argmax(1) == y).sum() for x, y in batches)
