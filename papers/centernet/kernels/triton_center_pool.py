"""Center pooling in Triton: both maps are read once, the result is written once; backward the gradient is read once.

Maps are (p, H, W, q), q = 1 for contiguous and q = C for channels_last ones. The columns' maxima come first, a program
walking down H with a row of the W q lanes; the second kernel finds a row's maximum, adds the column's and writes the
result. Backward one kernel adds the gradient up both ways, down its columns in strips that torch adds up: no atomics.
Comparisons and sums are in float32, in float64 for float64 maps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

STRIP = 16  # rows of the gradient that one program adds up: the partial sums are 1/16 of the map


@triton.jit
def _column_maxima(x, maxima, places, lanes, H, m, TRAIN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of p m, m = W q
    inside = lane < lanes
    at = lane // m * H * m + lane % m
    best = tl.full((BLOCK,), float("-inf"), ACC)
    place = tl.zeros((BLOCK,), tl.int32)
    start = 0
    while start < H:
        for k in tl.static_range(16):
            here = inside & (start + k < H)
            value = tl.load(x + at + k * m, here, float("-inf")).to(ACC)
            new = here & ((value >= best) | (value != value))
            best = tl.where(new, value, best)
            place = tl.where(new, start + k, place)
        at += 16 * m
        start += 16
    tl.store(maxima + lane, best.to(maxima.dtype.element_ty), inside)
    if TRAIN:
        tl.store(places + lane, place, inside)


@triton.jit
def _later_or_larger(value, place, other_value, other_place):
    other = (other_value > value) | (other_value != other_value) | ((other_value == value) & (other_place > place))
    return tl.where(other, other_value, value), tl.where(other, other_place, place)


@triton.jit
def _add_row_maxima(x, maxima, y, places, lanes, H, W, q, TRAIN: tl.constexpr, ACC: tl.constexpr,
                    LANES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)  # of p H q rows
    w = tl.arange(0, WIDTH)
    inside = (lane < lanes)[:, None] & (w < W)[None, :]
    line, c = lane // q, lane % q  # line: of p H
    at = (line * W * q + c)[:, None] + (w * q)[None, :]
    value = tl.load(x + at, inside, float("-inf")).to(ACC)
    w_or_none = tl.where(inside, tl.broadcast_to(w[None, :], (LANES, WIDTH)), -1)
    best, place = tl.reduce((value, w_or_none), 1, _later_or_larger)
    column = tl.load(maxima + (line // H * W * q + c)[:, None] + (w * q)[None, :], inside, 0.0).to(ACC)
    tl.store(y + at, (column + best[:, None]).to(y.dtype.element_ty), inside)
    if TRAIN:
        tl.store(places + lane, place, lane < lanes)


@triton.jit
def _sums(grad, down, across, H, W, q, strips, STRIP: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
          WIDTH: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    # one program: STRIP rows of CHANNELS of the q channels of one p
    blocks = tl.cdiv(q, CHANNELS)
    program = tl.program_id(0)
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    strip = program // blocks % strips
    p = (program // blocks // strips).to(tl.int64)
    w = tl.arange(0, WIDTH)
    flat = (w * q)[:, None] + c[None, :]
    here = (w < W)[:, None] & (c < q)[None, :]
    total = tl.zeros((WIDTH, CHANNELS), ACC)
    for start in tl.static_range(0, STRIP, ROWS):
        h = strip * STRIP + start + tl.arange(0, ROWS)
        line = p * H + h
        inside = (h < H)[:, None, None] & here[None, :, :]
        g = tl.load(grad + (line * W * q)[:, None, None] + flat[None, :, :], inside, 0.0).to(ACC)
        total += tl.sum(g, 0)
        row = tl.sum(g, 1)
        target = across + (line * q)[:, None] + c[None, :]
        tl.store(target, row.to(across.dtype.element_ty), (h < H)[:, None] & (c < q)[None, :])
    tl.store(down + (p * strips + strip) * W * q + flat, total, here)


def _acc(x: Tensor):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _check(x: Tensor) -> None:
    if not x.is_cuda and isinstance(_sums, triton.JITFunction):
        raise ValueError(f"impl='triton' on {x.device}, expected CUDA tensors; take impl='auto' or impl='torch'")
    if x[0].numel() >= 2**31 - 2**16:
        raise ValueError(f"maps of {tuple(x.shape[1:])}, expected fewer than 2^31 elements; use impl='torch'")


def forward(columns: Tensor, rows: Tensor, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last_row (p, 1, W, q), last_column (p, H, 1, q) int32, empty unless `train`); both maps contiguous."""
    _check(columns)
    p, h, w, q = columns.shape
    y, maxima = torch.empty_like(columns), columns.new_empty(p, 1, w, q)
    last_row, last_column = (
        columns.new_empty(shape if train else 0, dtype=torch.int32) for shape in ((p, 1, w, q), (p, h, 1, q))
    )
    width = triton.next_power_of_2(w)
    lanes = max(1, min(4096 // width, triton.next_power_of_2(p * h * q)))
    meta = {"TRAIN": train, "ACC": _acc(columns)}
    with torch.cuda.device_of(columns):
        _column_maxima[(triton.cdiv(maxima.numel(), 64),)](
            columns, maxima, last_row, maxima.numel(), h, w * q, BLOCK=64, num_warps=1, **meta
        )
        _add_row_maxima[(triton.cdiv(p * h * q, lanes),)](
            rows, maxima, y, last_column, p * h * q, h, w, q, LANES=lanes, WIDTH=width, num_warps=8, **meta
        )
    return y, last_row, last_column


def sums(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of grad (p, H, W, q), contiguous, down its columns (p, 1, W, q) and across its rows (p, H, 1, q)."""
    _check(grad)
    p, h, w, q = grad.shape
    strips, width = triton.cdiv(h, STRIP), triton.next_power_of_2(w)
    channels = max(1, min(16, 4096 // width, triton.next_power_of_2(q)))
    rows = max(1, min(STRIP, 4096 // (width * channels)))
    down = grad.new_empty(p, strips, w, q, dtype=torch.promote_types(grad.dtype, torch.float32))
    across = grad.new_empty(p, h, 1, q)
    with torch.cuda.device_of(grad):
        _sums[(p * strips * triton.cdiv(q, channels),)](
            grad, down, across, h, w, q, strips, STRIP=STRIP, ACC=_acc(grad), ROWS=rows, WIDTH=width,
            CHANNELS=channels, num_warps=8,
        )  # fmt: skip
    return down.sum(1, keepdim=True).to(grad.dtype), across
