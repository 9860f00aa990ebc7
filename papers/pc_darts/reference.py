"""The search cell by definition: every edge evaluates its own eight operations (official file: model_search.py).

Slow and plain: the shared cell of `supernet.py` is tested and timed against it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .genotypes import EDGES, NODES, PRIMITIVES
from .operations import FactorizedReduce, ReLUConvBN, operation


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Output channel i of (N, C, H, W) is input channel (i mod groups) * (C / groups) + floor(i / groups)."""
    n, c, h, w = x.shape
    if c % groups:
        raise ValueError(f"cannot shuffle {c} channels in {groups} groups, expected a multiple")
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class MixedOp(nn.Module):
    """Partial channel connection (eq. 2): mix the first C/K channels, let the others bypass, shuffle.

    (N, C, H, W) and weights (8,) -> (N, C, H/stride, W/stride).
    """

    def __init__(self, C: int, stride: int, K: int):
        super().__init__()
        self.K, self.stride, self.c = K, stride, C // K
        self.ops = nn.ModuleList(operation(o, self.c, stride, affine=False, search=True) for o in PRIMITIVES)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        mixed = sum(w * op(x[:, : self.c]) for w, op in zip(weights, self.ops, strict=True))
        if self.K == 1:  # every channel is mixed; pooling the zero bypassed ones would fail
            return mixed
        bypass = x[:, self.c :]
        if self.stride == 2:
            bypass = F.max_pool2d(bypass, 2, 2)
        return channel_shuffle(torch.cat([mixed, bypass], dim=1), self.K)


class PlainCell(nn.Module):
    """14 MixedOps; node j = sum_i softmax(beta)_ij f_ij(x_i) (eq. 3), or their plain sum without beta (DARTS)."""

    def __init__(self, c_pp: int, c_p: int, C: int, K: int, reduction: bool, reduction_prev: bool):
        super().__init__()
        self.preprocess0 = (FactorizedReduce if reduction_prev else ReLUConvBN)(c_pp, C, affine=False)
        self.preprocess1 = ReLUConvBN(c_p, C, affine=False)
        self.edges = nn.ModuleList(MixedOp(C, 2 if reduction and source < 2 else 1, K) for source, _ in EDGES)

    def forward(self, s0: Tensor, s1: Tensor, alphas: Tensor, betas: Tensor | None) -> Tensor:
        """alphas (14, 8) and betas (14,) or None, both after their softmax; -> (N, 4C, H/s, W/s)."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        e = 0
        for node in range(NODES):
            outs = []
            for source in range(node + 2):
                out = self.edges[e](states[source], alphas[e])
                outs.append(out if betas is None else betas[e] * out)
                e += 1
            states.append(sum(outs))
        return torch.cat(states[2:], dim=1)
