"""Both poolings in plain torch, made for the CPU: few calls, each on what a cache holds, and no scatter of every element.

Maps come in the order of their memory. A corner pool scans axis 1 of (n, L, m): for the columns of a contiguous map
m = W, for its rows m = 1. For the backward pass it keeps its own output and nothing else: the scan stays at one value
as long as one position holds the maximum, so equal neighbours have the same source. Center pooling takes (p, H, W, q),
q = 1 for contiguous and q = C for channels_last maps, and keeps one place for every column and row.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 2**20  # elements of a map that a thread works on at a time; half of that where there are twice the buffers
BLOCK = 16


def corner_pool(x: Tensor, reverse: bool) -> Tensor:
    """Running maximum along axis 1 of x (n, L, m), from the end if `reverse`."""
    y = torch.empty_like(x)
    for source, target in zip(_chunks(x, CHUNK), _chunks(y, CHUNK), strict=True):
        if _has_long_rows(x):
            _scan_rows(target.copy_(source), reverse)
        else:
            _scan_doubling(source, target, reverse)
    return y


def corner_pool_backward(grad: Tensor, y: Tensor, reverse: bool) -> Tensor:
    """Gradient of x (n, L, m) from that of y, summed in float32 at least; one that is not finite may spread."""
    dx, dtype = torch.empty_like(y), torch.promote_types(y.dtype, torch.float32)
    for g, maxima, target in zip(*(_chunks(t, CHUNK // 2) for t in (grad, y, dx)), strict=True):
        total = target if dtype == y.dtype else torch.empty_like(target, dtype=dtype)
        if _has_long_rows(y):
            _sum_rows(total.copy_(g), maxima, reverse)
        else:
            _sum_doubling(g.to(dtype), total, maxima, reverse)
        later = _part(total, 1, y.shape[1], reverse)  # only a position that raised the maximum is the source of its own
        later.mul_(torch.ne(*_pairs(maxima, 1, reverse), out=torch.empty_like(later)))
        if total is not target:
            target.copy_(total)
    return dx


def center_pool(columns: Tensor, rows: Tensor, places: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y (p, H, W, q); if `places`, the last row that holds a column's maximum (p, 1, W, q) and the last column that
    holds a row's (p, H, 1, q), both int32, else two empty tensors)."""
    if places:
        (column, last_row), (row, last_column) = _last_maximum(columns, 1), _last_maximum(rows, 2)
    else:
        column, row = columns.amax(1, keepdim=True), rows.amax(2, keepdim=True)
        last_row, last_column = (row.new_empty(0, dtype=torch.int32) for _ in range(2))
    return column + row, last_row, last_column


