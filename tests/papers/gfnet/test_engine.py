"""The engine against running every step and choosing: same steps, same logits, and nothing computed for who has left.

In float64: a location that rounding moves over a whole pixel would change a crop.
"""

import pytest
import torch
from torch import nn

from common.metrics.early_exit import confidence, exits_taken
from papers.gfnet.bench import (
    check,
    crop_bench,
    early_exit_bench,
    every_step,
    loop_of_slices,
    networks,
    safe_thresholds,
)
from papers.gfnet.crop import crop
from papers.gfnet.encoders import encoder
from papers.gfnet.engine import GlanceFocusEngine, _fold, for_inference
from papers.gfnet.model import GFNet
from papers.gfnet.policy import Policy

SIZES = {"tiny": (24, 3, 40), "mobilenet_v3_large": (32, 3, 48)}  # P, T, side of the images
FAMILIES = ["tiny", "mobilenet_v3_large"]  # a GRU, and a layer a step on all features


def live(network: nn.Module) -> nn.Module:
    """Eval mode, float64, with batch norms that do something: the statistics of noise, other scales and shifts."""
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
    with torch.no_grad():
        network.double().train()(torch.randn(8, 3, 32, 32).double())
    return network.eval()


def build(name: str, steps: int | None = None) -> tuple[GFNet, Policy]:
    """With confidences and places that differ between images."""
    torch.manual_seed(0)
    patch, T, _ = SIZES[name]
    model = GFNet(name, classes=6, patch=patch, steps=steps or T, hidden=16)
    policy = Policy.conv(model.global_encoder.channels, model.global_encoder.map_size(patch), conv=4, hidden=8)
    nn.init.normal_(policy.actor.weight, 0, 3)
    for network in (model.global_encoder, model.local_encoder):
        if network is not None:
            live(network)
    return model.double().eval(), policy.double().eval()


def draw(name: str, count: int) -> torch.Tensor:
    side = SIZES[name][2]
    return torch.randn(count, 3, side, side + 5).double() + torch.randn(count, 3, 1, 1).double()


def assert_same(engine, images, logits, bounds):
    found, steps = engine(images)
    expected = exits_taken(confidence(logits), bounds)
    assert steps.dtype == torch.int64
    assert torch.equal(steps, expected + 1)
    torch.testing.assert_close(found, logits[torch.arange(len(images)), expected], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "chunks"), [("tiny", (1, 5, 12, 64, None)), ("mobilenet_v3_large", (5,))])
def test_equals_running_every_step_and_choosing(name, chunks):
    """In the order of the images, for chunks of one image, of a few and the whole batch; the second call like the first."""
    (model, policy), images = build(name), draw(name, 12)
    logits = every_step(model, policy, images)
    bounds = safe_thresholds(confidence(logits), 1.0)
    assert exits_taken(confidence(logits), bounds).bincount().tolist() == [4, 4, 4]
    for chunk in chunks:
        engine = GlanceFocusEngine(model, policy, bounds, chunk)
        assert_same(engine, images, logits, bounds)
        assert_same(engine, images[3:].flip(0), logits[3:].flip(0), bounds)
        assert_same(engine, images[:1], logits[:1], bounds)
        assert_same(engine, images[:0], logits[:0], bounds)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_stop_at_each_step(name):
    """All at the first, all at the second, ..., none before the last; thresholds of 0, 1/classes and infinity."""
    (model, policy), images = build(name), draw(name, 6)
    logits, T = every_step(model, policy, images), model.steps
    for t in range(T):
        bounds = torch.full((T,), torch.inf)
        bounds[t] = 0.0
        engine = GlanceFocusEngine(model, policy, bounds, chunk=4)
        assert_same(engine, images, logits, bounds)
        assert engine.samples_run == [6] * (t + 1) + [0] * (T - t - 1)
    engine = GlanceFocusEngine(model, policy)  # no thresholds: all take all steps
    assert_same(engine, images, logits, torch.full((T,), torch.inf))
    assert engine.samples_run == [6] * T


