"""Anytime and budgeted prediction of networks with several exits: which exit takes which sample, and what a budget buys.

The protocol of MSDNet (Huang et al., ICLR 2018, section 3). A network with k exits (or steps) gives logits (N, k, classes).
A sample leaves at the first exit t whose confidence reaches the exit's threshold; thresholds are chosen on a held-out set
and then applied to any other. All functions are pure. `thresholds` gives the numbers of the sample-by-sample search of the
official codes (kalviny/MSDNet-PyTorch @ f654595270ce, adaptive_inference.py; blackfeather-wang/GFNet-Pytorch @
8a6775c8267c, inference.py), for many budgets at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Budgeted(NamedTuple):
    """Budgeted prediction on a set: accuracy in percent, mean cost of a sample (unit of `costs`), share of each exit."""

    accuracy: float
    cost: float
    fractions: Tensor


def confidence(logits: Tensor) -> Tensor:
    """Largest softmax probability: (..., classes) -> (...), in [1/classes, 1]."""
    return logits.softmax(-1).amax(-1)


def budget_grid(count: int = 39) -> Tensor:
    """p in {1, ..., count}/20, from little to much computing; p = 1 shares the samples evenly. (count,) float64."""
    return torch.arange(1, count + 1, dtype=torch.float64) / 20


def exit_fractions(p: float | Tensor, k: int) -> Tensor:
    """Share of the samples that each of k exits should take: q_i = p^i / sum_j p^j. p (...) > 0 -> (..., k) float64."""
    p = torch.as_tensor(p, dtype=torch.float64)
    if k < 1 or not (p > 0).all() or not p.isfinite().all():
        raise ValueError(f"exit fractions of p={p.tolist()} over k={k} exits, expected finite p > 0 and k >= 1")
    return (p.log()[..., None] * torch.arange(k, dtype=torch.float64)).softmax(-1)  # p^i without overflow


def thresholds(confidence: Tensor, fractions: Tensor) -> Tensor:
    """Confidence each exit asks for: confidence (N, k), fractions (..., k) -> (..., k), one row for each budget.

    Exit t takes floor(N q_t) samples: its threshold is the floor(N q_t)-th largest confidence at t among the samples
    that no earlier exit has taken; the last exit's is -inf. Ties are settled by value, as in the official code: all
    samples at a threshold leave, so an exit can take more than its share; an exit whose share is below one sample, or
    larger than what the earlier exits left, takes nobody (+inf). The order within a tie does not matter.
    """
    _check_confidence(confidence)
    N, k = confidence.shape
    if fractions.shape[-1:] != (k,) or not ((fractions >= 0) & (fractions <= 1)).all():
        raise ValueError(f"exit fractions of shape {tuple(fractions.shape)}, expected (..., {k}) with values in [0, 1]")
    counts = (N * fractions.reshape(-1, k)).floor().long().to(confidence.device)
    values, order = confidence.sort(0, descending=True)
    left = torch.ones(len(counts), N, dtype=torch.bool, device=confidence.device)
    chosen = confidence.new_full(counts.shape, torch.inf)
    for t in range(k - 1):
        count = counts[:, t, None].contiguous()
        rank = left[:, order[:, t]].cumsum(1)  # of the samples still there, best first
        at = torch.searchsorted(rank, count)
        taken = (count > 0) & (at < N)
        chosen[:, t, None] = values[at.clamp(max=N - 1), t].where(taken, torch.inf)
        left &= confidence[:, t] < chosen[:, t, None]
    chosen[:, -1] = -torch.inf
    return chosen.reshape(fractions.shape)


def exits_taken(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """First exit whose threshold a sample reaches; the last one takes the rest. (N, k), (..., k) -> (..., N) int64."""
    if confidence.ndim != 2 or thresholds.shape[-1:] != confidence.shape[1:]:
        raise ValueError(
            f"confidence {tuple(confidence.shape)} with thresholds {tuple(thresholds.shape)}, expected (N, k) and (..., k)"
        )
    reached = confidence >= thresholds[..., None, :]
    reached[..., -1] = True
    return reached.byte().argmax(-1)  # the first maximum


def expected_cost(exits: Tensor, costs: Sequence[float] | Tensor) -> Tensor:
    """Mean over samples of the cost up to the exit taken: exits (..., N) -> (...) float64. costs (k,), cumulative."""
    return torch.as_tensor(costs, dtype=torch.float64, device=exits.device)[exits].mean(-1)


def anytime(logits: Tensor, labels: Tensor) -> Tensor:
    """Accuracy in percent of each exit, had it taken all samples: (N, k, classes), (N,) -> (k,) float64."""
    _check_logits(logits, labels)
    return 100 * (logits.argmax(-1) == labels[:, None]).double().mean(0)


def budgeted(logits: Tensor, labels: Tensor, thresholds: Tensor, costs: Sequence[float] | Tensor) -> Budgeted:
    """Every sample answered by its exit: logits (N, k, classes), labels (N,), thresholds (k,), costs (k,) -> Budgeted."""
    _check_logits(logits, labels)
    k = logits.shape[1]
    if len(costs) != k or thresholds.shape != (k,):
        raise ValueError(
            f"{len(costs)} costs, thresholds {tuple(thresholds.shape)}; expected one for each of {k} exits"
        )
    exits = exits_taken(confidence(logits), thresholds)
    right = logits.argmax(-1) == labels[:, None]
    return Budgeted(
        accuracy=100 * right.gather(1, exits[:, None]).double().mean().item(),
        cost=expected_cost(exits, costs).item(),
        fractions=exits.bincount(minlength=k).double() / len(exits),
    )


def budget_curve(
    held_out: Tensor, logits: Tensor, labels: Tensor, costs: Sequence[float] | Tensor, grid: Tensor
) -> list[dict]:
    """{p, mult_adds, accuracy} on a set for every p of the grid; thresholds from confidences (M, k) of a held-out set."""
    curve = []
    for p, chosen in zip(grid.tolist(), thresholds(held_out, exit_fractions(grid, len(costs))), strict=True):
        found = budgeted(logits, labels, chosen, costs)
        curve.append({"p": p, "mult_adds": round(found.cost), "accuracy": found.accuracy})
    return curve


def accuracy_at(curve: list[dict], mult_adds: float) -> float:
    """Linear interpolation of a budget curve; beyond its ends, the end's accuracy."""
    points = sorted((point["mult_adds"], point["accuracy"]) for point in curve)
    return float(np.interp(mult_adds, *zip(*points, strict=True)))


