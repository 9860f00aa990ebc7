"""Corner pooling and center pooling, the operations that CenterNet's heads add to convolutions.

The official extension loops over the rows of a map on the host: a pool of 128 rows is 127 launches forward and, with a
wait for the device in each, 635 backward, and Hourglass-104 has 24 pools. Here a pool is one pass over memory each way.
"""

from math import prod

import torch
from torch import Tensor

from . import operators
from .reference import AXIS, REVERSE

__all__ = ["center_pool", "corner_pool"]


def corner_pool(x: Tensor, direction: str, impl: str = "auto") -> Tensor:
    """Running maximum of x (B, C, H, W), the same shape: `reference.corner_pool` defines it, its gradient and its ties.

    direction: "top", "bottom" (along H), "left" or "right" (along W). impl: "auto" takes Triton for CUDA tensors and
    torch elsewhere. Contiguous and channels_last maps are read where they lie, and the result is laid out as x.
    A NaN stays from where it is met; gradients from there on are not specified. ValueError for what does not fit.
    """
    if direction not in AXIS:
        raise ValueError(f"direction {direction!r}, expected top, bottom, left or right")
    impl = _implementation(x, impl)
    memory = _memory(x, _is_channels_last(x))
    axis = AXIS[direction] - _is_channels_last(x)
    shape = memory.shape
    lines = memory.reshape(prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :]))
    y = operators.corner_pool(lines, REVERSE[direction], _wants_gradient(x), impl)[0]
    return _logical(y.view(shape), _is_channels_last(x))


def center_pool(columns: Tensor, rows: Tensor, impl: str = "auto") -> Tensor:
    """Maximum of each column of `columns` plus maximum of each row of `rows`, everywhere; all (B, C, H, W).

    Equal to bottom(top(columns)) + right(left(rows)), its gradient too: of several equal maxima the last along the axis
    takes it (see `reference.center_pool`). The result is laid out as `columns`; the rest as for `corner_pool`.
    """
    impl = _implementation(columns, impl)
    if rows.shape != columns.shape or rows.dtype != columns.dtype or rows.device != columns.device:
        raise ValueError(
            f"columns {tuple(columns.shape)} {columns.dtype} on {columns.device}, rows {tuple(rows.shape)} "
            f"{rows.dtype} on {rows.device}: expected the same of both"
        )
    last = _is_channels_last(columns)
    maps = [_memory(x, last) if last else _memory(x, last).flatten(0, 1).unsqueeze(3) for x in (columns, rows)]
    y = operators.center_pool(*maps, _wants_gradient(columns, rows), impl)[0]
    return _logical(y if last else y.view(columns.shape), last)


def _implementation(x: Tensor, impl: str) -> str:
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"unknown impl {impl!r}, expected auto, torch or triton")
    if x.dim() != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"a map is {tuple(x.shape)} {x.dtype}, expected (B, C, H, W) of a floating dtype")
    if impl == "auto":
        return "triton" if x.is_cuda else "torch"
    return impl


def _wants_gradient(*maps: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in maps)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _memory(x: Tensor, channels_last: bool) -> Tensor:
    """x in the order of its memory, (B, H, W, C) or (B, C, H, W); a copy only if it is laid out in another way."""
    return x.permute(0, 2, 3, 1).contiguous() if channels_last else x.contiguous()


def _logical(y: Tensor, channels_last: bool) -> Tensor:
    return y.permute(0, 3, 1, 2) if channels_last else y
