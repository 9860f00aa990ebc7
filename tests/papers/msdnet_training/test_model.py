"""MSDNet against the counts of the official code, and its forward against its own definition."""

import re
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.metrics.compute import mult_adds, parameters
from papers.msdnet_training import IMTA, CollaborativeHeads, MSDNet, exit_costs, msdnet_cifar, msdnet_imagenet
from papers.msdnet_training.model import Layer, Transition, step_sizes

NETWORKS = {
    "imagenet4": lambda: msdnet_imagenet(4),
    "imagenet6": lambda: msdnet_imagenet(6),
    "imagenet7": lambda: msdnet_imagenet(7),
    "even7": lambda: msdnet_cifar(7),
    "lin7": lambda: msdnet_cifar(7, "lin_grow"),
    "lin5": lambda: msdnet_cifar(5, "lin_grow"),
    "cifar10": lambda: msdnet_cifar(5, "even", classes=10),
}


@cache
def on_meta(name: str) -> MSDNet:
    with torch.device("meta"):
        return NETWORKS[name]()


def small(**changes) -> MSDNet:
    torch.manual_seed(0)
    settings = {"exits": 3, "base": 2, "step": 2, "channels": 4, "growth": 2, "classes": 5}
    return msdnet_cifar(**{**settings, **changes})


# ------------------------------------------------------------------------------------------------ official numbers
@pytest.mark.parametrize(
    ("name", "steps", "cumulative"),
    [
        ("imagenet4", [4] * 5, [4_238_504, 8_772_240, 13_073_272, 16_748_416, 23_958_440]),
        ("imagenet6", [6] * 5, [7_076_712, 15_689_808, 24_014_008, 42_187_744, 56_529_304]),
        ("even7", [4] + [2] * 6, [433_876, 876_792, 1_274_952, 1_695_548, 2_178_352, 2_603_252, 3_067_960]),
        ("lin7", list(range(1, 8)), [299_704, 649_740, 1_111_388, 1_727_200, 2_384_968, 3_052_244, 3_966_664]),
        ("lin5", list(range(1, 6)), [299_704, 649_740, 1_018_308, 1_492_424, 2_078_924]),
        ("cifar10", [4] + [2] * 4, [422_266, 763_648, 1_141_530, 1_488_276, 1_892_990]),
    ],
)
def test_parameters(name, steps, cumulative):
    model = on_meta(name)
    assert model.steps == steps
    assert exit_costs(model, 224 if name.startswith("imagenet") else 32, "parameters") == cumulative
    assert parameters(model) == cumulative[-1]


@pytest.mark.parametrize(
    ("name", "size", "count", "millions"),
    [
        ("imagenet4", 224, "ops", [339.90, 685.46, 1008.16, 1254.47, 1360.53]),
        ("imagenet4", 224, "mult_adds", [337.21, 681.65, 1003.66, 1249.63, 1355.61]),
        ("even7", 32, "ops", [15.14, 25.51, 37.10, 46.33, 57.34, 66.96, 75.94]),
        ("lin5", 32, "ops", [6.86, 14.35, 27.54, 41.71, 58.48]),
    ],
)
def test_cost_of_each_exit(name, size, count, millions):
    assert [round(c / 1e6, 2) for c in exit_costs(on_meta(name), size, count)] == millions


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("imagenet4", [384, 384, 352, 304, 560]),
        ("imagenet6", [512, 544, 496, 880, 792]),
        ("imagenet7", [576, 640, 608, 528, 976]),
        ("lin7", [128] * 7),
    ],
)
def test_feature_dims(name, dims):
    assert on_meta(name).feature_dims == dims


def test_tensors_of_each_block():
    state, shapes = torch.empty(1, 3, 32, 32, device="meta"), []
    for i in range(5):
        state = on_meta("cifar10").run_block(i, state)
        shapes.append([tuple(x.shape[1:]) for x in state])
    assert shapes == [
        [(40, 32, 32), (80, 16, 16), (160, 8, 8)],
        [(58, 16, 16), (116, 8, 8)],
        [(82, 16, 16), (164, 8, 8)],
        [(116, 8, 8)],
        [(164, 8, 8)],
    ]


