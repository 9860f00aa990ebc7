"""What the heads should say: keypoints of boxes, their cells and offsets, and Gaussian heat maps (CornerNet's rules)."""

from typing import NamedTuple

import torch
from torch import Tensor

PEAK_WIDTH = (6.0, 6.0, 5.0)  # diameter over sigma: top left, bottom right, center


class Targets(NamedTuple):
    """For B images with at most M objects and k keypoints; mask (B, M) says which objects there are."""

    heats: Tensor  # (k, B, classes, h, w), 1 at a keypoint's cell
    cells: Tensor  # (k, B, M) int64, flat: y w + x
    offsets: Tensor  # (k, B, M, 2) in [0, 1): x, y within the cell
    mask: Tensor  # (B, M) float 0 or 1


def gaussian_radius(height: Tensor, width: Tensor, overlap: float = 0.7, proper: bool = False) -> Tensor:
    """Cells that both corners may be off with a box that still overlaps the true one by `overlap`, the least of three cases.

    The paper's numbers were made with CornerNet's first formula, whose roots lack the division by 2 a: always 2.8 times
    the proper third case at 0.7. proper=True divides (as CornerNet's code does since, at 0.3).
    """
    o, s, area = overlap, height + width, height * width
    cases = (
        (1.0, s, area * (1 - o) / (1 + o), -1),  # one corner inside, one outside
        (4.0, 2 * s, area * (1 - o), -1),  # both inside
        (4 * o, -2 * o * s, (o - 1) * area, 1),  # both outside
    )
    radii = []
    for a, b, c, sign in cases:
        root = (b * b - 4 * a * c).sqrt()
        radii.append((b + sign * root) / (2 * a) if proper else (b + root) / 2)
    return torch.stack(radii).amin(0)


def keypoints(boxes: Tensor, k: int) -> Tensor:
    """(..., 4) boxes x1, y1, x2, y2 to (k, ..., 2) points x, y: top left, bottom right and, with k = 3, the centre."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return torch.stack([top_left, bottom_right, (top_left + bottom_right) / 2][:k])


def render_targets(
    boxes: Tensor,
    labels: Tensor,
    counts: Tensor,
    classes: int,
    k: int,
    size: tuple[int, int],
    overlap: float = 0.7,
    proper_radius: bool = False,
) -> Targets:
    """Targets of a batch, made where its tensors are, without waiting for the device.

    boxes (B, M, 4) in pixels of the input, inside of it; labels (B, M) int64; counts (B,): how many of the M there are;
    size: height and width of the output, of an input that is four times as large less one.
    """
    h, w = size
    B, M = labels.shape
    ratio = boxes.new_tensor([w / (4 * w - 1), h / (4 * h - 1)])
    points = keypoints(boxes, k) * ratio  # in cells
    limit = torch.tensor([w - 1, h - 1], device=boxes.device)
    at = points.long().clamp_min(0).minimum(limit)
    extent = ((boxes[..., 2:] - boxes[..., :2]) * ratio).ceil()
    radius = gaussian_radius(extent[..., 1], extent[..., 0], overlap, proper_radius).int().clamp_min(0)  # (B, M)
    mask = torch.arange(M, device=boxes.device) < counts[:, None]

    heats = boxes.new_zeros(k, B, classes, h, w)
    keypoint = torch.arange(k, device=boxes.device)[:, None]
    image = torch.arange(B, device=boxes.device)
    sigma = (2 * radius + 1) / boxes.new_tensor(PEAK_WIDTH[:k])[:, None, None]  # (k, B, M)
    xs, ys = torch.arange(w, device=boxes.device), torch.arange(h, device=boxes.device)
    for m in range(M):  # one object of every image at a time: few calls, and never B M maps at once
        dx, dy = xs - at[:, :, m, :1], ys - at[:, :, m, 1:]  # (k, B, w), (k, B, h)
        squared = (dx * dx)[:, :, None, :] + (dy * dy)[:, :, :, None]
        near = (dx.abs() <= radius[:, m, None])[:, :, None, :] & (dy.abs() <= radius[:, m, None])[:, :, :, None]
        bump = torch.exp(squared / (-2 * sigma[:, :, m, None, None] ** 2))
        bump = torch.where(near & mask[:, m, None, None], bump, 0)
        label = labels[:, m]
        heats[keypoint, image, label] = torch.maximum(heats[keypoint, image, label], bump)
    return Targets(heats, at[..., 1] * w + at[..., 0], points - at, mask.to(boxes.dtype))
