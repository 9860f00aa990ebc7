"""Corner pooling in Triton: the map is read once and written once, forward and backward, without atomics.

For the backward pass the forward one leaves one bit an element, set where the running maximum changed: 1/32 of a float32
map, where its output would be a whole one. So both passes together move 4 maps and 1/16, the least with anything kept.

Maps are (n, L, m), scanned along L; a lane is one of the n m scans. Where lanes lie side by side (m >= 8) a program
walks L with a row of lanes, memory read in rows; where L itself lies side by side, as for the rows of a contiguous map,
it holds whole scans and combines them as a tree, in log2 L steps. A reverse scan reads mirrored places: associative_scan
with reverse=True has been wrong on GPUs. Comparisons and sums are in float32, in float64 for float64 maps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _walk(x, y, marks, lanes, L, m, scan, REVERSE: tl.constexpr, TRAIN: tl.constexpr, ACC: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    # scan = L m, elements from one n to the next; a word of marks holds 16 positions in the order of the scan
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < lanes
    n, first = lane // m, lane % m
    step = -m if REVERSE else m
    at = n * scan + first + ((L - 1) * m if REVERSE else 0)
    word = n * (tl.cdiv(L, 16) * m) + first
    best = tl.full((BLOCK,), float("-inf"), ACC)
    start = 0
    while start < L:  # not range: under the interpreter it wants a number that is known beforehand
        values = ()
        for k in tl.static_range(16):  # all loads first: none moves before a store, which may be to the same memory
            here = inside & (start + k < L)
            values += (tl.load(x + at + k * step, here, float("-inf")),)
        bits = tl.zeros((BLOCK,), tl.int32)
        for k in tl.static_range(16):
            value = values[k].to(ACC)
            new = (value > best) | (value != value) | (start + k == 0)
            best = tl.where(new, value, best)
            tl.store(y + at + k * step, best.to(y.dtype.element_ty), inside & (start + k < L))
            bits |= new.to(tl.int32) << k
        if TRAIN:
            tl.store(marks + word, bits.to(tl.int16), inside)
        at += 16 * step
        word += m
        start += 16


@triton.jit
def _walk_back(grad, marks, out, lanes, L, m, scan, REVERSE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < lanes
    n, first = lane // m, lane % m
    step = -m if REVERSE else m
    words = tl.cdiv(L, 16)
    at = n * scan + first + ((L - 1) * m if REVERSE else 0) + (words - 1) * 16 * step
    word = n * (words * m) + first + (words - 1) * m
    total = tl.zeros((BLOCK,), ACC)
    start = (words - 1) * 16
    while start >= 0:
        bits = tl.load(marks + word, inside, 0).to(tl.int32)
        values = ()
        for k in tl.static_range(16):
            values += (tl.load(grad + at + k * step, inside & (start + k < L), 0.0),)
        for k in tl.static_range(15, -1, -1):
            total += values[k].to(ACC)
            new = ((bits >> k) & 1) != 0
            source = tl.where(new, total, 0.0).to(out.dtype.element_ty)
            tl.store(out + at + k * step, source, inside & (start + k < L))
            total = tl.where(new, 0.0, total)
        at -= 16 * step
        word -= m
        start -= 16


@triton.jit
def _earlier_or_larger(value, place, later_value, later_place):
    later = (later_value > value) | (later_value != later_value)
    return tl.where(later, later_value, value), tl.where(later, later_place, place)


@triton.jit
def _sum_from(total, cut, later_total, later_cut):
    """Sums that start again where cut is set: what came before such a place does not reach behind it."""
    return tl.where(later_cut != 0, later_total, total + later_total), cut | later_cut


@triton.jit
def _tree(x, y, marks, lanes, L, m, scan, REVERSE: tl.constexpr, TRAIN: tl.constexpr, ACC: tl.constexpr,
          LANES: tl.constexpr, LENGTH: tl.constexpr):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    place = tl.arange(0, LENGTH)
    inside = (lane < lanes)[:, None] & (place < L)[None, :]
    n, first = lane // m, lane % m
    at = (n * scan + first)[:, None] + ((L - 1 - place if REVERSE else place) * m)[None, :]
    value = tl.load(x + at, inside, float("-inf")).to(ACC)
    places = tl.broadcast_to(place[None, :], (LANES, LENGTH))
    best, holder = tl.associative_scan((value, places), 1, _earlier_or_larger)
    tl.store(y + at, best.to(y.dtype.element_ty), inside)
    if TRAIN:
        bits = (holder == places).to(tl.int32) << (places % 16)
        bits = tl.sum(tl.reshape(bits, (LANES, LENGTH // 16, 16)), 2)
        word = tl.arange(0, LENGTH // 16)
        target = marks + (n * (tl.cdiv(L, 16) * m) + first)[:, None] + (word * m)[None, :]
        tl.store(target, bits.to(tl.int16), (lane < lanes)[:, None] & (word * 16 < L)[None, :])


@triton.jit
def _tree_back(grad, marks, out, lanes, L, m, scan, REVERSE: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr,
               LENGTH: tl.constexpr):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    back = tl.arange(0, LENGTH)  # positions from the end of the scan
    inside = (lane < lanes)[:, None] & (back < L)[None, :]
    n, first = lane // m, lane % m
    place = L - 1 - back
    at = (n * scan + first)[:, None] + ((back if REVERSE else place) * m)[None, :]
    source = marks + (n * (tl.cdiv(L, 16) * m) + first)[:, None]
    new = (tl.load(source + (place // 16 * m)[None, :], inside, 0).to(tl.int32) >> (place % 16)[None, :]) & 1
    after = place + 1  # its bit says that what the later positions have added up is not for this one
    there = inside & (after < L)[None, :]
    cut = (tl.load(source + (after // 16 * m)[None, :], there, 0).to(tl.int32) >> (after % 16)[None, :]) & 1
    total, _ = tl.associative_scan((tl.load(grad + at, inside, 0.0).to(ACC), cut), 1, _sum_from)
    tl.store(out + at, tl.where(new != 0, total, 0.0).to(out.dtype.element_ty), inside)


def _plan(n: int, length: int, m: int) -> tuple[bool, int, dict[str, int]]:
    """(whether to walk, programs, tile sizes), as a function of the shape; not tuned by timing. A walk gets along with
    one warp and 64 lanes, which gives the most programs; a tree holds 2048 elements."""
    if m >= 8 or length > 2**14:
        return True, triton.cdiv(n * m, 64), {"BLOCK": 64, "num_warps": 1}
    tile = max(16, triton.next_power_of_2(length))
    lanes = max(1, min(2048 // tile, triton.next_power_of_2(n * m)))
    return False, triton.cdiv(n * m, lanes), {"LANES": lanes, "LENGTH": tile, "num_warps": 4 if tile <= 4096 else 16}


def _launch(kernels: tuple, tensors: tuple, shape: tuple[int, int, int], reverse: bool, **flags: bool) -> None:
    n, length, m = shape
    walks, programs, meta = _plan(n, length, m)
    kernel, example = kernels[0 if walks else 1], tensors[0]
    if not example.is_cuda and isinstance(kernel, triton.JITFunction):
        raise ValueError(f"impl='triton' on {example.device}, expected CUDA tensors; take impl='auto' or impl='torch'")
    if length * m >= 2**31 - 2**16:
        raise ValueError(f"scans of {length} x {m} elements side by side, expected fewer than 2^31; use impl='torch'")
    acc = tl.float64 if example.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(example):
        kernel[(programs,)](*tensors, n * m, length, m, length * m, REVERSE=reverse, ACC=acc, **flags, **meta)


def forward(x: Tensor, reverse: bool, train: bool) -> tuple[Tensor, Tensor]:
    """x (n, L, m) contiguous -> (y, marks (n, ceil(L/16), m) int16, empty unless `train`)."""
    n, length, m = x.shape
    y = torch.empty_like(x)
    marks = x.new_empty((n, triton.cdiv(length, 16), m) if train else 0, dtype=torch.int16)
    _launch((_walk, _tree), (x, y, marks), x.shape, reverse, TRAIN=train)
    return y, marks


def backward(grad: Tensor, marks: Tensor, reverse: bool) -> Tensor:
    """Gradient of x from that of y (n, L, m), contiguous."""
    dx = torch.empty_like(grad)
    _launch((_walk_back, _tree_back), (grad, marks, dx), grad.shape, reverse)
    return dx