@pytest.mark.parametrize("chunk", [3, None])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_computed_for_an_image_that_has_left(name, chunk, monkeypatch):
    """Rows that every layer really sees, and rows that are cropped. The policy never runs after the last step."""
    (model, policy), images = build(name), draw(name, 14)
    logits = every_step(model, policy, images)
    bounds = safe_thresholds(confidence(logits), 0.5)
    taken = exits_taken(confidence(logits), bounds) + 1
    there = [int((taken >= t).sum()) for t in (1, 2, 3)]
    assert there == [14, 6, 2]
    engine, seen = GlanceFocusEngine(model, policy, bounds, chunk), {}

    def count(layer, inputs):
        seen[layer] = seen.get(layer, 0) + len(inputs[0])

    def watch(network):
        layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.GRUCell)]
        for layer in layers:
            layer.register_forward_pre_hook(count)
        return layers

    convs = {e: watch(e.trunk) for e in (engine.model.global_encoder, engine.model.local_encoder)}
    layers, heads = watch(engine.policy), watch(engine.model.classifier)
    own = [watch(e.fc)[0] for e in convs]
    cropped = []

    def counted_crop(x, locations, *more):
        cropped.append(len(locations))
        return crop(x, locations, *more)

    monkeypatch.setattr("papers.gfnet.engine.crop", counted_crop)
    engine(images)
    assert {seen[c] for c in convs[engine.model.global_encoder]} == {there[0]}
    assert {seen[c] for c in convs[engine.model.local_encoder]} == {there[1] + there[2]}
    assert {seen[c] for c in layers} == {there[1] + there[2]}
    assert sum(cropped) == there[1] + there[2]
    if model.family == "recurrent":
        assert [seen[c] for c in heads] == [sum(there)] * 2
        assert [seen.get(c, 0) for c in own] == [0, 0]
    else:
        assert [seen[c] for c in heads] == there[1:]
        assert [seen.get(c, 0) for c in own] == [14, 0]
    assert engine.samples_run == there
    engine(images)
    assert engine.samples_run == [2 * n for n in there]


def test_the_glance_alone():
    """T = 1: no f_L, and the policy never runs."""
    (model, policy), images = build("tiny", steps=1), draw("tiny", 5)
    logits = every_step(model, policy, images)
    engine = GlanceFocusEngine(model, policy)
    engine.policy.register_forward_pre_hook(lambda *_: pytest.fail("the policy ran"))
    assert_same(engine, images, logits, torch.zeros(1))


