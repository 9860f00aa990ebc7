"""Detection on whole images: canvas, mirrored pass, scales, centre check, soft-NMS (official file test/coco.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import normalised
from .decode import Candidates, pair, peaks, require_center
from .model import STRIDE, CenterNet
from .soft_nms import soft_nms

OUTSIDE = 5  # pixels that a side may lie outside the image

Mode = Literal["triplets", "pairs"]


@dataclass(frozen=True)
class Settings:
    """Of a detector. "Single-scale" in the paper is scales=(1,) with the mirrored pass."""

    top_k: int = 70  # peaks of each heat map
    tag_distance: float = 0.5
    pairs: int = 1000  # kept of all K x K
    flip: bool = True
    scales: tuple[float, ...] = (1.0,)  # centres come from scale 1 alone; more than one: boxes are merged
    keep: int = 100  # boxes of an image

    def __post_init__(self):
        if self.top_k < 1 or self.pairs < 1 or self.keep < 1:
            raise ValueError("top_k, pairs and keep must be at least 1")
        if 1.0 not in self.scales or min(self.scales) <= 0:
            raise ValueError(
                f"scales are {list(self.scales)}: expected positive ones, 1 among them, where centres are found"
            )


class Detections(NamedTuple):
    """Of one image, best first; centers are not a number where none was asked for."""

    boxes: Tensor  # (M, 4) x1, y1, x2, y2 in pixels
    scores: Tensor  # (M,)
    labels: Tensor  # (M,) int64
    centers: Tensor  # (M, 2) the centre keypoint that let the box pass


def canvas(images: Tensor, scale: float, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, H, W) uint8 to normalised float on a black canvas that the network takes: (canvas, border x y, size x y).

    Scaled by `scale`, in the middle of the smallest canvas with sides one less than a multiple of `multiple`; the border is
    normalised with the rest, so that it is black and not zero.
    """
    if scale != 1:
        size = [int(side * scale) for side in images.shape[2:]]
        if min(size) < 1:
            raise ValueError(f"an image of {images.shape[3]} x {images.shape[2]} pixels vanishes at scale {scale:g}")
        images = F.interpolate(images.float(), size, mode="bilinear", align_corners=False)
    h, w = images.shape[2:]
    height, width = (side | (multiple - 1) for side in (h, w))
    top, left = height // 2 - h // 2, width // 2 - w // 2
    padded = F.pad(images, (left, width - w - left, top, height - h - top))
    return normalised(padded), images.new_tensor([left, top]).float(), images.new_tensor([w, h], dtype=torch.float)


def to_image(found: Candidates, stride: Tensor, border: Tensor, size: Tensor, scale: float) -> Candidates:
    """Cells to pixels of the image. Pairs with a side more than 5 pixels outside are none; the others are clipped.

    stride (2,): pixels of a cell in x and y.
    """
    boxes = found.boxes * stride.repeat(2) - border.repeat(2)
    outside = (boxes[..., :2] <= -OUTSIDE).any(2) | (boxes[..., 2:] >= size + OUTSIDE).any(2)
    zero = torch.zeros_like(size)
    centers = (found.centers * stride - border).clamp(zero, size)
    return found._replace(
        boxes=boxes.clamp(zero.repeat(2), size.repeat(2)) / scale,
        scores=torch.where(outside, -1.0, found.scores),
        centers=centers / scale,
    )


def mirrored(found: Candidates, width: int) -> Candidates:
    """Candidates of a mirrored image, back where they belong; in cells."""
    x1, y1, x2, y2 = found.boxes.unbind(2)
    x, y = found.centers.unbind(2)
    return found._replace(
        boxes=torch.stack([width - x2, y1, width - x1, y2], 2), centers=torch.stack([width - x, y], 2)
    )


def joined(parts: Sequence[Candidates]) -> Candidates:
    return Candidates(*(torch.cat(fields, 1) for fields in zip(*parts, strict=True)))


