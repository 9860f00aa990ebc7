"""The pools: through torch.cummax, as the official loop over rows, torch.compile of that, ours; forward, and with backward.

python -m papers.centernet.kernels.bench [--device cuda] [--quick]; needs torch alone, like the kernels.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

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
        rows = _in_order(y, direction)
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


def _in_order(x: Tensor, direction: str) -> tuple[Tensor, ...]:
    """The rows of x in the order of the scan."""
    return x.unbind(AXIS[direction])[:: -1 if REVERSE[direction] else 1]


def compiled_loop(x: Tensor, direction: str) -> Tensor:
    """The loop in plain torch, for torch.compile."""
    rows = list(_in_order(x, direction))
    for i in range(1, len(rows)):
        rows[i] = torch.maximum(rows[i - 1], rows[i])
    return torch.stack(rows[:: -1 if REVERSE[direction] else 1], AXIS[direction])


def _by_scans(corner: Callable, op: str, x: Tensor) -> Tensor:
    """An op from a corner pool: center pooling is four scans, as in the official code."""
    if op == "center":
        return corner(corner(x, "top"), "bottom") + corner(corner(x, "left"), "right")
    return corner(x, op)


def _ours(op: str, impl: str, x: Tensor) -> Tensor:
    return center_pool(x, x, impl) if op == "center" else corner_pool(x, op, impl)


def kernel_bench(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Rows {op, impl, mode forward|training, dtype, shape, ms, gb_per_s, of_copy, over_cummax, over_row_loop}, gated first.

    GB/s counts what must move: forward a read and a write of the map, training twice that (center pooling: two maps are
    read, and two gradients written); `of_copy` divides it by what a large copy reaches on this device. over_*: how many
    times faster. Timings of an op and mode take turns. On the CPU there is no Triton row; `quick`: two shapes, without
    torch.compile. ValueError: no such device.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r}: expected cpu, or cuda on a machine that has it")
    cuda, rows = device == "cuda", []
    ceiling = _copy_bandwidth(device)
    for shape in SHAPES[:2] if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
            x = torch.randn(shape, device=device, dtype=dtype)
            for op in OPS:
                calls = {"cummax": partial(_by_scans, lambda x, d: cummax_pool(x, d), op)}
                calls["row loop"] = partial(_by_scans, RowLoop.apply, op)
                calls["triton" if cuda else "torch"] = partial(_ours, op, "auto")
                if not quick:
                    calls |= _compiled(partial(_by_scans, compiled_loop, op), x)
                expected = _by_scans(reference.corner_pool, op, x)
                for name, call in calls.items():
                    if not torch.equal(call(x), expected):  # a maximum does not round
                        raise RuntimeError(f"{name} differs from the definition of {op}")
                maps = 3 if op == "center" else 2
                for mode, moved in (("forward", maps), ("training", 2 * maps)):
                    steps = {name: partial(_step, call, x, mode == "training") for name, call in calls.items()}
                    times = _interleaved(steps, cuda, 3)
                    for name, ms in times.items():
                        gb_per_s = moved * x.numel() * x.element_size() / ms / 1e6
                        row = {"op": op, "impl": name, "mode": mode, "dtype": str(dtype)[6:], "shape": shape}
                        row |= {"ms": ms, "gb_per_s": gb_per_s, "of_copy": gb_per_s / ceiling}
                        rows.append(
                            row | {"over_cummax": times["cummax"] / ms, "over_row_loop": times["row loop"] / ms}
                        )
    return rows


def _compiled(call: Callable, x: Tensor) -> dict[str, Callable]:
    torch._dynamo.reset()
    # named, or compiled code cached by a run of another number of threads is taken
    compiled = torch.compile(call, options={"cpp.threads": torch.get_num_threads()})
    try:
        compiled(x)
    except Exception as error:  # a machine without a C++ compiler; the bench must print the other rows
        print(f"compiled: left out, {type(error).__name__}: {str(error).splitlines()[0]}")
        return {}
    return {"compiled": compiled}


def _step(call: Callable, x: Tensor, training: bool) -> Tensor:
    if not training:
        with torch.no_grad():
            return call(x)
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(call(leaf), leaf, x)[0]


def _copy_bandwidth(device: str) -> float:
    """GB/s of copying a tensor far larger than the caches, bytes read and written both counted."""
    source = torch.empty(2**27 if device == "cuda" else 2**24, device=device).zero_()
    target = torch.empty_like(source)
    ms = _interleaved({"copy": lambda: target.copy_(source)}, device == "cuda", 3)["copy"]
    return 2 * source.numel() * source.element_size() / ms / 1e6


def _interleaved(calls: dict[str, Callable], cuda: bool, rounds: int) -> dict[str, float]:
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if cuda:
                from triton.testing import do_bench

                times[name].append(do_bench(call, return_mode="median"))
            else:
                from torch.utils.benchmark import Timer

                timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
                times[name].append(1e3 * timer.blocked_autorange(min_run_time=0.05).median)
    return {name: statistics.median(t) for name, t in times.items()}


def table(rows: list[dict]) -> str:
    head = f"{'B, C, H, W':20}{'dtype':10}{'op':8}{'mode':10}{'impl':10}"
    lines = [f"{head}{'ms':>9}{'GB/s':>9}{'of copy':>9}{'x cummax':>10}{'x row loop':>12}"]
    for r in rows:
        head = f"{', '.join(map(str, r['shape'])):20}{r['dtype']:10}{r['op']:8}{r['mode']:10}{r['impl']:10}"
        lines.append(
            f"{head}{r['ms']:9.3f}{r['gb_per_s']:9.2f}{r['of_copy']:9.2f}{r['over_cummax']:10.2f}{r['over_row_loop']:12.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print(table(kernel_bench(args.device, args.quick)))
