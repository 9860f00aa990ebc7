"""pyramid_pool in Triton: the map is read once, its gradient written once; no atomics.

One program owns BLOCK channels of one image: their 2^k finest bins of M = H/2^k W values each, which lie one after the other.
Sums and maxima of coarser bins come from those of the finest by exact halving. Of each maximum the place of its first occurrence
(row by row) is kept for the backward pass. Arithmetic is in float32 (float64 for float64 maps).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NOWHERE = tl.constexpr(2**31 - 1)
VALUES = 4096  # of the map in one program, about


@triton.jit
def _pool(sums, tops, first, out, place, n, n_images, c, channels, offset, bins: tl.constexpr, AVG: tl.constexpr,
          MAX: tl.constexpr, FINE: tl.constexpr, M: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The bins of one scale, which start at bin `offset` of the result, from the finest bins."""
    target = ((offset + tl.arange(0, bins)).to(tl.int64)[None, :] * n_images + n) * channels + c[:, None]
    keep = (c < channels)[:, None] & (tl.arange(0, bins) >= 0)[None, :]
    found = tl.zeros((BLOCK, bins), ACC)
    if AVG:
        found += tl.sum(tl.reshape(sums, (BLOCK, bins, FINE // bins)), 2) / (FINE * M // bins)
    if MAX:
        parts = tl.reshape(tops, (BLOCK, bins, FINE // bins))
        top = tl.max(parts, 2)
        firsts = tl.reshape(first, (BLOCK, bins, FINE // bins))
        tl.store(place + target, tl.min(tl.where(parts == top[:, :, None], firsts, NOWHERE), 2), keep)
        found += top
    tl.store(out + target, found.to(out.dtype.element_ty), keep)


@triton.jit
def _forward(x, out, place, n_images, channels, scales, n_scales: tl.constexpr, AVG: tl.constexpr, MAX: tl.constexpr,
             FINE: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, FINE)[None, :, None] * M + tl.arange(0, WIDE)[None, None, :]  # place in the map of one channel
    there = (c < channels)[:, None, None] & (tl.arange(0, WIDE) < M)[None, None, :]
    values = tl.load(x + (n * channels + c.to(tl.int64))[:, None, None] * (FINE * M) + at, there, 0.0).to(ACC)
    sums = tl.sum(values, 2)
    values = tl.where(there, values, float("-inf"))
    tops = tl.max(values, 2)
    first = tl.min(tl.where((values == tops[:, :, None]) & there, at, NOWHERE), 2)
    offset = 0
    for k in tl.static_range(n_scales):
        _pool(sums, tops, first, out, place, n, n_images, c, channels, offset, scales[k], AVG, MAX, FINE, M, ACC, BLOCK)
        offset += scales[k]


@triton.jit
def _spread(grad, place, at, n, n_images, c, channels, offset, bins: tl.constexpr, AVG: tl.constexpr, MAX: tl.constexpr,
            FINE: tl.constexpr, M: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """What the bins of one scale give to every value of the map."""
    row = (offset + tl.arange(0, FINE) // (FINE // bins)).to(tl.int64)  # of each finest bin: the bin that holds it
    source = (row[None, :] * n_images + n) * channels + c[:, None]
    keep = (c < channels)[:, None] & (tl.arange(0, FINE) >= 0)[None, :]
    g = tl.load(grad + source, keep, 0.0).to(ACC)[:, :, None]
    found = tl.zeros_like(g)
    if AVG:
        found = g / (FINE * M // bins)
    if MAX:
        where = tl.load(place + source, keep, NOWHERE)[:, :, None]
        found += tl.where(at == where, g, tl.zeros_like(g))
    return found


@triton.jit
def _backward(grad, place, d_x, n_images, channels, scales, n_scales: tl.constexpr, AVG: tl.constexpr, MAX: tl.constexpr,
              FINE: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, FINE)[None, :, None] * M + tl.arange(0, WIDE)[None, None, :]
    there = (c < channels)[:, None, None] & (tl.arange(0, WIDE) < M)[None, None, :]
    total = tl.zeros((BLOCK, FINE, WIDE), ACC)
    offset = 0
    for k in tl.static_range(n_scales):
        total += _spread(grad, place, at, n, n_images, c, channels, offset, scales[k], AVG, MAX, FINE, M, ACC)
        offset += scales[k]
    target = d_x + (n * channels + c.to(tl.int64))[:, None, None] * (FINE * M) + at
    tl.store(target, total.to(d_x.dtype.element_ty), there)


def _launch(x: Tensor, scales: list[int], avg: bool, maximum: bool) -> tuple[tuple[int, int], dict]:
    n, channels, h, w = x.shape
    fine = max(scales)
    m = h // fine * w
    wide = triton.next_power_of_2(m)
    block = max(1, min(triton.next_power_of_2(channels), VALUES // (fine * wide)))
    meta = {"n_scales": len(scales), "AVG": avg, "MAX": maximum, "FINE": fine, "M": m, "WIDE": wide, "BLOCK": block}
    return (n, triton.cdiv(channels, block)), meta | {"ACC": tl.float64 if x.dtype == torch.float64 else tl.float32}


def _op_forward(x: Tensor, scales: list[int], avg: bool, maximum: bool) -> tuple[Tensor, Tensor]:
    """(pooled (bins, N, C), places of the maxima (bins, N, C) int32, empty without maxima)."""
    shape = (sum(scales), *x.shape[:2])
    out = x.new_empty(shape)
    place = torch.empty(shape if maximum else (0,), dtype=torch.int32, device=x.device)
    if out.numel():
        grid, meta = _launch(x, scales, avg, maximum)
        sizes = tuple(tl.constexpr(scale) for scale in scales)
        _forward[grid](x.contiguous(), out, place, *x.shape[:2], sizes, **meta)
    return out, place


def _op_backward(grad: Tensor, place: Tensor, like: Tensor, scales: list[int], avg: bool, maximum: bool) -> Tensor:
    d_x = torch.empty_like(like, memory_format=torch.contiguous_format)
    if grad.numel():
        grid, meta = _launch(like, scales, avg, maximum)
        sizes = tuple(tl.constexpr(scale) for scale in scales)
        _backward[grid](grad.contiguous(), place, d_x, *like.shape[:2], sizes, **meta)
    return d_x


def _define():
    """Register both operators once per process: two copies of this folder may be imported together."""
    namespace = "repro_hpm"
    known = getattr(torch.ops, namespace)
    if hasattr(known, "pyramid_pool"):
        return known.pyramid_pool.default
    forward = torch.library.custom_op(f"{namespace}::pyramid_pool", _op_forward, mutates_args=())
    backward = torch.library.custom_op(f"{namespace}::pyramid_pool_backward", _op_backward, mutates_args=())

    @forward.register_fake
    def _(x, scales, avg, maximum):
        shape = (sum(scales), x.shape[0], x.shape[1])
        return x.new_empty(shape), x.new_empty(shape if maximum else (0,), dtype=torch.int32)

    @backward.register_fake
    def _(grad, place, like, scales, avg, maximum):
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def setup_context(ctx, inputs, output):
        x, ctx.scales, ctx.avg, ctx.maximum = inputs
        ctx.save_for_backward(output[1], x)  # of x only its shape is read, and the layer before keeps it anyway
        ctx.mark_non_differentiable(output[1])

    def gradients(ctx, grad, _):
        place, x = ctx.saved_tensors
        return backward(grad, place, x, ctx.scales, ctx.avg, ctx.maximum), None, None, None

    forward.register_autograd(gradients, setup_context=setup_context)
    return known.pyramid_pool.default


pyramid_pool = _define()
