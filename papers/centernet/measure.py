"""What a detector is worth on a set: average precision, recall and false discovery, of each way to decode."""

import torch
from torch import Tensor

from common import runtime
from common.datasets.detection import DetectionSet
from common.errors import UserError
from common.metrics.accuracy import evaluating
from common.metrics.detection import Found, coco_metrics, false_discovery, false_discovery_by_area
from common.results.records import metric

from .detector import Detections, Settings, candidates, select, with_centers
from .model import CenterNet

EDGES = [side * side for side in (0, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 1e5)]  # areas, for the figure


def batches(images: DetectionSet, size: int, world: runtime.World) -> list[list[int]]:
    """Indices of this rank's share, in batches of at most `size` images of the same height and width."""
    mine = sorted(range(world.rank, len(images), world.size), key=lambda i: (images.size(i), i))
    found: list[list[int]] = []
    for i in mine:
        if not found or len(found[-1]) == size or images.size(found[-1][0]) != images.size(i):
            found.append([])
        found[-1].append(i)
    return found


def _rows(i: int, found: Detections) -> Tensor:
    """(M, 7) float64: image, label, score, box: what ranks hand to each other."""
    image = torch.full((len(found.scores), 1), float(i))
    parts = (image, found.labels.cpu()[:, None], found.scores.cpu()[:, None], found.boxes.cpu())
    return torch.cat([part.double() for part in parts], 1)


def detections(
    model: CenterNet, images: DetectionSet, settings: Settings, batch: int, world: runtime.World, amp: bool = False
) -> tuple[dict[str, list[Found]], int]:
    """Of every image: {"triplets": ..., "pairs": ..., "oracle": ...}, and how many images did not open.

    One pass of the network serves all of them; a model without a centre branch has pairs alone. oracle: triplets with the
    centres of the true boxes. An image that does not open is one without detections, told of in one line.
    """
    names = ("triplets", "pairs", "oracle") if len(model.stacks[-1].keypoints) == 3 else ("pairs",)
    rows, unreadable = {name: [torch.zeros(0, 7, dtype=torch.float64)] for name in names}, 0
    with evaluating(model):
        for chosen in batches(images, batch, world):
            there, pixels = [], []
            for i in chosen:
                try:
                    pixels.append(images.image(i))
                    there.append(i)
                except UserError as error:
                    unreadable += 1
                    print(f"no detections: {error}", flush=True)
            if not there:
                continue
            found = candidates(model, torch.stack(pixels).to(world.device), settings, amp)
            truths = [images.truth(i) for i in there]
            true = with_centers(found, [t.boxes for t in truths], [t.labels for t in truths])
            for name in names:
                mode = "pairs" if name == "pairs" else "triplets"
                kept = select(true if name == "oracle" else found, mode, settings)
                rows[name] += [_rows(i, some) for i, some in zip(there, kept, strict=True)]
    by_image = {}
    for name, parts in rows.items():
        table = runtime.gather_rows(torch.cat(parts))
        each = [table[table[:, 0] == i] for i in range(len(images))]
        by_image[name] = [Found(t[:, 3:].float(), t[:, 2].float(), t[:, 1].long()) for t in each]
    return by_image, int(runtime.gather_rows(torch.tensor([unreadable])).sum())


def measured(
    model: CenterNet, images: DetectionSet, settings: Settings, batch: int, world: runtime.World, amp: bool = False
) -> tuple[dict[str, dict], dict]:
    """(metrics {"triplets_ap": ..., "pairs_fd": ..., ...} in percent, artifacts: false discovery by area)."""
    found, unreadable = detections(model, images, settings, batch, world, amp)
    truths, classes = [images.truth(i) for i in range(len(images))], len(images.classes)
    metrics, by_area = {}, {}
    for name, some in found.items():
        values = coco_metrics(truths, some, classes) | false_discovery(truths, some, classes)
        values["boxes"] = sum(len(s.scores) for s in some) / len(images)
        metrics |= {f"{name}_{key}": metric(value, len(images)) for key, value in values.items() if value == value}
        by_area[name] = [None if v != v else round(v, 3) for v in false_discovery_by_area(truths, some, classes, EDGES)]
    metrics["untested"] = metric(unreadable)
    return metrics, {"false_discovery_by_area": {"edges": EDGES, **by_area}}
