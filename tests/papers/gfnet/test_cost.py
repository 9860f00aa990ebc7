"""Counts of parameters and multiply-adds against those measured from the official code (conv + linear + GRU)."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from common.metrics.compute import mult_adds, parameters
from papers.gfnet.classifiers import ConcatClassifier, RecurrentClassifier
from papers.gfnet.cost import step_costs
from papers.gfnet.encoders import Encoder, encoder
from papers.gfnet.model import GFNet
from papers.gfnet.policy import Policy

# encoder, P: parameters and multiply-adds of one encoder (own head not run), in millions
ENCODERS = {
    ("resnet50", 96): (25.557, 750.7),
    ("resnet50", 128): (25.557, 1334.6),
    ("densenet121", 96): (7.979, 520.4),
    ("mobilenet_v3_large", 96): (5.483, 41.8),
    ("mobilenet_v3_large", 128): (5.483, 72.1),
    ("mobilenet_v3_large_1.25", 128): (7.552, 118.2),
    ("efficientnet_b2", 128): (9.110, 215.6),
    ("densenet201", 96): (20.014, 787.9),
    ("efficientnet_b3", 144): (12.233, 430.9),
    ("regnet_y_600mf", 96): (6.055, 111.0),
    ("regnet_y_1_6gf", 128): (11.202, 527.1),
}
# policy parameters and multiply-adds, and cumulative costs of the steps, in millions
SEQUENCES = {
    ("resnet50", 96): (46.150, 46.14, [761.2, 1568.5, 2375.8, 3183.1, 3990.4]),
    ("resnet50", 128): (75.510, 75.50, [1345.0, 2765.6, 4186.1, 5606.6, 7027.2]),
    ("densenet121", 96): (27.275, 27.27, [527.7, 1082.6, 1637.6, 2192.5, 2747.5]),
    ("mobilenet_v3_large", 96): (0.500, 0.74, [43.1, 88.1, 134.5]),
    ("mobilenet_v3_large", 128): (0.558, 1.02, [73.4, 149.2, 226.2]),
    ("mobilenet_v3_large_1.25", 128): (0.565, 1.14, [119.5, 241.5, 364.7]),
    ("efficientnet_b2", 128): (0.572, 1.25, [217.0, 436.7, 657.7, 880.2]),
}


@cache
def on_meta(name: str) -> Encoder:
    if name.startswith("regnet"):  # torchvision computes its widths with tensors, which need a real device
        return encoder(name).to("meta")
    with torch.device("meta"):
        return encoder(name)


def millions(counts: list[int], digits: int = 1) -> list[float]:
    return [round(count / 1e6, digits) for count in counts]


def policy_for(model: GFNet) -> Policy:
    make = Policy.linear if model.family == "recurrent" else Policy.conv
    return make(model.global_encoder.channels, -(-model.patch // 32))


@pytest.mark.parametrize(("name", "patch"), ENCODERS)
def test_encoders(name, patch):
    found, images = on_meta(name), torch.empty(1, 3, patch, patch, device="meta")
    size, cost = ENCODERS[name, patch]
    assert millions([parameters(found)], 3) == [size]
    assert millions([mult_adds(found, images)]) == [cost]


@pytest.mark.parametrize(("name", "patch"), SEQUENCES)
def test_policies_and_sequences(name, patch):
    size, cost, cumulative = SEQUENCES[name, patch]
    with torch.device("meta"):
        model = GFNet(name, patch=patch, steps=len(cumulative))
        policy = policy_for(model)
    e = torch.empty(1, *policy.e_shape, device="meta")
    assert millions([parameters(policy)], 3) == [size]
    assert millions([mult_adds(policy, e)], 2) == [cost]
    assert millions(step_costs(model, policy)) == cumulative


@pytest.mark.parametrize(
    ("feature_dim", "family", "size", "costs"),
    [
        (2048, "recurrent", 10.468, [10.46] * 5),
        (1024, "recurrent", 7.323, [7.32] * 5),
        (1280, "concat", 17.924, [1.28, 2.56, 3.84]),
        (1408, "concat", 19.716, [1.41, 2.82, 4.22, 5.63]),
    ],
)
def test_classifiers(feature_dim, family, size, costs):
    """The official type B has layers for 5 steps whatever T is, hence the parameters; step 1 is f_G's own head."""
    feature, state, own = torch.empty(1, feature_dim, device="meta"), None, nn.Linear(feature_dim, 1000, device="meta")
    with torch.device("meta"):
        if family == "recurrent":
            classifier = RecurrentClassifier(feature_dim, 1000)
        else:
            classifier = ConcatClassifier(feature_dim, 1000, steps=5)
    assert millions([parameters(classifier)], 3) == [size]
    found = []
    for _ in costs:
        found.append(mult_adds(classifier, feature, state) or mult_adds(own, feature))
        _, state = classifier(feature, state)
    assert millions(found, 2) == costs


def test_a_tiny_network_by_hand():
    model = GFNet("tiny", classes=5, patch=24, steps=3, hidden=8)
    convolutions = 27 * 16 * 24**2 + 9 * (16 * 32 * 12**2 + 32 * 64 * 6**2 + 64 * 64 * 3**2)
    classifier = 3 * 8 * (64 + 8) + 8 * 5
    step = convolutions + classifier
    assert step_costs(model) == [step, 2 * step, 3 * step]
    looks = 64 * 16 * 3**2 + 16 * 3**2 * 6 + 3 * 6 * (6 + 6) + 6 * 2 + 6 * 1
    policy = Policy.conv(64, 3, conv=16, hidden=6)
    assert step_costs(model, policy) == [step, 2 * step + looks, 3 * step + 2 * looks]


def test_costs_agree_with_an_independent_count():
    """Of the whole network on CPU; there the own heads run too."""
    torch.manual_seed(0)
    model = GFNet("tiny", classes=5, patch=16, steps=3, hidden=8)
    policy, h = Policy.conv(64, 2, conv=4, hidden=6), None

    def locate(t: int, e: Tensor) -> Tensor:
        nonlocal h
        mean, _, h = policy(e, h)
        return mean.detach()

    heads = 3 * 64 * 5
    assert step_costs(model, policy)[-1] == mult_adds(model, torch.rand(1, 3, 20, 20), locate) - heads


def test_counting_leaves_the_networks_as_they_are():
    model, policy = GFNet("tiny", classes=5, patch=16, steps=2, hidden=8), Policy.conv(64, 2, conv=4, hidden=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step_costs(model, policy)
    assert model.training
    assert policy.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for network in (model, policy) for m in network.modules())
