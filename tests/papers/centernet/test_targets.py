"""Targets: the radius formulas, Gaussian maps by their definition, cells, offsets; the losses by examples."""

import math

import pytest
import torch

from papers.centernet.losses import detection_loss, focal_loss, offset_loss, pull_push
from papers.centernet.model import Output
from papers.centernet.targets import gaussian_radius, keypoints, render_targets

SIDES = [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (128, 128), (10, 20), (20, 60), (100, 50)]


# ---------------------------------------------------------------------------------------------- radius
@pytest.mark.parametrize(
    ("proper", "expected"),
    [
        (False, [1.0933, 2.1866, 4.3731, 8.7462, 17.4925, 34.985, 3.6779, 8.3739, 18.3896]),
        (True, [0.3267, 0.6534, 1.3067, 2.6134, 5.2269, 10.4538, 1.0774, 2.3932, 5.3869]),
    ],
)
def test_radius_of_both_formulas(proper, expected):
    height, width = torch.tensor(SIDES, dtype=torch.double).T
    found = gaussian_radius(height, width, 0.7, proper).tolist()
    assert found == pytest.approx(expected, abs=5e-5)


def test_radius_of_cornernet_today():
    assert gaussian_radius(torch.tensor(32.0), torch.tensor(32.0), 0.3, proper=True).item() == pytest.approx(
        7.2364, abs=5e-5
    )


def test_proper_radius_keeps_the_overlap():
    """The definition: boxes whose corners are both off by r, in or out, or one in and one out, have the IoU asked for."""
    h, w, o = 37.0, 23.0, 0.7
    r = gaussian_radius(torch.tensor(h), torch.tensor(w), o, proper=True).item()

    def iou(a, b):
        inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
        return inter / (sum(area) - inter)

    shifted = [(r, r, w + r, h + r), (r, r, w - r, h - r), (-r, -r, w + r, h + r)]
    worst = min(iou((0, 0, w, h), box) for box in shifted)
    assert worst == pytest.approx(o, abs=1e-4)


# ---------------------------------------------------------------------------------------------- maps
def drawn(boxes, labels, classes, cells, overlap=0.7, proper=False):
    """One image by the definition, cell by cell: (3, classes, cells, cells), the cells and offsets of each keypoint."""
    ratio = cells / (4 * cells - 1)
    heats, places = torch.zeros(3, classes, cells, cells, dtype=torch.double), []
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        height, width = math.ceil((y2 - y1) * ratio), math.ceil((x2 - x1) * ratio)
        sides = torch.tensor([height, width], dtype=torch.double)
        r = max(0, int(gaussian_radius(*sides, overlap, proper)))
        for k, (x, y) in enumerate([(x1, y1), (x2, y2), ((x1 + x2) / 2, (y1 + y2) / 2)]):
            fx, fy = x * ratio, y * ratio
            cx, cy = int(fx), int(fy)
            places.append((k, cx, cy, fx - cx, fy - cy))
            sigma = (2 * r + 1) / (6, 6, 5)[k]
            for v in range(max(0, cy - r), min(cells, cy + r + 1)):
                for u in range(max(0, cx - r), min(cells, cx + r + 1)):
                    value = math.exp(-((u - cx) ** 2 + (v - cy) ** 2) / (2 * sigma**2))
                    heats[k, label, v, u] = max(heats[k, label, v, u], value)
    return heats, places


@pytest.mark.parametrize("proper", [False, True])
def test_targets_equal_the_definition(proper):
    torch.manual_seed(0)
    B, M, cells, classes = 3, 5, 16, 2
    counts = torch.tensor([5, 0, 2])
    ends = (torch.rand(B, M, 2, 2) * 61).sort(2).values
    boxes = torch.cat([ends[:, :, 0], ends[:, :, 1]], 2)
    labels = torch.randint(classes, (B, M))
    found = render_targets(boxes, labels, counts, classes, 3, (cells, cells), 0.7, proper)
    assert found.heats.shape == (3, B, classes, cells, cells)
    assert found.mask.tolist() == [[1] * 5, [0] * 5, [1, 1, 0, 0, 0]]
    for b in range(B):
        n = int(counts[b])
        heats, places = drawn(boxes[b, :n].double().tolist(), labels[b, :n].tolist(), classes, cells, 0.7, proper)
        assert torch.allclose(found.heats[:, b].double(), heats, atol=1e-6)
        for i, (k, cx, cy, dx, dy) in enumerate(places):
            m = i // 3
            assert found.cells[k, b, m].item() == cy * cells + cx
            assert found.offsets[k, b, m].tolist() == pytest.approx([dx, dy], abs=1e-5)


def test_sum_of_an_inner_map_of_radius_7():
    """A box of 26 x 26 cells has radius 7.1; sigma 15/6 and 15/5."""
    box = torch.tensor([[[100.0, 100.0, 203.0, 203.0]]])
    heats = render_targets(box, torch.zeros(1, 1).long(), torch.tensor([1]), 1, 3, (128, 128)).heats.flatten(1).sum(1)
    assert heats.tolist() == pytest.approx([39.0717, 39.0717, 55.1976], abs=5e-5)
    box = torch.tensor([[[100.0, 100.0, 102.0, 102.0]]])  # radius 0: a single 1
    heats = render_targets(box, torch.zeros(1, 1).long(), torch.tensor([1]), 1, 3, (128, 128)).heats
    assert heats.flatten(1).sum(1).tolist() == [1, 1, 1]


