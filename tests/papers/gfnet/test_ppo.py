"""PPO: rewards and returns by their definitions, clipping by a loop, and what one update a batch comes down to."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from papers.gfnet.policy import Locator, Policy
from papers.gfnet.ppo import ENTROPY, log_prob, ppo_loss, replay, returns, rewards, standardised

T, B, C, N = 5, 6, 4, 3
SHAPE = (T - 1, B)


def episode(kind="conv", dtype=torch.float32) -> tuple[Policy, Locator]:
    """A policy and a batch of sampled actions, some of them clamped."""
    torch.manual_seed(0)
    policy = Policy.conv(C, N, conv=4, hidden=8) if kind == "conv" else Policy.linear(C, N, widths=(16, 8))
    policy.to(dtype)
    locate = Locator(policy, lambda count: 4 * torch.randn(count, 2, dtype=dtype))
    for t in range(1, T):
        locate(t, torch.randn(B, C, N, N, dtype=dtype))
    locations = torch.stack(locate.locations)
    assert 0 < ((locations == 0) | (locations == 1)).float().mean() < 1
    return policy, locate


def targets(dtype=torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return standardised(returns(rewards(torch.rand(T, B, dtype=dtype))))


# ------------------------------------------------------------------------------------------------ rewards, returns
def test_rewards_telescope():
    torch.manual_seed(2)
    p = torch.rand(T, B, dtype=torch.float64)
    found = rewards(p)
    assert found.shape == SHAPE
    torch.testing.assert_close(found.sum(0), p[-1] - p[0])
    assert torch.equal(found[1], p[2] - p[1])
    for bad in (p[:1], p[0]):
        with pytest.raises(ValueError, match=r"expected \(T, B\) with T >= 2"):
            rewards(bad)


@pytest.mark.parametrize("discount", [0.7, 0.0, 1.0])
def test_returns_are_the_discounted_sums(discount):
    torch.manual_seed(3)
    r = torch.randn(SHAPE, dtype=torch.float64)
    found = returns(r, discount)
    for t in range(T - 1):
        torch.testing.assert_close(found[t], sum(discount**i * r[t + i] for i in range(T - 1 - t)))
    assert torch.equal(returns(r), returns(r, 0.7))
    assert torch.equal(returns(r[:1]), r[:1])


def test_standardised_over_all_steps_and_images():
    """With n - 1, and 1e-5 beside the deviation: numpy's words."""
    torch.manual_seed(4)
    G = torch.randn(SHAPE, dtype=torch.float64) * 1e-4 + 3
    expected = (G.numpy() - G.numpy().mean()) / (G.numpy().std(ddof=1) + 1e-5)
    np.testing.assert_allclose(standardised(G).numpy(), expected, rtol=1e-12)
    assert standardised(torch.full(SHAPE, 0.25)).abs().max() == 0, "equal returns say nothing, and are no NaN"
    with pytest.raises(ValueError, match="expected at least 2"):
        standardised(torch.ones(1, 1))


# ------------------------------------------------------------------------------------------------ the loss
def test_loss_by_definition():
    """A loop over every action, with ratios on both sides of both bounds and advantages of both signs."""
    rng = np.random.default_rng(5)
    new, old, value, G = (rng.normal(size=SHAPE) for _ in range(4))
    for clip, value_weight, entropy_weight in ((0.2, 0.5, 0.01), (0.1, 2.0, 0.0)):
        surrogate, error, cases = 0.0, 0.0, set()
        for t, b in np.ndindex(*SHAPE):
            rho, advantage = math.exp(new[t, b] - old[t, b]), G[t, b] - value[t, b]
            surrogate += min(rho * advantage, min(max(rho, 1 - clip), 1 + clip) * advantage)
            error += (value[t, b] - G[t, b]) ** 2
            cases.add((rho < 1 - clip, rho > 1 + clip, advantage > 0))
        assert len(cases) >= 4
        expected = (-surrogate + value_weight * error) / ((T - 1) * B) - entropy_weight * ENTROPY
        found = ppo_loss(*map(torch.from_numpy, (new, old, value, G)), clip, value_weight, entropy_weight)
        assert found.item() == pytest.approx(expected, rel=1e-12)
        if clip == 0.2:
            assert torch.equal(found, ppo_loss(*map(torch.from_numpy, (new, old, value, G)))), "the paper's numbers"


