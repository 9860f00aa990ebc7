"""Decoding: an example by hand, peaks and pairs and centres against loops, soft-NMS against its definition, whole images."""

import math

import pytest
import torch

from papers.centernet import detector
from papers.centernet.decode import Candidates, central_region, pair, peaks, require_center
from papers.centernet.detector import Settings, canvas, detect_objects, mirrored, select, to_image, with_centers
from papers.centernet.model import CenterNet, Output
from papers.centernet.soft_nms import soft_nms


# ---------------------------------------------------------------------------------------------- peaks and pairs
def test_the_example_of_the_card():
    heats = [torch.full((1, 2, 32, 32), -9.0) for _ in range(3)]
    heats[0][0, 1, 4, 5], heats[1][0, 1, 20, 21], heats[2][0, 1, 12, 13] = 3, 2, 1
    tags = torch.full((1, 70), 2.0), torch.full((1, 70), 2.3)
    found = pair(Output(tuple(heats), tags, (torch.zeros(1, 70, 2),) * 3), [peaks(heat) for heat in heats], 32)
    assert found.boxes.shape == (1, 1000, 4)
    assert found.centers.shape == (1, 70, 2)
    assert found.scores[0, 0].item() == pytest.approx(0.916686, abs=1e-6)
    assert found.boxes[0, 0].tolist() == [5, 4, 21, 20]
    scores, which = require_center(found)
    assert scores[0, 0].item() == pytest.approx(0.854810, abs=1e-6)
    assert found.centers[0, which[0, 0]].tolist() == [13, 12]


def test_peaks_are_local_maxima_over_all_classes():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 9, 11)
    found = peaks(logits, 12)
    for b in range(2):
        expected = []
        for c in range(3):
            for y in range(9):
                for x in range(11):
                    around = logits[b, c, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                    if logits[b, c, y, x] == around.max():
                        expected.append((logits[b, c, y, x].sigmoid().item(), c, y * 11 + x))
        expected.sort(reverse=True)
        rows = zip(found.scores[b].tolist(), found.classes[b].tolist(), found.cells[b].tolist(), strict=True)
        for row, wanted in zip(rows, expected[:12], strict=True):
            assert row == pytest.approx(wanted)
    assert peaks(torch.randn(1, 1, 2, 2), 70).scores.shape == (1, 4), "fewer cells than peaks asked for"


def random_output(B, C, h, w, K, seed=0):
    torch.manual_seed(seed)
    heats = tuple(torch.randn(B, C, h, w) for _ in range(3))
    tags = tuple(torch.rand(B, K) for _ in range(2))
    return Output(heats, tags, tuple(torch.rand(B, K, 2) for _ in range(3))), [peaks(heat, K) for heat in heats]


def test_pairs_equal_the_loop_over_all_of_them():
    B, K, w = 2, 10, 8
    output, found = random_output(B, 2, 7, w, K)
    pairs = pair(output, found, w, tag_distance=0.4, number=30)
    for b in range(B):
        expected = []
        for i in range(K):
            for j in range(K):
                (xi, yi), (xj, yj) = (
                    (
                        int(p.cells[b, n]) % w + float(o[b, n, 0]),
                        int(p.cells[b, n]) // w + float(o[b, n, 1]),
                    )
                    for p, o, n in ((found[0], output.offsets[0], i), (found[1], output.offsets[1], j))
                )
                near = abs(output.tags[0][b, i] - output.tags[1][b, j]) <= 0.4
                if found[0].classes[b, i] == found[1].classes[b, j] and near and xj >= xi and yj >= yi:
                    score = (found[0].scores[b, i] + found[1].scores[b, j]) / 2
                    expected.append((float(score), xi, yi, xj, yj, int(found[0].classes[b, i])))
        expected.sort(reverse=True)
        there = pairs.scores[b] > -1
        assert int(there.sum()) == min(30, len(expected)) > 3
        rows = torch.cat([pairs.scores[b][:, None], pairs.boxes[b], pairs.labels[b][:, None]], 1)[there].tolist()
        for row, wanted in zip(rows, expected, strict=False):
            assert row == pytest.approx(wanted, abs=1e-5)
        assert torch.allclose(pairs.corner_scores[b][there].mean(1), pairs.scores[b][there])


def test_cornernet_has_pairs_and_no_centres():
    output, found = random_output(1, 2, 7, 8, 10)
    pairs = pair(output._replace(heats=output.heats[:2], offsets=output.offsets[:2]), found[:2], 8)
    assert pairs.centers.shape == (1, 0, 2)
    assert pairs.center_scores.shape == pairs.center_labels.shape == (1, 0)


# ---------------------------------------------------------------------------------------------- centres
def test_central_regions():
    found = central_region(torch.tensor([[0.0, 0, 90, 90], [0, 0, 200, 200], [0, 0, 150, 150], [0, 0, 150, 150.1]]))
    expected = [[30, 30, 60, 60], [80, 80, 120, 120], [50, 50, 100, 100], [60, 60.04, 90, 90.06]]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4)


