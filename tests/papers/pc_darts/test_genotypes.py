"""Genotypes: published cells, the derivation rule, the size of the space."""

import math

import pytest
import torch

from papers.pc_darts import PRIMITIVES, PUBLISHED, Genotype, derive, random_genotype, space_size
from papers.pc_darts.genotypes import EDGES, edge_weights

SHORT = dict(zip(("mp", "ap", "sk", "s3", "s5", "d3", "d5"), PRIMITIVES[1:], strict=True))


def cell(text: str) -> tuple:
    words = text.replace("|", " ").replace(",", " ").split()
    return tuple((SHORT[op], int(s)) for op, s in zip(words[::2], words[1::2], strict=True))


def wave():
    """The deterministic weights of the genotype test: (alphas_normal, alphas_reduce, betas_normal, betas_reduce)."""
    a = 1 + torch.arange(14 * 8, dtype=torch.float64).view(14, 8)
    b = 1 + torch.arange(14, dtype=torch.float64)
    return a.sin(), a.cos(), b.sin(), b.cos()


def test_edges_are_numbered_node_after_node():
    assert len(EDGES) == 14
    assert EDGES[:5] == ((0, 0), (1, 0), (0, 1), (1, 1), (2, 1))


def test_derived_genotype_of_the_official_code():
    genotype = derive(*wave())
    assert genotype.normal == cell("s5 1, d5 0 | sk 0, ap 1 | mp 2, sk 1 | sk 4, s5 3")
    assert genotype.reduce == cell("s5 0, s3 1 | s5 2, d3 1 | sk 0, mp 1 | s3 3, s5 2")
    assert genotype.normal_concat == genotype.reduce_concat == (2, 3, 4, 5)
    assert derive(*(t.float() for t in wave())) == genotype


def test_derive_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    for betas in (None, torch.randn(14, generator=generator)):
        alphas = torch.randn(14, 8, generator=generator)
        expected = []
        for node, first in enumerate((0, 2, 5, 9)):
            scores = []
            for source in range(node + 2):
                p = [math.exp(v) for v in alphas[first + source].tolist()]
                beta = 1.0
                if betas is not None:
                    b = [math.exp(v) for v in betas[first : first + node + 2].tolist()]
                    beta = b[source] / sum(b)
                op = max(range(1, 8), key=lambda o, p=p: p[o])
                scores.append((-p[op] / sum(p) * beta, source, PRIMITIVES[op]))
            expected += [(op, source) for _, source, op in sorted(scores)[:2]]
        assert derive(alphas, alphas, betas, betas).normal == tuple(expected)


def test_none_stays_in_the_denominator_and_ties_keep_the_lower_source():
    zero = torch.zeros(14, 8)
    assert derive(zero, zero).normal == tuple((PRIMITIVES[1], s) for _ in range(4) for s in (0, 1))
    alphas = torch.zeros(14, 8)
    alphas[0, 0] = alphas[0, 4] = 5.0  # strong, but `none` takes half of it
    alphas[2, 4], alphas[3, 0], alphas[3, 5], alphas[4, 5] = 3.0, 9.0, 4.0, 2.0
    assert derive(alphas, alphas).normal[2:4] == (("sep_conv_3x3", 0), ("sep_conv_5x5", 2))


def test_beta_changes_edges_but_never_operations():
    generator = torch.Generator().manual_seed(1)
    alphas = torch.randn(14, 8, generator=generator)
    best = {}
    for _ in range(20):
        betas = 3 * torch.randn(14, generator=generator)
        for i, (op, source) in enumerate(derive(alphas, alphas, betas, betas).normal):
            assert best.setdefault((i // 2, source), op) == op
    assert len(best) > 8  # the edges did change


def test_edge_weights_sum_to_one_at_every_node():
    weights = edge_weights(torch.randn(14))
    for first, count in ((0, 2), (2, 3), (5, 4), (9, 5)):
        assert weights[first : first + count].sum().item() == pytest.approx(1)


def test_space_size():
    assert space_size() == 180 * 49**4
    assert space_size() == pytest.approx(1.04e9, rel=0.01)
    assert space_size() ** 2 == pytest.approx(1.08e18, rel=0.01)


def test_random_genotypes_are_valid_and_cover_the_space():
    generator = torch.Generator().manual_seed(0)
    seen, pairs = set(), set()
    for _ in range(200):
        genotype = random_genotype(generator).validate()
        seen |= {op for op, _ in genotype.normal + genotype.reduce}
        pairs.add((genotype.normal[6][1], genotype.normal[7][1]))
    assert seen == set(PRIMITIVES[1:])
    assert len(pairs) == 10  # node 5 chooses 2 of 5
    draws = [random_genotype(torch.Generator().manual_seed(7)) for _ in range(2)]
    assert draws[0] == draws[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_json_round_trip(name):
    assert Genotype.from_json(PUBLISHED[name].to_json()) == PUBLISHED[name]


def test_published_cells():
    assert PUBLISHED["PC_DARTS_cifar"].normal == cell("s3 1, sk 0 | s3 0, d3 1 | s5 0, s3 1 | ap 0, d3 1")
    assert PUBLISHED["PC_DARTS_image"].reduce == cell("s3 0, sk 1 | d5 2, mp 1 | s3 2, s3 1 | s5 0, s3 3")
    assert set(PUBLISHED) == {"PC_DARTS_cifar", "PC_DARTS_image", "DARTS_V1", "DARTS_V2"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"avg_pool_3x3", 0', '"conv_7x7", 0', "unknown operation 'conv_7x7'"),
        ('"avg_pool_3x3", 0', '"none", 0', "unknown operation 'none'"),
        ('"avg_pool_3x3", 0', '"avg_pool_3x3", 9', "source 9, expected a state from 0 to 4"),
        ('"avg_pool_3x3", 0', '"avg_pool_3x3", true', "source True"),
        ('["avg_pool_3x3", 0], ', "", "7 entries, expected 8"),
        ('"avg_pool_3x3", 0', '"avg_pool_3x3", 1', "takes source 1 twice"),
        ('"normal_concat": [2, 3', '"normal_concat": [2, 2', "normal_concat"),
        ('"reduce"', '"reduction"', "not a genotype"),
        ("{", "", "not a genotype"),
    ],
)
def test_broken_json_names_the_fault(old, new, message):
    text = PUBLISHED["PC_DARTS_cifar"].to_json()
    assert old in text
    with pytest.raises(ValueError, match=message):
        Genotype.from_json(text.replace(old, new, 1))


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"alphas of shape \(14, 7\), expected \(14, 8\)"):
        derive(torch.zeros(14, 7), torch.zeros(14, 8))
    with pytest.raises(ValueError, match="betas of shape"):
        derive(torch.zeros(14, 8), torch.zeros(14, 8), torch.zeros(13), torch.zeros(14))
