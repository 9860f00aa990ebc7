"""Encoders, classifiers and the sequence of glance and crops, each against its own definition."""

import re
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from papers.gfnet.classifiers import ConcatClassifier, RecurrentClassifier
from papers.gfnet.crop import crop
from papers.gfnet.encoders import FAMILY, NETWORKS, Encoder, encoder
from papers.gfnet.model import GFNet

# name: C, F, and the side of e at P = 96, 128, 144 (official code: configs.py, models/, pycls/)
SHAPES = {
    "resnet50": (2048, 2048, [3, 4, 5]),
    "densenet121": (1024, 1024, [3, 4, 4]),
    "densenet169": (1664, 1664, [3, 4, 4]),
    "densenet201": (1920, 1920, [3, 4, 4]),
    "regnet_y_400mf": (440, 440, [3, 4, 5]),
    "regnet_y_600mf": (608, 608, [3, 4, 5]),
    "regnet_y_800mf": (784, 784, [3, 4, 5]),  # 768 in the official code
    "regnet_y_1_6gf": (888, 888, [3, 4, 5]),
    "mobilenet_v3_large": (960, 1280, [3, 4, 5]),
    "mobilenet_v3_large_1.25": (1200, 1280, [3, 4, 5]),
    "efficientnet_b2": (1408, 1408, [3, 4, 5]),
    "efficientnet_b3": (1536, 1536, [3, 4, 5]),
}
ONE_OF_EACH = ["resnet50", "densenet121", "regnet_y_400mf", "mobilenet_v3_large", "efficientnet_b2"]


@cache
def on_meta(name: str) -> Encoder:
    if name.startswith("regnet"):  # torchvision computes its widths with tensors, which need a real device
        return encoder(name).to("meta").eval()
    with torch.device("meta"):
        return encoder(name).eval()


def small(**changes) -> GFNet:
    torch.manual_seed(0)
    return GFNet(**{"encoder": "tiny", "classes": 5, "patch": 16, "steps": 3, "hidden": 8, **changes})


def images(B: int = 2, size: int = 24) -> Tensor:
    return torch.rand(B, 3, size, size, generator=torch.Generator().manual_seed(1))


def at_random(t: int, e: Tensor) -> Tensor:
    return torch.rand(len(e), 2, generator=torch.Generator().manual_seed(t))


# ------------------------------------------------------------------------------------------------ encoders
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_maps_and_features(name):
    found, (channels, feature_dim, sides) = on_meta(name), SHAPES[name]
    assert (found.channels, found.feature_dim) == (channels, feature_dim)
    for P, side in zip((96, 128, 144), sides, strict=True):
        e, feature = found(torch.empty(2, 3, P, P, device="meta"))
        assert e.shape == (2, channels, side, side)
        assert feature.shape == (2, feature_dim)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_logits_are_those_of_torchvision(name):
    """Bit for bit, from a file; that of DenseNet-121 is of the old kind, as the published ones are."""
    torch.manual_seed(0)
    net = getattr(models, name)(num_classes=7).eval()
    for tensor in net.state_dict().values():
        if tensor.dim() == 1:  # batch norms and biases, which start with all channels alike
            tensor += 0.1 * torch.rand_like(tensor)
    file = {re.sub(r"(denselayer\d+\.(norm|conv))(\d)", r"\1.\3", k): v for k, v in net.state_dict().items()}
    if name == "densenet121":
        assert "features.denseblock1.denselayer1.norm.1.weight" in file
        file = {key: tensor for key, tensor in file.items() if "num_batches_tracked" not in key}
    found = encoder(name, classes=7).eval()
    found.load_torchvision(file)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        e, feature = found(x)
        logits, expected = found.fc(feature), net(x)
    assert expected.isfinite().all()
    assert not torch.equal(expected[0], expected[1])
    assert torch.equal(logits, expected)
    if name != "mobilenet_v3_large":
        torch.testing.assert_close(feature, e.mean((2, 3)))


