"""The pools: through torch.cummax, torch.compile of that, as the official loop over rows, ours; forward, and with backward.

python -m papers.centernet.kernels.bench [--device cuda] [--quick]
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor

from common.metrics.kernel_time import compiled, copy_gb_per_s, main, times_ms
from common.runtime import select_device

from . import center_pool, corner_pool, reference
from .reference import AXIS, REVERSE

# (B, C, H, W): one image of 511 x 511 pixels, a small network's batch, a rank's batch of the paper.
SHAPES = ((1, 128, 128, 128), (8, 16, 32, 32), (6, 128, 128, 128))
OPS = (*AXIS, "center")


def cummax_pool(x: Tensor, direction: str) -> Tensor:
    """A corner pool through torch.cummax, on a flipped map where the scan runs backwards; ties go to the last one met."""
    axis = AXIS[direction]
    if REVERSE[direction]:
        return x.flip(axis).cummax(axis).values.flip(axis)
    return x.cummax(axis).values


class RowLoop(torch.autograd.Function):
    """A corner pool as the official extension runs it: a call for every row forward, and several for every row backward."""

    @staticmethod
    def forward(ctx, x: Tensor, direction: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.direction = direction
        y = x.clone()
        rows = y.unbind(AXIS[direction])[:: -1 if REVERSE[direction] else 1]
        for before, row in pairwise(rows):
            torch.maximum(before, row, out=row)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        axis, out = AXIS[ctx.direction], torch.zeros_like(x)
        order = range(x.shape[axis])[:: -1 if REVERSE[ctx.direction] else 1]
        best = x.narrow(axis, order[0], 1) if order else x
        place = torch.full_like(best, order[0] if order else 0, dtype=torch.int64)
        for i in order:
            row = x.narrow(axis, i, 1)
            new = row > best
            best, place = torch.where(new, row, best), torch.where(new, i, place)
            out.scatter_add_(axis, place, grad.narrow(axis, i, 1))
        return out, None


def _by_scans(corner: Callable, op: str, x: Tensor) -> Tensor:
    """An op from a corner pool: center pooling is four scans, as in the official code."""
    if op == "center":
        return corner(corner(x, "top"), "bottom") + corner(corner(x, "left"), "right")
    return corner(x, op)


def _ours(op: str, x: Tensor) -> Tensor:
    return center_pool(x, x) if op == "center" else corner_pool(x, op)


@torch.no_grad()
def _forward(call: Callable, x: Tensor, grad: Tensor) -> Tensor:
    return call(x)


def _training(call: Callable, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = call(leaf)
    return y, torch.autograd.grad(y, leaf, grad)[0]


def _drawn(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A map, and a gradient for it. No two values of a row or a column are alike: of equal maxima torch.cummax gives the
    gradient to the last, the others to the first. Up to 256 rows or columns the values and all sums are exact in bfloat16.
    """
    b, c, h, w = shape
    row, column = (torch.rand(b, c, max(h, w), device=device).argsort(2)[..., :side] for side in (h, w))
    x = (row[..., None] + column[:, :, None]) % max(h, w)
    return x.to(dtype), torch.randint(-1, 2, shape, device=device).to(dtype)


def kernel_bench(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Rows {op, impl, mode forward|training, dtype, shape, ms, gb_per_s, of_copy, over_cummax, over_row_loop}; values and
    gradients are compared with the definition first.

    GB/s counts what must move: forward a read and a write of the map, training twice that (center pooling: two maps are
    read, and two gradients written); `of_copy` divides it by what a large copy reaches on this device. over_*: how many
    times faster. Timings of an op and mode take turns. On the CPU there is no Triton row; `quick`: two shapes, without
    torch.compile.
    """
    device = select_device(device).type
    cuda, rows, ceiling = device == "cuda", [], copy_gb_per_s(device)
    dtypes = (torch.float32, torch.bfloat16) if cuda else (torch.float32,)
    for shape, dtype, op in product(SHAPES[:2] if quick else SHAPES, dtypes, OPS):
        x, grad = _drawn(shape, device, dtype)
        calls = {
            "cummax": partial(_by_scans, cummax_pool, op),
            "row_loop": partial(_by_scans, RowLoop.apply, op),
            "triton" if cuda else "torch": partial(_ours, op),
        }
        if not quick:
            calls |= compiled(calls["cummax"], x)  # not the loop: 32 rows take 13 s to compile
        expected = _training(partial(_by_scans, reference.corner_pool, op), x, grad)
        for name, call in calls.items():
            if not all(map(torch.equal, _training(call, x, grad), expected)):
                raise RuntimeError(f"{name} differs from the definition of {op}")
        maps = 3 if op == "center" else 2
        for mode, run, moved in (("forward", _forward, maps), ("training", _training, 2 * maps)):
            times = times_ms({name: partial(run, call, x, grad) for name, call in calls.items()}, device, 3, 0.05)
            for name, ms in times.items():
                gb_per_s = moved * x.numel() * x.element_size() / ms / 1e6
                row = {"op": op, "impl": name, "mode": mode, "dtype": str(dtype)[6:], "shape": shape, "ms": ms}
                row |= {"gb_per_s": gb_per_s, "of_copy": gb_per_s / ceiling}
                rows.append(row | {f"over_{base}": times[base] / ms for base in ("cummax", "row_loop")})
    return rows


def kernel_table(rows: list[dict]) -> str:
    head = f"{'B, C, H, W':20}{'dtype':10}{'op':8}{'mode':10}{'impl':10}"
    lines = [f"{head}{'ms':>9}{'GB/s':>9}{'of copy':>9}{'x cummax':>10}{'x row loop':>12}"]
    for r in rows:
        head = f"{', '.join(map(str, r['shape'])):20}{r['dtype']:10}{r['op']:8}{r['mode']:10}{r['impl']:10}"
        lines.append(
            f"{head}{r['ms']:9.3f}{r['gb_per_s']:9.2f}{r['of_copy']:9.2f}{r['over_cummax']:10.2f}{r['over_row_loop']:12.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(kernel_bench, kernel_table, __doc__)
