"""pyramid_pool: horizontal pyramid pooling of all scales and both poolings in one pass over the map.

By definition the last map is read once for every scale and pooling, 8 times. But the bins of a coarse scale are unions of
those of the finest: sums add up, maxima are maxima of maxima. So the map is read once, for the finest bins.
"""

import torch
from torch import Tensor

from .reference import reference

__all__ = ["pyramid_pool", "reference"]

POOLS = ("avg+max", "avg", "max")


def pyramid_pool(
    x: Tensor, scales: tuple[int, ...] = (1, 2, 4, 8), pool: str = "avg+max", impl: str = "auto"
) -> Tensor:
    """(N, C, H, W) -> (bins, N, C) of the dtype of x; see `reference` for the definition.

    The gradient of a maximum goes to the first of equal values, row by row, as that of torch's adaptive pool does on a CPU.
    NaN in a bin is NaN in its result with torch; with Triton only where averages are asked for too.
    impl: "auto" takes Triton for CUDA tensors when all scales are powers of two, and torch otherwise. ValueError unless
    each scale divides the largest, and that one H.
    """
    _check(x, scales, pool, impl)
    powers = all(scale & (scale - 1) == 0 for scale in scales)
    if impl == "triton" and not powers:
        raise ValueError(f"impl='triton' of scales {tuple(scales)}, expected powers of two; take impl='torch'")
    if impl == "triton" or (impl == "auto" and x.is_cuda and powers):
        from .triton_pyramid_pool import pyramid_pool as triton_op  # triton is only needed here

        return triton_op(x, list(scales), "avg" in pool, "max" in pool)[0]
    return _torch(x, scales, pool)


def _torch(x: Tensor, scales: tuple[int, ...], pool: str) -> Tensor:
    fine = x.flatten(2).unflatten(
        2, (max(scales), -1)
    )  # (N, C, finest bins, values): a view, also of channels_last maps
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = fine.sum(3, dtype=dtype) if "avg" in pool else None
    tops = _maximum(fine).to(dtype) if "max" in pool else None
    bins = []
    for scale in scales:
        found = 0
        if sums is not None:
            found = sums.unflatten(2, (scale, -1)).sum(3) * (scale / (x.shape[2] * x.shape[3]))
        if tops is not None:
            found = found + tops.unflatten(2, (scale, -1)).max(3).values
        bins.append(found)
    return torch.cat(bins, 2).permute(2, 0, 1).to(x.dtype)


def _maximum(fine: Tensor) -> Tensor:
    """Maxima over the last axis. Without a gradient by halves, which on a CPU takes a third of the time."""
    if torch.is_grad_enabled() and fine.requires_grad:
        return fine.max(3).values  # unlike amax, its gradient goes to the first of equal values
    while fine.shape[3] % 2 == 0:
        fine = torch.maximum(*fine.chunk(2, 3))
    return fine.amax(3)


def _check(x: Tensor, scales: tuple[int, ...], pool: str, impl: str) -> None:
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"unknown impl {impl!r}, expected auto, torch or triton")
    if pool not in POOLS:
        raise ValueError(f"unknown pool {pool!r}, expected one of {', '.join(POOLS)}")
    if x.dim() != 4 or not x.dtype.is_floating_point or 0 in x.shape[1:]:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}, expected (N, C, H, W) of a floating dtype, nothing but N zero"
        )
    if not scales or min(scales) < 1 or any(max(scales) % scale for scale in scales) or x.shape[2] % max(scales):
        raise ValueError(
            f"scales {tuple(scales)} on a map of {x.shape[2]} rows; expected each to divide the largest, and that one the rows"
        )
