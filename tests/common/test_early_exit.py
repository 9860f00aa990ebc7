"""Thresholds against the sample-by-sample search, and what a budget buys."""

import math

import pytest
import torch

from common.metrics.early_exit import (
    accuracy_at,
    anytime,
    budget_curve,
    budget_grid,
    budgeted,
    confidence,
    exit_fractions,
    exits_taken,
    expected_cost,
    thresholds,
    thresholds_for_budget,
)

COSTS = [6.86e6, 14.35e6, 27.54e6, 41.71e6, 58.48e6]  # CIFAR-100, 5 blocks, base 1, lin_grow


def search_one_by_one(scores, fractions):
    """The definition, a sample at a time: walk down exit t, count who is still there, stop at the floor(N q_t)-th."""
    N, k = len(scores), len(scores[0])
    gone, found = [False] * N, [math.inf] * (k - 1) + [-math.inf]
    for t in range(k - 1):
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
@pytest.mark.parametrize(("N", "k"), [(1, 1), (1, 5), (2, 3), (97, 5), (200, 2), (60, 8)])
def test_thresholds_equal_the_search_one_by_one(N, k, levels):
    """For every budget of the grid at once, also with ties: `levels` is how many values the confidences take."""
    torch.manual_seed(N + k)
    scores = torch.rand(N, k, dtype=torch.float64)
    if levels:
        scores = (scores * levels).floor() / levels
    fractions = exit_fractions(torch.cat([budget_grid(40), torch.tensor([1e-12, 1e12])]), k)
    together = thresholds(scores, fractions)
    exits = exits_taken(scores, together)
    assert together.shape == (42, k)
    assert exits.shape == (42, N)
    for row, found, taken in zip(fractions, together, exits, strict=True):
        expected = search_one_by_one(scores.tolist(), row.tolist())
        assert found.tolist() == expected
        assert torch.equal(thresholds(scores, row), found)
        assert taken.tolist() == walk_one_by_one(scores.tolist(), expected)


def test_thresholds_by_hand():
    """10 samples, a half, 0.3 and 0.2: 5 leave at 0.5, then of 0.0 to 0.4 the best three at exit 2."""
    first = torch.arange(10) / 10
    scores = torch.stack([first, 1 - first, torch.zeros(10)], dim=1)
    found = thresholds(scores, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.5, 0.8, -math.inf])
    assert exits_taken(scores, found).tolist() == [1, 1, 1, 2, 2, 0, 0, 0, 0, 0]


def test_ties():
    """All at a threshold leave; an exit whose share is none, or more than is left, takes nobody."""
    tie = torch.tensor([[0.5, 0.5, 1.0]]).expand(6, 3)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert thresholds(tie, third).tolist() == [0.5, math.inf, -math.inf]  # exit 1 wanted two of six
    assert thresholds(tie, torch.tensor([0.1, 0.5, 0.4])).tolist() == [math.inf, 0.5, -math.inf]


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_fractions(k):
    assert budget_grid().tolist() == [i / 20 for i in range(1, 40)]
    grid = budget_grid(40)
    assert (len(grid), grid[19], grid[-1]) == (40, 1, 2)
    for p in grid.tolist():
        q = exit_fractions(p, k)
        assert q.sum().item() == pytest.approx(1, abs=1e-12)
        assert q.tolist() == pytest.approx([p**i / sum(p**j for j in range(1, k + 1)) for i in range(1, k + 1)])
    assert exit_fractions(1.0, k).tolist() == pytest.approx([1 / k] * k, abs=1e-15)
    assert exit_fractions(grid, k).shape == (40, k)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected finite p > 0"):
            exit_fractions(bad, k)


def test_expected_cost_grows_with_the_budget():
    """Without ties every exit takes its share to within a sample; p = 1 shares evenly."""
    torch.manual_seed(0)
    scores = torch.rand(1000, 5, dtype=torch.float64)
    fractions = exit_fractions(budget_grid(40), 5)
    exits = exits_taken(scores, thresholds(scores, fractions))
    cost = expected_cost(exits, COSTS)
    assert ((cost >= COSTS[0]) & (cost <= COSTS[-1])).all()
    assert (cost.diff() > 0).all()
    assert exits[19].bincount().tolist() == [200] * 5
    shares = torch.stack([row.bincount(minlength=5) for row in exits]) / 1000
    assert (shares[:, :-1] - fractions[:, :-1]).abs().max() <= 1e-3