def spread(grad: Tensor, down: Tensor, across: Tensor, last_row: Tensor, last_column: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of columns and rows from the sums of grad (p, H, W, q) down its columns (p, 1, W, q) and across its rows
    (p, H, 1, q): the sum at the place of the maximum, zero elsewhere."""
    d_columns, d_rows = torch.zeros_like(grad), torch.zeros_like(grad)
    return d_columns.scatter_(1, last_row.long(), down), d_rows.scatter_(2, last_column.long(), across)


def _chunks(x: Tensor, elements: int) -> tuple[Tensor, ...]:
    return x.split(max(1, elements * torch.get_num_threads() // x[0].numel()))


def _has_long_rows(x: Tensor) -> bool:
    """Whether the m elements of a position are enough to be vectorised, so that positions may be taken one by one."""
    return x.shape[2] >= BLOCK


def _part(x: Tensor, start: int, count: int, reverse: bool) -> Tensor:
    """Positions start, start + 1, ... of the scan."""
    length, stop = x.shape[1], min(x.shape[1], start + count)
    return x[:, length - stop : length - start] if reverse else x[:, start:stop]


def _pairs(x: Tensor, distance: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """(earlier, later): the positions of the scan that have another one `distance` later, and those others."""
    count = x.shape[1] - distance
    return _part(x, 0, count, reverse), _part(x, distance, count, reverse)


def _in_order(rows: tuple[Tensor, ...], reverse: bool) -> tuple[Tensor, ...]:
    return rows[::-1] if reverse else rows


def _walk(rows: tuple[Tensor, ...]) -> None:
    for before, row in pairwise(rows):
        torch.maximum(before, row, out=row)


def _scan_rows(y: Tensor, reverse: bool) -> None:
    """In place. A long scan is cut: inside all blocks at once, along the blocks' maxima, these into the blocks behind."""
    length = y.shape[1]
    whole = length // BLOCK * BLOCK if length >= 4 * BLOCK else 0
    if whole:
        blocks = _part(y, 0, whole, reverse).unflatten(1, (-1, BLOCK))
        inside = _in_order(blocks.unbind(2), reverse)
        _walk(inside)
        _walk(_in_order(inside[-1].unbind(1), reverse))
        before, behind = _pairs(blocks, 1, reverse)
        last, others = (slice(1), slice(1, None)) if reverse else (slice(-1, None), slice(-1))
        torch.maximum(behind[:, :, others], before[:, :, last], out=behind[:, :, others])
    _walk(_in_order(y.unbind(1), reverse)[max(0, whole - 1) :])


def _sum_rows(total: Tensor, y: Tensor, reverse: bool) -> None:
    """In place: to every position's gradient the sum at the next one is added, if both have the same maximum."""
    same = torch.eq(*_pairs(y, 1, reverse), out=torch.empty_like(total[:, 1:]))
    rows, same = _in_order(total.unbind(1), reverse), _in_order(same.unbind(1), reverse)
    for i in reversed(range(len(same))):
        rows[i].addcmul_(same[i], rows[i + 1])


def _double(x: Tensor, y: Tensor, reverse: bool, join: Callable) -> None:
    """y = x joined over the last BLOCK positions of the scan: in every step each joins what it has with what the one
    1, 2, 4, ... before it has. Shifts go over the memory as a whole, which is fastest; what crosses from one scan into
    the next is overwritten. join(before, here, out, distance)."""
    spare = torch.empty_like(y)
    steps = min((x.shape[1] - 1).bit_length(), (BLOCK - 1).bit_length())
    if not steps:
        y.copy_(x)
    for step in range(steps):
        distance, target = 2**step, y if (steps - step) % 2 else spare  # the last step writes y
        join(*_shifted(x, distance, reverse), _shifted(target, distance, reverse)[1], distance)
        _part(target, 0, distance, reverse).copy_(_part(x, 0, distance, reverse))
        x = target


def _shifted(x: Tensor, distance: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """`_pairs`, flat."""
    flat, shift = x.view(-1), distance * x.shape[2]
    return (flat[shift:], flat[:-shift]) if reverse else (flat[:-shift], flat[shift:])


def _scan_doubling(x: Tensor, y: Tensor, reverse: bool) -> None:
    """y = running maximum of x: over 16 positions by doubling, from there on block by block."""
    _double(x, y, reverse, lambda before, here, out, _: torch.maximum(before, here, out=out))
    for start in range(BLOCK, y.shape[1], BLOCK):
        block = _part(y, start, BLOCK, reverse)
        torch.maximum(block, _part(y, start - 1, 1, reverse), out=block)


def _sum_doubling(grad: Tensor, total: Tensor, y: Tensor, reverse: bool) -> None:
    """What `_sum_rows` gives: a scan from the other end, in which positions join if they have the same maximum."""
    same, back = torch.empty_like(total).view(-1), not reverse

    def join(before: Tensor, here: Tensor, out: Tensor, distance: int) -> None:
        torch.addcmul(here, torch.eq(*_shifted(y, distance, back), out=same[: len(out)]), before, out=out)

    _double(grad, total, back, join)
    for start in range(BLOCK, y.shape[1], BLOCK):
        count = min(BLOCK, y.shape[1] - start)
        here, before = (_part(total, at, count, back) for at in (start, start - BLOCK))
        maxima = (_part(y, at, count, back) for at in (start, start - BLOCK))
        here.addcmul_(torch.eq(*maxima, out=torch.empty_like(here)), before)


def _last_maximum(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The maximum along an axis of x and the last place that holds it, both with that axis kept at size 1."""
    place = torch.arange(x.shape[axis], dtype=torch.float32, device=x.device).view([-1] + [1] * (3 - axis))
    maxima, places = [], []
    for part in _chunks(x, CHUNK):
        maxima.append(part.amax(axis, keepdim=True))
        holds = torch.eq(part, maxima[-1], out=torch.empty_like(part, dtype=torch.float32))
        places.append(holds.mul_(place).amax(axis, keepdim=True))
    return torch.cat(maxima), torch.cat(places).int()
