"""The network and its cuts, and the auxiliary nets: official counts, forms, and what is refused."""

import pytest
import torch
import torchvision

from common.metrics.compute import mult_adds, parameters
from papers.infopro import (
    EQUAL_LAYERS,
    EQUAL_MEMORY,
    HEADS,
    Decoder,
    ImageNetDecoder,
    cut_points,
    from_torchvision,
    head,
    imagenet_head,
    network,
    resnet_cifar,
)
from papers.infopro.cuts import STL_EQUAL_MEMORY_K3
from papers.infopro.model import TORCHVISION, width


def on_meta(name: str, classes: int = 10):
    with torch.device("meta"):
        return network(name, classes)


# ------------------------------------------------------------------------------------------------ the network
@pytest.mark.parametrize(("name", "weights", "macs"), [("r32", 466_906, 69_124_736), ("r110", 1_730_714, 253_149_824)])
def test_official_sizes(name, weights, macs):
    model = on_meta(name)
    assert parameters(model) == weights
    assert mult_adds(model, torch.empty(1, 3, 32, 32, device="meta")) == macs


def test_a_chain_of_units_is_the_network_wherever_it_is_cut():
    torch.manual_seed(0)
    model, x = resnet_cifar(14, 5, (4, 8, 8)).eval(), torch.randn(2, 3, 12, 12)
    assert len(model.units) == 8
    for end in range(9):
        torch.testing.assert_close(model.run(model.run(x, 0, end), end), model(x), rtol=0, atol=0)
    assert sorted(id(p) for u in model.units for p in u.parameters()) == sorted(id(p) for p in model.parameters())
    assert [width(u) for u in model.units[:-1]] == [4, 4, 4, 8, 8, 8, 8]


def test_torchvision_networks_are_the_same_function():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=4).eval()
    x = torch.randn(2, 3, 64, 64)
    model = from_torchvision(net)
    assert torch.equal(model(x), net(x))
    assert parameters(model) == parameters(net)


def test_convolutions_start_as_the_papers_code_starts_them():
    torch.manual_seed(0)
    model = resnet_cifar(32)
    for conv in (model.stages[0][1].conv1, model.stages[2][3].conv2):
        assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.05)
    shortcut = model.stages[2][0].downsample[0].weight
    assert shortcut.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("r33", "depth 33, expected 6n"),
        ("r2", "depth 2, expected 6n"),
        ("resnet50", "unknown network 'resnet50'; expected r32"),
        ("r", "unknown network 'r'"),
    ],
)
def test_unknown_networks(name, message):
    with pytest.raises(ValueError, match=message):
        network(name, 10)


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        resnet_cifar(8)(torch.zeros(2, 1, 8, 8))
    for widths in ((4, 8), (0, 8, 8)):
        with pytest.raises(ValueError, match="expected three widths"):
            resnet_cifar(8, 10, widths)


# ------------------------------------------------------------------------------------------------ cuts
@pytest.mark.parametrize("table", [EQUAL_LAYERS, EQUAL_MEMORY], ids=["layers", "memory"])
def test_tables_are_cuts_of_their_networks(table):
    for (name, K), cuts in table.items():
        model = on_meta(name)
        assert len(cuts) == K - 1
        ends = [model.units_before(cut) for cut in cuts]
        assert ends == sorted(set(ends))
        assert ends[-1] < len(model.units) - 1, "the last module has a block"
        assert cut_points(name, model, K, table is EQUAL_MEMORY) == cuts
    assert on_meta("r110").units_before(STL_EQUAL_MEMORY_K3[1]) == 1 + 18 + 2


def test_table_entries_written_out():
    """Lines of the official tables that the code derives or that are easy to mistype."""
    stages = {
        "r32": ((0,), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4), (0, 1, 2, 3)),
        "r110": ((), (1, 4, 7, 10, 13, 16), (1, 4, 7, 11, 15), (1, 5, 9, 13)),
    }
    for name, blocks in stages.items():
        assert EQUAL_LAYERS[name, 16] == tuple((s, b) for s, chosen in enumerate(blocks) for b in chosen)
    assert EQUAL_LAYERS["resnet152", 2] == EQUAL_MEMORY["resnet152", 2] == ((2, 5),)


