"""The policy network, its distribution, and the ways to choose a location."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.metrics.compute import parameters
from papers.gfnet.policy import Locator, Policy, centre, uniform
from papers.gfnet.ppo import ENTROPY, STD, log_prob

B, C, N = 6, 5, 3


def small(kind="conv", dtype=torch.float32) -> Policy:
    torch.manual_seed(0)
    policy = Policy.conv(C, N, conv=4, hidden=8) if kind == "conv" else Policy.linear(C, N, widths=(16, 8))
    return policy.to(dtype)


def maps(steps=4, dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.randn(steps, B, C, N, N, dtype=dtype))


def normals():
    generator = torch.Generator().manual_seed(2)
    return lambda count: torch.randn(count, 2, generator=generator)


# ------------------------------------------------------------------------------------------------ network
@pytest.mark.parametrize(
    ("kind", "channels", "map_size", "millions"),
    [
        ("linear", 2048, 3, 46.150),  # ResNet-50, P = 96
        ("linear", 2048, 4, 75.510),  # ResNet-50, P = 128
        ("linear", 1024, 3, 27.275),  # DenseNet-121, P = 96
        ("conv", 960, 3, 0.500),  # MobileNetV3-Large, P = 96
        ("conv", 960, 4, 0.558),  # MobileNetV3-Large, P = 128
        ("conv", 1200, 4, 0.565),  # MobileNetV3-Large 1.25, P = 128
        ("conv", 1408, 4, 0.572),  # EfficientNet-B2, P = 128
    ],
)
def test_parameters(kind, channels, map_size, millions):
    with torch.device("meta"):
        policy = getattr(Policy, kind)(channels, map_size)
    found = parameters(policy)
    assert round(found / 1e6, 3) == millions
    if kind == "linear":
        gru = 6 * 1024**2 + 6 * 1024
        assert found == (channels * map_size**2 + 1) * 2048 + 2049 * 1024 + gru + 2050 + 1025
    else:
        assert found == 32 * channels + (32 * map_size**2 + 1) * 256 + 6 * 256**2 + 6 * 256 + 514 + 257


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_forward_is_the_formula(kind):
    """Encoder, a GRU written out from zero, sigmoid mean, value."""
    policy, h = small(kind, torch.float64), torch.zeros(B, 8, dtype=torch.float64)
    layers = [m for m in policy.encode if isinstance(m, nn.Linear | nn.Conv2d)]
    state = None
    for e in maps(dtype=torch.float64):
        x = e
        if kind == "conv":
            x = torch.einsum("oi,bihw->bohw", layers[0].weight[:, :, 0, 0], x).relu()
            x = F.linear(x.flatten(1), layers[1].weight, layers[1].bias).relu()
        else:
            for layer in layers:
                x = F.linear(x.flatten(1), layer.weight, layer.bias).relu()
        gru = policy.gru
        r_x, z_x, n_x = F.linear(x, gru.weight_ih, gru.bias_ih).chunk(3, 1)
        r_h, z_h, n_h = F.linear(h, gru.weight_hh, gru.bias_hh).chunk(3, 1)
        r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
        h = (1 - z) * (n_x + r * n_h).tanh() + z * h
        mean, value, state = policy(e, state)
        torch.testing.assert_close(state, h)
        torch.testing.assert_close(mean, F.linear(h, policy.actor.weight, policy.actor.bias).sigmoid())
        torch.testing.assert_close(value, F.linear(h, policy.critic.weight, policy.critic.bias)[:, 0])
        assert (mean.shape, value.shape, state.shape) == ((B, 2), (B,), (B, 8))


def test_no_gradient_to_what_made_e():
    encoder, policy = nn.Conv2d(3, C, 1), small()
    images = torch.randn(B, 3, N, N, requires_grad=True)
    mean, value, h = policy(encoder(images))
    mean, value, h = policy(encoder(images), h)
    (mean.sum() + value.sum()).backward()
    assert encoder.weight.grad is None
    assert images.grad is None
    assert all(p.grad.abs().max() > 0 for p in policy.parameters())


def test_autocast_does_not_coarsen_the_mean():
    """Under autocast the encoders give bfloat16 maps; the policy itself stays in its own precision."""
    policy, e = small(), maps()[0].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = policy(e)
    assert all(torch.equal(a, b) for a, b in zip(found, policy(e.float()), strict=True))
    assert found[0].dtype == torch.float32


def test_a_seed_gives_the_same_policy():
    assert all(torch.equal(a, b) for a, b in zip(small().parameters(), small().parameters(), strict=True))


def test_a_map_of_another_shape_is_refused():
    for kind in ("linear", "conv"):
        with pytest.raises(ValueError, match=r"expected \(B, 5, 3, 3\)"):
            small(kind)(torch.randn(B, C, 4, 4))


# ------------------------------------------------------------------------------------------------ distribution
def test_log_prob_and_entropy():
    """STD is the Cholesky factor of the official code, so a standard deviation and not a variance."""
    torch.manual_seed(3)
    mean, location = torch.rand(4, B, 2), torch.rand(4, B, 2)
    official = torch.distributions.MultivariateNormal(mean, scale_tril=torch.diag(torch.full((2,), 0.1)))
    torch.testing.assert_close(log_prob(location, mean), official.log_prob(location))
    torch.testing.assert_close(torch.full((4, B), ENTROPY), official.entropy())
    assert official.stddev.unique().tolist() == [pytest.approx(STD)]
    assert log_prob(mean, mean).unique().item() == pytest.approx(2.7673, abs=5e-5)
    assert pytest.approx(-1.7673, abs=5e-5) == ENTROPY
    other = torch.distributions.MultivariateNormal(mean, covariance_matrix=torch.diag(torch.full((2,), 0.1)))
    assert (other.log_prob(location) - log_prob(location, mean)).abs().min() > 0.01


def test_log_prob_gradient():
    mean, location = torch.rand(3, 2, dtype=torch.float64, requires_grad=True), torch.rand(3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: log_prob(location, m), mean)
    (found,) = torch.autograd.grad(log_prob(location, mean).sum(), mean)
    torch.testing.assert_close(found, (location - mean) / 0.1**2)


# ------------------------------------------------------------------------------------------------ locate
def test_without_noise_the_location_is_the_mean():
    policy, locate, h = small(), Locator(small()), None
    for t, e in enumerate(maps(), 1):
        mean, _, h = policy(e, h)
        assert torch.equal(locate(t, e), mean)
        assert torch.equal(locate.h, h)
    assert locate.es == locate.locations == locate.log_probs == locate.values == []


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_with_noise_what_ppo_needs_is_kept(scale):
    """The action is clamped, and the clamped action is scored under the Gaussian that was not."""
    policy, noise, again = small(), normals(), normals()
    locate, h = Locator(policy, lambda count: scale * noise(count)), None
    for t, e in enumerate(maps(), 1):
        mean, value, h = policy(e, h)
        found = locate(t, e)
        raw = mean + 0.1 * scale * again(B)
        torch.testing.assert_close(found, raw.clamp(0, 1))
        density = torch.distributions.Normal(mean, 0.1).log_prob(found).sum(1)
        torch.testing.assert_close(locate.log_probs[-1], density)
        assert torch.equal(locate.values[-1], value)
        assert torch.equal(locate.locations[-1], found)
        assert torch.equal(locate.es[-1], e)
        assert not found.requires_grad
        assert scale == 1 or (found != raw).float().mean() > 0.5
    assert [len(kept) for kept in (locate.es, locate.locations, locate.log_probs, locate.values)] == [4] * 4
    assert not any(kept.requires_grad for kept in locate.log_probs + locate.values + locate.es)


def test_the_state_starts_anew_with_each_batch():
    locate, es = Locator(small(), normals()), maps()
    first = [locate(t, e) for t, e in enumerate(es, 1)]
    locate.noise = normals()
    assert all(torch.equal(locate(t, e), l) for t, (e, l) in enumerate(zip(es, first, strict=True), 1))
    assert len(locate.es) == 4, "the batch before is forgotten"
    assert locate(1, es[0][:2]).shape == (2, 2), "another batch size"
    with pytest.raises(ValueError, match="expected t=1 first"):
        Locator(small())(2, es[0])


def test_images_of_a_batch_do_not_meet():
    whole, part = Locator(small()), Locator(small())
    rows = torch.tensor([4, 1])
    for t, e in enumerate(maps(), 1):
        torch.testing.assert_close(whole(t, e)[rows], part(t, e[rows]))


def test_uniform_and_centre():
    draws = torch.rand(3, 1000, 2, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    locate = uniform(lambda count: torch.rand(count, 2, generator=generator))
    e = torch.empty(1000, C, N, N, dtype=torch.bfloat16)
    for t, expected in enumerate(draws, 1):
        assert torch.equal(locate(t, e), expected)
    middle = centre(1, e)
    assert (middle.shape, middle.dtype, middle.unique().tolist()) == ((1000, 2), torch.float32, [0.5])


def test_samples_have_the_deviation():
    """20,000 actions around a mean near 0.5: mean and deviation of what is drawn, each within five standard errors."""
    count = 20000
    torch.manual_seed(5)
    locate = Locator(small(), lambda n: torch.randn(n, 2))
    e = maps()[0][:1].expand(count, -1, -1, -1)
    offset = (locate(1, e) - small()(e)[0]).double()
    assert offset.std(0).tolist() == pytest.approx([STD] * 2, abs=5 * STD / math.sqrt(2 * count))
    assert offset.mean(0).tolist() == pytest.approx([0] * 2, abs=5 * STD / math.sqrt(count))
