"""Policies that do not look at the image: counts, the table of all policies against running each, the best subset."""

import itertools

import pytest
import torch

from papers.blockdrop import subsets
from papers.blockdrop.model import resnet_cifar


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = resnet_cifar(14, widths=(4, 8, 8)).eval()  # K = 6
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    return model


def test_all_policies_are_all_and_different():
    for K in (1, 3, 6):
        found = [tuple(row) for row in subsets.all_policies(K).int().tolist()]
        assert found == list(itertools.product((0, 1), repeat=K))
    for K in (0, 13):
        with pytest.raises(ValueError, match="expected 1 to 12"):
            subsets.all_policies(K)


def test_told_subsets_have_k_blocks():
    for K in (1, 5, 9, 54):
        for k in range(K + 1):
            first, spread = subsets.first_k(K, k), subsets.spread_k(K, k)
            assert first.tolist() == [True] * k + [False] * (K - k)
            assert spread.sum() == k
            gaps = spread.nonzero()[:, 0].diff()
            assert not len(gaps) or gaps.amax() - gaps.amin() <= 1
    for choose in (subsets.first_k, subsets.spread_k):
        for k in (-1, 6):
            with pytest.raises(ValueError, match="expected 0 to 5"):
                choose(5, k)


@pytest.mark.parametrize("k", [0, 2.3, 5, 8.99, 9])
def test_random_subsets_have_the_right_mean_and_no_preference(k):
    found = subsets.random_k(torch.rand(40_000, 10, generator=torch.Generator().manual_seed(0)), k).double()
    counts = found.sum(1)
    assert counts.mean().item() == pytest.approx(k, abs=0.01)
    assert set(counts.tolist()) <= {int(k), int(k) + 1}
    assert found.mean(0).tolist() == pytest.approx([k / 9] * 9, abs=0.01)


def test_table_is_every_policy_run_by_itself(network):
    images, labels = torch.randn(20, 3, 16, 16), torch.randint(10, (20,))
    table, policies = subsets.correct_table(network, images, labels), subsets.all_policies(6)
    with torch.inference_mode():
        for i in range(0, 64, 7):
            alone = network(images, policies[i].expand(20, -1)).argmax(1) == labels
            assert torch.equal(table[:, i], alone)
    assert 0 < table.double().mean() < 1
    with pytest.raises(ValueError, match=r"call .eval\(\)"):
        subsets.correct_table(network.train(), images, labels)


def test_best_subset_is_the_best_of_all_of_its_size(network):
    batches = [(torch.randn(15, 3, 16, 16), torch.randint(10, (15,))) for _ in range(2)]
    with torch.inference_mode():
        for k in (0, 2, 5, 6):
            scores = {}
            for bits in itertools.product((False, True), repeat=6):
                if sum(bits) == k:
                    policy = torch.tensor(bits).expand(15, -1)
                    scores[bits] = sum((network(x, policy).argmax(1) == y).sum().item() for x, y in batches)
            found = tuple(subsets.best_subset(network, batches, k).tolist())
            assert scores[found] == max(scores.values())


def test_greedy_subset_of_a_deep_network_takes_away_what_hurts_least(monkeypatch, network):
    """The search for K > 12, tried on K = 6: the first step is the best of all policies that lack one block."""
    batches = [(torch.randn(40, 3, 16, 16), torch.randint(10, (40,)))]
    best = subsets.best_subset(network, batches, 5)
    monkeypatch.setattr(subsets, "MOST_BLOCKS", 3)
    greedy = subsets.best_subset(network, batches, 5)
    with torch.inference_mode():
        scores = [(network(batches[0][0], p.expand(40, -1)).argmax(1) == batches[0][1]).sum() for p in (best, greedy)]
    assert scores[0] == scores[1]
    smaller = subsets.best_subset(network, batches, 3)
    assert smaller.sum() == 3
    assert not (smaller & ~greedy).any(), "a subset of the larger one"
