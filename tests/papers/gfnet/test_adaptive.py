"""Thresholds against the image-by-image search, and what a budget buys."""

import math

import pytest
import torch

from papers.gfnet.adaptive import (
    budget_grid,
    budgeted,
    confidence,
    exit_fractions,
    exits_taken,
    thresholds,
    thresholds_for_budget,
)

COSTS = [527.7, 1082.6, 1637.6, 2192.5, 2747.5]  # MMACs, DenseNet-121, P = 96


def search_one_by_one(scores, fractions):
    """The definition, an image at a time: walk down step t, count who is still there, stop at the floor(N q_t)-th."""
    N, T = len(scores), len(scores[0])
    gone, found = [False] * N, [math.inf] * (T - 1) + [-math.inf]
    for t in range(T - 1):
        count = 0
        for n in sorted(range(N), key=lambda n: -scores[n][t]):
            if not gone[n]:
                count += 1
                if count == math.floor(N * fractions[t]):
                    found[t] = scores[n][t]
                    break
        gone = [g or row[t] >= found[t] for g, row in zip(gone, scores, strict=True)]
    return found


def walk_one_by_one(scores, bounds):
    return [next(t for t, c in enumerate(row) if c >= bounds[t]) for row in scores]


@pytest.mark.parametrize("levels", [None, 50, 7, 2, 1], ids=lambda n: f"levels={n}")
@pytest.mark.parametrize(("N", "T"), [(1, 1), (1, 5), (2, 3), (97, 5), (200, 2), (60, 8)])
def test_thresholds_equal_the_search_one_by_one(N, T, levels):
    """For every budget of the grid, also with ties: `levels` is how many values the confidences take."""
    torch.manual_seed(N + T)
    scores = torch.rand(N, T, dtype=torch.float64)
    if levels:
        scores = (scores * levels).floor() / levels
    for p in [*budget_grid().tolist(), 1e-12, 1e12]:
        fractions = exit_fractions(p, T)
        found, expected = thresholds(scores, fractions), search_one_by_one(scores.tolist(), fractions.tolist())
        assert found.tolist() == expected
        assert exits_taken(scores, found).tolist() == walk_one_by_one(scores.tolist(), expected)


def test_ties():
    """All at a threshold stop; a step whose share is none, or more than is left, takes nobody."""
    tie = torch.tensor([[0.5, 0.5, 1.0]]).expand(6, 3)
    assert thresholds(tie, exit_fractions(1.0, 3)).tolist() == [0.5, math.inf, -math.inf]  # step 1 wanted two of six
    assert thresholds(tie, torch.tensor([0.1, 0.5, 0.4])).tolist() == [math.inf, 0.5, -math.inf]


@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_fractions(T):
    grid = budget_grid()
    assert grid.tolist() == [i / 20 for i in range(1, 40)]
    for p in grid.tolist():
        q = exit_fractions(p, T).tolist()
        assert q == pytest.approx([p**t / sum(p**s for s in range(1, T + 1)) for t in range(1, T + 1)])
        assert sum(q) == pytest.approx(1, abs=1e-12)
    assert exit_fractions(grid[19], T).tolist() == pytest.approx([1 / T] * T, abs=1e-15), "20/20 shares evenly"
    for bad in (0.0, -1.0, math.nan, math.inf, [1.0, 2.0]):
        with pytest.raises(ValueError, match="expected one finite p > 0"):
            exit_fractions(torch.tensor(bad), T)


def test_cost_grows_with_the_budget():
    """Without ties every step takes its share to within an image; the cost lies between those of step 1 and step T."""
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(1000, 5, 4, dtype=torch.float64), torch.randint(4, (1000,))
    scores = confidence(logits)
    found = [budgeted(logits, labels, thresholds(scores, exit_fractions(p, 5)), COSTS) for p in budget_grid()]
    costs = [result.cost for result in found]
    assert COSTS[0] < costs[0] < costs[-1] < COSTS[-1]
    assert costs == sorted(costs)
    assert found[19].fractions.tolist() == [0.2] * 5
    for p, result in zip(budget_grid(), found, strict=True):
        assert (result.fractions - exit_fractions(p, 5))[:-1].abs().max() <= 1e-3


