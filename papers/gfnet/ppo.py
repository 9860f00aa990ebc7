"""How the policy learns (Stage II): proximal policy optimisation on the gain of the true label's probability.

An image is an episode of T - 1 actions; pi is a Gaussian of fixed deviation around the policy's mean. With one update a
batch, as in the paper's code, rho is exactly 1 and the loss is that of an actor-critic; it is written here as PPO. Follows
blackfeather-wang/GFNet-Pytorch @ 8a6775c8267c, network.py. S = T - 1 steps, B images.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STD = 0.1  # of both coordinates, never learned; the official code passes it as a Cholesky factor, so it is no variance
ENTROPY = 1 + math.log(2 * math.pi) + 2 * math.log(STD)  # of N(mu, 0.1^2 I) in the plane, for any mu: -1.7673


def log_prob(location: Tensor, mean: Tensor) -> Tensor:
    """log N(l; mu, 0.1^2 I): location (..., 2), mean (..., 2) -> (...); 2.7673 at the mean.

    The location is the action taken, that is after clamping to [0, 1], and its density that of the Gaussian before
    clamping: what the official code scores, when it acts and when it evaluates.
    """
    return -((location - mean) / STD).square().sum(-1) / 2 - 2 * math.log(STD) - math.log(2 * math.pi)


def rewards(probabilities: Tensor) -> Tensor:
    """r_t = p_t[y] - p_{t-1}[y]: the label's probability after each step (T, B) -> (T-1, B). They sum to p_T - p_1."""
    if probabilities.ndim != 2 or len(probabilities) < 2:
        raise ValueError(f"probabilities of shape {tuple(probabilities.shape)}, expected (T, B) with T >= 2")
    return probabilities.diff(dim=0)


def returns(rewards: Tensor, discount: float = 0.7) -> Tensor:
    """G_t = r_t + discount * G_{t+1}, nothing after the last step: (S, B) -> (S, B)."""
    found = [rewards[-1]]
    for reward in rewards[:-1].flip(0):
        found.append(reward + discount * found[-1])
    return torch.stack(found[::-1])


def standardised(returns: Tensor) -> Tensor:
    """(G - mean) / (std + 1e-5) over all steps and images; std with n - 1, as in the official code. (S, B) -> (S, B)."""
    if returns.numel() < 2:
        raise ValueError(f"{returns.numel()} returns have no standard deviation, expected at least 2")
    return (returns - returns.mean()) / (returns.std(correction=1) + 1e-5)


def ppo_loss(
    log_prob_new: Tensor,
    log_prob_old: Tensor,
    value: Tensor,
    returns: Tensor,
    clip: float = 0.2,
    value_weight: float = 0.5,
    entropy_weight: float = 0.01,
) -> Tensor:
    """Clipped surrogate + value_weight * MSE(V, G) - entropy_weight * entropy; all tensors (S, B), the loss a scalar.

    rho = pi_new / pi_old, A = G - V with V held fixed, surrogate = mean of -min(rho A, clip(rho, 1 - clip, 1 + clip) A).
    Gradient reaches log_prob_new and value only. The entropy is a constant here: it shifts the loss, nothing else.
    """
    if not log_prob_new.shape == log_prob_old.shape == value.shape == returns.shape:
        shapes = [tuple(t.shape) for t in (log_prob_new, log_prob_old, value, returns)]
        raise ValueError(f"log-probs new and old, values and returns of shapes {shapes}, expected the same for all")
    returns = returns.detach()
    rho, advantage = (log_prob_new - log_prob_old.detach()).exp(), returns - value.detach()
    surrogate = torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)
    return -surrogate.mean() + value_weight * F.mse_loss(value, returns) - entropy_weight * ENTROPY


def replay(policy: nn.Module, es: Sequence[Tensor], locations: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sequence again with gradient: es S x (B, C, n, n), locations S x (B, 2) -> log-probs (S, B), values (S, B).

    Runs the same operations as acting did, so an unchanged policy gives the same bits.
    """
    if not len(es) == len(locations) > 0:
        raise ValueError(f"{len(es)} feature maps with {len(locations)} locations, expected as many, at least one")
    log_probs, values, h = [], [], None
    for e, location in zip(es, locations, strict=True):
        mean, value, h = policy(e, h)
        log_probs.append(log_prob(location.detach(), mean))
        values.append(value)
    return torch.stack(log_probs), torch.stack(values)
