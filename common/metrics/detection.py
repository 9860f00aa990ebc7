"""Detection metrics: COCO's average precision and recall, and the false discovery rate of CenterNet. In percent.

Both come from the evaluator of faster-coco-eval, which gives what pycocotools gives (Lin et al. 2014): per class, boxes
in falling score each take the free truth that they overlap most, if the IoU reaches the threshold; precision is made to
fall with recall and read at recalls 0, 0.01, ..., 1; at most 100 boxes an image and class count. Crowds, and truths and
unmatched boxes whose area is outside the range that is asked for, count neither as found nor as false.

Scores are used as they are. Many converters of results, CenterNet's too, round them to two decimals first, which makes
ties; equal scores rank in the order given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster

from common.datasets.detection import Truth
from common.errors import UserError

SMALL, MEDIUM = 32.0**2, 96.0**2  # COCO: the areas where small and medium objects end, in pixels
ANY = (0.0, 1e10)
STRICT = np.linspace(0.5, 0.95, 10)  # IoU thresholds of AP and AR
LOOSE = np.linspace(0.05, 0.5, 10)  # of the false discovery rate: a box that is wrong even so is a false box
MOST = (1, 10, 100)  # boxes an image and class


@dataclass(frozen=True)
class Found:
    """The boxes that a detector found in one image, in any order.

    boxes: (M, 4) float x1, y1, x2, y2 in pixels of the image as served. scores: (M,) float. labels: (M,) integers.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor


def coco_metrics(truths: Sequence[Truth], found: Sequence[Found], classes: int) -> dict[str, float]:
    """The twelve numbers of COCO, in percent; nan where there is no such truth.

    ap: mean precision over IoU 0.50:0.05:0.95, recalls and classes; ap50, ap75: at one IoU; ap_small, ap_medium,
    ap_large: by area, cut at 32^2 and 96^2 pixels. ar1, ar10, ar100: mean over IoU and classes of the highest recall
    with that many boxes an image and class; ar_small, ar_medium, ar_large: by area, with 100.
    truths[i] and found[i] are of the same image, labels in 0..classes-1. Raises UserError as `_checked` says.
    """
    precision, recall = _evaluate(truths, found, classes, STRICT, _ranges(SMALL, MEDIUM))
    ap = {"ap": precision[:, :, :, 0], "ap50": precision[0, :, :, 0], "ap75": precision[5, :, :, 0]}
    ar = {f"ar{most}": recall[:, :, 0, k] for k, most in enumerate(MOST)}
    for k, size in enumerate(("small", "medium", "large"), 1):
        ap[f"ap_{size}"], ar[f"ar_{size}"] = precision[:, :, :, k], recall[:, :, k, -1]
    return {name: _mean(values) for name, values in (ap | ar).items()}


def false_discovery(
    truths: Sequence[Truth], found: Sequence[Found], classes: int, areas: tuple[float, float] = (SMALL, MEDIUM)
) -> dict[str, float]:
    """False discovery rate, in percent; nan where there is no such truth. Errors as in `coco_metrics`.

    CenterNet's FD (Duan et al. 2019, Table 3): 100 - AP over the IoU thresholds 0.05:0.05:0.50, so low that only a false
    box fails them. Recall that is never reached counts as false too: a detector that finds nothing has 100.
    fd: all thresholds; fd5, fd25, fd50: at one; fd_small, fd_medium, fd_large: all, by area, cut at `areas`.
    """
    precision, _ = _evaluate(truths, found, classes, LOOSE, _ranges(*areas))
    parts = {"fd": precision[:, :, :, 0], "fd5": precision[0, :, :, 0], "fd25": precision[4, :, :, 0]}
    parts["fd50"] = precision[9, :, :, 0]
    for k, size in enumerate(("small", "medium", "large"), 1):
        parts[f"fd_{size}"] = precision[:, :, :, k]
    return {name: 100 - _mean(values) for name, values in parts.items()}


def false_discovery_by_area(
    truths: Sequence[Truth], found: Sequence[Found], classes: int, edges: Sequence[float]
) -> list[float]:
    """`fd` of the boxes whose area lies between edges[k] and edges[k + 1], ends included, for each k; in percent.

    edges: at least two areas in pixels, rising. nan where there is no such truth.
    """
    precision, _ = _evaluate(truths, found, classes, LOOSE, _ranges(*edges)[2:-1])
    return [100 - _mean(precision[:, :, :, k]) for k in range(len(edges) - 1)]


