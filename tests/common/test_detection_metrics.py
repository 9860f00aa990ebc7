"""AP, AR and false discovery: by hand, against the definition written out, and on every edge of it."""

import logging
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from common.datasets.detection import Truth
from common.errors import UserError
from common.metrics.detection import Found, coco_metrics, false_discovery, false_discovery_by_area

STRICT = [k / 100 for k in range(50, 100, 5)]
LOOSE = [k / 100 for k in range(5, 55, 5)]
AP, AR = (
    ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
SMALL, MEDIUM, ANY = 32**2, 96**2, (0, 1e10)


def truth(*boxes, labels=None, crowd=None, area=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    m = len(boxes)
    sides = boxes[:, 2:] - boxes[:, :2]
    return Truth(
        boxes,
        torch.tensor(labels or [0] * m, dtype=torch.int64),
        torch.tensor(crowd or [False] * m, dtype=torch.bool),
        sides.prod(1) if area is None else torch.tensor(area),
    )


def found(*boxes, scores=(), labels=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return Found(boxes, torch.tensor(scores), torch.tensor(labels or [0] * len(boxes), dtype=torch.int64))


# ------------------------------------------------------------------------------------------------ by hand
def test_by_hand():
    """Two truths of 10 x 10. In falling score: a box with IoU 0.78 on the first, one with 0.22 on the second, an exact one.

    At 0.25 to 0.75: right, wrong, right, so precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1; made to fall with recall it is 1
    at the 51 recalls 0..0.50 and 2/3 at the 50 above: AP = (51 + 50 * 2/3) / 101.
    At 0.80 to 0.95 the first box is wrong too: precision 1/3 at the recalls 0..0.50, 0 above: AP = 51/3 / 101.
    At 0.05 to 0.20 the second box takes the second truth; two are right before one is wrong: AP = 1.
    """
    truths = [truth((0, 0, 10, 10), (20, 0, 30, 10))]
    boxes = [found((0, 0, 10, 7.8), (20, 0, 30, 2.2), (20, 0, 30, 10), scores=(0.9, 0.8, 0.7))]
    middle, strict = 100 * (51 + 50 * 2 / 3) / 101, 100 * 51 / 3 / 101
    ap = coco_metrics(truths, boxes, 1)
    assert ap["ap50"] == ap["ap75"] == pytest.approx(middle)
    assert ap["ap"] == ap["ap_small"] == pytest.approx(0.6 * middle + 0.4 * strict)
    assert ap["ar1"] == pytest.approx(0.6 * 50)  # the first box alone: one of two truths, up to 0.75
    assert ap["ar10"] == ap["ar100"] == ap["ar_small"] == pytest.approx(0.6 * 100 + 0.4 * 50)
    assert all(math.isnan(ap[f"{what}_{size}"]) for what in ("ap", "ar") for size in ("medium", "large"))
    fd = false_discovery(truths, boxes, 1)
    assert fd["fd5"] == pytest.approx(0)
    assert fd["fd25"] == fd["fd50"] == pytest.approx(100 - middle)
    assert fd["fd"] == fd["fd_small"] == pytest.approx(0.6 * (100 - middle))
    assert math.isnan(fd["fd_medium"])
    assert math.isnan(fd["fd_large"])
    assert list(ap) == [*AP, *AR]
    assert list(fd) == ["fd", "fd5", "fd25", "fd50", "fd_small", "fd_medium", "fd_large"]


def test_perfect_boxes_and_no_boxes():
    truths = [truth((1, 2, 20, 30), (5, 5, 90, 90), (0, 0, 200, 200), labels=[0, 1, 2]), truth()]
    perfect = [found(*truths[0].boxes.tolist(), scores=(0.1, 0.2, 0.3), labels=[0, 1, 2]), found()]
    assert set(coco_metrics(truths, perfect, 3).values()) == {100.0}
    assert set(false_discovery(truths, perfect, 3).values()) == {0.0}
    assert set(coco_metrics(truths, [found(), found()], 3).values()) == {0.0}
    assert set(false_discovery(truths, [found(), found()], 3).values()) == {100.0}


def test_a_box_of_another_class_or_on_an_empty_image_is_false():
    truths = [truth((0, 0, 10, 10)), truth()]
    right = found((0, 0, 10, 10), scores=(0.5,))
    assert coco_metrics(truths, [right, found()], 2)["ap50"] == pytest.approx(100)
    assert coco_metrics(truths, [replace(right, labels=torch.tensor([1])), found()], 2)["ap50"] == 0
    assert coco_metrics(truths, [right, replace(right, scores=torch.tensor([0.9]))], 2)["ap50"] == pytest.approx(50)
    assert false_discovery(truths, [right, replace(right, scores=torch.tensor([0.9]))], 2)["fd"] == pytest.approx(50)


def test_boxes_on_a_crowd_are_neither_right_nor_wrong():
    crowd = truth((0, 0, 10, 10), (50, 50, 99, 99), crowd=[False, True])
    person = replace(crowd, crowd=torch.tensor([False, False]))
    boxes = found((60, 60, 70, 70), (55, 80, 66, 97), (0, 0, 10, 10), scores=(0.9, 0.8, 0.7))
    assert coco_metrics([crowd], [boxes], 1)["ap"] == pytest.approx(100)
    assert false_discovery([crowd], [boxes], 1)["fd"] == pytest.approx(0)
    assert coco_metrics([person], [boxes], 1)["ap50"] == pytest.approx(100 * 51 / 3 / 101)  # wrong, wrong, right of two


def test_areas_outside_the_range_are_neither_right_nor_wrong():
    large, small = (0, 0, 100, 100), (200, 200, 210, 210)
    boxes = [found(small, large, scores=(0.9, 0.8))]  # the small one is false
    measured = coco_metrics([truth(large)], boxes, 1)
    assert measured["ap"] == pytest.approx(50)
    assert measured["ap_large"] == pytest.approx(100)
    assert math.isnan(measured["ap_small"])
    outline = [truth(large, area=[900.0])]  # the area is the annotation's, not the box's
    assert coco_metrics(outline, boxes, 1)["ap_small"] == pytest.approx(50)
    fd = false_discovery([truth(large)], boxes, 1, areas=(25, 50))
    assert fd["fd_large"] == pytest.approx(50)  # both boxes are now
    assert math.isnan(fd["fd_small"])


def test_scores_are_not_rounded():
    truths = [truth((0, 0, 10, 10))]
    boxes = [found((40, 40, 50, 50), (0, 0, 10, 10), scores=(0.9000, 0.9001))]
    assert coco_metrics(truths, boxes, 1)["ap"] == pytest.approx(100)


# ------------------------------------------------------------------------------------------------ the definition
def overlap(box, other, crowd):
    w = min(box[2], other[2]) - max(box[0], other[0])
    h = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(w, 0) * max(h, 0)
    own, others = ((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return shared / (own if crowd else own + others - shared)


def matched(truth, boxes, threshold, area):
    """COCO's matching in one image and class: (score, right or wrong) of the boxes that count, and how many truths do."""
    targets = [
        (box, crowd, crowd or not area[0] <= size <= area[1])
        for box, crowd, size in zip(truth.boxes.tolist(), truth.crowd.tolist(), truth.area.tolist(), strict=True)
    ]
    order = sorted(range(len(boxes.scores)), key=lambda k: -boxes.scores[k].item())
    taken, marks = set(), []
    for k in order[:100]:
        box = boxes.boxes[k].tolist()
        options = [
            (not ignored, overlap(box, target, crowd), j)
            for j, (target, crowd, ignored) in enumerate(targets)
            if (crowd or j not in taken) and overlap(box, target, crowd) >= threshold
        ]
        if options:
            counts, _, j = max(options)  # a truth that counts before one that does not, then the larger IoU
            taken.add(j)
            if counts:
                marks.append((boxes.scores[k].item(), True))
        elif area[0] <= (box[2] - box[0]) * (box[3] - box[1]) <= area[1]:
            marks.append((boxes.scores[k].item(), False))
    return marks, sum(not ignored for _, _, ignored in targets)


def of_class(some, c):
    return type(some)(*(values[some.labels == c] for values in vars(some).values()))


def by_definition(truths, boxes, classes, threshold, area=ANY):
    """(mean interpolated precision, mean recall) in percent over the classes that have a truth."""
    precisions, recalls = [], []
    for c in range(classes):
        images = [matched(of_class(t, c), of_class(f, c), threshold, area) for t, f in zip(truths, boxes, strict=True)]
        total = sum(count for _, count in images)
        if not total:
            continue
        marks = sorted((mark for marks, _ in images for mark in marks), key=lambda mark: -mark[0])
        right = [sum(good for _, good in marks[: k + 1]) for k in range(len(marks))]
        points = [(r / total, r / (k + 1)) for k, r in enumerate(right)]
        at = [max((p for recall, p in points if recall >= k / 100), default=0) for k in range(101)]
        precisions.append(sum(at) / 101)
        recalls.append(points[-1][0] if points else 0)
    mean = [100 * sum(values) / len(values) if values else math.nan for values in (precisions, recalls)]
    return tuple(mean)


def toy(seed, images=4, classes=3, crowds=0.15):
    """Truths of all sizes, boxes near them and anywhere, classes sometimes wrong; odd seeds have tied scores."""
    g = torch.Generator().manual_seed(seed)

    def boxes_of(m):
        corner, sides = torch.rand(m, 2, generator=g) * 100, 4 + torch.rand(m, 2, generator=g) ** 2 * 180
        return torch.cat([corner, corner + sides], 1)

    truths, results = [], []
    for i in range(images):
        m = int(torch.randint(0, 6, (1,), generator=g)) + (i == 0)
        boxes, labels = boxes_of(m), torch.randint(classes, (m,), generator=g)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1) * (0.5 + 0.5 * torch.rand(m, generator=g))
        crowd = torch.rand(m, generator=g) < crowds * (i > 0)
        truths.append(Truth(boxes, labels, crowd, area))
        near = boxes.repeat(2, 1) + torch.randn(2 * m, 4, generator=g) * 3
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
        some = torch.cat([near, boxes_of(3)])
        wrong = torch.rand(len(some), generator=g) < 0.2
        guess = torch.cat([labels.repeat(2), torch.zeros(3, dtype=torch.int64)])
        guess = torch.where(wrong, torch.randint(classes, guess.shape, generator=g), guess)
        scores = torch.rand(len(some), generator=g)
        results.append(Found(some, scores if seed % 2 == 0 else (scores * 4).floor() / 4, guess))
    return truths, results


@pytest.mark.parametrize("seed", range(12))
def test_against_the_definition(seed):
    truths, boxes = toy(seed)
    areas = {"small": (0, SMALL), "medium": (SMALL, MEDIUM), "large": (MEDIUM, 1e10)}

    def mean(thresholds, area=ANY, of=0):
        values = [by_definition(truths, boxes, 3, threshold, area)[of] for threshold in thresholds]
        return pytest.approx(sum(values) / len(values), nan_ok=True)

    ap, fd = coco_metrics(truths, boxes, 3), false_discovery(truths, boxes, 3)
    assert ap["ap"] == mean(STRICT)
    assert ap["ap50"] == mean([0.5])
    assert ap["ap75"] == mean([0.75])
    assert ap["ar100"] == mean(STRICT, of=1)
    for size, area in areas.items():
        assert ap[f"ap_{size}"] == mean(STRICT, area)
        assert ap[f"ar_{size}"] == mean(STRICT, area, of=1)
        assert 100 - fd[f"fd_{size}"] == mean(LOOSE, area)
    assert 100 - fd["fd"] == mean(LOOSE)
    for name, threshold in (("fd5", 0.05), ("fd25", 0.25), ("fd50", 0.5)):
        assert 100 - fd[name] == mean([threshold])
    edges = (0, 300, 900, 4000, 1e10)
    bins = false_discovery_by_area(truths, boxes, 3, edges)
    assert len(bins) == 4
    for value, area in zip(bins, pairwise(edges), strict=True):
        assert 100 - value == mean(LOOSE, area)


def test_bins_at_cocos_bounds_are_its_sizes():
    truths, boxes = toy(4, images=12)
    fd = false_discovery(truths, boxes, 3)
    bins = false_discovery_by_area(truths, boxes, 3, (0, SMALL, MEDIUM, math.inf))
    assert not any(map(math.isnan, bins))
    assert bins == [fd["fd_small"], fd["fd_medium"], fd["fd_large"]]


def test_neither_the_order_of_images_nor_that_of_boxes_matters():
    truths, boxes = toy(2, images=6)
    g = torch.Generator().manual_seed(0)

    def shuffled(some):
        order = torch.randperm(len(some.labels), generator=g)
        return type(some)(*(values[order] for values in vars(some).values()))

    images = torch.randperm(6, generator=g).tolist()
    other = [shuffled(truths[i]) for i in images], [shuffled(boxes[i]) for i in images]
    assert coco_metrics(*other, 3) == pytest.approx(coco_metrics(truths, boxes, 3), nan_ok=True)
    assert false_discovery(*other, 3) == pytest.approx(false_discovery(truths, boxes, 3), nan_ok=True)


def test_only_the_best_hundred_boxes_of_an_image_and_class_count():
    wrong = [(50.0, 50, 60, 60)] * 100
    boxes = found(*wrong, (0, 0, 10, 10), scores=[0.9] * 100 + [0.5])
    assert coco_metrics([truth((0, 0, 10, 10))], [boxes], 1)["ar100"] == 0
    boxes = replace(boxes, scores=torch.tensor([0.9] * 99 + [0.4, 0.5]))
    assert coco_metrics([truth((0, 0, 10, 10))], [boxes], 1)["ar100"] == 100


# ------------------------------------------------------------------------------------------------ the user's side
def test_quiet(capfd, caplog):
    caplog.set_level(logging.DEBUG)
    truths, boxes = toy(0)
    coco_metrics(truths, boxes, 3)
    false_discovery(truths, [found()] * 4, 3)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


ONE, HIT = truth((0, 0, 10, 10)), found((0, 0, 10, 10), scores=(0.5,))


@pytest.mark.parametrize(
    ("truths", "boxes", "message"),
    [
        ([], [], "no truth in 0 images"),
        ([truth()], [HIT], "no truth in 1 images (crowds aside); expected at least one"),
        ([replace(ONE, crowd=torch.tensor([True]))], [HIT], "no truth in 1 images"),
        ([ONE], [HIT, HIT], "1 truths and 2 found; expected one of each an image"),
        ([ONE], [replace(HIT, scores=torch.tensor([math.nan]))], "image 0, found: a box, score or area is not finite"),
        ([ONE], [replace(HIT, boxes=torch.tensor([[0, 0, math.inf, 1]]))], "found: a box, score or area is not finite"),
        (
            [ONE, ONE],
            [HIT, replace(HIT, labels=torch.tensor([2]))],
            "image 1, found: labels run from 2 to 2; expected 0 to 1",
        ),
        ([replace(ONE, labels=torch.tensor([-1]))], [HIT], "image 0, truth: labels run from -1 to -1; expected 0 to 1"),
        ([ONE], [replace(HIT, scores=torch.zeros(2))], "found: shapes [(1, 4), (1,), (2,)]; expected boxes (M, 4)"),
        ([ONE], [found((5, 0, 1, 9), scores=(0.5,))], "found: a box ends before it begins"),
        ([truth((5, 0, 5, 9))], [HIT], "truth: a box ends before it begins, or a truth has no area"),
    ],
)
def test_bad_input(truths, boxes, message):
    for measure in (coco_metrics, false_discovery):
        with pytest.raises(UserError) as refused:
            measure(truths, boxes, 2)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("edges", [(), (5,), (9, 4), (-1, 4), (4, 4), (0, math.nan)])
def test_bad_areas(edges):
    with pytest.raises(UserError, match="expected two or more numbers of pixels, each larger than the one before"):
        false_discovery_by_area([ONE], [HIT], 1, edges)
