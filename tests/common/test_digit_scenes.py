"""Digit scenes: pure, pinned; boxes tight around what is drawn, labels right, little overlap, many of one class."""

import pytest
import torch
from PIL import Image

from common import datasets
from common.datasets import cluttered_digits, detection, digit_scenes, digits
from common.datasets.__main__ import main
from common.errors import UserError


def drawn(monkeypatch, n, **options):
    """The scenes with white ink on black and nothing else: (n, S, S) uint8 of how much ink is where."""
    with monkeypatch.context() as patch:
        patch.setattr(
            digit_scenes, "background", lambda base, g, c, m, fine: torch.zeros(len(base), 3, *fine.shape[1:])
        )
        patch.setattr(digit_scenes, "_distract", lambda *_: None)
        patch.setattr(digit_scenes, "ink_colour", lambda base, draws: torch.ones_like(base))
        return digit_scenes.load("train", n=n, **options).images[:, 0]


@pytest.mark.parametrize(
    ("split", "size", "digest"),
    [
        ("train", 128, "c5b87e7a1a0d20d2ec41b0d5b6b03e0f28a2d3f116beee5e6a06ad9bd3ca71fe"),
        ("test", 128, "4fe0f72ec4fb8d46b7127c80873c417825bf49202353a6483dcc17ca62e60dfd"),
        ("train", 96, "4cbf660bd5bf863edab1c107a41f1644f630c32be3ef540011f722d4ebd52f29"),
    ],
)
def test_scenes_are_golden(split, size, digest):
    made = detection.load("digit_scenes", split, n=40, size=size)
    assert len(made) == 40
    assert made.image(39).shape == (3, size, size)
    assert made.image(39).dtype == torch.uint8
    assert made.size(39) == (size, size)
    assert made.digest == digest


def test_scenes_are_a_pure_function_of_their_arguments(monkeypatch):
    monkeypatch.setattr(digit_scenes, "CHUNK", 32)
    state = torch.get_rng_state()
    first = digit_scenes.load("train", n=100, size=64)
    assert torch.equal(digit_scenes.load("train", n=100, size=64).images, first.images)
    assert torch.equal(torch.get_rng_state(), state)
    for n in (1, 64, 77):  # chunks end elsewhere
        prefix = digit_scenes.load("train", n=n, size=64)
        assert torch.equal(prefix.images, first.images[:n])
        for i in range(n):
            for ours, theirs in zip(vars(prefix.truth(i)).values(), vars(first.truth(i)).values(), strict=True):
                assert torch.equal(ours, theirs)
    monkeypatch.setattr(digit_scenes, "CHUNK", 100)
    assert digit_scenes.load("train", n=100, size=64).digest == first.digest
    for other in (digit_scenes.load("test", n=100, size=64), digit_scenes.load("train", n=100, size=64, seed=1)):
        assert other.digest != first.digest


@pytest.mark.parametrize("size", [48, 96])
def test_boxes_are_tight_around_the_ink(monkeypatch, size):
    ink = drawn(monkeypatch, 200, size=size)
    made = digit_scenes.load("train", n=200, size=size)
    alone = 0
    for i in range(200):
        boxes = made.truth(i).boxes.int().tolist()
        uncovered = ink[i].clone()
        for x1, y1, x2, y2 in boxes:
            inside = ink[i, y1:y2, x1:x2] >= 64  # a quarter of full ink
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            uncovered[y1:y2, x1:x2] = 0
        assert (uncovered > 64).sum() <= (0 if len(boxes) == 1 else 2)  # faint borders of two digits may add up
        alone += len(boxes) == 1
    assert alone > 15


def test_the_image_is_what_is_drawn_over_a_background_with_distractors(monkeypatch):
    ink = drawn(monkeypatch, 100, size=96)
    made = digit_scenes.load("train", n=100, size=96)
    monkeypatch.setattr(digit_scenes, "_distract", lambda *_: None)
    plain = digit_scenes.load("train", n=100, size=96)
    assert torch.equal(made.objects.boxes, plain.objects.boxes)  # a distractor moves no digit
    assert torch.equal(made.images.permute(0, 2, 3, 1)[ink == 255], plain.images.permute(0, 2, 3, 1)[ink == 255])
    changed = (made.images.int() - plain.images.int()).abs().amax((1, 2, 3))
    assert (changed > 20).float().mean() > 0.95


def test_labels_are_what_was_written():
    ink, written = cluttered_digits.handwriting("train")
    wanted = torch.arange(10).repeat(500, 6)
    chosen = digit_scenes._handwritten(wanted, torch.rand(wanted.shape), written)
    assert torch.equal(written[chosen], wanted)
    assert len(chosen.unique()) == len(ink)  # every piece of handwriting is used
    extreme = torch.tensor([[0.0, 1 - 2**-24]])
    assert written[digit_scenes._handwritten(torch.tensor([[9, 9]]), extreme, written)].tolist() == [[9, 9]]


