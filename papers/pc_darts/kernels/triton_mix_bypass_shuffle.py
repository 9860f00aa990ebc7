"""mix_bypass_shuffle in Triton: every input read once, the node written once; the same for the gradients.

One program owns a stretch of one output channel o = i K + k of one image: k = 0 is mixed channel i, the others are
bypass channel (k - 1) c + i. Arithmetic is in float32 (float64 for float64 inputs). The gradient of beta is a partial
sum per program, added up by torch in a fixed order: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 2048


@triton.jit
def _forward(mixed, mixed_stride, bypass, bypass_stride, beta, out, c, pixels, K: tl.constexpr, S: tl.constexpr,
             ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # image n, output channel o
    n, o = row // (c * K), row % (c * K)
    i, k = o // K, o % K
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    acc = tl.zeros((BLOCK,), ACC)
    if k == 0:
        for s in tl.static_range(S):
            acc += tl.load(mixed[s] + n * mixed_stride[2 * s] + i * mixed_stride[2 * s + 1] + at, inside, 0.0).to(ACC)
    else:
        channel = (k - 1) * c + i
        for s in tl.static_range(S):
            source = bypass[s] + n * bypass_stride[2 * s] + channel * bypass_stride[2 * s + 1]
            x = tl.load(source + at, inside, 0.0).to(ACC)
            acc += tl.load(beta + s).to(ACC) * x
    tl.store(out + row * pixels + at, acc.to(out.dtype.element_ty), inside)


@triton.jit
def _backward(grad, bypass, bypass_stride, beta, d_mixed, d_bypass, partial, c, pixels, K: tl.constexpr,
              S: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n, o = row // (c * K), row % (c * K)
    i, k = o // K, o % K
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    g = tl.load(grad + row * pixels + at, inside, 0.0)
    if k == 0:
        tl.store(d_mixed + (n * c + i) * pixels + at, g, inside)
    else:
        g_acc = g.to(ACC)
        channel = (k - 1) * c + i
        programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        program = row * tl.num_programs(1) + tl.program_id(1)
        for s in tl.static_range(S):
            source = bypass[s] + n * bypass_stride[2 * s] + channel * bypass_stride[2 * s + 1]
            x = tl.load(source + at, inside, 0.0).to(ACC)
            tl.store(partial + s * programs + program, tl.sum(g_acc * x, axis=0))
            dx = tl.load(beta + s).to(ACC) * g_acc
            target = d_bypass[s] + (n * c * (K - 1) + channel) * pixels + at
            tl.store(target, dx.to(d_bypass[s].dtype.element_ty), inside)


def _rows(tensors: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The tensors, copied only where a map is not contiguous in itself, and their batch and channel strides."""
    kept = [x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in tensors]
    return tuple(kept), tuple(stride for x in kept for stride in x.stride()[:2])


def _launch(x: Tensor, k: int) -> tuple[tuple[int, int], dict]:
    n, c, h, w = x.shape
    block = min(MAX_BLOCK, triton.next_power_of_2(h * w))
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return (n * c * k, triton.cdiv(h * w, block)), {"ACC": acc, "BLOCK": block, "num_warps": 4 if block > 256 else 1}


def _op_forward(mixed: list[Tensor], bypass: list[Tensor], beta: Tensor) -> Tensor:
    n, c, h, w = mixed[0].shape
    k = 1 + bypass[0].shape[1] // c
    out = mixed[0].new_empty(n, k * c, h, w)
    if out.numel():
        grid, meta = _launch(mixed[0], k)
        _forward[grid](*_rows(mixed), *_rows(bypass), beta.contiguous(), out, c, h * w, K=k, S=len(mixed), **meta)
    return out


def _op_backward(grad: Tensor, bypass: list[Tensor], beta: Tensor) -> list[Tensor]:
    """[d_mixed (the same for every edge), d_beta, d_bypass of edge 0, 1, ...]."""
    n, channels, h, w = grad.shape
    c, s = channels - bypass[0].shape[1], len(bypass)
    k = channels // c
    d_mixed = grad.new_empty(n, c, h, w)
    d_bypass = [x.new_empty(x.shape) for x in bypass]
    if not grad.numel():
        return [d_mixed, torch.zeros_like(beta), *d_bypass]
    grid, meta = _launch(d_mixed, k)
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    partial = torch.zeros(s, *grid, dtype=accumulate, device=grad.device)  # stays zero for the mixed channels
    _backward[grid](
        grad.contiguous(), *_rows(bypass), beta.contiguous(), d_mixed, tuple(d_bypass), partial, c, h * w,
        K=k, S=s, **meta,
    )  # fmt: skip
    return [d_mixed, partial.sum((1, 2)).to(beta.dtype), *d_bypass]


def _define():
    """Register both operators once per process: two copies of this folder may be imported together."""
    namespace = "repro_pc_darts"
    known = getattr(torch.ops, namespace)
    if hasattr(known, "mix_bypass_shuffle"):
        return known.mix_bypass_shuffle.default
    forward = torch.library.custom_op(f"{namespace}::mix_bypass_shuffle", _op_forward, mutates_args=())
    backward = torch.library.custom_op(f"{namespace}::mix_bypass_shuffle_backward", _op_backward, mutates_args=())

    @forward.register_fake
    def _(mixed, bypass, beta):
        n, c, h, w = mixed[0].shape
        return mixed[0].new_empty(n, c + bypass[0].shape[1], h, w)

    @backward.register_fake
    def _(grad, bypass, beta):
        n, channels, h, w = grad.shape
        d_mixed = grad.new_empty(n, channels - bypass[0].shape[1], h, w)
        return [d_mixed, torch.empty_like(beta), *(x.new_empty(x.shape) for x in bypass)]

    def setup_context(ctx, inputs, output):
        _, bypass, beta = inputs
        ctx.save_for_backward(beta, *bypass)

    def gradients(ctx, grad):
        beta, *bypass = ctx.saved_tensors
        d_mixed, d_beta, *d_bypass = backward(grad, bypass, beta)
        return [d_mixed] * len(bypass), d_bypass, d_beta

    forward.register_autograd(gradients, setup_context=setup_context)
    return known.mix_bypass_shuffle.default


mix_bypass_shuffle = _define()