def test_confidence_and_budgeted_prediction():
    """Against a loop over images; all stopped at one step give that step's accuracy and cost."""
    torch.manual_seed(1)
    logits, labels = 3 * torch.randn(50, 3, 4), torch.randint(4, (50,))
    scores = confidence(logits)
    assert torch.allclose(scores, (logits.exp() / logits.exp().sum(-1, keepdim=True)).max(-1).values)
    bounds = torch.tensor([0.9, 0.7, -math.inf])
    result = budgeted(logits, labels, bounds, [1, 2, 4])
    right, spent, taken = 0, 0, [0, 0, 0]
    for n, t in enumerate(walk_one_by_one(scores.tolist(), bounds.tolist())):
        right += int(logits[n, t].argmax() == labels[n])
        spent += [1, 2, 4][t]
        taken[t] += 1
    assert (result.accuracy, result.cost) == (pytest.approx(100 * right / 50), pytest.approx(spent / 50))
    assert result.fractions.tolist() == pytest.approx([n / 50 for n in taken])
    assert min(taken) > 0
    for t in range(3):
        alone = torch.full((3,), math.inf)
        alone[t] = -math.inf
        result = budgeted(logits, labels, alone, [1, 2, 4])
        accuracy = 100 * (logits[:, t].argmax(1) == labels).double().mean().item()
        assert (result.accuracy, result.cost) == (pytest.approx(accuracy), [1, 2, 4][t])


def test_last_step_takes_what_no_threshold_does():
    assert exits_taken(torch.tensor([[0.2, 0.3]]), torch.tensor([0.9, 0.9])).tolist() == [1]


@pytest.mark.parametrize("levels", [None, 10])
def test_thresholds_for_a_budget(levels):
    """Never above the budget on the held-out set, and without ties within the cost of one image of it."""
    torch.manual_seed(2)
    scores = torch.rand(500, 5)
    if levels:
        scores = (scores * levels).floor() / levels
    for budget in torch.linspace(COSTS[0], COSTS[-1], 12, dtype=torch.float64).tolist():
        found, p, cost = thresholds_for_budget(scores, COSTS, budget)
        assert torch.equal(found, thresholds(scores, exit_fractions(p, 5)))
        assert cost == pytest.approx(sum(COSTS[t] for t in exits_taken(scores, found).tolist()) / 500)
        assert cost <= budget
        if not levels:
            assert budget - cost <= (COSTS[-1] - COSTS[0]) / 500
    assert exits_taken(scores, thresholds_for_budget(scores, COSTS, COSTS[0])[0]).tolist() == [0] * 500
    assert exits_taken(scores, thresholds_for_budget(scores, COSTS, COSTS[-1])[0]).tolist() == [4] * 500
    single = thresholds_for_budget(scores[:, :1], [3.0], 3.0)
    assert (single[0].tolist(), single[2]) == ([-math.inf], 3)


def test_bad_input():
    scores = torch.rand(10, 5)
    for budget in (COSTS[0] - 1, COSTS[-1] + 1, math.nan):
        with pytest.raises(ValueError, match="choose a budget between the two"):
            thresholds_for_budget(scores, COSTS, budget)
    with pytest.raises(ValueError, match="N >= 1 held-out images"):
        thresholds_for_budget(torch.empty(0, 5), COSTS, 1e3)
    with pytest.raises(ValueError, match="NaN"):
        thresholds_for_budget(scores.where(scores < scores.max(), torch.nan), COSTS, 1e3)
    for costs in (COSTS[:4], COSTS[::-1], [*COSTS[:4], math.inf]):
        with pytest.raises(ValueError, match="expected one for each of 5 steps, not decreasing"):
            thresholds_for_budget(scores, costs, 1e3)
    with pytest.raises(ValueError, match="held-out images"):
        thresholds(scores[:, 0], exit_fractions(1.0, 5))
    for fractions in (exit_fractions(1.0, 4), -exit_fractions(1.0, 5), torch.full((5,), math.nan)):
        with pytest.raises(ValueError, match=r"expected 5 values in \[0, 1\]"):
            thresholds(scores, fractions)
    with pytest.raises(ValueError, match=r"expected \(N, T\) and \(T,\)"):
        exits_taken(scores, torch.zeros(4))
    good = (torch.zeros(10, 5, 3), torch.zeros(10).long(), torch.zeros(5), COSTS)
    for i, bad in enumerate((torch.zeros(10, 5), torch.zeros(9).long(), torch.zeros(4), COSTS[:4])):
        with pytest.raises(ValueError, match=r"expected \(N, T"):
            budgeted(*good[:i], bad, *good[i + 1 :])
