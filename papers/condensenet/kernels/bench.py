"""condensed_conv: the five passes of the definition, torch.compile of them, and the Triton kernel; forward only.

python -m papers.condensenet.kernels.bench [--device cuda] [--quick]
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from common.metrics.kernel_time import compiled, copy_gb_per_s, main, times_ms
from common.runtime import select_device

from . import condensed_conv, reference

# (N, R, H, O, G, C): layers of the CIFAR networks at 32 px, then the last layer of the two ImageNet networks.
SHAPES = (
    (256, 16, 32, 32, 4, 4),
    (256, 120, 32, 32, 4, 4),
    (256, 768, 32, 128, 4, 4),
    (256, 1936, 7, 512, 4, 4),
    (256, 1936, 7, 512, 8, 8),
    (1, 1936, 7, 512, 8, 8),
)


def _inputs(shape: tuple, device: str, dtype: torch.dtype, layout: str) -> tuple:
    """Each group keeps R/C of the channels, sorted as after conversion: some are kept by several, others by none."""
    n, R, size, O, G, C = shape
    draw = partial(torch.randn, device=device)
    x = draw(n, R, size, size).to(dtype)
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    index = torch.cat([torch.randperm(R, device=device)[: R // C].sort().values for _ in range(G)])
    weight = (draw(O, R // C) / (R // C) ** 0.5).to(dtype)
    return x, index, draw(len(index)).abs(), draw(len(index)), weight, G


def _gate(name: str, op: Callable, inputs: tuple, exact: Tensor) -> None:
    """Raise unless the output agrees with the definition in float64."""
    tolerance = 1e-2 if inputs[0].dtype == torch.bfloat16 else 1e-4
    error = ((op(*inputs) - exact).abs().max() / exact.abs().max()).item()
    if not error <= tolerance:
        raise RuntimeError(f"{name} differs from the definition by {error:.1e}, expected at most {tolerance:.0e}")


@torch.no_grad()
def kernel_bench(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Rows {impl, dtype, layout, shape, ms, gb_per_s, of_copy, speedup over the eager definition}, gated first.

    GB/s counts what must move: every channel that some group keeps once, the weight, the output; `of_copy` divides it
    by what a large copy reaches on this device. Timings of a shape are interleaved. On the CPU there is no Triton row,
    the batch is N/16, and `quick` leaves torch.compile out. Float32 is float32 everywhere: TF32 is off.
    """
    cuda = select_device(device).type == "cuda"
    ceiling = copy_gb_per_s(device)
    rows = []
    for shape in SHAPES[:2] if quick else SHAPES:
        shape = shape if cuda else (max(1, shape[0] // 16), *shape[1:])
        for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
            for layout in ("nchw", "nhwc") if cuda and not quick else ("nchw",):
                inputs = _inputs(shape, device, dtype, layout)
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                    times = _times(inputs, device, quick)
                x, index, _, _, weight, _ = inputs
                n, _, h, w = x.shape
                elements = n * h * w * (len(index.unique()) + len(weight)) + weight.numel()
                for name, ms in times.items():
                    row = {"impl": name, "dtype": str(dtype)[6:], "layout": layout, "shape": shape, "ms": ms}
                    gb_per_s = elements * x.element_size() / ms / 1e6
                    row |= {"gb_per_s": gb_per_s, "of_copy": gb_per_s / ceiling, "speedup": times["eager"] / ms}
                    rows.append(row)
    return rows


def _times(inputs: tuple, device: str, quick: bool) -> dict[str, float]:
    """{impl: ms} for the implementations that this machine can run, correct ones only."""
    cuda = device == "cuda"
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    exact = reference(*wide)
    ops = {"eager": reference} | ({} if quick and not cuda else compiled(reference, *inputs))
    if cuda:
        ops["triton"] = partial(condensed_conv, impl="triton")
    for name, op in ops.items():
        _gate(name, op, inputs, exact)
    del wide, exact
    return times_ms({name: partial(op, *inputs) for name, op in ops.items()}, device, 1 if quick else 3)


def kernel_table(rows: list[dict]) -> str:
    head = f"{'N, R, H, O, G, C':26}{'dtype':10}{'layout':8}{'impl':10}"
    lines = [f"{head}{'ms':>9}{'GB/s':>9}{'of copy':>9}{'x eager':>9}"]
    for r in rows:
        head = f"{', '.join(map(str, r['shape'])):26}{r['dtype']:10}{r['layout']:8}{r['impl']:10}"
        lines.append(f"{head}{r['ms']:9.3f}{r['gb_per_s']:9.2f}{r['of_copy']:9.2f}{r['speedup']:9.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(kernel_bench, kernel_table, __doc__)