@torch.inference_mode()
def candidates(model: CenterNet, images: Tensor, settings: Settings, amp: bool = False) -> Candidates:
    """Pairs and centres of images (B, 3, H, W) uint8 RGB of one size, in their pixels, over the passes and scales.

    The model is in eval mode. amp: bfloat16 autocast.
    """
    passes = []
    for scale in settings.scales:
        x, border, size = canvas(images, scale, model.multiple)
        found = []

        def strongest(heats, found=found):
            found += [peaks(heat, settings.top_k) for heat in heats]
            return [peak.cells for peak in found]

        x = torch.cat([x, x.flip(3)]) if settings.flip else x
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            output = model(x, strongest)[-1]
        height, width = ((side + 1) // STRIDE for side in x.shape[2:])
        both = pair(output, found, width, settings.tag_distance, settings.pairs)
        plain, flipped = (Candidates(*half) for half in zip(*(field.split(len(images)) for field in both), strict=True)) \
            if settings.flip else (both, None)  # fmt: skip
        views = [plain] + ([mirrored(flipped, width)] if settings.flip else [])
        stride = border.new_tensor([x.shape[3] / width, x.shape[2] / height])
        views = [to_image(view, stride, border, size, scale) for view in views]
        if scale != 1:
            views = [v._replace(centers=v.centers[:, :0], center_scores=v.center_scores[:, :0],
                                center_labels=v.center_labels[:, :0]) for v in views]  # fmt: skip
        passes += views
    return joined(passes)


def select(found: Candidates, mode: Mode, settings: Settings) -> list[Detections]:
    """The detections of each image. pairs: as CornerNet decodes, the centres are not looked at."""
    boxes, scores, labels = found.boxes, found.scores, found.labels
    which = None
    if mode == "triplets":
        scores, which = require_center(found)
    number = int((scores > -1).sum(1).max())  # waits for the device, once a batch
    order = scores.topk(max(number, 1), dim=1).indices  # only what is there takes part in the picking
    boxes, scores, labels = (
        boxes.gather(1, order[..., None].expand(-1, -1, 4)),
        scores.gather(1, order),
        labels.gather(1, order),
    )
    corners = found.corner_scores.gather(1, order[..., None].expand(-1, -1, 2)) if len(settings.scales) > 1 else None
    kept = soft_nms(boxes, scores, labels, settings.keep, corner_scores=corners)
    labels = labels.gather(1, kept.index)
    if which is None:
        centers = torch.full_like(kept.boxes[..., :2], torch.nan)
    else:
        which = which.gather(1, order).gather(1, kept.index)
        centers = found.centers.gather(1, which[..., None].expand(-1, -1, 2))
    there = kept.scores > -1
    return [
        Detections(*(field[i][there[i]] for field in (kept.boxes, kept.scores, labels, centers)))
        for i in range(len(boxes))
    ]


def detect_objects(
    model: CenterNet, images: Tensor, settings: Settings | None = None, mode: Mode = "triplets"
) -> list[Detections]:
    """Boxes of images (B, 3, H, W) uint8 RGB of one size; the model in eval mode.

    ValueError for other images, and for triplets of a model without a centre branch.
    """
    settings = settings or Settings()
    if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images are {tuple(images.shape)} {images.dtype}, expected (B, 3, H, W) uint8, RGB")
    if mode == "triplets" and len(model.stacks[-1].keypoints) < 3:
        raise ValueError("the model has no centre branch (CornerNet); expected mode='pairs'")
    return select(candidates(model, images, settings), mode, settings)


def with_centers(found: Candidates, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Candidates:
    """`found` with the centres of true boxes, score 1, instead of its own: the bound of section 4.4's error analysis.

    boxes, labels: of each image, (M, 4) and (M,).
    """
    B, most = len(boxes), max(1, *(len(b) for b in boxes))
    centers = found.boxes.new_full((B, most, 2), torch.nan)  # a centre that is not there lies in no box
    known = found.labels.new_full((B, most), -1)
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        centers[i, : len(box)], known[i, : len(box)] = (box[:, :2] + box[:, 2:]) / 2, label
    return found._replace(centers=centers, center_scores=torch.ones_like(centers[..., 0]), center_labels=known)
