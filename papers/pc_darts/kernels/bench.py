"""mix_bypass_shuffle: definition, torch.compile of it, torch and Triton implementations, forward and backward.

python -m papers.pc_darts.kernels.bench [--device cuda] [--quick]
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from common.metrics.kernel_time import compiled, copy_gb_per_s, main, times_ms
from common.runtime import select_device

from . import mix_bypass_shuffle, reference

# (N, C, H, K, edges): the cells of the CIFAR search at K=4 (batch 256 on a GPU, 16 on a CPU), then the ImageNet one.
SHAPES = ((256, 16, 32, 4, 2), (256, 16, 32, 4, 5), (256, 64, 8, 4, 5), (128, 16, 28, 2, 5), (256, 16, 32, 1, 5))


def _inputs(n: int, C: int, size: int, K: int, edges: int, device: str, dtype: torch.dtype) -> tuple:
    """As the cell makes them: mixtures laid out channel first, bypass channels read in place in the states."""
    c = C // K
    draw = partial(torch.randn, device=device, dtype=dtype)
    mixed = [draw(c, n, size, size).requires_grad_() for _ in range(edges)]
    states = [draw(n, C, size, size).requires_grad_() for _ in range(edges)]
    beta = torch.rand(edges, device=device).requires_grad_()
    grad = draw(n, C, size, size)
    return [m.transpose(0, 1) for m in mixed], [x[:, c:] for x in states], beta, grad, (*mixed, *states, beta)


def _gradients(op: Callable, mixed: list, bypass: list, beta: Tensor, grad: Tensor) -> list[Tensor]:
    out = op(mixed, bypass, beta)
    leaves = [*mixed, *(b for b in bypass if b.shape[1]), beta]
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    return [out, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))]


def _gate(name: str, op: Callable, inputs: tuple, dtype: torch.dtype) -> None:
    """Raise unless output and every gradient agree with the definition."""
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    got, expected = (_gradients(f, *inputs[:4]) for f in (op, reference))
    for a, b in zip(got, expected, strict=True):
        error = (a.double() - b.double()).abs().max().item() / (b.double().abs().max().item() + 1e-12)
        if not error <= tolerance:
            raise RuntimeError(f"{name} differs from the definition by {error:.1e}, expected at most {tolerance:.0e}")


def kernel_bench(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Rows {impl, mode forward|training, dtype, shape, ms, gb_per_s, of_copy, speedup over the eager definition}, gated first.

    GB/s counts what must move: every input and gradient once; `of_copy` divides it by what a large copy reaches on this
    device. Timings of a shape take turns. On the CPU the batch is N/16 and there is no Triton row; `quick`: two shapes,
    without torch.compile.
    """
    cuda, rows = select_device(device).type == "cuda", []
    ceiling = copy_gb_per_s(device)
    for shape in SHAPES[:2] if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
            n, C, size, K, edges = shape
            inputs = _inputs(n if cuda else n // 16, C, size, K, edges, device, dtype)
            mixed, bypass, beta, grad, _ = inputs
            ops = {"eager": reference, "torch": partial(mix_bypass_shuffle, impl="torch")}
            ops |= {} if quick else compiled(reference, mixed, bypass, beta)
            if cuda:
                ops["triton"] = partial(mix_bypass_shuffle, impl="triton")
            for name, op in ops.items():
                _gate(name, op, inputs, dtype)
            width = grad.numel() * grad.element_size()
            read = edges * width + width  # all inputs once, the node once; backward: all gradients, and bypass for beta
            moves = {"forward": read, "training": 2 * read + edges * width * (K - 1) // K}
            for mode, call in (("forward", _forward), ("training", _gradients)):
                calls = {name: partial(call, op, mixed, bypass, beta, grad) for name, op in ops.items()}
                times = times_ms(calls, device, 1 if quick else 3)
                for name, ms in times.items():
                    row = {"impl": name, "mode": mode, "dtype": str(dtype)[6:], "shape": shape, "ms": ms}
                    gb_per_s = moves[mode] / ms / 1e6
                    row |= {"gb_per_s": gb_per_s, "of_copy": gb_per_s / ceiling, "speedup": times["eager"] / ms}
                    rows.append(row)
    return rows


@torch.no_grad()
def _forward(op: Callable, mixed: list, bypass: list, beta: Tensor, grad: Tensor) -> Tensor:
    return op(mixed, bypass, beta)


def kernel_table(rows: list[dict]) -> str:
    head = f"{'N, C, H, K, edges':26}{'dtype':10}{'mode':10}{'impl':10}"
    lines = [f"{head}{'ms':>9}{'GB/s':>9}{'of copy':>9}{'x eager':>9}"]
    for r in rows:
        head = f"{', '.join(map(str, r['shape'])):26}{r['dtype']:10}{r['mode']:10}{r['impl']:10}"
        lines.append(f"{head}{r['ms']:9.3f}{r['gb_per_s']:9.1f}{r['of_copy']:9.2f}{r['speedup']:9.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(kernel_bench, kernel_table, __doc__)
