"""The networks: the official counts, equal forms of the heads, recomputation, bad sizes."""

import copy

import pytest
import torch
from torch import nn

from common.metrics.compute import mult_adds, parameters, saved_bytes
from papers.centernet.hourglass import Hourglass
from papers.centernet.kernels import center_pool, corner_pool
from papers.centernet.model import CenterNet, centernet
from papers.centernet.pooling import CascadeCornerPooling, CenterPooling, CornerPooling

TINY = {"classes": 3, "dims": (8, 12, 16), "modules": (1, 1, 1)}


# ---------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize(
    ("depth", "params", "buffers", "convs", "gmacs"),
    [(52, 104_844_152, 65_891, 119, 297.45), (104, 210_062_960, 132_038, 238, 417.07)],
)
def test_counts_of_the_official_networks(depth, params, buffers, convs, gmacs):
    with torch.device("meta"):
        model = centernet(depth)
        assert parameters(model) == params
        assert sum(b.numel() for b in model.buffers()) == buffers
        assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convs
        assert mult_adds(model, torch.empty(1, 3, 511, 511)) / 1e9 == pytest.approx(gmacs, abs=0.005)


def test_mult_adds_by_part():
    """Card, 511 x 511: stem 16.27, hourglass 88.48, cnv 9.66, cascade 39.73, center 25.23, heat 10.00, tag 9.67, offset 9.67."""
    with torch.device("meta"):
        model, x = centernet(52), torch.empty(1, 256, 128, 128)
        stack = model.stacks[0]
        corner, _, center = stack.keypoints
        parts = [
            stack.hourglass,
            stack.features,
            corner.pooling,
            center.pooling,
            corner.heat,
            corner.tag,
            corner.offset,
        ]
        found = [mult_adds(model.stem, torch.empty(1, 3, 511, 511)), *(mult_adds(part, x) for part in parts)]
    assert [round(n / 1e9, 2) for n in found] == [16.27, 88.48, 9.66, 39.73, 25.23, 10.00, 9.67, 9.67]


@pytest.mark.parametrize(
    ("changed", "keypoints", "pooling", "params"),
    [
        ({}, 3, CascadeCornerPooling, 2_427_392),
        ({"corner": "plain"}, 3, CornerPooling, 1_542_144),
        ({"center": "none"}, 2, CascadeCornerPooling, 2_427_392),
        ({"corner": "plain", "center": "none"}, 2, CornerPooling, 1_542_144),
    ],
)
def test_ablations_and_the_cornernet_baseline(changed, keypoints, pooling, params):
    with torch.device("meta"):
        found = centernet(52, **changed).stacks[0].keypoints
    assert len(found) == keypoints
    assert type(found[0].pooling) is pooling
    assert parameters(found[0].pooling) == parameters(found[1].pooling) == params


def test_centre_branch_without_pooling_has_the_same_weights():
    plain, pooled = CenterPooling(8, pool=False), CenterPooling(8)
    plain.load_state_dict(pooled.state_dict())
    x = torch.randn(2, 8, 8, 8)
    assert not torch.equal(plain.eval()(x), pooled.eval()(x))


def test_initialisation_of_the_heat_maps():
    model = CenterNet(**TINY)
    for keypoint in model.stacks[0].keypoints:
        assert torch.equal(keypoint.heat[-1].bias, torch.full((3,), -2.19))
        assert keypoint.heat[-1].bias.sigmoid()[0].item() == pytest.approx(0.1007, abs=1e-4)
    assert model.stacks[0].keypoints[2].tag is None, "centres have no tag"


# ---------------------------------------------------------------------------------------------- modules
def test_hourglass_levels():
    """Resolution halves and width follows dims at each level, without a max pool."""
    seen = []
    model = Hourglass((4, 6, 6, 8), (1, 2, 1, 3))
    for level in (model, model.low2, model.low2.low2):
        level.low1.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[1:])))
    assert model(torch.randn(1, 4, 16, 24)).shape == (1, 4, 16, 24)
    assert seen == [(6, 8, 12), (6, 4, 6), (8, 2, 3)]
    assert not [m for m in model.modules() if isinstance(m, nn.MaxPool2d)]
    assert len(model.low2.low2.low2) == 3, "the innermost level"