@pytest.mark.parametrize("layout", ["channels_last", "slice", "every second"])
def test_any_layout_of_the_images(layout):
    (model, policy), images = build("tiny"), draw("tiny", 12)
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    else:
        images = images[:, :, 3:, 2:] if layout == "slice" else images[::2]
    before, logits = images.clone(), every_step(model, policy, images)
    bounds = safe_thresholds(confidence(logits), 1.0)
    assert_same(GlanceFocusEngine(model, policy, bounds, chunk=5), images, logits, bounds)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "name", ["tiny", "resnet50", "densenet121", "regnet_y_400mf", "mobilenet_v3_large", "efficientnet_b2"]
)
def test_for_inference(name):
    """The same maps and features; batch norms are left only where a concatenation comes before: in DenseNet-121 the first
    of 58 layers, 3 transitions and the end."""
    torch.manual_seed(0)
    network, x = live(encoder(name, 5)), torch.randn(2, 3, 32, 32).double()
    fast = for_inference(network)
    with torch.no_grad():
        for found, expected in zip(fast(x), network(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert left == (58 + 3 + 1 if name == "densenet121" else 0)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in fast.parameters() if p.ndim == 4)


def test_a_convolution_that_others_read_is_not_folded():
    class Shared(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[1](x) + x

    trunk = Shared(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    _fold(trunk)
    assert isinstance(trunk[1], nn.BatchNorm2d)


def test_model_and_policy_are_left_as_they_are():
    model, policy = build("mobilenet_v3_large")
    model.train(), policy.train()
    before = {name: x.clone() for net in (model, policy) for name, x in net.state_dict().items()}
    GlanceFocusEngine(model, policy)(draw("mobilenet_v3_large", 2))
    assert model.training
    assert policy.training
    assert all(torch.equal(x, before[name]) for net in (model, policy) for name, x in net.state_dict().items())
    assert all(p.requires_grad for p in (*model.local_encoder.parameters(), *policy.parameters()))


def test_not_a_number_takes_all_steps():
    """As in exits_taken: no threshold is reached, no image is lost, the others are as without it."""
    (model, policy), images = build("tiny"), draw("tiny", 3)
    engine = GlanceFocusEngine(model, policy, torch.tensor([0.0, 0.0, 0.0]))
    whole = GlanceFocusEngine(model, policy)
    expected, _ = whole(images)
    images[1] = torch.nan
    logits, steps = engine(images)
    assert steps.tolist() == [1, 3, 1]
    assert logits.isnan().any(1).tolist() == [False, True, False]
    torch.testing.assert_close(whole(images)[0][::2], expected[::2], rtol=1e-8, atol=1e-8)


def test_bad_input():
    model, policy = build("tiny")
    for bad in (torch.zeros(2), torch.zeros(3, 1), torch.tensor([0.5, torch.nan, 0.5])):
        with pytest.raises(ValueError, match="one number for each of 3 steps"):
            GlanceFocusEngine(model, policy, bad)
    with pytest.raises(ValueError, match="chunk=0"):
        GlanceFocusEngine(model, policy, chunk=0)
    for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 3, 23, 32)):
        with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\) with H and W at least 24"):
            GlanceFocusEngine(model, policy)(torch.zeros(shape).double())


def test_bench_finds_a_wrong_engine():
    """Its check passes for the real one, and fails with other thresholds, or a policy that looks elsewhere."""
    model, policy = networks("tiny")
    images = torch.randn(64, 3, 72, 72) + torch.randn(64, 3, 1, 1)
    logits = every_step(model, policy, images)
    bounds = safe_thresholds(confidence(logits), 1.0)
    engine = GlanceFocusEngine(model, policy, bounds)
    steps = check(engine, images, logits)
    assert steps.bincount().tolist()[1:] == [21, 21, 22]
    nn.init.constant_(engine.policy.actor.bias, 3)
    with pytest.raises(AssertionError, match="of 64 images do not stop where"):
        check(engine, images, logits)
    engine = GlanceFocusEngine(model, policy, bounds)
    with pytest.raises(AssertionError, match="of 64 images do not stop where"):
        check(engine, images, logits.flip(0))


def test_bench_figures():
    """Tiny runs: no time is judged here. At p = 1 a third of the images stop at each step: close to 2/3 of the cost."""
    figures = early_exit_bench(batch=64, rounds=1, min_run_time=0.01, budgets=(1.0,))
    assert figures["mult_adds_1"] == pytest.approx(2 / 3, abs=0.02)
    assert all(value > 0 for key, value in figures.items() if key != "saving_1")
    assert figures["saving_1"] == pytest.approx((1 - figures["time_1"]) / (1 - figures["mult_adds_1"]))
    assert set(crop_bench(4, 20, 8, rounds=1, min_run_time=0.01)) == {"loop_ms", "crop_ms", "speed_up"}
    with pytest.raises(ValueError, match="encoder 'large'"):
        early_exit_bench(encoder="large")


def test_loop_of_slices():
    images = torch.arange(10000.0).view(1, 1, 100, 100).expand(1, 3, -1, -1)
    patch = loop_of_slices(images, torch.tensor([[0.5, 0.25]]), 60)
    assert patch.shape == (1, 3, 60, 60)
    assert patch[0, 1, 0, 0] == 2010
