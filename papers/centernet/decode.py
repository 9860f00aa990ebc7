"""From heat maps to boxes: peaks, pairs of corners, and the centre that a true box must have (section 3.2)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Output

SMALL_BOX = 150.0**2  # square pixels: up to here a central region is a third of the box (n = 3), beyond a fifth (n = 5)


class Peaks(NamedTuple):
    """The K strongest local maxima of a heat map, best first; each (B, K)."""

    scores: Tensor
    classes: Tensor
    cells: Tensor  # flat: y w + x


class Candidates(NamedTuple):
    """Pairs of corners and centres of B images; coordinates in the unit of the maps until they are brought to the image.

    A pair that is none has score -1. centers (B, K, 2) x, y; without a centre branch K is 0.
    """

    boxes: Tensor  # (B, N, 4) x1, y1, x2, y2
    scores: Tensor  # (B, N) mean of the two corners'
    corner_scores: Tensor  # (B, N, 2)
    labels: Tensor  # (B, N) int64
    centers: Tensor  # (B, K, 2)
    center_scores: Tensor  # (B, K)
    center_labels: Tensor  # (B, K) int64


def peaks(logits: Tensor, k: int = 70) -> Peaks:
    """logits (B, classes, h, w): cells that no neighbour of the 3 x 3 around exceeds, over all classes together."""
    heat = logits.float().sigmoid()
    heat = heat * (F.max_pool2d(heat, 3, 1, 1) == heat)
    cells = heat.shape[2] * heat.shape[3]
    scores, index = heat.flatten(1).topk(min(k, heat[0].numel()))
    return Peaks(scores, index.div(cells, rounding_mode="floor"), index % cells)


def points(found: Peaks, offsets: Tensor, width: int) -> Tensor:
    """(B, K, 2) x, y in cells: where the peaks are, moved by their offsets (B, K, 2)."""
    at = torch.stack([found.cells % width, found.cells.div(width, rounding_mode="floor")], 2)
    return at + offsets.float()


def pair(output: Output, found: list[Peaks], width: int, tag_distance: float = 0.5, number: int = 1000) -> Candidates:
    """All K x K pairs of corners, the `number` best of them, and the centres; `output` read at the peaks `found`.

    No pair: classes differ, tags differ by more than `tag_distance`, or the second corner lies left of or above the first.
    """
    top_left, bottom_right = found[:2]
    B, K = top_left.scores.shape
    first, second = (points(p, o, width) for p, o in zip(found[:2], output.offsets[:2], strict=True))
    corners = torch.cat([first[:, :, None].expand(B, K, K, 2), second[:, None].expand(B, K, K, 2)], 3)
    tags = (output.tags[0].float()[:, :, None] - output.tags[1].float()[:, None]).abs()
    fits = (top_left.classes[:, :, None] == bottom_right.classes[:, None]) & (tags <= tag_distance)
    fits &= (corners[..., 2:] >= corners[..., :2]).all(3)
    both = torch.stack(torch.broadcast_tensors(top_left.scores[:, :, None], bottom_right.scores[:, None]), 3)
    scores, best = torch.where(fits, both.mean(3), -1.0).flatten(1).topk(min(number, K * K))

    def chosen(x: Tensor) -> Tensor:
        return x.flatten(1, 2).gather(1, best[..., None].expand(-1, -1, x.shape[3]))

    labels = top_left.classes.gather(1, best.div(K, rounding_mode="floor"))
    if len(found) == 2:
        none = scores.new_zeros(B, 0)
        return Candidates(chosen(corners), scores, chosen(both), labels, scores.new_zeros(B, 0, 2), none, none.long())
    center = points(found[2], output.offsets[2], width)
    return Candidates(chosen(corners), scores, chosen(both), labels, center, found[2].scores, found[2].classes)


def central_region(boxes: Tensor) -> Tensor:
    """(..., 4) boxes to their middle third, of boxes above 150 x 150 pixels their middle fifth (equations 1 and 2)."""
    sides = boxes[..., 2:] - boxes[..., :2]
    n = torch.where(sides.prod(-1, keepdim=True) <= SMALL_BOX, 3.0, 5.0)
    middle, half = (boxes[..., :2] + boxes[..., 2:]) / 2, sides / (2 * n)
    return torch.cat([middle - half, middle + half], -1)


def require_center(found: Candidates) -> tuple[Tensor, Tensor]:
    """Scores (B, N) of boxes as triplets, -1 without a centre, and the index (B, N) of the centre that a box has.

    A box keeps its place if a centre of its class lies strictly inside its central region; its score is then the mean of
    the three keypoints'. Of several centres the first counts, not the best (official code).
    """
    region = central_region(found.boxes)[:, :, None]  # (B, N, 1, 4)
    at = found.centers[:, None]
    inside = ((at > region[..., :2]) & (at < region[..., 2:])).all(3)
    inside &= found.labels[:, :, None] == found.center_labels[:, None]
    has, first = inside.any(2), inside.int().argmax(2)  # of equal values argmax takes the first
    scores = (2 * found.scores + found.center_scores.gather(1, first)) / 3
    return torch.where(has & (found.scores > -1), scores, -1.0), first