def test_a_clipped_action_has_no_gradient():
    """rho = 1.5 and 0.5, A = +1 and -1: what would leave the interval further is held, the way back is open."""
    rho = torch.tensor([[1.5, 1.5, 0.5, 0.5]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    new = rho.log().requires_grad_()
    ppo_loss(new, torch.zeros_like(rho), torch.zeros_like(rho), advantage).backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0, 1.5, -0.5, 0]], dtype=torch.float64) / 4)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_with_one_update_a_batch_it_is_an_actor_critic(kind):
    """rho is exactly 1; gradient = -mean(A grad log pi) + 0.5 grad MSE, also where actions were clamped."""
    policy, locate = episode(kind, torch.float64)
    G = targets(torch.float64)
    log_probs, values = replay(policy, locate.es, locate.locations)
    old = torch.stack(locate.log_probs)
    assert (log_probs - old).exp().eq(1).all()
    found = torch.autograd.grad(ppo_loss(log_probs, old, values, G), list(policy.parameters()))
    log_probs, values = replay(policy, locate.es, locate.locations)
    plain = -((G - values).detach() * log_probs).mean() + 0.5 * ((values - G) ** 2).mean()
    expected = torch.autograd.grad(plain, list(policy.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert a.abs().max() > 0


def test_value_of_the_loss_with_one_update_a_batch():
    policy, locate = episode()
    G = targets()
    log_probs, values = replay(policy, locate.es, locate.locations)
    loss = ppo_loss(log_probs, torch.stack(locate.log_probs), values, G)
    expected = -(G - values).mean() + 0.5 * (values - G).square().mean() + 0.01 * 1.7673
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_gradient_reaches_the_new_log_probs_and_the_values_only():
    tensors = [torch.randn(SHAPE, dtype=torch.float64).requires_grad_() for _ in range(4)]
    ppo_loss(*tensors).backward()
    assert [t.grad is None for t in tensors] == [False, True, False, True]
    new, old, value, G = [t.detach() for t in tensors]
    value.requires_grad_()
    ppo_loss(new, old, value, G).backward()
    torch.testing.assert_close(value.grad, (value.detach() - G) / G.numel())  # 0.5 MSE; none through the advantage


def test_different_shapes_are_refused():
    a, b = torch.zeros(SHAPE), torch.zeros(B)
    for bad in range(4):
        with pytest.raises(ValueError, match="expected the same for all"):
            ppo_loss(*(b if i == bad else a for i in range(4)))


# ------------------------------------------------------------------------------------------------ replay
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_sequence_again_gives_the_same_bits(kind):
    policy, locate = episode(kind)
    log_probs, values = replay(policy, locate.es, locate.locations)
    assert log_probs.shape == values.shape == SHAPE
    assert torch.equal(log_probs, torch.stack(locate.log_probs))
    assert torch.equal(values, torch.stack(locate.values))
    stacked = replay(policy, torch.stack(locate.es), torch.stack(locate.locations))
    assert torch.equal(stacked[0], log_probs)


def test_a_later_action_depends_on_earlier_maps():
    """The state runs through the sequence: changing e_1 changes the last value, and the gradient goes back to it."""
    policy, locate = episode()
    _, values = replay(policy, locate.es, locate.locations)
    _, others = replay(policy, [locate.es[0] + 1, *locate.es[1:]], locate.locations)
    assert (values[-1] != others[-1]).all()
    (alone,) = torch.autograd.grad(replay(policy, locate.es[-1:], locate.locations[-1:])[1].sum(), policy.gru.weight_ih)
    (whole,) = torch.autograd.grad(values[-1].sum(), policy.gru.weight_ih)
    assert not torch.allclose(alone, whole)


def test_no_gradient_to_what_made_the_maps_and_the_locations():
    policy, locate = episode()
    encoder = nn.Conv2d(C, C, 1)
    locations = [l.clone().requires_grad_() for l in locate.locations]
    log_probs, values = replay(policy, [encoder(e) for e in locate.es], locations)
    ppo_loss(log_probs, torch.stack(locate.log_probs), values, targets()).backward()
    assert encoder.weight.grad is None
    assert all(l.grad is None for l in locations)
    assert all(p.grad.abs().max() > 0 for p in policy.parameters())


def test_lists_of_different_length_are_refused():
    policy, locate = episode()
    for es, locations in ((locate.es, locate.locations[1:]), ([], [])):
        with pytest.raises(ValueError, match="expected as many, at least one"):
            replay(policy, es, locations)


def test_it_learns_a_place():
    """A closed loop without encoders: the label's probability is higher the nearer the crop lands to (0.8, 0.3)."""
    torch.manual_seed(6)
    policy, goal, e = Policy.conv(C, N, conv=4, hidden=8), torch.tensor([0.8, 0.3]), torch.ones(64, C, N, N)
    optimiser = torch.optim.Adam(policy.parameters(), lr=3e-3, betas=(0.9, 0.999))
    start = (policy(e[:1])[0] - goal).norm().item()
    for _ in range(300):
        locate = Locator(policy, lambda count: torch.randn(count, 2))
        near = [torch.exp(-4 * (locate(t, e) - goal).square().sum(1)) for t in (1, 2)]
        G = standardised(returns(rewards(torch.stack([torch.zeros(64), *near]))))
        log_probs, values = replay(policy, locate.es, locate.locations)
        loss = ppo_loss(log_probs, torch.stack(locate.log_probs), values, G)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    mean, _, h = policy(e[:1])
    assert start > 0.25
    assert (mean - goal).norm() < 0.1
    assert (policy(e[:1], h)[0] - goal).norm() < 0.1
    assert log_prob(goal, mean).item() > 2
