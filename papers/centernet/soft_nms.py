"""Gaussian soft-NMS: neighbours of a picked box lose score instead of their place (Bodla et al. 2017), for whole batches.

A picked score is never below the next one, so picking over all classes at once and stopping after `keep` picks gives
the best `keep` of running each class to its end: at most `keep` short steps, whatever the number of boxes.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """Up to `keep` boxes an image, best first; score -1 fills up."""

    index: Tensor  # (B, keep) int64 into the boxes given
    scores: Tensor  # (B, keep)
    boxes: Tensor  # (B, keep, 4), moved where they were merged


def overlaps(box: Tensor, boxes: Tensor) -> Tensor:
    """IoU of (B, 1, 4) with (B, N, 4): (B, N), with CornerNet's pixels: a side of x2 - x1 + 1."""
    low, high = torch.maximum(box[..., :2], boxes[..., :2]), torch.minimum(box[..., 2:], boxes[..., 2:])
    shared = (high - low + 1).clamp_min(0).prod(2)
    areas = [(b[..., 2:] - b[..., :2] + 1).prod(2) for b in (box, boxes)]
    return shared / (areas[0] + areas[1] - shared)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    keep: int = 100,
    sigma: float = 0.5,
    floor: float = 0.001,
    corner_scores: Tensor | None = None,
    weight_exponent: float = 10.0,
) -> Kept:
    """boxes (B, N, 4), scores (B, N) with -1 for none, labels (B, N). A score falls by exp(-IoU^2 / sigma); a box that
    falls below `floor` is dropped.

    corner_scores (B, N, 2) asks for merging, as the multi-scale test does: a picked box becomes the mean of itself and the boxes
    of its class still there, its first corner weighted by their first corners' scores and its second by their second's,
    times (1 - decay)^weight_exponent. Without any weight, or where its corners would cross (each is a mean of its own), it stays
    as it is.

    The official loop lets a stale copy of the last box survive when a box is dropped, and when merging swaps boxes without
    their corner scores; neither is repeated here.
    """
    B, N, _ = boxes.shape
    scores, keep = scores.clone(), min(keep, N)
    index = torch.zeros(B, keep, dtype=torch.int64, device=boxes.device)
    found, moved = scores.new_full((B, keep), -1.0), boxes.new_zeros(B, keep, 4)
    for i in range(keep):
        best, at = scores.max(1, keepdim=True)
        box = boxes.gather(1, at[..., None].expand(-1, -1, 4))
        index[:, i], found[:, i], moved[:, i] = at[:, 0], best[:, 0], box[:, 0]
        overlap = overlaps(box, boxes)
        near = (labels == labels.gather(1, at)) & (overlap > 0) & (scores > -1)
        near = near.scatter(1, at, False)
        decay = torch.where(near, torch.exp(-overlap * overlap / sigma), 1.0)
        if corner_scores is not None:
            own = torch.zeros_like(scores).scatter(1, at, 1.0)  # the picked box itself has weight 1
            weights = (own + (1 - decay) ** weight_exponent * near)[..., None] * corner_scores  # (B, N, 2)
            weights = weights.repeat_interleave(2, 2)
            total = weights.sum(1)
            merged = (weights * boxes).sum(1) / torch.where(total > 0, total, 1)
            sound = (total > 0).all(1) & (merged[:, :2] <= merged[:, 2:]).all(1)
            moved[:, i] = torch.where(sound[:, None], merged, moved[:, i])
        scores = scores * decay
        scores = torch.where(near & (scores < floor), -1.0, scores).scatter(1, at, -1.0)
    return Kept(index, found, moved)
