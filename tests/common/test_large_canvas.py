"""Large canvases: pure, pinned, balanced; the object is where `boxes` says, whole and in front; options of generated sets."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common import datasets
from common.datasets import cluttered_digits, digits, images, large_canvas, official
from common.datasets.__main__ import main
from common.datasets.images import save_npz
from common.errors import UserError


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A data root with smooth coloured pictures under the name of CIFAR-10."""
    draws = np.random.default_rng(0)
    fake = replace(images.PUBLISHED["cifar10"], counts={"train": 60, "test": 20}, fingerprints={})
    monkeypatch.setitem(images.PUBLISHED, "cifar10", fake)
    for split, n in fake.counts.items():
        coarse = torch.from_numpy(draws.integers(0, 256, (n, 3, 4, 4)).astype(np.float32))
        pictures = cluttered_digits.enlarge(coarse, 32).byte().permute(0, 2, 3, 1).numpy()
        save_npz(tmp_path / "cifar10" / f"{split}.npz", pictures, draws.integers(0, 10, n))
    return tmp_path


def corners(boxes):
    """Whole pixels (top, left, bottom, right) that hold the boxes."""
    half = boxes[:, 2:] / 2
    return torch.cat([(boxes[:, :2] - half).floor(), (boxes[:, :2] + half).ceil()], 1).long()


@pytest.mark.parametrize(
    ("split", "size", "digest"),
    [
        ("train", 72, "74eed46458ba3c9ecd2c2492bf3b2b12843b8a5b0a39171e5460056e1348b00f"),
        ("test", 72, "4dace65d60b05cbfdff2651e0fbfe83fc82cb3bebcc0bbe59a1a1ef293504891"),
        ("train", 96, "596b956d6faf30c5a96781b5f7c453d548e19722a8ef1250d02bbb32d3fa1f69"),
    ],
)
def test_images_are_golden(split, size, digest):
    made = datasets.load("large_canvas", split, n=40, size=size)
    assert made.images.shape == (40, size, size, 3)
    assert made.images.dtype == torch.uint8
    assert made.digest == digest


def test_images_are_a_pure_function_of_their_arguments():
    state = torch.get_rng_state()
    first = large_canvas.load("train", n=100)
    assert torch.equal(large_canvas.load("train", n=100).images, first.images)
    assert torch.equal(torch.get_rng_state(), state)
    for n in (1, 32, 45):  # chunks end elsewhere
        prefix = large_canvas.load("train", n=n)
        assert torch.equal(prefix.images, first.images[:n])
        assert torch.equal(prefix.labels, first.labels[:n])
        assert torch.equal(large_canvas.boxes("train", n=n), large_canvas.boxes("train", n=100)[:n])
    for other in (large_canvas.load("test", n=100), large_canvas.load("train", n=100, seed=1)):
        assert other.digest != first.digest
    default = large_canvas.centres("test")
    assert default.shape == (2000, 2)


def test_images_are_balanced_and_normalised():
    made = large_canvas.load("train", n=2000)
    assert (made.labels.bincount(minlength=10) / 200 - 1).abs().max() < 0.2
    _, mean, std = images.statistics(made.images.numpy(), made.labels.numpy())
    assert made.mean == pytest.approx(mean, abs=0.01)
    assert made.std == pytest.approx(std, abs=0.01)


def test_only_handwriting_of_the_split_is_drawn(monkeypatch):
    asked = []
    load = digits.load
    monkeypatch.setattr(digits, "load", lambda split: asked.append(split) or load(split))
    large_canvas.load("test", n=4)
    assert asked == ["test"]


@pytest.mark.parametrize("size", [72, 100])
def test_the_digit_is_where_boxes_says(monkeypatch, size):
    made = large_canvas.load("train", n=200, size=size)
    draw = large_canvas.draw_digit

    def only_halves(ink, place, side, cut=None):
        return draw(ink, place, side, cut) * (cut is not None)

    monkeypatch.setattr(large_canvas, "draw_digit", only_halves)
    without = large_canvas.load("train", n=200, size=size)
    assert torch.equal(made.labels, without.labels)
    drawn = ((made.images.int() - without.images.int()).abs().amax(3) > 8).numpy()
    boxes = large_canvas.boxes("train", n=200, size=size)
    gaps = []
    for ink, (top, left, bottom, right), box in zip(drawn, corners(boxes).tolist(), boxes, strict=True):
        inside = ink[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1].sum()  # a turn moves the corners
        assert inside > 0.98 * ink.sum()
        assert ink.sum() > 12
        rows, columns = np.nonzero(ink)
        gaps.append([(rows.min() + rows.max() + 1) / 2 - box[0], (columns.min() + columns.max() + 1) / 2 - box[1]])
    gaps = torch.tensor(gaps)
    assert gaps.abs().max() < 0.05 * size
    assert gaps.mean(0).abs().max() < 0.01 * size
    assert torch.equal(large_canvas.centres("train", n=200, size=size), boxes[:, :2])