def test_confidence_and_budgeted_prediction():
    """Against a loop over samples; a single exit for all gives anytime accuracy and that exit's cost."""
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
    for t, accuracy in enumerate(anytime(logits, labels)):
        alone = torch.full((3,), math.inf)
        alone[t] = -math.inf
        result = budgeted(logits, labels, alone, [1, 2, 4])
        assert (result.accuracy, result.cost) == (pytest.approx(accuracy.item()), [1, 2, 4][t])


def test_budget_curve_and_reading_it():
    """Thresholds of one set, budgets spent on another: a row for each p, as budgeted prediction gives it alone."""
    torch.manual_seed(3)
    held_out, logits, labels = torch.rand(40, 3), 3 * torch.randn(50, 3, 4), torch.randint(4, (50,))
    grid = torch.tensor([0.5, 1.0, 3.0])
    for point, p in zip(budget_curve(held_out, logits, labels, [10, 20, 40], grid), grid.tolist(), strict=True):
        alone = budgeted(logits, labels, thresholds(held_out, exit_fractions(p, 3)), [10, 20, 40])
        assert point == {"p": p, "mult_adds": round(alone.cost), "accuracy": alone.accuracy}
    curve = [{"mult_adds": 4, "accuracy": 30}, {"mult_adds": 0, "accuracy": 10}, {"mult_adds": 6, "accuracy": 20}]
    assert [accuracy_at(curve, at) for at in (-1, 0, 1, 4, 5, 9)] == [10, 10, 15, 30, 25, 20]


def test_last_exit_takes_what_no_threshold_does():
    assert exits_taken(torch.tensor([[0.2, 0.3]]), torch.tensor([0.9, 0.9])).tolist() == [1]


@pytest.mark.parametrize("levels", [None, 10])
def test_thresholds_for_a_budget(levels):
    """Never above the budget on the held-out set, and without ties within the cost of one sample of it."""
    torch.manual_seed(2)
    scores = torch.rand(500, 5)
    if levels:
        scores = (scores * levels).floor() / levels
    for budget in torch.linspace(COSTS[0], COSTS[-1], 12, dtype=torch.float64).tolist():
        found, p, cost = thresholds_for_budget(scores, COSTS, budget)
        assert torch.equal(found, thresholds(scores, exit_fractions(p, 5)))
        assert cost == expected_cost(exits_taken(scores, found), COSTS).item() <= budget
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
    with pytest.raises(ValueError, match="N >= 1 held-out samples"):
        thresholds_for_budget(torch.empty(0, 5), COSTS, 1e7)
    with pytest.raises(ValueError, match="NaN"):
        thresholds_for_budget(scores.where(scores < scores.max(), torch.nan), COSTS, 1e7)
    for costs in (COSTS[:4], COSTS[::-1], [*COSTS[:4], math.inf]):
        with pytest.raises(ValueError, match="cumulative cost of each of 5 exits"):
            thresholds_for_budget(scores, costs, 1e7)
    with pytest.raises(ValueError, match="held-out samples"):
        thresholds(scores[:, 0], exit_fractions(1.0, 5))
    for fractions in (exit_fractions(1.0, 4), -exit_fractions(1.0, 5), torch.full((5,), math.nan)):
        with pytest.raises(ValueError, match=r"expected \(..., 5\) with values in \[0, 1\]"):
            thresholds(scores, fractions)
    with pytest.raises(ValueError, match=r"expected \(N, k\) and \(..., k\)"):
        exits_taken(scores, torch.zeros(4))
    with pytest.raises(ValueError, match=r"expected \(N, k, classes\) and \(N,\)"):
        anytime(torch.zeros(10, 5, 3), torch.zeros(9))
    with pytest.raises(ValueError, match="expected one for each of 5 exits"):
        budgeted(torch.zeros(10, 5, 3), torch.zeros(10).long(), torch.zeros(5), COSTS[:4])
