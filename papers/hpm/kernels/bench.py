"""pyramid_pool: bin by bin in slices, adaptive pools, torch.compile of them, the one-pass torch form, and Triton.

python -m papers.hpm.kernels.bench [--device cuda] [--quick]
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from common.metrics.kernel_time import compiled, copy_gb_per_s, main, times_ms
from common.runtime import select_device

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


@torch.no_grad()
def _forward(op: Callable, x: Tensor, grad: Tensor) -> Tensor:
    return op(x)


def _training(op: Callable, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    out = op(x)
    return out, torch.autograd.grad(out, x, grad)[0]


def _drawn(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    """A map without two equal values in a channel, or all would have to agree on the first of them; in bfloat16 too, which
    has every multiple of 1/64 up to 4.
    """
    n, c, h, w = shape
    ranks = torch.rand(n, c, h * w, device=device).argsort(2)
    return ((ranks - h * w // 2) / 64).view(shape).to(dtype).requires_grad_()


def _gate(name: str, op: Callable, x: Tensor, grad: Tensor) -> None:
    """Raise unless output and gradient agree with the definition."""
    tolerance = 1e-2 if x.dtype == torch.bfloat16 else 1e-4
    for a, b in zip(_training(op, x, grad), _training(adaptive, x, grad), strict=True):
        error = (a.double() - b.double()).abs().max().item() / b.double().abs().max().item()
        if not error <= tolerance:
            raise RuntimeError(f"{name} differs from the definition by {error:.1e}, expected at most {tolerance:.0e}")


def kernel_bench(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Rows {impl, mode forward|training, dtype, shape, ms, gb_per_s, of_copy, over_slices}, gated for correctness.

    GB/s counts what must move: the map once, in training the map's gradient once more; `of_copy` divides it by what a large
    copy reaches here, over_slices: how many times faster. Timings of a shape take turns. On the CPU the batch is N/4 and there
    is no Triton row; `quick`: the first shape, without torch.compile.
    """
    device = select_device(device).type
    cuda, rows, ceiling = device == "cuda", [], copy_gb_per_s(device)
    dtypes = (torch.float32, torch.bfloat16) if cuda else (torch.float32,)
    for (n, *size), dtype in product(SHAPES[:1] if quick else SHAPES, dtypes):
        torch.manual_seed(0)
        x = _drawn((n if cuda else n // 4, *size), device, dtype)
        grad = torch.randn(sum(SCALES), *x.shape[:2], device=device).to(dtype)
        ops = {"slices": slices, "adaptive": adaptive, "torch": partial(pyramid_pool, impl="torch")}
        if cuda:
            ops["triton"] = partial(pyramid_pool, impl="triton")
        if not quick:
            ops |= compiled(adaptive, x)
        for name, op in ops.items():
            _gate(name, op, x, grad)
        for mode, run, moved in (("forward", _forward, 1), ("training", _training, 2)):
            times = times_ms({name: partial(run, op, x, grad) for name, op in ops.items()}, device)
            for name, ms in times.items():
                gb_per_s = moved * x.numel() * x.element_size() / ms / 1e6
                row = {"impl": name, "mode": mode, "dtype": str(dtype)[6:], "shape": tuple(x.shape), "ms": ms}
                row |= {"gb_per_s": gb_per_s, "of_copy": gb_per_s / ceiling, "over_slices": times["slices"] / ms}
                rows.append(row)
    return rows


def kernel_table(rows: list[dict]) -> str:
    lines = [f"{'N, C, H, W':20}{'dtype':10}{'mode':10}{'impl':10}{'ms':>9}{'GB/s':>9}{'of copy':>9}{'x slices':>10}"]
    for r in rows:
        head = f"{', '.join(map(str, r['shape'])):20}{r['dtype']:10}{r['mode']:10}{r['impl']:10}"
        lines.append(f"{head}{r['ms']:9.3f}{r['gb_per_s']:9.2f}{r['of_copy']:9.2f}{r['over_slices']:10.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(kernel_bench, kernel_table, __doc__)
