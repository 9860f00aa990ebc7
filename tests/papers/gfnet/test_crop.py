"""A crop is a slice: every location, dtype and memory format, bit for bit."""

import pytest
import torch

from papers.gfnet.crop import crop


def slices(images, starts, size):
    """The definition, an image at a time."""
    return torch.stack([x[:, r : r + size, c : c + size] for x, (r, c) in zip(images, starts, strict=True)])


def coordinates(H, W):
    """Images whose value is 1000 row + column, in every channel's own thousands: (1, 3, H, W) float32, exact."""
    return (1000 * torch.arange(H)[:, None] + torch.arange(W) + 1e6 * torch.arange(3)[:, None, None])[None]


@pytest.mark.parametrize(
    ("location", "start"), [((0, 0), (0, 0)), ((1, 1), (128, 128)), ((0.5, 0.25), (64, 32)), ((0.999, 0), (127, 0))]
)
def test_places_of_the_card(location, start):
    patch = crop(coordinates(224, 224), torch.tensor([location], dtype=torch.float32), 96)
    assert patch.shape == (1, 3, 96, 96)
    assert (patch[0, 0, 0, 0] // 1000, patch[0, 0, 0, 0] % 1000) == start
    assert torch.equal(patch, slices(coordinates(224, 224), [start], 96))


def test_row_first():
    assert crop(coordinates(20, 30), torch.tensor([[1.0, 0.0]]), 8)[0, 0, 0, 0] == 12000
    assert crop(coordinates(20, 30), torch.tensor([[0.0, 1.0]]), 8)[0, 0, 0, 0] == 22


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("H", "W", "P"), [(9, 9, 4), (7, 11, 3), (11, 6, 6), (5, 5, 5), (6, 5, 1)])
def test_every_place_equals_slicing(H, W, P, dtype, memory_format):
    """A location in the middle of each cell (r + 0.5) / (H - P), and the exact corner 1."""
    rows = [(r, (r + 0.5) / (H - P)) for r in range(H - P)] + [(H - P, 1.0)]
    columns = [(c, (c + 0.5) / (W - P)) for c in range(W - P)] + [(W - P, 1.0)]
    places = [((r, c), (y, x)) for r, y in rows for c, x in columns]
    torch.manual_seed(0)
    images = torch.randint(256, (len(places), 3, H, W)).to(dtype).contiguous(memory_format=memory_format)
    patches = crop(images, torch.tensor([y_x for _, y_x in places]), P)
    assert patches.dtype == dtype
    assert patches.is_contiguous(memory_format=memory_format)
    assert torch.equal(patches, slices(images, [start for start, _ in places], P))


def test_random_locations_floor_the_float32_product():
    torch.manual_seed(1)
    images, locations = torch.randn(500, 3, 64, 48), torch.rand(500, 2)
    starts = [((y * 40).floor().int().item(), (x * 24).floor().int().item()) for y, x in locations]
    assert torch.equal(crop(images, locations, 24), slices(images, starts, 24))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[::2],
        lambda x: x.flip(3).transpose(2, 3),
        lambda x: x[:, :1],
        lambda x: x[:1].expand(5, -1, -1, -1),
        lambda x: x.contiguous(memory_format=torch.channels_last)[1:, :, 2:],
        lambda x: x[:, :, 1:, 3:],
    ],
    ids=["every second", "transposed", "one channel", "expanded", "channels_last slice", "slice"],
)
def test_any_strides(change):
    images = change(torch.arange(10 * 3 * 14 * 14).view(10, 3, 14, 14))
    B, _, H, W = images.shape
    torch.manual_seed(2)
    locations = torch.rand(B, 2)
    starts = [(int(y * (H - 5)), int(x * (W - 5))) for y, x in locations]
    assert torch.equal(crop(images, locations, 5), slices(images, starts, 5))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_choose_images(memory_format):
    """In any order, some twice, some not at all, or none; the images of the definition are copied first."""
    torch.manual_seed(3)
    images, rows = torch.randn(7, 3, 12, 15).contiguous(memory_format=memory_format), torch.tensor([5, 0, 6, 5, 2])
    locations = torch.rand(5, 2)
    assert torch.equal(crop(images, locations, 4, rows), crop(images[rows], locations, 4))
    assert crop(images, locations[:0], 4, rows[:0]).shape == (0, 3, 4, 4)
    for bad in (-1, 7):
        with pytest.raises(ValueError, match="expected 0..6"):
            crop(images, locations[:1], 4, torch.tensor([bad]))
    with pytest.raises(ValueError, match="expected"):
        crop(images, locations, 4)


def test_no_images_and_a_copy():
    assert crop(torch.randn(0, 3, 8, 8), torch.rand(0, 2), 4).shape == (0, 3, 4, 4)
    images = torch.ones(2, 3, 4, 4)
    crop(images, torch.rand(2, 2), 4).zero_()
    assert images.min() == 1, "also when the patch is the whole image"


def test_no_gradient_to_the_locations():
    locations = torch.rand(2, 2, requires_grad=True)
    assert not crop(torch.randn(2, 3, 8, 8), locations, 4).requires_grad


def test_places_are_never_read_by_the_host():
    """On the meta device nothing can be read: a crop that asked for a value would fail there."""
    with torch.device("meta"):
        assert crop(torch.empty(4, 3, 16, 16), torch.empty(4, 2), 8).shape == (4, 3, 8, 8)


def test_bad_input():
    images, locations = torch.randn(2, 3, 8, 10), torch.rand(2, 2)
    for x, l in (
        (images[0], locations),
        (images, locations[:1]),
        (images, locations[:, :1]),
        (images, locations.long()),
    ):
        with pytest.raises(ValueError, match=r"expected \(B, C, H, W\) and \(B, 2\) of a floating-point type"):
            crop(x, l, 4)
    for size in (0, 9):
        with pytest.raises(ValueError, match=f"patches of {size} pixels from images of 8 x 10, expected 1 to 8"):
            crop(images, locations, size)
    for bad in (-0.01, 1.01, torch.nan):
        with pytest.raises(ValueError, match=r"outside \[0, 1\] or NaN"):
            crop(images, locations.index_fill(1, torch.tensor([1]), bad), 4)
    with pytest.raises(ValueError, match="detach them"):
        crop(images.requires_grad_(), locations, 4)
