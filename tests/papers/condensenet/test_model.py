"""Networks: the paper's sizes in its own way of counting and in plain ones, shapes, a training step."""

import pytest
import torch
import torch.nn.functional as F

from common.metrics.compute import mult_adds, parameters
from papers.condensenet import (
    CondenseNet,
    condensed_like,
    condensenet,
    condensenet_imagenet,
    condensenet_light,
    densenet_bc,
)
from papers.condensenet.cost import authors_mult_adds, counted_parameters

TINY = {"blocks": (2, 2), "growth": (8, 16), "classes": 5}


def millions(x, digits=2):
    return round(x / 1e6, digits)


@pytest.mark.parametrize(
    ("depth", "flops", "counted", "real"),
    [
        (50, 28.64, 0.2165, 522_938),
        (74, 51.90, 0.4055, 1_090_906),
        (86, 65.82, 0.5202, 1_451_594),
        (98, 81.26, 0.6484, None),
        (110, 98.24, 0.7902, None),
        (122, 116.74, 0.9454, None),
        (182, 512.67, 4.2219, 13_792_906),
    ],
)
def test_cifar_sizes_of_the_training_form(depth, flops, counted, real):
    with torch.device("meta"):
        model = condensenet(depth)
    assert millions(authors_mult_adds(model, 32)) == flops
    assert millions(counted_parameters(model), 4) == counted
    if real:
        assert parameters(model) == real


def test_cifar_sizes_condensed():
    with torch.device("meta"):
        model, model100, images = condensenet(86), condensenet(86, classes=100), torch.empty(1, 3, 32, 32)
    condensed = condensed_like(model)
    assert parameters(condensed) == counted_parameters(condensed) == 516_202
    assert parameters(condensed_like(model100)) == 552_292
    assert millions(authors_mult_adds(condensed, 32)) == 65.81
    assert millions(mult_adds(model, images)) == 173.86
    assert millions(mult_adds(condensed, images)) == 62.38


@pytest.mark.parametrize(
    ("groups", "real", "condensed", "flops"), [(4, 11_922_680, 4_773_944, 529.33), (8, 11_103_608, 2_935_416, 274.23)]
)
def test_imagenet_sizes(groups, real, condensed, flops):
    with torch.device("meta"):
        model, images = condensenet_imagenet(groups), torch.empty(1, 3, 224, 224)
    assert parameters(model) == real
    small = condensed_like(model)
    assert parameters(small) == condensed
    assert millions(authors_mult_adds(small, 224)) == flops
    inputs = [layer.in_channels for layer in model.learned()]
    assert (len(inputs), inputs[0], inputs[-1], model.classifier.in_features) == (36, 16, 1936, 2064)
    if groups == 4:
        assert millions(mult_adds(model, images), 1) == 1267.9
        assert millions(mult_adds(small, images), 1) == 516.6


@pytest.mark.parametrize(
    ("depth", "growth", "flops", "counted"), [(94, 16, 121.93, 0.3305), (160, 32, 1136.58, 3.1469)]
)
def test_light_sizes(depth, growth, flops, counted):
    with torch.device("meta"):
        model = condensenet_light(depth, growth)
    assert millions(authors_mult_adds(model, 32)) == flops
    assert millions(counted_parameters(model), 4) == counted


def test_densenet_bc_100():
    with torch.device("meta"):
        model = densenet_bc(100, 12)
    assert parameters(model) == counted_parameters(model) == 769_162
    assert millions(authors_mult_adds(model, 32)) == 292.38
    assert model.densities() == []


@pytest.mark.parametrize(
    ("options", "flops", "counted"),
    [
        ({}, 5_217_546, 34_346),
        ({"condense_factor": 2}, 6_200_586, 41_066),
        ({"growth": (16, 16, 16), "reduction": 0.5}, 9_864_842, 21_834),
    ],
)
def test_counts_to_the_last_digit(options, flops, counted):
    """Counted by the official measure_model on small networks."""
    with torch.device("meta"):
        model = CondenseNet((2, 2, 2), **options)
    assert (authors_mult_adds(model, 32), counted_parameters(model)) == (flops, counted)


def test_reduced_channels_are_rounded_up_to_whole_groups():
    model = CondenseNet((1, 1), (8, 8), reduction=0.4)
    assert model.transitions[0][0].out_channels == 12  # 24 channels x 0.4 = 9.6


def test_arms_have_equal_test_cost():
    with torch.device("meta"):
        learned, static = CondenseNet((4, 4, 4)), CondenseNet((4, 4, 4), conv="static")
        random, dense = CondenseNet((4, 4, 4), conv="random"), CondenseNet((4, 4, 4), conv="dense")
        images = torch.empty(1, 3, 16, 16)
    cost = mult_adds(condensed_like(learned, classifier=False), images)
    assert cost == mult_adds(static, images) == mult_adds(condensed_like(random, classifier=False), images)
    assert authors_mult_adds(learned, 16) == authors_mult_adds(static, 16) == authors_mult_adds(random, 16)
    ones = sum(m.weight.numel() for block in dense.blocks for m in (layer.conv1 for layer in block))
    assert counted_parameters(dense) - counted_parameters(learned) == 0.75 * ones