def test_each_label_is_that_of_the_digit_in_its_box(monkeypatch):
    shades = 0.45 + 0.035 * torch.arange(10)
    plain = shades[:, None, None].expand(10, 10, 10), torch.arange(10)  # "handwriting" that tells its digit by its ink
    monkeypatch.setattr(digit_scenes, "handwriting", lambda split: plain)
    ink, made = drawn(monkeypatch, 60, size=96), digit_scenes.load("train", n=60, size=96)
    for i in range(60):
        truth = made.truth(i)
        for (x1, y1, x2, y2), label in zip(truth.boxes.int().tolist(), truth.labels.tolist(), strict=True):
            assert abs(ink[i, y1:y2, x1:x2].median() - 255 * (1.8 * shades[label] - 0.45)) < 2


def test_classes_group_the_digits():
    ten = digit_scenes.load("train", n=30, size=64)
    assert ten.classes == tuple("0123456789")
    for classes, names in ((1, ("digit",)), (3, ("0369", "147", "258"))):
        made = digit_scenes.load("train", n=30, size=64, classes=classes)
        assert made.classes == names
        assert torch.equal(made.images, ten.images)
        assert torch.equal(made.objects.labels, ten.objects.labels % classes)
        assert made.digest != ten.digest


def test_what_a_scene_holds():
    made = digit_scenes.load("train", n=600, size=128)
    counts = torch.tensor(made.starts).diff()
    assert counts.unique().tolist() == [1, 2, 3, 4, 5, 6]
    boxes = made.objects.boxes
    assert boxes.min() >= 0
    assert boxes.max() <= 128
    share = (boxes[:, 3] - boxes[:, 1]) / 128
    assert 0.07 < share.min() < 0.1 < share.median() < 0.25 < 0.33 < share.max() < 0.38
    assert torch.equal(made.objects.area, (boxes[:, 2:] - boxes[:, :2]).prod(1))
    assert not made.objects.crowd.any()
    assert (made.objects.labels.bincount(minlength=10) / len(boxes) * 10 - 1).abs().max() < 0.25
    same = 0
    for i in range(600):
        truth = made.truth(i)
        a, b = truth.boxes[:, None], truth.boxes[None]
        shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(2)
        smaller = torch.minimum(truth.area[:, None], truth.area[None])
        assert (shared - shared.diag().diag() <= 0.15 * smaller).all()
        same += len(truth.labels.unique()) < len(truth)
    assert same / 600 > 0.6


def test_only_handwriting_of_the_split_is_drawn(monkeypatch):
    asked = []
    load = digits.load
    monkeypatch.setattr(digits, "load", lambda split: asked.append(split) or load(split))
    digit_scenes.load("test", n=4)
    assert asked == ["test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "digit_scenes has no split 'val'; expected train or test"),
        ({"n": 0}, "digit_scenes was asked for n=0 images; expected n >= 1"),
        ({"size": 32}, "digit_scenes cannot be drawn at size 32; expected 48 to 512 pixels"),
        ({"classes": 0}, "digit_scenes was asked for classes=0; expected 1 to 10"),
        ({"classes": 11}, "classes=11; expected 1 to 10"),
        ({"colour": 1}, "digit_scenes has no option colour; expected n, size, seed, classes"),
        (
            {"n": 2, "longest_side": 64},
            "longest_side is 64; expected scenes drawn as they are served; draw them at size=64",
        ),
        ({"longest_side": -1}, "longest_side is -1; expected a number of pixels, or 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError) as refused:
        detection.load("digit_scenes", **{"split": "train", **arguments})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_data_step_and_other_loaders(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(digit_scenes, "COUNTS", {"train": 5, "test": 3})
    detection._generate.cache_clear()
    assert detection.splits("digit_scenes") == ["train", "test"]
    datasets.prepare("digit_scenes", tmp_path)
    assert main(["digit_scenes", "--root", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "digit_scenes is embedded: nothing to fetch" in printed
    assert "digit_scenes train: 5 images, " in printed
    assert "digit_scenes test: 3 images, " in printed
    assert "10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), passed over: nothing, " in printed
    detection._generate.cache_clear()
    with pytest.raises(UserError, match="digit_scenes is a set with boxes; .*common.datasets.detection.load"):
        datasets.load("digit_scenes", "train", tmp_path)


def test_figure(tmp_path):
    digit_scenes.draw_samples(tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as figure:
        assert figure.size[0] > 400