def test_digits_lie_anywhere_but_wholly_on_the_canvas_and_fit_a_third_of_it():
    boxes = large_canvas.boxes("train", n=5000)
    top, left, bottom, right = corners(boxes).unbind(1)
    assert min(top.min(), left.min()) == 0
    assert max(bottom.max(), right.max()) == 72
    for middle in boxes[:, :2].unbind(1):
        shares = ((middle - 8) / 56 * 7).clamp(0, 6).long().bincount() / 5000 * 7
        assert (shares - 1).abs().max() < 0.15
    assert boxes[:, 2:].min() > 6
    assert boxes[:, 2:].max() < 16 < 72 / 3


def test_a_cifar10_object_is_its_whole_picture_in_front(cifar10):
    made = datasets.load("large_canvas_cifar10", "train", cifar10, n=50)
    assert made.images.shape == (50, 96, 96, 3)
    boxes = large_canvas.boxes("train", n=50, size=96, name="large_canvas_cifar10")
    assert boxes[:, 2:].unique().tolist() == [24]
    source = datasets.load("cifar10", "train", cifar10)
    pictures = torch.nn.functional.interpolate(
        source.images.permute(0, 3, 1, 2).float(), (24, 24), mode="bilinear", align_corners=True, antialias=False
    )
    for image, label, (top, left, bottom, right) in zip(made.images, made.labels, corners(boxes).tolist(), strict=True):
        gaps = (pictures - image[top:bottom, left:right].permute(2, 0, 1)).abs().amax((1, 2, 3))
        assert gaps.min() < 1
        assert source.labels[gaps.argmin()] == label
    again = datasets.load("large_canvas_cifar10", "train", cifar10, n=33)
    assert torch.equal(again.images, made.images[:33])
    assert datasets.load("large_canvas_cifar10", "test", cifar10, n=50).digest != made.digest


def test_what_a_set_is_made_from_is_what_it_needs(tmp_path, cifar10, monkeypatch, capsys):
    assert {"large_canvas", "large_canvas_cifar10"} <= set(datasets.known(tmp_path))
    assert datasets.splits("large_canvas_cifar10", tmp_path) == ["train", "test"]
    with pytest.raises(UserError, match=r"cifar10/train.npz is missing.*make data DATASET=cifar10"):
        datasets.load("large_canvas_cifar10", "train", tmp_path / "nowhere")
    asked = []
    monkeypatch.setattr(official, "convert", lambda name, root: asked.append(name))
    monkeypatch.setitem(cluttered_digits.COUNTS, "train", 5)
    monkeypatch.setitem(cluttered_digits.COUNTS, "test", 3)
    assert main(["large_canvas_cifar10", "--root", str(cifar10)]) == 0
    printed = capsys.readouterr().out
    assert asked == ["cifar10"]
    assert "embedded" not in printed
    assert "large_canvas_cifar10 train: 5 images of 96 x 96 x 3, 10 classes" in printed
    assert main(["large_canvas"]) == 0
    printed = capsys.readouterr().out
    assert asked == ["cifar10"]
    assert "large_canvas is embedded: nothing to fetch" in printed
    assert "large_canvas test: 3 images of 72 x 72 x 3, 10 classes" in printed


@pytest.mark.parametrize("name", ["large_canvas", "large_canvas_cifar10"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "no split 'val'; expected train or test"),
        ({"n": 0}, "n=0 images; expected n >= 1"),
        ({"size": 24}, "size 24; expected 36 to 256 pixels"),
        ({"root_folder": 1, "colour": 1}, "no option colour, root_folder; expected n, size, seed"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(UserError, match=f"^{name} .*{message}"):
        datasets.load(name, **{"split": "train", **arguments})


def test_places_of_other_sets_are_not_known():
    with pytest.raises(UserError, match="'digits' are not known; expected large_canvas or large_canvas_cifar10"):
        large_canvas.centres("train", name="digits")


def test_figure(tmp_path):
    large_canvas.draw_samples(tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as figure:
        assert figure.size[0] > 500