def test_corner_modules_pool_in_the_directions_of_their_corner():
    """Cascade, by hand from its own convolutions (figure 5): inside first, then along the boundary."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 6, 7)
    for corner, (p1, p2) in {"top_left": ("top", "left"), "bottom_right": ("bottom", "right")}.items():
        m = CascadeCornerPooling(8, corner).eval()
        b1 = corner_pool(m.b1(m.a1(x) + corner_pool(m.l1(x), p2)), p1)
        b2 = corner_pool(m.b2(m.a2(x) + corner_pool(m.l2(x), p1)), p2)
        wide = torch.relu(m.tail.widen(b1 + b2) + m.tail.shortcut(x))
        assert torch.allclose(m(x), m.tail.last(wide), atol=1e-6)
        m = CornerPooling(8, corner).eval()
        both = corner_pool(m.p1(x), p1) + corner_pool(m.p2(x), p2)
        assert torch.allclose(m(x), m.tail(both, x), atol=1e-6)


def test_center_pooling_is_column_plus_row_maximum():
    x, y = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    assert torch.equal(center_pool(x, y), x.amax(2, keepdim=True) + y.amax(3, keepdim=True))


# ---------------------------------------------------------------------------------------------- whole networks
def test_shapes_in_training_and_test():
    model, x = CenterNet(**TINY, stacks=2), torch.randn(2, 3, 31, 47)
    assert model.multiple == 16
    outputs = model.train()(x)
    assert len(outputs) == 2, "intermediate supervision"
    for output in outputs:
        assert [heat.shape for heat in output.heats] == [(2, 3, 8, 12)] * 3
        assert [tag.shape for tag in output.tags] == [(2, 1, 8, 12)] * 2
        assert [offset.shape for offset in output.offsets] == [(2, 2, 8, 12)] * 3
    assert len(model.eval()(x)) == 1


def test_heads_of_the_last_stack_alone_run_in_test():
    model, calls = CenterNet(**TINY, stacks=2), []
    for i, stack in enumerate(model.stacks):
        stack.keypoints[0].pooling.register_forward_hook(lambda *_, i=i: calls.append(i))
    model.eval()(torch.randn(1, 3, 31, 31))
    assert calls == [1]


@pytest.mark.parametrize("center", ["none", "pool"])
def test_heads_at_cells_equal_dense_heads_and_so_do_their_gradients(center):
    torch.manual_seed(0)
    model, x = CenterNet(**TINY, stacks=2, center=center).double(), torch.randn(2, 3, 31, 47).double()
    k = 2 if center == "none" else 3
    cells = torch.randint(8 * 12, (k, 2, 9))
    cells[:, :, :4] = torch.tensor([0, 11, 7 * 12, 8 * 12 - 1])  # corners of the map: the padding is in the patch
    cells[:, :, 4] = cells[:, :, 5]  # twice the same cell

    def gathered(maps, at):
        return maps.flatten(2).gather(2, at[:, None].expand(-1, maps.shape[1], -1)).mT

    def read(outputs, dense):
        found = []
        for output in outputs:
            for maps, at in [*zip(output.offsets, cells, strict=True), *zip(output.tags, cells[:2], strict=True)]:
                found.append(gathered(maps, at).flatten() if dense else maps.flatten())
        return torch.cat(found)

    other = copy.deepcopy(model)
    a, b = read(model(x), True), read(other(x, cells), False)
    assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(a)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-10)


def test_cells_may_be_chosen_from_the_heat_maps():
    model, x = CenterNet(**TINY).eval(), torch.randn(1, 3, 31, 31)
    seen = []

    def choose(heats):
        seen.extend(heats)
        return [heat.flatten(1).argmax(1, keepdim=True) % 64 for heat in heats]

    output = model(x, choose)[-1]
    assert len(seen) == 3
    assert all(a is b for a, b in zip(seen, output.heats, strict=True))
    assert output.offsets[0].shape == (1, 1, 2)
    assert output.tags[0].shape == (1, 1)


def test_recomputation_changes_memory_and_nothing_else():
    torch.manual_seed(0)
    model, x = CenterNet(**TINY, stacks=2), torch.randn(2, 3, 31, 31)
    other = copy.deepcopy(model)
    other.recompute = True
    own = [*model.parameters(), *model.buffers(), *other.parameters(), *other.buffers(), x]
    kept = [saved_bytes(lambda net=net: net(x), own) for net in (copy.deepcopy(model), copy.deepcopy(other))]
    assert kept[1] < 0.8 * kept[0]
    for net in (model, other):
        sum(heat.square().sum() for output in net(x) for heat in output.heats).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), f"{name}: batch norm saw the batch once"
    assert all(m.momentum == 0.1 for m in other.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dims": (8,), "modules": (1,)}, "at least two"),
        ({"dims": (8, 12), "modules": (1, 1, 1)}, "as many of each"),
        ({"dims": (7, 12, 16)}, "an even first width"),
        ({"modules": (1, 0, 1)}, "at least one module a level"),
        ({"classes": 0}, "0 classes and 1 stacks"),
        ({"stacks": 0}, "3 classes and 0 stacks"),
    ],
)
def test_widths_that_do_not_fit(changed, message):
    with pytest.raises(ValueError, match=message):
        CenterNet(**TINY | changed)


def test_image_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="images of 31 x 32, expected sides one less than a multiple of 16"):
        CenterNet(**TINY)(torch.zeros(1, 3, 31, 32))
    with pytest.raises(ValueError, match="Hourglass-53: expected 52 or 104"):
        centernet(53)