def test_features_of_all_layers_reach_all_later_ones():
    """Fully dense connectivity: the input of a later block begins with the stem's channels, only pooled."""
    torch.manual_seed(0)
    model = CondenseNet((3, 2, 2))
    assert [layer.conv1.in_channels for block in model.blocks for layer in block] == [16, 24, 32, 40, 56, 72, 104]
    assert [layer.conv3x3.out_channels for block in model.blocks for layer in block] == [8, 8, 8, 16, 16, 32, 32]
    assert model.classifier.in_features == 16 + 24 + 32 + 64
    outs = {}
    for name in ("stem", "blocks.0", "blocks.1", "blocks.2"):
        model.get_submodule(name).register_forward_hook(lambda _m, _x, out, name=name: outs.update({name: out}))
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
    earlier = outs["stem"]
    for m in range(3):
        out = outs[f"blocks.{m}"]
        assert torch.allclose(out[:, : earlier.shape[1]], earlier, atol=1e-6)
        earlier = F.avg_pool2d(out, 2)


@pytest.mark.parametrize("conv", ["learned", "random", "static", "dense"])
@pytest.mark.parametrize("reduction", [None, 0.5])
def test_training_before_and_after_pruning(conv, reduction):
    torch.manual_seed(0)
    model = CondenseNet(**TINY, conv=conv, dropout=0.1, reduction=reduction)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images, labels = torch.randn(20, 3, 8, 8), torch.arange(20) % 5
    losses, pruned = [], []
    for step in range(24):
        pruned.append(model.prune(step / 24))
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        (loss + 1e-5 * model.group_lasso()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    learning = conv in ("learned", "random")
    assert [step for step, p in enumerate(pruned) if p] == ([4, 8, 12] if learning else [])
    assert model.densities() == ([0.25] * (5 if reduction else 4) if learning else [])


def test_group_lasso_ends_with_the_last_stage():
    model = CondenseNet(**TINY, condense_factor=2)  # C - 1 < G - 1: the official code never stops here
    total = sum(layer.lasso() for layer in model.learned())
    assert model.group_lasso().item() == pytest.approx(total.item())
    model.prune(0.5)
    assert model.group_lasso().item() == 0
    assert all(layer.lasso() > 0 for layer in model.learned())


def test_prune_reaches_every_layer_and_a_state_dict_continues():
    torch.manual_seed(0)
    model, other = CondenseNet(**TINY), CondenseNet(**TINY)
    assert not model.prune(0)
    assert model.prune(0.2)
    other.load_state_dict(model.state_dict())
    assert not other.prune(0.2)
    assert model.prune(0.9)
    assert other.prune(0.9)
    for a, b in zip(model.learned(), other.learned(), strict=True):
        assert torch.equal(a.mask, b.mask)
    assert other.densities() == [0.25] * 4


def test_initialisation():
    torch.manual_seed(0)
    model = CondenseNet((1, 1), (32, 64))
    conv1, conv3x3 = model.blocks[1][0].conv1, model.blocks[1][0].conv3x3
    assert conv1.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert conv3x3.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert model.stem.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert model.classifier.bias.eq(0).all()
    static = CondenseNet((1, 1), (32, 64), conv="static")
    assert static.blocks[1][0].conv1.conv.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.03)


def test_any_image_size_down_to_one_pixel_in_the_last_block():
    torch.manual_seed(0)
    model = CondenseNet((1, 1, 1), classes=7).eval()
    for size in ((4, 4), (9, 6), (32, 32)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 7)
    with pytest.raises(ValueError, match="at least 4"):
        model(torch.randn(2, 3, 3, 8))
    strided = CondenseNet((1, 1, 1), stem_stride=2).eval()
    assert strided.features(torch.randn(2, 3, 7, 7)).shape == (2, 16 + 56)
    with pytest.raises(ValueError, match="at least 7"):
        strided(torch.randn(2, 3, 6, 6))
    for bad in (torch.randn(2, 1, 8, 8), torch.randn(3, 8, 8)):
        with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
            model(bad)


def test_bad_arguments():
    with pytest.raises(ValueError, match="depth 87: expected 6n \\+ 2"):
        condensenet(87)
    with pytest.raises(ValueError, match="6n \\+ 4"):
        condensenet_light(2)
    with pytest.raises(ValueError, match="as many blocks as growths"):
        CondenseNet((2, 2), (8, 16, 32))
    with pytest.raises(ValueError, match="'learned', 'random', 'static' or 'dense'"):
        CondenseNet(**TINY, conv="grouped")
    with pytest.raises(ValueError, match="C = G"):
        CondenseNet(**TINY, conv="static", condense_factor=2)
    with pytest.raises(ValueError, match="R divisible by G"):
        CondenseNet(**TINY, groups=3)