def test_units_are_counted_from_the_stem():
    model = on_meta("r32")
    assert model.units_before((0, 0)) == 1
    assert model.units_before((1, 0)) == 2
    assert model.units_before((3, 3)) == 15
    assert len(model.units) == 17


def test_the_rule_for_other_depths_is_the_table_of_r32():
    """Equal numbers of units: what the paper's R-32 table does, where K divides them."""
    model = on_meta("r32")
    for K in (2, 4, 8, 16):
        assert cut_points("other", model, K) == EQUAL_LAYERS["r32", K]
    assert cut_points("r20", on_meta("r20"), 4) == ((1, 0), (2, 0), (3, 0))
    assert cut_points("r8", on_meta("r8"), 1) == ()


def test_cuts_that_do_not_exist():
    model = on_meta("r32")
    for K in (0, 17, -1):
        with pytest.raises(ValueError, match=f"K={K} modules of r32; it has 15 blocks and a stem: 1 to 16"):
            cut_points("r32", model, K)
    with pytest.raises(ValueError, match="no cuts of r32 for K=5; the paper has r32 K=2"):
        cut_points("r32", model, 5)
    with pytest.raises(ValueError, match="no cuts of r32 for K=2 and equal memory; the paper has r110 K=2"):
        cut_points("r32", model, 2, equal_memory=True)
    for cut in ((1, 5), (4, 0), (0, 1), (-1, 0), (2, -1)):
        with pytest.raises(ValueError, match="to cut after; blocks count from 0: 5 in stage 1, 5 in stage 2"):
            model.units_before(cut)


# ------------------------------------------------------------------------------------------------ auxiliary nets
def test_official_auxiliary_sizes():
    for c, decoder, contrast, softmax, greedy in (
        (16, 2_091, 25_408, 10_186, 170),
        (32, 3_819, 43_392, 28_170, 330),
        (64, 7_275, 61_824, 46_602, 650),
    ):
        assert parameters(Decoder(c)) == decoder
        assert parameters(head("1c2f", c, 128)) == contrast
        assert parameters(head("1c2f", c, 10)) == softmax
        assert parameters(head("0c1f", c, 10)) == greedy


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("c", [16, 32, 64])
def test_heads_have_the_layers_that_their_name_says(kind, c):
    net = head(kind, c, 7)
    convs = [m for m in net if isinstance(m, torch.nn.Conv2d)]
    linears = [m for m in net if isinstance(m, torch.nn.Linear)]
    assert f"{len(convs)}c{len(linears)}f" == kind
    assert [m.stride for m in convs] == [(2, 2) if c < 64 else (1, 1), (1, 1)][: len(convs)]
    assert all(m.out_channels == min(2 * c, 64) for m in convs)
    assert net(torch.randn(2, c, 8, 8)).shape == (2, 7)


def test_decoders_give_an_image_of_any_size():
    assert Decoder(32)(torch.randn(2, 32, 8, 8), (30, 32)).shape == (2, 3, 30, 32)
    assert ImageNetDecoder(512)(torch.randn(2, 512, 7, 7), (56, 56)).shape == (2, 3, 56, 56)
    x = torch.randn(1, 16, 3, 3)
    corners = torch.nn.functional.interpolate(x, (9, 9), mode="bilinear", align_corners=True)
    assert torch.equal(Decoder(16)(x, (9, 9)), Decoder(16).requires_grad_(False).net(corners)) is False, (
        "random weights"
    )
    net = Decoder(16).eval()
    assert torch.equal(net(x, (9, 9)), net.net(corners))


def test_imagenet_head_and_cuts():
    """The paper cuts where 512 x 28 x 28 come out."""
    for name in TORCHVISION:
        model = on_meta(name, 1000)
        (cut,) = EQUAL_LAYERS[name, 2]
        h = model.run(torch.empty(1, 3, 224, 224, device="meta"), 0, model.units_before(cut))
        assert h.shape == (1, 512, 28, 28)
    assert imagenet_head(512, 10)(torch.randn(2, 512, 7, 7)).shape == (2, 10)


def test_unknown_head():
    with pytest.raises(ValueError, match="unknown head '3c1f'; expected one of 0c1f, 0c2f"):
        head("3c1f", 16, 10)
