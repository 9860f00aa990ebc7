"""The search space as data: operation names, genotypes, and how one is read off the architecture weights.

States of a cell are numbered 0 (the cell before the previous one), 1 (the previous cell), 2..5 (the four nodes). The 14
edges are numbered node after node, source ascending: 2 edges enter node 2, then 3, 4 and 5.
"""

import json
from typing import NamedTuple

import torch
from torch import Tensor

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
NODES = 4  # intermediate nodes of a cell
EDGES = tuple((source, node) for node in range(NODES) for source in range(node + 2))  # (source state, node), 14 of them
CONCAT = (2, 3, 4, 5)  # a cell's output is the concatenation of these states


class Genotype(NamedTuple):
    """Two cells. `normal` and `reduce` hold 8 pairs (op, source state); pairs 2n and 2n+1 enter state n + 2."""

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]

    def validate(self) -> "Genotype":
        """Return self, or raise ValueError saying which entry is wrong."""
        for name, cell, concat in (("normal", *self[:2]), ("reduce", *self[2:])):
            if len(cell) != 2 * NODES:
                raise ValueError(f"{name}: {len(cell)} entries, expected {2 * NODES} (two for each of {NODES} nodes)")
            for i, (op, source) in enumerate(cell):
                if op not in PRIMITIVES[1:]:
                    raise ValueError(
                        f"{name}[{i}]: unknown operation {op!r}, expected one of {', '.join(PRIMITIVES[1:])}"
                    )
                if type(source) is not int or not 0 <= source < i // 2 + 2:
                    raise ValueError(f"{name}[{i}]: source {source!r}, expected a state from 0 to {i // 2 + 1}")
            for n in range(NODES):
                if cell[2 * n][1] == cell[2 * n + 1][1]:
                    raise ValueError(f"{name}: node {n + 2} takes source {cell[2 * n][1]} twice, expected two sources")
            if not concat or len(set(concat)) != len(concat) or not set(concat) <= set(CONCAT):
                raise ValueError(f"{name}_concat: {tuple(concat)}, expected distinct states from {CONCAT}")
        return self

    def to_json(self) -> str:
        """One line of JSON, read back by `from_json`."""
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> "Genotype":
        """Parse and validate what `to_json` wrote. ValueError if it is not a genotype."""
        try:
            data = json.loads(text)
            cells = [tuple((op, source) for op, source in data[name]) for name in ("normal", "reduce")]
            concats = [tuple(data[name]) for name in ("normal_concat", "reduce_concat")]
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a genotype ({error!r}), expected JSON with {', '.join(cls._fields)}") from None
        return cls(cells[0], concats[0], cells[1], concats[1]).validate()


_SHORT = dict(zip(("mp", "ap", "sk", "s3", "s5", "d3", "d5"), PRIMITIVES[1:], strict=True))


def _genotype(normal: str, reduce: str) -> Genotype:
    """Expand the shorthand 's3 1, sk 0 | ...' (node by node) of a published table."""
    cells = []
    for text in (normal, reduce):
        words = text.replace("|", " ").replace(",", " ").split()
        cells.append(tuple((_SHORT[op], int(s)) for op, s in zip(words[::2], words[1::2], strict=True)))
    return Genotype(cells[0], CONCAT, cells[1], CONCAT).validate()


# Found by the authors on CIFAR-10 and on ImageNet, and the two cells of DARTS (first and second order).
PUBLISHED = {
    "PC_DARTS_cifar": _genotype(
        "s3 1, sk 0 | s3 0, d3 1 | s5 0, s3 1 | ap 0, d3 1", "s5 1, mp 0 | s5 1, s5 2 | s3 0, s3 3 | s3 1, s3 2"
    ),
    "PC_DARTS_image": _genotype(
        "sk 1, s3 0 | s3 0, sk 1 | s3 1, s3 3 | s3 1, d5 4", "s3 0, sk 1 | d5 2, mp 1 | s3 2, s3 1 | s5 0, s3 3"
    ),
    "DARTS_V1": _genotype(
        "s3 1, s3 0 | sk 0, s3 1 | sk 0, s3 1 | s3 0, sk 2", "mp 0, mp 1 | sk 2, mp 0 | mp 0, sk 2 | sk 2, ap 0"
    ),
    "DARTS_V2": _genotype(
        "s3 0, s3 1 | s3 0, s3 1 | s3 1, sk 0 | sk 0, d3 2", "mp 0, mp 1 | sk 2, mp 1 | mp 0, sk 2 | sk 2, mp 1"
    ),
}


def edge_weights(betas: Tensor) -> Tensor:
    """Edge normalisation: softmax of betas (14,) over the edges entering each node, (14,); they sum to 1 per node."""
    if betas.shape != (len(EDGES),):
        raise ValueError(f"betas of shape {tuple(betas.shape)}, expected ({len(EDGES)},)")
    return torch.cat([part.softmax(0) for part in betas.split([n + 2 for n in range(NODES)])])


def derive(
    alphas_normal: Tensor, alphas_reduce: Tensor, betas_normal: Tensor | None = None, betas_reduce: Tensor | None = None
) -> Genotype:
    """The discrete cells of alphas (14, 8) and betas (14,); without betas, the DARTS rule (section 3.3).

    W[e, o] = softmax(alpha_e)_o * softmax(beta)_e. Every node keeps the two edges with the largest max_{o != none} W
    (the lower source wins a tie), each with its best operation; `none` stays in the softmax but is never chosen.
    """
    cells = []
    for alphas, betas in ((alphas_normal, betas_normal), (alphas_reduce, betas_reduce)):
        if alphas.shape != (len(EDGES), len(PRIMITIVES)):
            raise ValueError(f"alphas of shape {tuple(alphas.shape)}, expected ({len(EDGES)}, {len(PRIMITIVES)})")
        weights = alphas.detach().cpu().double().softmax(-1)
        if betas is not None:
            weights = weights * edge_weights(betas.detach().cpu().double())[:, None]
        best = [max((w, -o) for o, w in enumerate(row) if o > 0) for row in weights.tolist()]  # (weight, -operation)
        cell = []
        for node in range(NODES):
            edges = [e for e, edge in enumerate(EDGES) if edge[1] == node]
            for e in sorted(edges, key=lambda e: -best[e][0])[:2]:
                cell.append((PRIMITIVES[-best[e][1]], EDGES[e][0]))
        cells.append(tuple(cell))
    return Genotype(cells[0], CONCAT, cells[1], CONCAT)


def random_genotype(generator: torch.Generator | None = None) -> Genotype:
    """A uniform draw from the space: two distinct sources per node, an operation other than none on each."""
    cells = []
    for _ in range(2):
        cell = []
        for node in range(NODES):
            for source in sorted(torch.randperm(node + 2, generator=generator)[:2].tolist()):
                op = int(torch.randint(1, len(PRIMITIVES), (), generator=generator))
                cell.append((PRIMITIVES[op], source))
        cells.append(tuple(cell))
    return Genotype(cells[0], CONCAT, cells[1], CONCAT)


def space_size() -> int:
    """Number of distinct cells (the pair: squared): the product over nodes of C(inputs, 2) * 7^2 = 180 * 49^4."""
    size = 1
    for node in range(NODES):
        inputs = node + 2
        size *= inputs * (inputs - 1) // 2 * (len(PRIMITIVES) - 1) ** 2
    return size
