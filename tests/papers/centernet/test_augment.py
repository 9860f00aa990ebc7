"""Augmentation: crops by the definition, mirroring, and colour as one linear map against the steps it is made of."""

import pytest
import torch

from papers.centernet import augment
from papers.centernet.augment import clip, colour_draw, coloured, mirror, normalised, random_crop
from papers.centernet.crops import MOST, Crops


@pytest.mark.parametrize(
    ("border", "side", "expected"),
    [(128, 640, 128), (128, 256, 64), (128, 200, 64), (128, 95, 32), (32, 95, 32), (128, 1, 0)],
)
def test_border_is_halved_until_it_leaves_room(border, side, expected):
    assert augment._border(border, side) == expected


def test_crops_hold_the_same_pixels_and_boxes_at_scale_1():
    torch.manual_seed(0)
    image = torch.randint(1, 256, (3, 60, 90), dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 20, 30, 50], [0, 0, 90, 60]])
    seen = set()
    for _ in range(20):
        view, moved = random_crop(image, boxes, 47, [1.0], border=16)
        assert view.shape == (3, 47, 47)
        left, top = (boxes[0, :2] - moved[0, :2]).int().tolist()
        assert torch.equal(moved, boxes - torch.tensor([left, top, left, top]))
        assert 16 - 23 <= left < 90 - 16 - 23
        assert 16 - 23 <= top < 60 - 16 - 23
        expected = torch.zeros(3, 47, 47, dtype=torch.uint8)
        for y in range(47):
            for x in range(47):
                if 0 <= y + top < 60 and 0 <= x + left < 90:
                    expected[:, y, x] = image[:, y + top, x + left]
        assert torch.equal(view, expected), "what lies outside is black"
        seen.add((left, top))
    assert len(seen) > 10


@pytest.mark.parametrize("scale", [0.6, 1.3])
def test_scale_of_a_crop(scale):
    """Boxes shrink where the view is larger, by side over its whole number of pixels."""
    image, box = torch.zeros(3, 200, 200, dtype=torch.uint8), torch.tensor([[50.0, 60, 90, 100]])
    _, moved = random_crop(image, box, 95, [scale])
    assert torch.allclose(moved[:, 2:] - moved[:, :2], torch.tensor([[40.0, 40]]) * 95 / int(95 * scale))


def test_mirroring_twice_is_nothing_and_moves_a_pixel_with_its_box():
    image, boxes = torch.zeros(3, 4, 10, dtype=torch.uint8), torch.tensor([[2.0, 1, 5, 3]])
    image[:, 1, 2] = 9
    flipped, moved = mirror(image, boxes)
    assert moved.tolist() == [[4, 1, 7, 3]]
    assert flipped[0, 1, 7] == 9, "the left edge is the right edge"
    again, back = mirror(flipped, moved)
    assert torch.equal(again, image)
    assert torch.equal(back, boxes)


def test_clipping_drops_what_is_gone():
    boxes, there = clip(torch.tensor([[-5.0, -5, 4, 4], [30, 2, 50, 9], [-9, 2, -1, 9], [31, 2, 60, 9]]), 32)
    assert boxes.tolist() == [[0, 0, 4, 4], [30, 2, 31, 9], [0, 2, 0, 9], [31, 2, 31, 9]]
    assert there.tolist() == [True, True, False, False]


def test_colour_is_brightness_contrast_and_saturation_in_their_order(monkeypatch):
    """The official steps one after another, with the grey image of before the first, against the drawn coefficients."""
    torch.manual_seed(0)
    x = torch.randint(256, (1, 3, 7, 9), dtype=torch.uint8)
    for seed in range(12):
        torch.manual_seed(seed)
        draw = colour_draw()
        torch.manual_seed(seed)
        image = x[0].double() / 255
        grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        for which in torch.randperm(3).tolist():
            alpha = 1 + 0.4 * (2 * float(torch.rand(())) - 1)
            target = [torch.zeros_like(grey), grey.mean().expand_as(grey), grey][which]
            image = alpha * image + (1 - alpha) * target
        shift = torch.tensor(augment.EIGENVECTORS) @ (torch.tensor(augment.EIGENVALUES) * torch.randn(3) * 0.1)
        image = image + shift.double()[:, None, None]
        mean, std = (torch.tensor(v).double()[:, None, None] for v in (augment.MEAN, augment.STD))
        assert torch.allclose(coloured(x, draw[None])[0].double(), (image - mean) / std, atol=1e-5)


def test_no_colour_is_the_plain_normalisation():
    x = torch.randint(256, (2, 3, 5, 5), dtype=torch.uint8)
    plain = torch.tensor([1.0, 0, 0, 0, 0, 0]).expand(2, -1)
    assert torch.allclose(coloured(x, plain), normalised(x), atol=1e-6)
    assert normalised(torch.zeros(1, 3, 1, 1)).flatten().tolist() == pytest.approx([-1.691, -1.6316, -1.4132], abs=1e-3)


def test_eigenvectors_are_orthonormal():
    vectors = torch.tensor(augment.EIGENVECTORS)
    assert torch.allclose(vectors @ vectors.T, torch.eye(3), atol=1e-3)


def test_samples_are_padded_and_whole():
    from common.datasets import detection

    scenes = detection.load("digit_scenes", "train", n=4, size=48, classes=3)
    crops = Crops(scenes, 47, [1.0], 8, flip=True, colour=True)
    for i in range(4):
        sample = crops[i]
        n = int(sample["count"])
        assert sample["image"].shape == (3, 47, 47)
        assert sample["boxes"].shape == (MOST, 4)
        sides = sample["boxes"][:n, 2:] - sample["boxes"][:n, :2]
        assert (sides > 0).all()
        assert sample["boxes"].max() <= 46
        assert sample["boxes"][n:].abs().sum() == sample["labels"][n:].sum() == 0
        assert n <= len(scenes.truth(i))
