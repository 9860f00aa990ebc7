"""mix_bypass_shuffle: definition, torch.compile of it, torch and Triton implementations, forward and backward.

Part of `make bench PAPER=pc_darts`; needs torch alone, like the kernels.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

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
    """Rows {impl, mode fwd|full, dtype, shape, ms, gb_per_s, speedup over the eager definition}, gated for correctness.

    GB/s counts what must move: every input and gradient once. Timings of a shape are interleaved.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r}: expected cpu, or cuda on a machine that has it")
    cuda = device == "cuda"
    rows = []
    for shape in SHAPES[:2] if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
            n, C, size, K, edges = shape
            inputs = _inputs(n if cuda else n // 16, C, size, K, edges, device, dtype)
            mixed, bypass, beta, grad, _ = inputs
            ops = {"reference": reference, "torch": partial(mix_bypass_shuffle, impl="torch")}
            if cuda:
                torch._dynamo.reset()
                ops["reference compiled"] = torch.compile(reference)
                ops["triton"] = partial(mix_bypass_shuffle, impl="triton")
            for name, op in ops.items():
                _gate(name, op, inputs, dtype)
            width = grad.numel() * grad.element_size()
            read = edges * width + width  # all inputs once, the node once; backward: all gradients, and bypass for beta
            for mode, moved in (("fwd", read), ("full", 2 * read + edges * width * (K - 1) // K)):
                call = _forward if mode == "fwd" else _gradients
                calls = {name: partial(call, op, mixed, bypass, beta, grad) for name, op in ops.items()}
                for name, ms in _interleaved(calls, cuda, 1 if quick else 3).items():
                    row = {"impl": name, "mode": mode, "dtype": str(dtype)[6:], "shape": shape, "ms": ms}
                    rows.append(row | {"gb_per_s": moved / ms / 1e6})
                base = next(r["ms"] for r in rows[-len(ops) :] if r["impl"] == "reference")
                for row in rows[-len(ops) :]:
                    row["speedup"] = base / row["ms"]
    return rows


@torch.no_grad()
def _forward(op: Callable, mixed: list, bypass: list, beta: Tensor, grad: Tensor) -> Tensor:
    return op(mixed, bypass, beta)


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
    lines = [f"{'N, C, H, K, edges':26}{'dtype':10}{'mode':6}{'impl':20}{'ms':>9}{'GB/s':>9}{'x eager':>9}"]
    for r in rows:
        head = f"{', '.join(map(str, r['shape'])):26}{r['dtype']:10}{r['mode']:6}{r['impl']:20}"
        lines.append(f"{head}{r['ms']:9.3f}{r['gb_per_s']:9.1f}{r['speedup']:9.2f}")
    return "\n".join(lines)