def test_tiny_takes_any_size_from_8():
    found = encoder("tiny", classes=3)
    assert [found.map_size(P) for P in (8, 15, 24, 32)] == [1, 1, 3, 4]
    assert [on_meta(name).map_size(144) for name in ("densenet121", "mobilenet_v3_large")] == [4, 5]
    assert found(images(2, 24))[0].shape == (2, found.channels, 3, 3)
    assert found(images(2, 9))[1].shape == (2, found.feature_dim)


def test_the_wide_mobilenet_is_the_authors_not_torchvisions():
    """An expansion is a ratio of rounded channels (96 = 4 x 24, not 80), and the linear layer stays 1280 wide."""
    wide = on_meta("mobilenet_v3_large_1.25")
    inner = [m.out_channels for m in wide.trunk.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert inner == [24, 96, 96, 96, 144, 144, 288, 264, 240, 240, 624, 864, 864, 1200, 1200]
    assert wide.neck[2].out_features == 1280


def test_dropout_comes_before_both_heads_of_type_b():
    found = encoder("mobilenet_v3_large", classes=3).train()
    _, feature = found(torch.randn(4, 3, 32, 32))
    assert 0.1 < (feature == 0).float().mean() < 0.3  # 0.2 in the official code
    assert not any(isinstance(m, nn.Dropout) for m in found.fc.modules())


def test_weights_that_do_not_fit_are_named_and_none_is_loaded():
    found = encoder("tiny", classes=3)
    state = dict(encoder("tiny", classes=3).state_dict())
    net = {key: state[name] for key, name in found.torchvision_names.items()}
    before = {name: value.clone() for name, value in found.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"fit this encoder: fc.bias is \(3,\), expected \(4,\)|fc.weight is \(3, 64\)"
    ):
        encoder("tiny", classes=4).load_torchvision(net)
    with pytest.raises(ValueError, match="encoder: features.0.weight is missing$"):
        found.load_torchvision({k: v for k, v in net.items() if k != "features.0.weight"})
    with pytest.raises(ValueError, match="encoder: module.x is unknown$"):
        found.load_torchvision({**net, "module.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="is missing; .* and 20 more"):
        found.load_torchvision({"state_dict": net})
    assert all(torch.equal(value, before[name]) for name, value in found.state_dict().items())


def test_families():
    concat = {name for name in NETWORKS if FAMILY[name] == "concat"}
    assert concat == {"mobilenet_v3_large", "mobilenet_v3_large_1.25", "efficientnet_b2", "efficientnet_b3"}
    assert {FAMILY[name] for name in NETWORKS if name not in concat} == {"recurrent"}


# ------------------------------------------------------------------------------------------------ classifiers
def test_recurrent_classifier_is_a_gru_over_the_sequence():
    torch.manual_seed(0)
    classifier, gru = RecurrentClassifier(6, 4, hidden=5), nn.GRU(6, 5)
    gru.load_state_dict({f"{name}_l0": value for name, value in classifier.gru.state_dict().items()})
    features, state, found = torch.randn(3, 2, 6), None, []
    for feature in features:
        logits, state = classifier(feature, state)
        found.append(logits)
    torch.testing.assert_close(torch.stack(found), classifier.fc(gru(features)[0]))


def test_concat_classifier_reads_all_features_so_far():
    torch.manual_seed(0)
    classifier, features = ConcatClassifier(6, 4, steps=3), torch.randn(3, 2, 6)
    logits, state = classifier(features[0], None)
    assert logits is None
    assert torch.equal(state, features[0])
    for t in (2, 3):
        logits, state = classifier(features[t - 1], state)
        linear = classifier.fc[t - 2]
        expected = sum(features[i] @ linear.weight[:, 6 * i : 6 * i + 6].T for i in range(t)) + linear.bias
        torch.testing.assert_close(logits, expected)
    assert torch.equal(state, features.movedim(0, 1).flatten(1))
    with pytest.raises(ValueError, match="step 4 of a classifier for 3 steps"):
        classifier(features[0], state)


@pytest.mark.parametrize("classifier", [RecurrentClassifier(6, 4, 5), ConcatClassifier(6, 4, 3)])
def test_images_can_leave_between_steps(classifier):
    features, rows = torch.randn(3, 4, 6), [2, 0]
    _, state = classifier(features[0], None)
    expected, _ = classifier(features[1], state)
    found, _ = classifier(features[1][rows], state[rows])
    torch.testing.assert_close(found, expected[rows])


# ------------------------------------------------------------------------------------------------ glance
def bicubic(image: Tensor, size: int) -> Tensor:
    """(H, W) -> (size, size) by definition: Keys' kernel, a = -0.75, corners on corners, borders repeated."""

    def matrix(n: int) -> Tensor:
        weights = torch.zeros(size, n, dtype=torch.float64)
        for i in range(size):
            place = i * (n - 1) / (size - 1)
            for k in range(int(place) - 1, int(place) + 3):
                d = abs(place - k)
                near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3
                weights[i, min(max(k, 0), n - 1)] += near if d <= 1 else far
        return weights

    return matrix(image.shape[0]) @ image @ matrix(image.shape[1]).T


def test_glance_is_bicubic_with_aligned_corners():
    x = torch.rand(1, 3, 29, 37, dtype=torch.float64)
    found = small().glance(x)
    torch.testing.assert_close(found[0], torch.stack([bicubic(channel, 16) for channel in x[0]]))
    corners = ([0, 0, -1, -1], [0, -1, 0, -1])
    torch.testing.assert_close(found[..., corners[0], corners[1]], x[..., corners[0], corners[1]])
    assert torch.equal(small().glance(x[..., :16, :16]), x[..., :16, :16])


# ------------------------------------------------------------------------------------------------ the sequence
@pytest.mark.parametrize("name", ["tiny", "mobilenet_v3_large"])
def test_forward_is_glance_then_crops(name):
    P = 32 if name != "tiny" else 16
    model, x, seen = small(encoder=name, patch=P).eval(), images(2, P + 8), []

    def locate(t: int, e: Tensor) -> Tensor:
        seen.append((t, e))
        return at_random(t, e)

    steps = model(x, locate)
    assert [t for t, _ in seen] == [1, 2]
    assert all(e is step.e for (_, e), step in zip(seen, steps, strict=False))
    e, feature = model.global_encoder(model.glance(x))
    logits, state = model.classifier(feature, None)
    own = model.global_encoder.fc(feature)
    expected = [(own if model.family == "concat" else logits, own, e)]
    for t in (1, 2):
        e, feature = model.local_encoder(crop(x, at_random(t, x), P))
        logits, state = model.classifier(feature, state)
        expected.append((logits, model.local_encoder.fc(feature), e))
    for found, wanted in zip(steps, expected, strict=True):
        torch.testing.assert_close(tuple(found), wanted, rtol=0, atol=0)
    assert (steps[0].logits is steps[0].own_logits) == (model.family == "concat")


@pytest.mark.parametrize(("name", "heads_run"), [("tiny", 0), ("mobilenet_v3_large", 1)])
def test_own_heads_are_skipped_on_request(name, heads_run):
    """All but that of f_G in type B, which is its classifier."""
    model, x, runs = small(encoder=name, patch=32).eval(), images(2, 32), []
    for network in (model.global_encoder, model.local_encoder):
        network.fc.register_forward_hook(lambda *_: runs.append(1))
    first, state = model.step(1, x, None, own=False)
    second, _ = model.step(2, x, state, own=False)
    assert len(runs) == heads_run
    assert (first.own_logits is None) == (heads_run == 0)
    assert second.own_logits is None
    assert torch.equal(first.logits, model.step(1, x, None)[0].logits)
    assert torch.equal(second.logits, model.step(2, x, state)[0].logits)


@pytest.mark.parametrize("name", ["tiny", "mobilenet_v3_large"])
def test_one_step_is_the_glance_alone(name):
    model = small(encoder=name, patch=32, steps=1).eval()
    assert model.local_encoder is None
    [step] = model(images(2, 40))
    e, feature = model.global_encoder(model.glance(images(2, 40)))
    assert torch.equal(step.own_logits, model.global_encoder.fc(feature))
    assert torch.equal(step.e, e)
    assert step.logits.shape == (2, 5)


def test_images_do_not_meet():
    model, x = small().eval(), images(3)

    def locate(t: int, e: Tensor) -> Tensor:
        return e[:, :2].mean((2, 3)).sigmoid()  # of the image alone

    together = model(x, locate)
    for i in range(3):
        for a, b in zip(model(x[i : i + 1], locate), together, strict=True):
            torch.testing.assert_close(a.logits[0], b.logits[i])


def test_a_seed_gives_the_same_network_in_the_order_of_construction():
    model = small()
    torch.manual_seed(0)
    parts = [encoder("tiny", 5), encoder("tiny", 5), RecurrentClassifier(64, 5, 8)]
    for found, expected in zip((model.global_encoder, model.local_encoder, model.classifier), parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ training
def loss_of(steps) -> Tensor:
    return sum(step.logits.square().sum() + step.own_logits.square().sum() for step in steps)


def without_gradient(network: nn.Module) -> list[str]:
    return [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


def test_gradients_reach_both_encoders_and_the_classifier():
    model = small()
    loss_of(model(images(4), at_random)).backward()
    assert without_gradient(model) == []


def test_classifier_alone_trains_both_encoders_of_type_a():
    """Through the GRU: the loss of the last step reaches the glance."""
    model = small()
    model(images(4), at_random)[-1].logits.square().sum().backward()
    own_heads = [f"{encoder}_encoder.fc.{name}" for encoder in ("global", "local") for name in ("weight", "bias")]
    assert without_gradient(model) == own_heads


@pytest.mark.parametrize("settings", [{"global_frozen": True}, {"encoder": "mobilenet_v3_large", "patch": 32}])
def test_a_frozen_glance_takes_no_gradient_and_stays_in_eval_mode(settings):
    model = small(**settings)
    assert model.global_frozen
    for network in (model, model.eval().train()):
        assert network.training
        assert not any(m.training for m in network.global_encoder.modules())
        assert all(m.training for m in network.local_encoder.modules())
    before = {name: value.clone() for name, value in model.global_encoder.state_dict().items()}
    steps = model(images(4, 40), at_random)
    assert not steps[0].own_logits.requires_grad
    loss_of(steps).backward()
    assert all(p.grad is None for p in model.global_encoder.parameters())
    assert without_gradient(model.local_encoder.neck) == without_gradient(model.classifier) == []
    assert all(torch.equal(value, before[name]) for name, value in model.global_encoder.state_dict().items())


def test_a_trained_glance_moves_its_statistics():
    model = small()
    assert not model.global_frozen
    before = model.global_encoder.trunk.features[1].running_mean.clone()
    model(images(), at_random)
    assert not torch.equal(model.global_encoder.trunk.features[1].running_mean, before)


# ------------------------------------------------------------------------------------------------ bad arguments
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "resnet18"}, "unknown encoder 'resnet18', expected one of resnet50, densenet121"),
        ({"classes": 0}, "classes 0: expected at least 1"),
        ({"patch": 7}, "patch 7: tiny needs at least 8"),
        ({"encoder": "mobilenet_v3_large", "patch": 31}, "patch 31: mobilenet_v3_large needs at least 32"),
        ({"steps": 0}, "steps=0, hidden=8: expected at least 1"),
        ({"hidden": 0}, "steps=3, hidden=0: expected at least 1"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


@pytest.mark.parametrize("shape", [(2, 3, 15, 16), (2, 3, 16, 15), (2, 1, 16, 16), (3, 16, 16)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\) with H and W at least 16"):
        small()(torch.rand(shape), at_random)


def test_bad_steps():
    model, x = small(), images(2, 16)
    _, state = model.step(1, x, None)
    for t, given in ((1, state), (2, None), (4, state), (0, None)):
        with pytest.raises(ValueError, match=f"step {t} with .* expected step 1 with none, or 2..3 with one"):
            model.step(t, x, given)
    with pytest.raises(ValueError, match="3 steps: expected a `locate`"):
        model(x)
