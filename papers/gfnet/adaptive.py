"""Which step an image stops at: confidence, thresholds for a budget, and what that budget buys (section 3 of the paper).

A sequence of T steps gives logits (N, T, classes). An image stops at the first step whose confidence reaches the step's
threshold; thresholds are chosen on held-out images and then applied to any others. `thresholds` gives the numbers of the
image-by-image search of the official code (blackfeather-wang/GFNet-Pytorch @ 8a6775c8267c, inference.py).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Budgeted(NamedTuple):
    """Budgeted prediction on a set: accuracy in percent, mean cost of an image (unit of `costs`), share of each step."""

    accuracy: float
    cost: float
    fractions: Tensor


def confidence(logits: Tensor) -> Tensor:
    """Largest softmax probability: (..., classes) -> (...), in [1/classes, 1]."""
    return logits.softmax(-1).amax(-1)


def budget_grid() -> Tensor:
    """p in {1, ..., 39}/20, from little to much computing; p = 1 shares the images evenly. (39,) float64."""
    return torch.arange(1, 40, dtype=torch.float64) / 20


def exit_fractions(p: float | Tensor, T: int) -> Tensor:
    """Share of the images that should stop at each step: q_t = p^t / sum_s p^s. p () > 0 -> (T,) float64."""
    p = torch.as_tensor(p, dtype=torch.float64)
    if T < 1 or p.ndim or not 0 < p < torch.inf:
        raise ValueError(f"exit fractions of p={p.tolist()} over T={T} steps, expected one finite p > 0 and T >= 1")
    return (p.log() * torch.arange(T, dtype=torch.float64)).softmax(0)  # p^t without overflow


def thresholds(confidence: Tensor, fractions: Tensor) -> Tensor:
    """Confidence each step asks for: confidence (N, T), fractions (T,) -> (T,).

    Step t takes floor(N q_t) images: its threshold is the floor(N q_t)-th largest confidence at t among those that no
    earlier step has taken; the last step's is -inf. All images at a threshold stop, so a tie can take more than its share;
    a step whose share is below one image, or larger than what is left, takes nobody (+inf).
    """
    _check(confidence)
    N, T = confidence.shape
    if fractions.shape != (T,) or not ((fractions >= 0) & (fractions <= 1)).all():
        raise ValueError(f"exit fractions {fractions.tolist()}, expected {T} values in [0, 1]")
    chosen = confidence.new_full((T,), torch.inf)
    left = torch.ones(N, dtype=torch.bool, device=confidence.device)
    for t, count in enumerate((N * fractions[:-1]).floor().long().tolist()):
        there = confidence[left, t]
        if 0 < count <= len(there):
            chosen[t] = there.topk(count).values[-1]
        left &= confidence[:, t] < chosen[t]
    chosen[-1] = -torch.inf
    return chosen


def exits_taken(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """First step whose threshold an image reaches; the last one takes the rest. (N, T), (T,) -> (N,) int64 in 0..T-1."""
    if confidence.ndim != 2 or thresholds.shape != confidence.shape[1:]:
        raise ValueError(
            f"confidence {tuple(confidence.shape)} with thresholds {tuple(thresholds.shape)}, expected (N, T) and (T,)"
        )
    reached = confidence >= thresholds
    reached[:, -1] = True
    return reached.byte().argmax(1)  # the first maximum


def budgeted(logits: Tensor, labels: Tensor, thresholds: Tensor, costs: Sequence[float] | Tensor) -> Budgeted:
    """Every image answered where it stops: logits (N, T, classes), labels (N,), thresholds (T,), costs (T,) cumulative."""
    if logits.ndim != 3 or 0 in logits.shape or labels.shape != logits.shape[:1] or len(costs) != logits.shape[1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} with labels {tuple(labels.shape)} and {len(costs)} costs, expected "
            "(N, T, classes), (N,) and T, N >= 1"
        )
    exits = exits_taken(confidence(logits), thresholds)
    right = logits.argmax(-1) == labels[:, None]
    return Budgeted(
        accuracy=100 * right.gather(1, exits[:, None]).double().mean().item(),
        cost=_mean_cost(exits, costs),
        fractions=exits.bincount(minlength=len(costs)).double() / len(exits),
    )


def thresholds_for_budget(
    confidence: Tensor, costs: Sequence[float] | Tensor, budget: float
) -> tuple[Tensor, float, float]:
    """Thresholds that spend at most `budget` an image on the held-out set: (T,), their p and their mean cost.

    confidence (N, T) of the held-out set; costs (T,) cumulative; budget in [costs[0], costs[-1]] (ValueError outside).
    Found by halving the range of log p, as the cost grows with p. It moves in steps of one image (of one tie): what is left
    unspent is that step.
    """
    _check(confidence)
    costs = torch.as_tensor(costs, dtype=torch.float64)
    if costs.shape != confidence.shape[1:] or not (costs.diff() >= 0).all() or not costs.isfinite().all():
        raise ValueError(
            f"costs {costs.tolist()}, expected one for each of {confidence.shape[1]} steps, not decreasing"
        )
    first, last = costs[0].item(), costs[-1].item()
    if not first <= budget <= last:
        raise ValueError(
            f"budget {budget:g} an image cannot be met: the first step costs {first:g} and the last {last:g}; "
            "choose a budget between the two"
        )

    def at(p: float) -> tuple[Tensor, float]:
        chosen = thresholds(confidence, exit_fractions(p, len(costs)))
        return chosen, _mean_cost(exits_taken(confidence, chosen), costs)

    low, high = math.exp(-40), math.exp(40)  # at the first, all images stop at once; at the second, none before the end
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if at(middle)[1] <= budget else (low, middle)
    chosen, cost = at(low)
    return chosen, low, cost


def _mean_cost(exits: Tensor, costs: Sequence[float] | Tensor) -> float:
    return torch.as_tensor(costs, dtype=torch.float64, device=exits.device)[exits].mean().item()


def _check(confidence: Tensor) -> None:
    if confidence.ndim != 2 or 0 in confidence.shape:
        raise ValueError(f"confidence of shape {tuple(confidence.shape)}, expected (N, T) with N >= 1 held-out images")
    if confidence.isnan().any():
        raise ValueError("confidence has NaN: the logits are not finite; check the network before choosing thresholds")
