"""pyramid_pool: bin by bin in slices, adaptive pools, torch.compile of them, the one-pass torch form, and Triton.

python -m papers.hpm.kernels.bench [--device cuda] [--quick]; needs torch alone, like the kernels.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import pyramid_pool, reference

SHAPES = ((64, 2048, 24, 8), (64, 2048, 16, 8), (64, 64, 16, 6))  # 384 x 128 and 256 x 128 images; the quick tier's
SCALES = (1, 2, 4, 8)


def slices(x: Tensor) -> Tensor:
    """The naive loop: 15 slices, two pools each, as the method is told."""
    bins = []
    for scale in SCALES:
        for stripe in x.chunk(scale, 2):
            size = stripe.shape[2:]
            bins.append((F.avg_pool2d(stripe, size) + F.max_pool2d(stripe, size))[..., 0, 0])
    return torch.stack(bins)


def adaptive(x: Tensor) -> Tensor:
    return reference(x, SCALES)


def _gradients(op: Callable, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    out = op(x)
    return out, torch.autograd.grad(out, x, grad)[0]


@torch.no_grad()
def _forward(op: Callable, x: Tensor, grad: Tensor) -> Tensor:
    return op(x)


def _gate(name: str, op: Callable, x: Tensor, grad: Tensor) -> None:
    """Raise unless output and gradient agree with the definition."""
    tolerance = 1e-2 if x.dtype == torch.bfloat16 else 1e-4
    for a, b in zip(_gradients(op, x, grad), _gradients(adaptive, x, grad), strict=True):
        error = (a.double() - b.double()).abs().max().item() / b.double().abs().max().item()
        if not error <= tolerance:
            raise RuntimeError(f"{name} differs from the definition by {error:.1e}, expected at most {tolerance:.0e}")


def kernel_bench(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Rows {impl, mode fwd|full, dtype, shape, ms, gb_per_s, of_copy, speedup over the slices}, gated for correctness.

    GB/s counts what must move: the map once, with the gradient (full) the map's gradient once more; `of_copy` divides it by
    what a large copy reaches here. Timings of a shape are interleaved. On the CPU the batch is N/4 and there is no Triton row.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r}: expected cpu, or cuda on a machine that has it")
    cuda, rows, ceiling = device == "cuda", [], _copy_bandwidth(device, quick)
    for n, *size in SHAPES[:1] if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
            torch.manual_seed(0)
            # no two values alike, in bfloat16 too, or "the first" would have to be agreed on
            x = torch.randn(n if cuda else n // 4, *size, device=device).to(dtype).requires_grad_()
            grad = torch.randn(sum(SCALES), *x.shape[:2], device=device).to(dtype)
            ops = {"slices": slices, "adaptive": adaptive, "torch": partial(pyramid_pool, scales=SCALES, impl="torch")}
            if cuda:
                torch._dynamo.reset()
                ops["adaptive compiled"] = torch.compile(adaptive)
                ops["triton"] = partial(pyramid_pool, scales=SCALES, impl="triton")
            for name, op in ops.items():
                if dtype == torch.float32:
                    _gate(name, op, x, grad)
            for mode, call, moved in (("fwd", _forward, 1), ("full", _gradients, 2)):
                times = _interleaved({name: partial(call, op, x, grad) for name, op in ops.items()}, cuda, 3)
                for name, ms in times.items():
                    gb_per_s = moved * x.numel() * x.element_size() / ms / 1e6
                    row = {"impl": name, "mode": mode, "dtype": str(dtype)[6:], "shape": tuple(x.shape), "ms": ms}
                    row |= {"gb_per_s": gb_per_s, "of_copy": gb_per_s / ceiling, "speedup": times["slices"] / ms}
                    rows.append(row)
    return rows


def _copy_bandwidth(device: str, quick: bool) -> float:
    """GB/s of copying a tensor larger than the caches, bytes read and written both counted."""
    source = torch.empty(2**27 if device == "cuda" else 2**22 if quick else 2**25, device=device).zero_()
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
    lines = [f"{'N, C, H, W':20}{'dtype':10}{'mode':6}{'impl':19}{'ms':>9}{'GB/s':>9}{'of copy':>9}{'x slices':>10}"]
    for r in rows:
        head = f"{', '.join(map(str, r['shape'])):20}{r['dtype']:10}{r['mode']:6}{r['impl']:19}"
        lines.append(f"{head}{r['ms']:9.3f}{r['gb_per_s']:9.2f}{r['of_copy']:9.2f}{r['speedup']:10.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print(kernel_table(kernel_bench(args.device, args.quick)))