def one(boxes, scores, labels, centers=(), center_scores=(), center_labels=()) -> Candidates:
    """Candidates of one image."""
    scores = torch.tensor([scores])
    return Candidates(
        torch.tensor([boxes]),
        scores,
        scores[..., None].repeat(1, 1, 2),
        torch.tensor([labels]),
        torch.tensor([centers]).reshape(1, -1, 2),
        torch.tensor([center_scores]).reshape(1, -1),
        torch.tensor([center_labels], dtype=torch.int64).reshape(1, -1),
    )


def test_a_box_needs_a_centre_of_its_class_strictly_inside_its_region():
    box, third = [[0.0, 0.0, 90.0, 90.0]], 30.0
    for center, label, passes in [
        ((45.0, 45.0), 1, True),
        ((45.0, 45.0), 0, False),  # another class
        ((third, 45.0), 1, False),  # on the edge
        ((third + 0.01, 45.0), 1, True),
        ((45.0, 60.0), 1, False),
        ((61.0, 45.0), 1, False),
    ]:
        scores, _ = require_center(one(box, [0.6], [1], [center], [0.3], [label]))
        assert scores.item() == pytest.approx((2 * 0.6 + 0.3) / 3 if passes else -1), (center, label)
    scores, _ = require_center(one(box, [-1.0], [1], [(45.0, 45.0)], [0.3], [1]))
    assert scores.item() == -1, "what is no pair is no triplet"


def test_the_first_centre_counts_not_the_best():
    scores, which = require_center(
        one([[0.0, 0, 90, 90]], [0.6], [1], [(0.0, 0.0), (40.0, 40), (50.0, 50)], [0.9, 0.2, 0.8], [1, 1, 1])
    )
    assert which.item() == 1
    assert scores.item() == pytest.approx((1.2 + 0.2) / 3)


def test_the_centre_check_only_takes_boxes_away():
    torch.manual_seed(0)
    ends = (torch.rand(1, 200, 2, 2) * 100).sort(2).values.flatten(2)
    scores = torch.rand(1, 200)
    found = Candidates(ends, scores, torch.rand(1, 200, 2), torch.randint(2, (1, 200)),
                       torch.rand(1, 20, 2) * 100, torch.rand(1, 20), torch.randint(2, (1, 20)))  # fmt: skip
    kept = require_center(found)[0] > -1
    assert 0 < int(kept.sum()) < 200
    more = found._replace(centers=torch.cat([found.centers, torch.rand(1, 20, 2) * 100], 1),
                          center_scores=torch.rand(1, 40), center_labels=torch.randint(2, (1, 40)))  # fmt: skip
    more.center_labels[:, :20] = found.center_labels
    assert (require_center(more)[0] > -1)[kept].all(), "more centres never take a box away"


def test_true_centres_as_the_bound():
    boxes = [[0.0, 0, 90, 90], [10.0, 10, 50, 50]]
    found = with_centers(one(boxes, [0.6, 0.5], [1, 0]), [torch.tensor([[0.0, 0, 90, 90]])], [torch.tensor([1])])
    scores, _ = require_center(found)
    assert scores[0].tolist() == pytest.approx([(1.2 + 1) / 3, -1])
    none = with_centers(one(boxes, [0.6, 0.5], [1, 0]), [torch.zeros(0, 4)], [torch.zeros(0).long()])
    assert select(none, "triplets", Settings())[0].scores.tolist() == [], "an image without objects"


# ---------------------------------------------------------------------------------------------- soft-NMS
def overlap(a, b) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    if w <= 0 or h <= 0:
        return 0.0
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return w * h / (sum(areas) - w * h)


