"""The pools: torch.cummax, the official loop over rows, torch.compile of the loop, and ours; forward, and with backward.

python -m papers.centernet.kernels.bench [--device cuda] [--quick]; needs torch alone, like the kernels.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import center_pool, corner_pool, reference
from .reference import AXIS, REVERSE

# (B, C, H, W): one image of 511 x 511 pixels, a rank's batch of the paper, a small network's batch.
SHAPES = ((1, 128, 128, 128), (6, 128, 128, 128), (8, 16, 32, 32))
POOLS = (*AXIS, "center")


def cummax_pool(x: Tensor, direction: str) -> Tensor:
    """A corner pool through torch.cummax, on a flipped map where the scan runs backwards; ties go to the last one met."""
    axis = AXIS[direction]
    if REVERSE[direction]:
        return x.flip(axis).cummax(axis).values.flip(axis)
    return x.cummax(axis).values


def loop_pool(x: Tensor, direction: str) -> Tensor:
    """A corner pool as the official extension runs it: one maximum a row, written into the result."""
    rows = x.clone().unbind(AXIS[direction])
    rows = list(rows[::-1] if REVERSE[direction] else rows)
    for i in range(1, len(rows)):
        rows[i] = torch.maximum(rows[i - 1], rows[i])
    return torch.stack(rows[::-1] if REVERSE[direction] else rows, AXIS[direction])


def _pool(corner: Callable, name: str, x: Tensor) -> Tensor:
    """`name` of POOLS from a corner pool; center pooling as four scans, as in the official code."""
    if name == "center":
        return corner(corner(x, "top"), "bottom") + corner(corner(x, "left"), "right")
    return corner(x, name)


def _ours(name: str, x: Tensor, impl: str = "auto") -> Tensor:
    return center_pool(x, x, impl) if name == "center" else corner_pool(x, name, impl)


def _gate(name: str, op: Callable, pool: str, x: Tensor) -> None:
    """Raise unless the output is that of the definition, bit for bit (compiled too: a maximum does not round)."""
    expected = reference.center_pool(x, x) if pool == "center" else reference.corner_pool(x, pool)
    if not torch.equal(op(x), expected):
        raise RuntimeError(f"{name} of {pool} pooling differs from the definition")


def kernel_bench(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Rows {pool, impl, mode forward|training, dtype, shape, ms, gb_per_s, of_copy, speedup over the loop}, gated first.

    GB/s counts what must move: forward a read and a write of the map, training twice that (center pooling reads two maps
    and writes two gradients); `of_copy` divides it by what a large copy reaches on this device. Timings of a pool and mode
    take turns. `quick`: the first shape, without torch.compile. On the CPU there is no Triton row. ValueError: no such device.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r}: expected cpu, or cuda on a machine that has it")
    cuda, rows = device == "cuda", []
    ceiling = _copy_bandwidth(device)
    for shape in SHAPES[:1] if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
            x = torch.randn(shape, device=device, dtype=dtype)
            for pool in POOLS:
                ops = {"loop": partial(_pool, loop_pool, pool), "cummax": partial(_pool, cummax_pool, pool)}
                ops["ours"] = partial(_ours, pool)
                if not quick:
                    ops |= _compiled(ops["loop"], x)
                for name, op in ops.items():
                    _gate(name, op, pool, x)
                maps = 3 if pool == "center" else 2
                for mode, moved in (("forward", maps), ("training", 2 * maps)):
                    calls = {name: partial(_step, op, x, mode == "training") for name, op in ops.items()}
                    times = _interleaved(calls, cuda, 3)
                    for name, ms in times.items():
                        gb_per_s = moved * x.numel() * x.element_size() / ms / 1e6
                        row = {"pool": pool, "impl": name, "mode": mode, "dtype": str(dtype)[6:], "shape": shape}
                        row |= {"ms": ms, "gb_per_s": gb_per_s, "of_copy": gb_per_s / ceiling}
                        rows.append(row | {"speedup": times["loop"] / ms})
    return rows


def _compiled(op: Callable, x: Tensor) -> dict[str, Callable]:
    torch._dynamo.reset()
    # named, or compiled code cached by a run of another number of threads is taken
    compiled = torch.compile(op, options={"cpp.threads": torch.get_num_threads()})
    try:
        compiled(x)
    except Exception as error:  # a machine without a C++ compiler; the bench must print the other rows
        print(f"compiled: left out, {type(error).__name__}: {str(error).splitlines()[0]}")
        return {}
    return {"compiled": compiled}


def _step(op: Callable, x: Tensor, training: bool) -> Tensor:
    if not training:
        with torch.inference_mode():
            return op(x)
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(op(leaf), leaf, x)[0]


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
                times[name].append(1e3 * timer.blocked_autorange(min_run_time=0.1).median)
    return {name: statistics.median(t) for name, t in times.items()}


def kernel_table(rows: list[dict]) -> str:
    lines = [
        f"{'B, C, H, W':20}{'dtype':10}{'pool':8}{'mode':10}{'impl':10}{'ms':>9}{'GB/s':>9}{'of copy':>9}{'x loop':>8}"
    ]
    for r in rows:
        head = f"{', '.join(map(str, r['shape'])):20}{r['dtype']:10}{r['pool']:8}{r['mode']:10}{r['impl']:10}"
        lines.append(f"{head}{r['ms']:9.3f}{r['gb_per_s']:9.2f}{r['of_copy']:9.2f}{r['speedup']:8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print(kernel_table(kernel_bench(args.device, args.quick)))
