"""common.datasets.classification: one `part` for every set, split, cut, shrunk and shared as the config says."""

from types import SimpleNamespace

import pytest
import torch

from common.cli import Job
from common.datasets import DeviceLoader, load
from common.datasets.classification import FolderLoader, divided, imagenet_transform, part, shrink
from common.errors import UserError
from common.runtime import World


def config(**changed):
    values = {"dataset": "cluttered_digits", "train_images": 50, "test_images": 30, "held_out": 0, "image_size": 16}
    values |= {"workers": 0, "crop_pad": 2, "flip": True, "batch_size": 10, "channels_last": False}
    return SimpleNamespace(**values | changed)


def job(tmp_path, seed=0, rank=0, size=1):
    return Job(seed, World(rank, size, torch.device("cpu")), tmp_path, tmp_path)


def labels(found, epoch=0):
    return torch.cat([y for _, y in found.loader.epoch(epoch)])


def test_training_batches_are_full_shuffled_and_augmented_the_others_are_in_order(tmp_path):
    train, test = (part(config(), job(tmp_path), which) for which in ("train", "test"))
    assert (train.samples, test.samples, train.classes, train.size) == (50, 30, 10, 16)
    assert isinstance(train.loader, DeviceLoader)
    assert not torch.equal(labels(train, 0), labels(train, 1))
    raw = load("cluttered_digits", "test", n=30, size=16)
    (x, y), *rest = test.loader.epoch(0)
    assert not rest, "evaluation takes larger batches"
    assert torch.equal(y, raw.labels)
    expected = (raw.images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.22
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(("name", "image_size", "drawn"), [("large_canvas", 0, 72), ("large_canvas", 48, 48),
                                                           ("cluttered_digits", 0, 32)])  # fmt: skip
def test_generated_sets_are_drawn_at_the_size_and_number_asked_for(name, image_size, drawn, tmp_path):
    found = part(config(dataset=name, image_size=image_size), job(tmp_path), "test")
    assert (found.samples, found.classes, found.size) == (30, 10, drawn)
    assert found.digests == {f"{name}/test": load(name, "test", n=30, size=drawn).digest}


def test_held_out_and_trained_on_images_are_disjoint_and_complete(tmp_path):
    parts = divided(50, 20, seed=3)
    assert sorted(torch.cat([parts["train"], parts["held_out"]]).tolist()) == list(range(50))
    assert not torch.equal(parts["held_out"], divided(50, 20, seed=4)["held_out"])
    train, held = (part(config(held_out=20), job(tmp_path, seed=3), which) for which in ("train", "held_out"))
    assert (train.samples, held.samples) == (30, 20)
    assert torch.equal(labels(held), load("cluttered_digits", "train", n=50, size=16).labels[parts["held_out"]])
    for wrong in (50, 60, -1):
        with pytest.raises(UserError, match=f"held_out is {wrong} of 50 training images"):
            part(config(held_out=wrong), job(tmp_path), "train")


def test_ranks_share_the_batch(tmp_path):
    shares = [labels(part(config(), job(tmp_path, rank=r, size=2), "train")) for r in (0, 1)]
    whole = part(config(), job(tmp_path), "train").loader.epoch(0)
    for step, (_, y) in enumerate(whole):
        mine = [share[5 * step : 5 * step + 5] for share in shares]
        assert torch.equal(torch.stack(mine, 1).flatten(), y)
    with pytest.raises(UserError, match="batch_size 10 cannot be shared by 3 processes"):
        part(config(), job(tmp_path, size=3), "train")


def test_cutout_and_jitter_are_for_training_images_of_configs_that_have_them(tmp_path):
    plain, cut = config(crop_pad=0, flip=False), config(crop_pad=0, flip=False, cutout=6)
    for which, holes in (("train", True), ("test", False)):
        (x, _), (cut_x, _) = (next(part(c, job(tmp_path), which).loader.epoch(0)) for c in (plain, cut))
        gone = x != cut_x
        assert gone.flatten(1).any(1).all() == holes
        assert not cut_x[gone].any()
        assert gone[:, 0].sum((1, 2)).max() <= 36
    names = [type(t).__name__ for t in imagenet_transform(True, 32, colour_jitter=True).transforms]
    assert names == ["RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter", "ToTensor", "Normalize"]


def test_shrink_is_the_rounded_mean():
    images = load("cluttered_digits", "train", n=3, size=16)
    small = shrink(images, 4).images
    assert small.shape == (3, 4, 4, 3)
    assert small[1, 2, 3, 0] == round(images.images[1, 8:12, 12:16, 0].float().mean().item())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": "digits", "image_size": 0}, "digits has 1 channel"),
        ({"dataset": "digits", "train_images": 9999}, "train_images is 9999, but digits train has 1397"),
        ({"dataset": "digits", "image_size": 3}, "image_size 3 does not divide 8"),
    ],
)
def test_bad_settings_are_named(changed, message, tmp_path):
    with pytest.raises(UserError, match=message):
        part(config(**changed), job(tmp_path), "train")


def test_imagenet_has_the_same_interface(tmp_path):
    from PIL import Image

    for split, count in (("train", 6), ("val", 3)):
        for name in ("n01", "n02"):
            (tmp_path / "imagenet" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (50, 40), (9 * i, 0, 0)).save(tmp_path / "imagenet" / split / name / f"{i}.JPEG")
    settings = config(dataset="imagenet", batch_size=4, image_size=32, held_out=4)
    train, held, test = (part(settings, job(tmp_path), which) for which in ("train", "held_out", "test"))
    assert (train.samples, held.samples, test.samples, train.classes) == (8, 4, 6, 2)
    assert isinstance(train.loader, FolderLoader)
    assert len(train.loader) == 2
    assert [x.shape for x, _ in train.loader.epoch(0)] == [(4, 3, 32, 32)] * 2
    assert len(list(train.loader.epoch(0, start=1))) == 1
    assert labels(test).sum() == 3
    picture = Image.new("RGB", (90, 70), (255, 0, 0))
    x = imagenet_transform(False, 32)(picture)
    assert x[0].mean() == pytest.approx((1 - 0.485) / 0.229, rel=1e-4)
    with pytest.raises(UserError, match="batch size 10 a rank exceeds its 8 images"):
        part(config(dataset="imagenet", held_out=4), job(tmp_path), "train")