def by_definition(boxes, scores, labels, corners=None, exponent=10.0):
    """Class by class to the end: (score, index, box), best first."""
    found = []
    for label in set(labels):
        left = {i: s for i, s in enumerate(scores) if labels[i] == label and s > -1}
        while left:
            i = max(left, key=left.get)
            score, box = left.pop(i), boxes[i]
            weights = [list(corners[i])] if corners else None
            members = [boxes[i]]
            for j in list(left):
                iou = overlap(box, boxes[j])
                if iou > 0:
                    decay = math.exp(-iou * iou / 0.5)
                    if corners:
                        members.append(boxes[j])
                        weights.append([c * (1 - decay) ** exponent for c in corners[j]])
                    left[j] *= decay
                    if left[j] < 0.001:
                        del left[j]
            if corners:
                merged = [
                    sum(w[k // 2] * m[k] for w, m in zip(weights, members, strict=True))
                    / sum(w[k // 2] for w in weights)
                    for k in range(4)
                ]
                box = merged if merged[0] <= merged[2] and merged[1] <= merged[3] else box
            found.append((score, i, box))
    return sorted(found, key=lambda row: -row[0])


@pytest.mark.parametrize("merge", [False, True])
def test_soft_nms_equals_class_by_class_to_the_end(merge):
    torch.manual_seed(0)
    B, N = 3, 60
    low = torch.rand(B, N, 2, dtype=torch.double) * 60
    boxes = torch.cat([low, low + 1 + torch.rand(B, N, 2, dtype=torch.double) * 40], 2)
    scores, labels = torch.rand(B, N, dtype=torch.double), torch.randint(3, (B, N))
    scores[:, ::7] = -1
    scores[:, 1::5] *= 0.002  # some fall below the floor
    corners = torch.rand(B, N, 2, dtype=torch.double) if merge else None
    for keep in (5, 100):
        found = soft_nms(boxes, scores, labels, keep, corner_scores=corners)
        for b in range(B):
            given = (boxes[b].tolist(), scores[b].tolist(), labels[b].tolist())
            expected = by_definition(*given, corners[b].tolist() if merge else None)[:keep]
            there = found.scores[b] > -1
            assert found.index[b][there].tolist() == [i for _, i, _ in expected]
            assert found.scores[b][there].tolist() == pytest.approx([s for s, _, _ in expected], rel=1e-9)
            assert torch.allclose(
                found.boxes[b][there], torch.tensor([box for _, _, box in expected], dtype=torch.double)
            )


def test_merging_leaves_a_box_that_it_would_break():
    """Corner scores of 0 have no mean; and a first corner drawn far to the right would pass the second."""
    boxes = torch.tensor([[[0.0, 0, 9, 9], [8, 8, 60, 60]], [[0, 0, 50, 50], [30, 30, 52, 52]]])
    scores, labels = torch.tensor([[0.9, 0.5]]).expand(2, -1), torch.zeros(2, 2).long()
    corners = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1e-30, 1.0], [1.0, 1e-30]]])
    found = soft_nms(boxes, scores, labels, corner_scores=corners, weight_exponent=0.0)
    assert torch.equal(found.boxes[0, 0], boxes[0, 0])
    assert found.boxes[1, 0].tolist() == [30, 30, 50, 50]
    found = soft_nms(boxes[:1], scores[:1], labels[:1], corner_scores=torch.tensor([[[1e-30, 1], [1.0, 1e-30]]]),
                     weight_exponent=0.0)  # fmt: skip
    assert found.boxes[0, 0].tolist() == [8, 8, 9, 9]
    boxes[0, 0] = torch.tensor([0, 0, 7.5, 7.5])  # one pixel is shared still, but its first corner would go to 8
    found = soft_nms(boxes[:1], scores[:1], labels[:1], corner_scores=torch.tensor([[[1e-30, 1], [1.0, 1e-30]]]),
                     weight_exponent=0.0)  # fmt: skip
    assert torch.equal(found.boxes[0, 0], boxes[0, 0])


def test_soft_nms_leaves_its_input_alone_and_takes_no_boxes():
    scores = torch.rand(1, 8)
    before = scores.clone()
    soft_nms(torch.rand(1, 8, 4).sort(2).values, scores, torch.zeros(1, 8).long())
    assert torch.equal(scores, before)
    assert soft_nms(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0).long()).scores.shape == (2, 0)


# ---------------------------------------------------------------------------------------------- whole images
@pytest.mark.parametrize(
    ("h", "w", "scale"), [(95, 127, 1), (96, 100, 1), (50, 31, 1), (1, 1, 1), (40, 60, 1.5), (64, 64, 0.6)]
)
def test_canvas_holds_the_image_in_its_middle(h, w, scale):
    image = torch.randint(256, (1, 3, h, w), dtype=torch.uint8)
    x, border, size = canvas(image, scale, 32)
    assert all((side + 1) % 32 == 0 for side in x.shape[2:])
    assert size.tolist() == [int(w * scale), int(h * scale)]
    left, top = border.int().tolist()
    assert abs(2 * left + size[0] - x.shape[3]) <= 1
    black = detector.normalised(torch.zeros(1, 3, 1, 1))
    if scale == 1:
        assert torch.equal(x[:, :, top : top + h, left : left + w], detector.normalised(image))
        around = x.clone()
        around[:, :, top : top + h, left : left + w] = black
        assert torch.equal(around, black.expand_as(around)), "the border is black, not zero"