def test_logits_of_the_official_code():
    """models/msdnet_ge.py of kalviny/IMTA @ a9378373241c, seed 0: its weights, drawn in its order, and its wiring."""
    torch.manual_seed(0)
    model = msdnet_cifar(5, classes=10).eval()
    found = torch.cat([p[:, :3] for p in model(torch.linspace(-1, 1, 3072).view(1, 3, 32, 32))])
    expected = [
        [-0.02635, -0.08459, -0.02684],
        [0.01914, -0.08432, -0.05571],
        [0.07385, -0.05422, 0.01287],
        [0.01172, -0.00189, 0.02216],
        [0.0206, -0.02142, -0.04574],
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_scale_is_left_at_the_end(name):
    """In all published networks: else the finer ones would be computed for nobody, their weights without gradient."""
    assert len(on_meta(name).blocks[-1][-1].scales) == 1


def test_network_of_the_small_experiment():
    with torch.device("meta"):
        model = msdnet_cifar(5, classes=10, base=1, step=1, channels=8, growth=4)
    assert parameters(model) == 1_071_826
    assert [round(c / 1e6, 2) for c in exit_costs(model, 32)] == [3.00, 5.59, 8.05, 10.44, 12.31]


def test_costs_agree_with_an_independent_count():
    model = small()
    model.train()
    assert exit_costs(model, 32)[-1] == mult_adds(model, torch.zeros(1, 3, 32, 32))
    imta = IMTA(model, CollaborativeHeads(model.feature_dims, 5))
    assert exit_costs(imta, 32)[-1] == mult_adds(imta, torch.zeros(1, 3, 32, 32))
    backbone_linears = sum(parameters(e.linear) for e in model.exits)  # not run: the heads stand in their place
    assert exit_costs(imta, 32, "parameters")[-1] == parameters(imta) - backbone_linears
    assert not any(m._forward_hooks for m in imta.modules())
    with pytest.raises(ValueError, match="unknown count 'macs'"):
        exit_costs(model, 32, "macs")


def test_operations_of_one_exit_by_hand():
    """One scale, one layer, 8x8 images: every term of the authors' count."""
    model = MSDNet(1, 1, 1, "even", 4, 2, (1,), (3,), 5, "cifar")
    first, squeeze, grow = 4 * 27 * 64, 4 * 4 * 64, 2 * 9 * 4 * 64  # 3 -> 4, 4 -> min(4, 3 * 2), 4 -> 2 channels
    exits = 128 * 9 * 6 * 16 + 128 * 9 * 128 * 4  # 6 -> 128 on 4x4, 128 -> 128 on 2x2
    assert exit_costs(model, 8) == [first + squeeze + grow + exits + 128 * 5]
    relu, pool, bias = (4 + 4 + 2) * 64 + 128 * (16 + 4), 128 * 4, 5
    assert exit_costs(model, 8, "ops") == [first + squeeze + grow + exits + 128 * 5 + relu + pool + bias]


# ------------------------------------------------------------------------------------------------ definition
def test_step_sizes():
    assert step_sizes(4, 4, 2, "even") == [4, 2, 2, 2]
    assert step_sizes(4, 1, 2, "lin_grow") == [1, 3, 5, 7]
    assert step_sizes(1, 3, 2, "lin_grow") == [3]


def test_a_layer_keeps_its_input_and_reads_what_is_finer():
    torch.manual_seed(0)
    state = [torch.randn(2, 5 * f, 16 // f, 16 // f) for f in (1, 2, 4)]
    dropping, staying = Layer(5, 2, (1, 2, 4), (1, 2, 4), 3, 2), Layer(5, 2, (1, 2, 4), (1, 2, 4), 3, 3)
    for layer, kept in ((staying, state), (dropping, state[1:])):
        out = layer(state)
        assert [x.shape[1] for x in out] == [7 * x.shape[1] // 5 for x in kept]
        assert all(torch.equal(new[:, : x.shape[1]], x) for new, x in zip(out, kept, strict=True))
    changed = [state[0] + 1, *state[1:]]
    for layer, reads_finest in ((staying, [True, True, False]), (dropping, [True, False])):
        pairs = zip(layer.eval()(state), layer(changed), strict=True)
        assert [not torch.equal(a, b) for a, b in pairs] == reads_finest


def test_half_of_the_width_is_left_where_a_scale_is_dropped():
    layers = [l for block in small(exits=1, base=6).blocks for l in block]
    transitions = [l for l in layers if isinstance(l, Transition)]
    # Layers 1-2 at three scales, 3-4 at two, 5-6 at one; width 4 + 3 * 2 = 10 -> 5, then 5 + 2 * 2 = 9 -> 4.
    assert [[tuple(conv[0].weight.shape) for conv in t.scales] for t in transitions] == [
        [(10, 20, 1, 1), (20, 40, 1, 1)],
        [(16, 36, 1, 1)],
    ]


def test_exit_by_exit_is_the_forward_pass():
    model = small().eval()
    images = torch.randn(4, 3, 32, 32)
    expected, features = model(images), model.features(images)
    state, logits = images, None
    for i in range(model.num_exits):
        state = model.run_block(i, state)
        logits = model.exit_logits(i, state, logits)
        assert logits.shape == (4, 5)
        torch.testing.assert_close(logits, expected[i], rtol=0, atol=0)
        torch.testing.assert_close(model.exits[i].linear(model.exit_features(i, state)), expected[i], rtol=0, atol=0)
        assert features[i].shape == (4, model.feature_dims[i])


@pytest.mark.parametrize(("stem", "size", "map_size"), [("cifar", 32, 8), ("imagenet", 224, 7)])
def test_the_pool_is_the_official_one_on_official_sizes(stem, size, map_size):
    scales = 3 if stem == "cifar" else 4
    model = MSDNet(1, 1, 1, "even", 4, 2, (1,) * scales, (1,) * scales, 5, stem).eval()
    coarsest = model.run_block(0, torch.randn(2, 3, size, size))[-1]
    assert coarsest.shape[2:] == (map_size, map_size)
    official = F.avg_pool2d(model.exits[0].convs(coarsest), 2)
    assert official.shape[2:] == (1, 1)
    torch.testing.assert_close(model.exit_features(0, [coarsest]), official.flatten(1))


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (16, 16), (33, 47)])
def test_other_image_sizes(size):
    assert [p.shape for p in small()(torch.randn(3, 3, *size))] == [(3, 5)] * 3


def test_weights_are_torch_defaults():
    """Within 1/sqrt(fan in), which the intended N(0, sqrt(2 / fan out)) would leave."""
    for m in small(channels=16, growth=6).modules():
        if isinstance(m, nn.Conv2d):
            fan_in = m.weight[0].numel()
            assert 0.9 < m.weight.abs().max() * fan_in**0.5 <= 1


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"growth_factor": (1, 2)}, "expected one number >= 1 a scale in each"),
        ({"growth_factor": (), "bottleneck_factor": ()}, "expected one number >= 1 a scale in each"),
        ({"growth": 3, "growth_factor": (1, 1, 2)}, "expected even products after the first scale"),
        ({"exits": 0}, "exits=0, base=2, step=2: expected at least 1 of each"),
        ({"classes": 0}, "classes=0"),
        ({"reduction": 0}, "0 < reduction <= 1"),
        ({"step_mode": "odd"}, "unknown step_mode 'odd', expected 'even' or 'lin_grow'"),
        ({"stem": "mnist"}, "unknown stem 'mnist', expected 'imagenet' or 'cifar'"),
        ({"equilibrium": "finest"}, "unknown equilibrium 'finest', expected None, 'all' or 'last'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_bad_images():
    model, imagenet = small(), MSDNet(1, 1, 1, channels=4, growth=2, classes=5)
    for shape in ((1, 3, 3, 8), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=re.escape("expected (N, 3, H, W) with H and W at least 4")):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="H and W at least 32"):
        imagenet(torch.zeros(2, 3, 31, 32))
    assert imagenet(torch.zeros(2, 3, 32, 32))[0].shape == (2, 5)
