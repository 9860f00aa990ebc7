"""DeviceLoader: torchvision's augmentation in batch, as a pure function of seed, epoch and sample."""

import pytest
import torch
from torchvision.transforms import functional as TF

from common.datasets import bench
from common.datasets.device_loader import DeviceLoader
from common.datasets.images import Images
from common.errors import UserError


def noise(n=50, height=12, width=9, channels=3):
    pixels = torch.randint(256, (n, height, width, channels), dtype=torch.uint8, generator=torch.Generator())
    mean, std = (0.49, 0.48, 0.44)[:channels], (0.25, 0.24, 0.26)[:channels]
    return Images("noise", "train", pixels, torch.arange(n), n, mean, std, "")


def full(images=None, batch_size=8, **options):
    return DeviceLoader(images or noise(), batch_size, 7, crop_pad=2, flip=True, cutout=4, **options)


def by_sample(loader, epoch):
    """Label (= sample number in these sets) -> augmented image."""
    return {int(y): x for xs, ys in loader.epoch(epoch) for x, y in zip(xs, ys, strict=True)}


@pytest.mark.parametrize(("height", "width", "channels", "pad"), [(12, 9, 3, 2), (8, 8, 1, 4), (5, 7, 3, 0)])
def test_equals_torchvision_pixel_for_pixel(height, width, channels, pad):
    images = noise(20, height, width, channels)
    loader = DeviceLoader(images, 20, 0, crop_pad=pad, flip=True)
    plan = loader.plan(3)
    xs, ys = loader.batch(plan)
    for (index, down, right, flip, _, _), x, y in zip(plan.T.tolist(), xs, ys, strict=True):
        expected = TF.pad(TF.to_pil_image(images.images[index].permute(2, 0, 1)), pad)
        expected = TF.crop(expected, down, right, height, width)
        expected = TF.hflip(expected) if flip else expected
        assert torch.equal(x, TF.normalize(TF.to_tensor(expected), images.mean, images.std))
        assert y == index
    assert {0, 1} == set(plan[3].tolist())
    assert plan[1:3].min() >= 0
    assert plan[1:3].max() <= 2 * pad


@pytest.mark.parametrize("cutout", [1, 4, 5, 30])
def test_cutout_is_the_clipped_square_of_darts(cutout):
    images = noise(40)
    loader = DeviceLoader(images, 40, 0, cutout=cutout)
    plan = loader.plan(0)
    plain = DeviceLoader(images, 40, 0).batch(plan)[0]
    for (_, _, _, _, cy, cx), before, after in zip(plan.T.tolist(), plain, loader.batch(plan)[0], strict=True):
        expected = before.clone()
        for y in range(max(cy - cutout // 2, 0), min(cy + cutout // 2, 12)):
            for x in range(max(cx - cutout // 2, 0), min(cx + cutout // 2, 9)):
                expected[:, y, x] = 0
        assert torch.equal(after, expected)
    assert 0 <= plan[4].min() < plan[4].max() <= 11  # the centre may be anywhere in the image
    assert 0 <= plan[5].min() < plan[5].max() <= 8


def test_offsets_flips_and_centres_are_uniform():
    plan = full(noise(6000), batch_size=6000).plan(0)
    for row, high in ((1, 5), (2, 5), (3, 2), (4, 12), (5, 9)):
        shares = torch.bincount(plan[row], minlength=high) / 6000 * high
        assert len(shares) == high
        assert (shares - 1).abs().max() < 0.2


def test_augmentation_depends_on_sample_and_epoch_only():
    reference = by_sample(full(batch_size=50), 4)
    assert len(reference) == 50
    for loader in (full(batch_size=7, drop_last=False), full(shuffle=False, drop_last=False)):
        again = by_sample(loader, 4)
        assert all(torch.equal(again[k], reference[k]) for k in reference)
    ranks = [by_sample(full(batch_size=3, drop_last=False, rank=r, world=3), 4) for r in range(3)]
    merged = {k: v for rank in ranks for k, v in rank.items()}
    assert sum(map(len, ranks)) == len(merged) == 50  # disjoint, covering
    assert all(torch.equal(merged[k], reference[k]) for k in reference)
    other = by_sample(full(batch_size=50), 5)
    assert sum(torch.equal(other[k], reference[k]) for k in reference) < 5


def test_order_changes_with_epoch_and_seed_and_ignores_global_rng():
    images = noise()

    def order(seed, epoch):
        return torch.cat([y for _, y in DeviceLoader(images, 10, seed).epoch(epoch)]).tolist()

    first = order(0, 0)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert order(0, 0) == first != order(0, 1)
    assert first != order(1, 0)
    assert sorted(first) == list(range(50))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.cat([y for _, y in DeviceLoader(images, 10, 0, shuffle=False).epoch(9)]).tolist() == list(range(50))


def test_ranks_together_make_the_same_global_batches():
    whole = [set(y.tolist()) for _, y in full(batch_size=12).epoch(1)]
    parts = [[set(y.tolist()) for _, y in full(batch_size=4, rank=r, world=3).epoch(1)] for r in range(3)]
    assert [set.union(*batch) for batch in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("drop_last", [True, False])
def test_resume_from_any_batch(drop_last):
    loader = full(drop_last=drop_last)
    batches = list(loader.epoch(2))
    assert len(batches) == len(loader) == (6 if drop_last else 7)
    for start in range(len(loader) + 1):
        rest = list(loader.epoch(2, start))
        assert len(rest) == len(batches) - start
        for (x, y), (x2, y2) in zip(batches[start:], rest, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)


def test_layout_and_dtype():
    plain = next(full().epoch(0))[0]
    last = next(full(channels_last=True).epoch(0))[0]
    half = next(full(dtype=torch.bfloat16).epoch(0))[0]
    assert plain.dtype == torch.float32
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, plain)
    assert torch.equal(half, plain.bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 51}, "batch size 51 does not fit noise train: a rank has 50 images"),
        ({"batch_size": 26, "world": 2}, "a rank has 25 images"),
        ({"batch_size": 0}, "batch size 0"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"cutout": -1}, "expected pixels >= 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        DeviceLoader(noise(), **{"batch_size": 8, "seed": 0, **options})


def test_larger_batch_than_the_set_is_fine_when_nothing_is_dropped():
    assert [len(y) for _, y in DeviceLoader(noise(), 64, 0, drop_last=False).epoch(0)] == [50]


def test_benchmark_checks_first_and_writes_its_numbers(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert bench.main(["--images", "256", "--rounds", "1", "--device", "cpu", "--out", str(out)]) == 0
    assert "equal to torchvision" in capsys.readouterr().out
    assert '"images_per_second"' in out.read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    here = by_sample(full(), 0)
    there = by_sample(full(device="cuda", channels_last=True), 0)
    for key, image in here.items():
        torch.testing.assert_close(there[key].cpu(), image, rtol=0, atol=1e-6)