def _ranges(*edges: float) -> list[tuple[float, float]]:
    """Any area, then the ranges between 0, the edges and infinity."""
    edges = [float(edge) for edge in edges]
    if len(edges) < 2 or edges[0] < 0 or not all(low < high for low, high in pairwise(edges)):
        raise UserError(f"areas {edges}; expected two or more numbers of pixels, each larger than the one before")
    return [ANY, *pairwise([ANY[0], *edges, ANY[1]])]


def _mean(values: np.ndarray) -> float:
    """In percent, over what has a truth: the evaluator writes -1 elsewhere."""
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else float("nan")


def _evaluate(truths, found, classes, thresholds, areas) -> tuple[np.ndarray, np.ndarray]:
    """Interpolated precision (thresholds, 101 recalls, classes, areas) with 100 boxes, and recall (T, C, A, MOST)."""
    _checked(truths, found, classes)
    images = [{"id": i} for i in range(len(truths))]
    categories = [{"id": c, "name": str(c)} for c in range(classes)]
    expected = [
        {"iscrowd": int(crowd), **_annotation(i, label, box), "area": area}
        for i, truth in enumerate(truths)
        for label, box, crowd, area in zip(*_lists(truth.labels, truth.boxes, truth.crowd, truth.area), strict=True)
    ]
    given = [
        {"iscrowd": 0, **_annotation(i, label, box), "score": score}
        for i, some in enumerate(found)
        for label, box, score in zip(*_lists(some.labels, some.boxes, some.scores), strict=True)
    ]
    sides = []
    for annotations in (expected, given):
        for k, annotation in enumerate(annotations, 1):  # id 0 would mean: no match
            annotation["id"] = k
        content = {"images": images, "categories": categories, "annotations": annotations}
        sides.append(COCO(content, print_function=_quiet))
    evaluator = COCOeval_faster(*sides, "bbox", print_function=_quiet)
    evaluator.params.iouThrs = thresholds
    evaluator.params.areaRng = [list(area) for area in areas]
    evaluator.params.areaRngLbl = [str(area) for area in areas]
    evaluator.params.maxDets = list(MOST)
    evaluator.evaluate()
    evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"])[..., -1], np.asarray(evaluator.eval["recall"])


def _quiet(*_) -> None:
    """The evaluator's reports go nowhere."""


def _annotation(image: int, label: int, box: list[float]) -> dict:
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1  # COCO's boxes are continuous: no + 1
    return {"image_id": image, "category_id": label, "bbox": [x1, y1, width, height], "area": width * height}


def _lists(*tensors: torch.Tensor) -> list[list]:
    return [tensor.tolist() for tensor in tensors]


def _checked(truths: Sequence[Truth], found: Sequence[Found], classes: int) -> None:
    """UserError, naming the image, for shapes, labels, boxes or scores that cannot be measured, or no truth at all."""
    if len(truths) != len(found):
        raise UserError(
            f"{len(truths)} truths and {len(found)} found; expected one of each an image, in the same order"
        )
    for i, (truth, some) in enumerate(zip(truths, found, strict=True)):
        for what, boxes, labels, *others in (
            ("truth", truth.boxes, truth.labels, truth.crowd, truth.area),
            ("found", some.boxes, some.labels, some.scores),
        ):
            shapes = [tuple(t.shape) for t in (boxes, labels, *others)]
            m = len(labels)
            if shapes != [(m, 4), *[(m,)] * (1 + len(others))]:
                raise UserError(f"image {i}, {what}: shapes {shapes}; expected boxes (M, 4) and the others (M,)")
            if m and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise UserError(
                    f"image {i}, {what}: labels run from {int(labels.min())} to {int(labels.max())}; "
                    f"expected 0 to {classes - 1}"
                )
            if not all(torch.isfinite(t).all() for t in (boxes, *others)):
                raise UserError(f"image {i}, {what}: a box, score or area is not finite; expected numbers")
            sides = boxes[:, 2:] - boxes[:, :2]
            if (sides < 0).any() or (what == "truth" and (sides == 0).any()):
                raise UserError(
                    f"image {i}, {what}: a box ends before it begins, or a truth has no area; expected x1 < x2 and y1 < y2"
                )
    if not any((truth.crowd == 0).any() for truth in truths):
        raise UserError(f"no truth in {len(truths)} images (crowds aside); expected at least one: is the split empty?")
