"""Gradient Equilibrium (GE): gradients rescaled at each branch of a multi-exit network, to a mean over the exits.

Blocks 1..k, exits 1..k; block i feeds exit i and block i + 1. Branch i has two rescalings, identities going forward:

    1/(k-i+1)  on block i's output, read by exit i and by what follows it
    k-i        on the way on to block i + 1

so what reaches block i is 1/(k-i+1) of exit i's gradient plus (k-i)/(k-i+1) of block i + 1's. From exit j down to
block i the factors telescope, for every j >= i,

    1/(k-j+1) * prod_{h=i}^{j-1} (k-h)/(k-h+1)  =  1/(k-i+1),

and with a sum of k losses each block gets the *mean* of the gradients of the k-i+1 exits above it: bounded, however
many there are, where the plain sum grows. The exits' own weights are above the rescaling: their gradients stay whole.
"""

import torch
from torch import Tensor

MODES = (None, "all", "last")


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, s: float) -> Tensor:
        ctx.s = s  # nothing else: no activation is kept
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.s * grad, None


def scale_gradient(x: Tensor, s: float) -> Tensor:
    """x, whose gradient is multiplied by s on the way back. Any shape; nothing is computed where x needs no gradient."""
    return _ScaleGradient.apply(x, s) if x.requires_grad else x


def scale_branch(state: list[Tensor], s: float, mode: str | None) -> list[Tensor]:
    """`scale_gradient` on the tensors of one branch: scale tensors, finest first, the exit reads the last.

    "all": every tensor, the formula above: exact, since each path between two blocks crosses every branch between them
    once, on whichever scale. "last": the last alone, as in the official code (models/msdnet_ge.py): paths that leave a
    block on a finer scale pass unscaled, so the mean holds only where one scale is left. None: nothing.
    """
    if mode not in MODES:
        raise ValueError(f"unknown equilibrium {mode!r}, expected None, 'all' or 'last'")
    if mode is None:
        return state
    kept = state[:-1] if mode == "last" else []
    return [*kept, *(scale_gradient(x, s) for x in state[len(kept) :])]