def test_a_point_goes_to_the_map_and_back():
    """A pixel of the image, seen at its place on the canvas and on the mirrored one, comes back within a quarter cell."""
    image = torch.zeros(1, 3, 60, 90, dtype=torch.uint8)
    x, border, size = canvas(image, 1.0, 32)
    cells = (x.shape[3] + 1) // 4
    stride = torch.tensor([x.shape[3] / cells, x.shape[2] / ((x.shape[2] + 1) // 4)])
    point = torch.tensor([20.0, 30.0])
    on_map = (point + border) / stride
    found = one([[*on_map.tolist(), *(on_map + 3).tolist()]], [0.5], [0], [on_map.tolist()], [0.5], [0])
    back = to_image(found, stride, border, size, 1.0)
    assert torch.allclose(back.boxes[0, 0, :2], point, atol=1e-4)
    assert torch.allclose(back.centers[0, 0], point, atol=1e-4)
    there = to_image(mirrored(mirrored(found, cells), cells), stride, border, size, 1.0)
    assert torch.allclose(there.boxes, back.boxes, atol=1e-4)
    half = to_image(found, stride, border, size, 2.0)
    assert torch.allclose(half.boxes, back.boxes / 2, atol=1e-4)


def test_boxes_outside_the_image_are_clipped_up_to_5_pixels_and_none_beyond():
    boxes = [[-4.9, 3, 20, 20], [-5.0, 3, 20, 20], [3, 3, 94.9, 64.9], [3, 3, 95, 20], [3.0, 3, 20, 65]]
    found = one(boxes, [0.5] * 5, [0] * 5)
    found = to_image(found, torch.ones(2), torch.zeros(2), torch.tensor([90.0, 60.0]), 1.0)
    assert (found.scores[0] > -1).tolist() == [True, False, True, False, False]
    assert found.boxes[0, 0].tolist() == [0, 3, 20, 20]
    assert found.boxes[0, 2].tolist() == [3, 3, 90, 60]


def tiny(center="pool"):
    torch.manual_seed(0)
    return CenterNet(2, (8, 12, 16), (1, 1, 1), center=center).eval()


def test_a_batch_gives_what_each_image_gives():
    model, images = tiny(), torch.randint(256, (3, 3, 50, 70), dtype=torch.uint8)
    settings = Settings(top_k=20, scales=(1.0, 1.5))
    together = detect_objects(model, images, settings)
    for image, found in zip(images, together, strict=True):
        alone = detect_objects(model, image[None], settings)[0]
        assert len(alone.scores) == len(found.scores)
        assert torch.allclose(alone.scores, found.scores, atol=1e-4)


@pytest.mark.parametrize("mode", ["pairs", "triplets"])
def test_detections_lie_in_the_image_sorted_and_within_their_number(mode):
    model, images = tiny(), torch.randint(256, (2, 3, 50, 70), dtype=torch.uint8)
    for found in detect_objects(model, images, Settings(top_k=40, keep=30, tag_distance=9), mode):
        assert 0 < len(found.scores) <= 30
        assert (found.scores.diff() <= 0).all()
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 0::2] <= 70).all()
        assert (found.boxes[:, 1::2] <= 50).all()
        assert found.centers.isnan().all() == (mode == "pairs")
        if mode == "triplets":
            region = central_region(found.boxes)
            assert ((found.centers > region[:, :2]) & (found.centers < region[:, 2:])).all()


def test_centres_come_from_scale_1_alone():
    model, images = tiny(), torch.randint(256, (1, 3, 50, 70), dtype=torch.uint8)
    single = detector.candidates(model, images, Settings(top_k=10))
    several = detector.candidates(model, images, Settings(top_k=10, scales=(0.6, 1.0, 1.2)))
    assert torch.equal(single.centers, several.centers)
    assert several.boxes.shape[1] == 3 * single.boxes.shape[1]


def test_a_mirrored_image_is_seen_the_same():
    """Both passes are in the union: mirroring the image mirrors the boxes, up to half a cell."""
    model, images = tiny(), torch.randint(256, (1, 3, 63, 63), dtype=torch.uint8)
    a = detector.candidates(model, images, Settings(top_k=10))
    b = detector.candidates(model, images.flip(3), Settings(top_k=10))
    assert torch.allclose(a.scores.sort(1).values, b.scores.sort(1).values, atol=1e-5)


def test_what_the_detector_refuses():
    model = tiny("none")
    with pytest.raises(ValueError, match="expected mode='pairs'"):
        detect_objects(model, torch.zeros(1, 3, 31, 31, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images are \(1, 1, 31, 31\) torch.uint8, expected"):
        detect_objects(model, torch.zeros(1, 1, 31, 31, dtype=torch.uint8), mode="pairs")
    with pytest.raises(ValueError, match="1 among them"):
        Settings(scales=(0.6, 1.2))
    with pytest.raises(ValueError, match="vanishes at scale 0.1"):
        canvas(torch.zeros(1, 3, 5, 5, dtype=torch.uint8), 0.1, 32)
