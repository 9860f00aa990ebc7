"""The training loss (section 3.4, equation 3): focal loss on the heat maps, associative embedding, offsets."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Output
from .targets import Targets

ALPHA, BETA = 2, 4
EPSILON = 1e-4


class Losses(NamedTuple):
    """Scalars, averaged over the stacks; pull and push already weighted."""

    focal: Tensor
    pull: Tensor
    push: Tensor
    offset: Tensor

    @property
    def total(self) -> Tensor:
        return self.focal + self.pull + self.push + self.offset


def focal_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """Of one heat map (any shape): the sum over cells, divided by the number of cells that are a keypoint (target 1).

    Near a keypoint a cell is penalised less, by (1 - target)^4. Without any keypoint the sum is not divided.
    """
    p = logits.float().sigmoid().clamp(EPSILON, 1 - EPSILON)
    found = (1 - p) ** ALPHA * p.log()
    empty = (1 - heat) ** BETA * p**ALPHA * (1 - p).log()
    peak = heat == 1
    return -torch.where(peak, found, empty).sum() / peak.sum().clamp_min(1)


def pull_push(top_left: Tensor, bottom_right: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tags (B, M) of the corners of objects, mask (B, M) 0 or 1: pull the two of an object together, push objects apart.

    Both are means within an image and sums over images. As in the official code an object is also pushed from itself, and
    1 / M is taken off every pair: a constant, about 1 for an image of a single object.
    """
    number = mask.sum(1, keepdim=True)
    mean = (top_left + bottom_right) / 2
    pull = ((top_left - mean) ** 2 + (bottom_right - mean) ** 2) * mask / (number + EPSILON)
    number, both = number[..., None], mask[:, None] * mask[:, :, None]
    distance = (mean[:, None] - mean[:, :, None]).abs()
    push = (F.relu(1 - distance) - 1 / (number + EPSILON)) * both / (number * (number - 1) + EPSILON)
    return pull.sum(), push.sum()


def offset_loss(offsets: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Smooth L1 of x and y, summed, per object of the batch: offsets and target (B, M, 2), mask (B, M)."""
    off = F.smooth_l1_loss(offsets, target, reduction="none").sum(2)
    return (off * mask).sum() / (mask.sum() + EPSILON)


def detection_loss(outputs: list[Output], target: Targets, pull: float = 0.1, push: float = 0.1) -> Losses:
    """Of all stacks; the outputs' tags and offsets at target.cells. Weights as in the paper: 0.1, 0.1, 1."""
    focal = pulled = pushed = offset = 0.0
    for output in outputs:
        focal += sum(focal_loss(logits, heat) for logits, heat in zip(output.heats, target.heats, strict=True))
        a, b = pull_push(*(tag.float() for tag in output.tags), target.mask)
        pulled, pushed = pulled + pull * a, pushed + push * b
        each = zip(output.offsets, target.offsets, strict=True)
        offset += sum(offset_loss(found.float(), wanted, target.mask) for found, wanted in each)
    return Losses(*(part / len(outputs) for part in (focal, pulled, pushed, offset)))