def thresholds_for_budget(
    confidence: Tensor, costs: Sequence[float] | Tensor, budget: float
) -> tuple[Tensor, float, float]:
    """Thresholds that spend at most `budget` a sample on the held-out set: (k,), their p and their expected cost.

    confidence (N, k) of the held-out set; costs (k,) cumulative multiply-adds of the exits; budget in [costs[0],
    costs[-1]] (ValueError outside). The expected cost grows with p, so the largest p that fits is found by dividing
    the range of log p into 64 parts, five times over. Cost moves in steps of one sample (of one tie): what is left
    unspent is that step.
    """
    _check_confidence(confidence)
    k = confidence.shape[1]
    costs = torch.as_tensor(costs, dtype=torch.float64)
    if costs.shape != (k,) or not (costs.diff() >= 0).all() or not costs.isfinite().all():
        raise ValueError(f"costs {costs.tolist()}, expected the cumulative cost of each of {k} exits, not decreasing")
    first, last = costs[0].item(), costs[-1].item()
    if not first <= budget <= last:
        raise ValueError(
            f"budget {budget:g} a sample cannot be met: the first exit costs {first:g} and the last {last:g}; "
            "choose a budget between the two"
        )
    low, high = -40.0, 40.0  # log p: below, exp(log p) vanishes beside 1 and all samples leave at once; above, none
    for _ in range(5):
        log_p = torch.linspace(low, high, 65, dtype=torch.float64)
        candidates = thresholds(confidence, exit_fractions(log_p.exp(), k))
        cost = expected_cost(exits_taken(confidence, candidates), costs)
        fits = int((cost <= budget).long().cumprod(0).sum()) - 1  # index of the last p before the first that does not
        low, high = log_p[fits].item(), log_p[min(fits + 1, 64)].item()
    return candidates[fits], log_p[fits].exp().item(), cost[fits].item()


def _check_confidence(confidence: Tensor) -> None:
    if confidence.ndim != 2 or 0 in confidence.shape:
        raise ValueError(f"confidence of shape {tuple(confidence.shape)}, expected (N, k) with N >= 1 held-out samples")
    if confidence.isnan().any():
        raise ValueError("confidence has NaN: the logits are not finite; check the network before choosing thresholds")


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 3 or 0 in logits.shape or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} with labels {tuple(labels.shape)}, expected (N, k, classes) and (N,), N >= 1"
        )