def test_edges_of_the_image_stay_on_the_map():
    box = torch.tensor([[[0.0, 0.0, 510.0, 510.0]]])
    found = render_targets(box, torch.zeros(1, 1).long(), torch.tensor([1]), 1, 3, (128, 128))
    assert found.cells[:, 0, 0].tolist() == [0, 127 * 128 + 127, 63 * 128 + 63]
    assert [found.heats[k, 0, 0].max().item() for k in range(3)] == [1, 1, 1]


def test_keypoints_of_boxes():
    found = keypoints(torch.tensor([[2.0, 4, 10, 20]]), 3)
    assert found.tolist() == [[[2, 4]], [[10, 20]], [[6, 12]]]
    assert keypoints(torch.tensor([[2.0, 4, 10, 20]]), 2).shape == (2, 1, 2)


# ---------------------------------------------------------------------------------------------- losses
def test_focal_loss_by_hand():
    logits = torch.tensor([[0.3, -1.0], [2.0, -3.0]], dtype=torch.double)
    heat = torch.tensor([[1.0, 0.5], [1.0, 0.0]], dtype=torch.double)
    p = [1 / (1 + math.exp(-v)) for v in (0.3, -1.0, 2.0, -3.0)]
    found = [(1 - q) ** 2 * math.log(q) for q in (p[0], p[2])]
    empty = [(1 - t) ** 4 * q**2 * math.log(1 - q) for q, t in ((p[1], 0.5), (p[3], 0.0))]
    assert focal_loss(logits, heat).item() == pytest.approx(-(sum(found) + sum(empty)) / 2, rel=1e-5)
    alone = focal_loss(logits, torch.zeros_like(heat))
    assert alone.item() == pytest.approx(-sum(q**2 * math.log(1 - q) for q in p), rel=1e-5), "not divided by 0"


def test_focal_loss_is_finite_at_the_ends():
    logits = torch.tensor([100.0, -100.0, 100.0, -100.0], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_pull_push_and_offset_of_the_card():
    tags = torch.tensor([[0, 1, 3], [0.5, 9, 9]]), torch.tensor([[0.2, 1.4, 3], [0.1, 9, 9]])
    pull, push = pull_push(*tags, torch.tensor([[1.0, 1, 1], [1, 0, 0]]))
    assert pull.item() == pytest.approx(0.1133242, abs=1e-6)
    assert push.item() == pytest.approx(1.0002, abs=1e-4)
    found, wanted = torch.tensor([[[0.2, 0.9], [2, 0], [7, 7]]]), torch.tensor([[[0.5, 0.4], [0, 0], [0, 0]]])
    assert offset_loss(found, wanted, torch.tensor([[1.0, 1, 0]])).item() == pytest.approx(0.834958, abs=1e-6)


def test_pull_and_push_by_their_definition():
    torch.manual_seed(0)
    a, b, M = torch.randn(1, 4).double(), torch.randn(1, 4).double(), 3
    mask = torch.tensor([[1.0, 1, 1, 0]]).double()
    mean = (a + b)[0, :M] / 2
    pulled = sum((a[0, k] - mean[k]) ** 2 + (b[0, k] - mean[k]) ** 2 for k in range(M)) / (M + 1e-4)
    pairs = [max(0, 1 - abs(mean[j] - mean[k])) - 1 / (M + 1e-4) for j in range(M) for k in range(M)]
    pull, push = pull_push(a, b, mask)
    assert pull.item() == pytest.approx(pulled.item(), rel=1e-12)
    assert push.item() == pytest.approx(float(sum(pairs) / (M * (M - 1) + 1e-4)), rel=1e-12)


def test_one_object_alone_has_no_push_gradient_and_none_has_no_loss():
    a = torch.tensor([[0.5], [0.3]], requires_grad=True)
    pull, push = pull_push(a, a.detach() + 0.2, torch.tensor([[1.0], [0.0]]))
    assert push.item() == pytest.approx(1, abs=1e-3)
    push.backward(retain_graph=True)
    assert a.grad.abs().max() == 0
    pull.backward()
    assert a.grad[1].item() == 0


def test_padding_and_the_unused_heads_carry_no_gradient():
    """Objects beyond the mask, and cells without an object, get nothing from tags and offsets."""
    torch.manual_seed(0)
    boxes, none = torch.tensor([[[4.0, 4, 30, 40], [0, 0, 0, 0]]]), torch.zeros(1, 2).long()
    wanted = render_targets(boxes, none, torch.tensor([1]), 2, 3, (16, 16))
    heats = tuple(torch.randn(1, 2, 16, 16, requires_grad=True) for _ in range(3))
    tags = tuple(torch.randn(1, 2, requires_grad=True) for _ in range(2))
    offsets = tuple(torch.randn(1, 2, 2, requires_grad=True) for _ in range(3))
    outputs = [Output(heats, tags, offsets)] * 2
    losses = detection_loss(outputs, wanted)
    assert losses.total.item() == pytest.approx(sum(part.item() for part in losses), rel=1e-6)
    single = detection_loss(outputs[:1], wanted)
    assert single.total.item() == pytest.approx(losses.total.item(), rel=1e-6), "a mean over stacks"
    losses.total.backward()
    for tag in tags:
        assert tag.grad[0, 0] != 0
        assert tag.grad[0, 1] == 0
    for offset in offsets:
        assert (offset.grad[0, 0] != 0).all()
        assert (offset.grad[0, 1] == 0).all()
