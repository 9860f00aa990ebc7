"""mix_bypass_shuffle: the torch implementation against the definition, and the interpreter run of the Triton one."""

from pathlib import Path

import pytest
import torch

from papers.pc_darts.kernels import mix_bypass_shuffle, reference
from papers.pc_darts.kernels.bench import kernel_bench


def inputs(n, c, K, h, w, edges, dtype=torch.float64):
    """Channel slices of wider maps, as the cell has them; (mixed, bypass, beta, leaves)."""
    ys = [torch.randn(n, 3, c, h, w, dtype=dtype).requires_grad_() for _ in range(edges)]
    xs = [torch.randn(n, K * c, h, w, dtype=dtype).requires_grad_() for _ in range(edges)]
    beta = torch.rand(edges, dtype=dtype).requires_grad_()
    return [y[:, 1] for y in ys], [x[:, c:] for x in xs], beta, (*ys, *xs, beta)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 7, 3), (1, 1, 2, 1, 1, 1), (2, 2, 1, 3, 3, 2), (0, 2, 4, 3, 3, 2)])
def test_torch_equals_the_definition(shape):
    torch.manual_seed(0)
    mixed, bypass, beta, leaves = inputs(*shape)
    found = []
    for op in (mix_bypass_shuffle, reference):
        out = op(mixed, bypass, beta)
        grads = torch.autograd.grad(out.sin().sum(), leaves, materialize_grads=True, allow_unused=True)
        found.append((out, *grads))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_definition_by_loops():
    torch.manual_seed(0)
    n, c, K, edges = 2, 3, 4, 2
    mixed, bypass, beta, _ = inputs(n, c, K, 2, 2, edges)
    out = mix_bypass_shuffle(mixed, bypass, beta)
    for channel in range(K * c):
        i, k = divmod(channel, K)
        total = sum(mixed[s][:, i] if k == 0 else beta[s] * bypass[s][:, (k - 1) * c + i] for s in range(edges))
        assert torch.allclose(out[:, channel], total, rtol=1e-14)


def test_gradcheck():
    torch.manual_seed(0)
    mixed, bypass, beta, _ = inputs(2, 2, 3, 2, 1, 2)
    leaves = [t.detach().requires_grad_() for t in (*mixed, *bypass, beta)]
    assert torch.autograd.gradcheck(lambda *t: mix_bypass_shuffle(list(t[:2]), list(t[2:4]), t[4]), leaves)


def test_half_precision_is_summed_in_float32():
    torch.manual_seed(0)
    mixed, bypass, beta, _ = inputs(2, 4, 4, 8, 8, 5, torch.bfloat16)
    out = mix_bypass_shuffle(mixed, bypass, beta.float())
    exact = reference([m.double() for m in mixed], [b.double() for b in bypass], beta.double())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.to(torch.bfloat16)) or (out - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_bad_inputs():
    mixed, bypass, beta, _ = inputs(2, 2, 2, 3, 3, 2)
    for args, message in (
        ((mixed, bypass[:1], beta), "2 mixed and 1 bypass"),
        ((mixed, bypass, beta[:1]), "beta"),
        (([], [], beta[:0]), "0 mixed"),
        ((mixed, [b[:, :1] for b in bypass], beta), "1 bypass channels beside 2"),
        ((mixed, [bypass[0], bypass[1][:, :, :2]], beta), "an edge has"),
        ((mixed, [bypass[0], bypass[1].float()], beta), "an edge has"),
    ):
        with pytest.raises(ValueError, match=message):
            mix_bypass_shuffle(*args)
    with pytest.raises(ValueError, match="unknown impl 'cuda'"):
        mix_bypass_shuffle(mixed, bypass, beta, impl="cuda")


def test_bench_rows(monkeypatch):
    monkeypatch.setattr("papers.pc_darts.kernels.bench.SHAPES", ((16, 4, 4, 2, 2), (16, 4, 4, 1, 2)))
    rows = kernel_bench("cpu", quick=True)
    assert {row["impl"] for row in rows} == {"eager", "torch"}
    assert all(row["ms"] > 0 and row["gb_per_s"] > 0 and row["of_copy"] > 0 and row["speedup"] > 0 for row in rows)


def test_triton_under_the_interpreter(passes_under_the_interpreter):
    """In a process of its own: TRITON_INTERPRET is read when a kernel is decorated."""
    passes_under_the_interpreter(Path(__file__).with_name("test_kernels_interpret.py"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_triton_compiles_for_a_gpu(dtype):
    """The interpreter does not check types as the compiler does; compiling needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from papers.pc_darts.kernels import triton_mix_bypass_shuffle as module

    edges, acc = 3, "fp64" if dtype == "fp64" else "fp32"
    pointer, pointers, strides = f"*{dtype}", (f"*{dtype}",) * edges, ("i64",) * (2 * edges)
    ins = {"bypass": pointers, "bypass_stride": strides, "beta": f"*{acc}"}
    sizes = {"c": "i32", "pixels": "i32", **dict.fromkeys(("K", "S", "ACC", "BLOCK"), "constexpr")}
    for kernel, signature in (
        (module._forward, {"mixed": pointers, "mixed_stride": strides, **ins, "out": pointer, **sizes}),
        (
            module._backward,
            {"grad": pointer, **ins, "d_mixed": pointer, "d_bypass": pointers, "partial": f"*{acc}", **sizes},
        ),
    ):
        constants = {"K": 4, "S": edges, "ACC": getattr(triton.language, f"float{acc[2:]}"), "BLOCK": 1024}
        constants = {(list(signature).index(name),): value for name, value in constants.items()}
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]
