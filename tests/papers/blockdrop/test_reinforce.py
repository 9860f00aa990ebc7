"""The decision and its gradient: enumerated over all policies, by hand, and at the ends of its ranges."""

import pytest
import torch

from papers.blockdrop import reinforce
from papers.blockdrop.subsets import all_policies


def logits(K: int, B: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, K, dtype=torch.double, generator=generator).requires_grad_()


@pytest.mark.parametrize("K", [1, 2, 4, 6])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_expected_estimator_is_the_exact_gradient_of_the_expected_reward(K, alpha):
    """J = sum_u pi(u) R(u) over all 2^K policies, for any rewards; the estimator's mean is weighted by the same pi(u)."""
    u, z = all_policies(K), logits(K)
    R = torch.rand(2**K, dtype=torch.double, generator=torch.Generator().manual_seed(K)) * 3 - 1

    def pi(s: torch.Tensor) -> torch.Tensor:
        s = reinforce.bounded(s, alpha)
        return torch.where(u, s, 1 - s).prod(1)

    exact = torch.autograd.grad((pi(z.sigmoid()) * R).sum(), z)[0]
    s = z.sigmoid().expand(2**K, K)
    greedy = reinforce.greedy(z.sigmoid())[0]
    baseline = R[(u == greedy).all(1)]
    weighted = 2**K * pi(z.sigmoid()).detach() * (R - baseline)
    mean_form = reinforce.curriculum_loss(s, u, weighted, K, alpha, beta=0.0)
    sum_form = reinforce.policy_loss(s, u, weighted / 2**K, alpha)
    for loss in (mean_form, sum_form):
        found = torch.autograd.grad(loss, z, retain_graph=True)[0]
        torch.testing.assert_close(-found, exact, rtol=1e-12, atol=1e-14)
    assert exact.abs().max() > 1e-3


def test_sampling_follows_the_probabilities():
    s = torch.tensor([[0.1, 0.5, 0.93]]).expand(200_000, 3)
    uniform = torch.rand(s.shape, generator=torch.Generator().manual_seed(0))
    assert reinforce.sample(s, uniform).float().mean(0).tolist() == pytest.approx([0.1, 0.5, 0.93], abs=0.005)
    assert reinforce.sample(torch.ones(1, 3), torch.rand(1, 3)).all()
    assert not reinforce.sample(torch.zeros(1, 3), torch.rand(1, 3)).any()


def test_log_probability_is_that_of_torchs_bernoulli():
    s, u = torch.rand(50, 7, dtype=torch.double), torch.rand(50, 7) < 0.5
    torch.testing.assert_close(reinforce.log_prob(s, u), torch.distributions.Bernoulli(s).log_prob(u.double()))


def test_rewards_of_the_paper():
    u = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    correct = torch.tensor([True, True, True, False, False])
    assert reinforce.rewards(u, correct, 5.0).tolist() == [0, 1, 0.75, -5, -5]


def test_bounded_probabilities_keep_their_side():
    s = torch.cat([torch.linspace(0, 1, 1001), torch.tensor([0.5, 0.5 - 1e-7, 0.5 + 1e-7])])
    for alpha in (0.6, 0.8, 1.0):
        bounded = reinforce.bounded(s.double(), alpha)
        assert bounded.amin().item() == pytest.approx(1 - alpha)
        assert bounded.amax().item() == pytest.approx(alpha)
        assert torch.equal(reinforce.greedy(bounded), reinforce.greedy(s.double()))
    for alpha in (0.5, 0.0, 1.1):
        with pytest.raises(ValueError, match="expected 0.5 < alpha <= 1"):
            reinforce.bounded(s, alpha)


@pytest.mark.parametrize("decided", [1, 3, 6])
def test_curriculum_gives_the_policy_gradient_to_the_decided_blocks_alone(decided):
    K, z = 6, logits(6, B=8)
    u = torch.rand(8, K, generator=torch.Generator().manual_seed(1)) < 0.5
    advantage = torch.randn(8, dtype=torch.double)
    loss = reinforce.curriculum_loss(z.sigmoid(), u, advantage, decided, 0.8, beta=0.0)
    gradient = torch.autograd.grad(loss, z)[0]
    assert not gradient[:, : K - decided].any()
    assert gradient[:, K - decided :].all()
    with_entropy = torch.autograd.grad(reinforce.curriculum_loss(z.sigmoid(), u, advantage, decided, 0.8, 0.1), z)[0]
    assert with_entropy.all(), "the entropy term reaches all blocks, as in the official code"


def test_forced_blocks_are_kept_and_the_rest_is_left():
    u = torch.rand(9, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    for decided in range(6):
        kept = reinforce.forced(u, decided)
        assert kept[:, : 5 - decided].all()
        assert torch.equal(kept[:, 5 - decided :], u[:, 5 - decided :])
    assert not u.all(), "its argument is left as it is"


def test_no_advantage_no_gradient():
    z = logits(5, B=4)
    u = reinforce.greedy(z.sigmoid())
    R = reinforce.rewards(u, torch.tensor([True, False, True, False]), 2.0)
    assert not torch.autograd.grad(reinforce.policy_loss(z.sigmoid(), u, (R - R).double(), 0.8), z)[0].any()


def test_entropy_term_pulls_towards_1_over_e():
    s = torch.linspace(0.01, 0.99, 9801, dtype=torch.double)
    assert s[reinforce.entropy_term(s).argmax()].item() == pytest.approx(1 / torch.e, abs=1e-4)


def test_joint_loss_by_hand_is_a_sum_beside_a_mean():
    """Doubling the batch doubles the policy's part and leaves a mean as it is."""
    z = logits(3, B=2)
    u, A = torch.tensor([[True, False, True], [False, False, True]]), torch.tensor([0.5, -2.0], dtype=torch.double)
    s = 0.8 * z.sigmoid() + 0.2 * (1 - z.sigmoid())
    by_hand = -sum(A[b] * sum((s[b, k] if u[b, k] else 1 - s[b, k]).log() for k in range(3)) for b in range(2))
    found = reinforce.policy_loss(z.sigmoid(), u, A, 0.8)
    torch.testing.assert_close(found, by_hand)
    twice = reinforce.policy_loss(z.sigmoid().repeat(2, 1), u.repeat(2, 1), A.repeat(2), 0.8)
    torch.testing.assert_close(twice, 2 * found)
