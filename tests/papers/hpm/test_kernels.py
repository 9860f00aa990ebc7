"""pyramid_pool: against the adaptive pools and against slices, ties included; the interpreter run of the Triton kernel."""

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from papers.hpm.kernels import bench as pooling_bench
from papers.hpm.kernels import pyramid_pool, reference
from papers.hpm.kernels.bench import kernel_bench, kernel_table

SCALES = [(1, 2, 4, 8), (1, 2, 4), (8,), (1,), (1, 2, 3, 6), (2, 8)]
POOLS = ["avg+max", "avg", "max"]


def gradients(op, x, *args):
    """(pooled, gradient of a weighted sum of it)."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = op(x, *args)
    weight = torch.linspace(0.5, 2, max(out.numel(), 1), dtype=out.dtype)[: out.numel()].view(out.shape)
    return out, torch.autograd.grad((out * weight).sum(), x)[0]


def tied(n, c, h, w, dtype=torch.float64):
    """Whole numbers of a small range, with rows of zeros as ReLU and erasing leave them: every bin has ties."""
    x = torch.randint(0, 3, (n, c, h, w), dtype=dtype)
    x[:, :, h // 2 : h // 2 + 3] = 0
    return x


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("draw", [torch.randn, tied])
def test_torch_equals_the_adaptive_pools(scales, pool, draw):
    """Forward and backward, in both memory formats; with ties the gradient goes to the first, as theirs does."""
    torch.manual_seed(0)
    plain = draw(2, 5, 24, 3).double()
    last = plain.contiguous(memory_format=torch.channels_last)
    for x in (plain, last, plain.transpose(2, 3).contiguous().transpose(2, 3)):
        (a, da), (b, db) = (gradients(op, x, scales, pool) for op in (pyramid_pool, reference))
        assert a.shape == b.shape == (sum(scales), 2, 5)
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        assert torch.allclose(da, db, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            assert torch.allclose(pyramid_pool(x, scales, pool), b, rtol=1e-12, atol=1e-12), "the path without gradient"


def test_reference_equals_slices_as_the_method_is_told():
    """Bin (i, j) is rows (j - 1) H / 2^(i-1) to j H / 2^(i-1); card: max abs diff 2e-7 and 0 in float32."""
    x = torch.randn(4, 16, 24, 8)
    avg, top = reference(x, (1, 2, 4, 8), "avg"), reference(x, (1, 2, 4, 8), "max")
    k = 0
    for i in range(1, 5):
        rows = 24 // 2 ** (i - 1)
        for j in range(1, 2 ** (i - 1) + 1):
            stripe = x[:, :, (j - 1) * rows : j * rows]
            assert (avg[k] - stripe.mean((2, 3))).abs().max() < 5e-7
            assert torch.equal(top[k], stripe.amax((2, 3)))
            k += 1
    assert k == 15
    both = reference(x, (1, 2, 4, 8))
    assert torch.equal(both, avg + top)
    assert (avg[0] - avg[7:].mean(0)).abs().max() < 5e-7
    assert torch.equal(top[0], top[7:].amax(0))


@pytest.mark.parametrize("scales", [(1,), (4,)])
def test_of_equal_maxima_the_first_row_by_row_takes_the_gradient(scales):
    x = torch.zeros(1, 1, 4, 3)
    x[0, 0, 1, 2] = x[0, 0, 2, 0] = 0 if scales == (4,) else 5
    _, gradient = gradients(pyramid_pool, x, scales, "max")
    expected = [(0, 0), (1, 0), (2, 0), (3, 0)] if scales == (4,) else [(1, 2)]  # column 0 comes later: rows go first
    assert [tuple(at) for at in gradient[0, 0].nonzero().tolist()] == expected


def test_shifting_the_map_by_a_bin_moves_the_eighths_by_one():
    torch.manual_seed(0)
    x = torch.rand(2, 7, 24, 8)
    for pool in POOLS:
        a, b = pyramid_pool(x, (8,), pool), pyramid_pool(x.roll(3, dims=2), (8,), pool)
        assert torch.equal(b[1:], a[:-1])
    kept = x[:, :, :21]
    assert torch.equal(
        pyramid_pool(kept, (1,), "max"), pyramid_pool(torch.cat([x[:, :, 21:] * 0, kept], 2), (1,), "max")
    )


def test_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 8, 2, dtype=torch.float64, requires_grad=True)
    for pool in POOLS:
        assert torch.autograd.gradcheck(lambda x, pool=pool: pyramid_pool(x, (1, 2, 4), pool), x)


def test_half_precision_is_summed_in_float32_and_nothing_is_a_size():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 24, 8).bfloat16()
    out = pyramid_pool(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, reference(x.double(), (1, 2, 4, 8)).bfloat16())
    assert pyramid_pool(x[:0]).shape == (15, 0, 4)
    assert pyramid_pool(x.to("meta")).shape == (15, 2, 4)


def test_bad_inputs():
    x = torch.randn(2, 3, 24, 8)
    for args, message in (
        ((x, (1, 2), "sum"), "unknown pool 'sum', expected one of avg\\+max, avg, max"),
        ((x, (1, 2), "avg", "cuda"), "unknown impl 'cuda'"),
        ((x[0], (1,)), r"expected \(N, C, H, W\)"),
        ((x.long(), (1,)), "of a floating dtype"),
        ((x[:, :, :0], (1,)), "nothing but N zero"),
        ((x, (2, 3)), "each to divide the largest"),
        ((x, (16,)), "map of 24 rows"),
        ((x, ()), "each to divide the largest"),
        ((x, (3, 6), "avg", "triton"), "expected powers of two"),
    ):
        with pytest.raises(ValueError, match=message):
            pyramid_pool(*args)


def test_bench_rows(monkeypatch):
    monkeypatch.setattr(pooling_bench, "SHAPES", ((16, 8, 8, 4),))
    rows = kernel_bench("cpu", quick=True)
    assert {row["impl"] for row in rows} == {"slices", "adaptive", "torch"}
    assert {row["mode"] for row in rows} == {"forward", "training"}
    assert all(row[key] > 0 for row in rows for key in ("ms", "gb_per_s", "of_copy", "over_slices"))
    assert len(kernel_table(rows).splitlines()) == 1 + len(rows)
    with pytest.raises(UserError, match="unknown device 'mps'"):
        kernel_bench("mps")


def test_bench_stops_at_a_wrong_implementation(monkeypatch):
    monkeypatch.setattr(pooling_bench, "SHAPES", ((16, 8, 8, 4),))
    right = pooling_bench.slices
    for wrong in (lambda x: 1.1 * right(x), lambda x: right(x).detach() + 0 * x.sum()):
        monkeypatch.setattr(pooling_bench, "slices", wrong)
        with pytest.raises(RuntimeError, match="slices differs from the definition"):
            kernel_bench("cpu", quick=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_of_the_bench_have_no_ties_in_any_precision(dtype):
    """So that all forms agree on the gradients, which are compared with the definition."""
    x = pooling_bench._drawn((4, 8, 24, 8), "cpu", dtype)
    assert (x.detach().flatten(2).sort(2).values.diff(dim=2) > 0).all()
    grad = torch.randn(15, 4, 8).to(dtype)
    for op in (pooling_bench.slices, pyramid_pool):
        pooling_bench._gate("op", op, x, grad)


def test_triton_under_the_interpreter(passes_under_the_interpreter):
    """In a process of its own: TRITON_INTERPRET is read when a kernel is decorated."""
    passes_under_the_interpreter(Path(__file__).with_name("test_kernels_interpret.py"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("maximum", [True, False])
def test_triton_compiles_for_a_gpu(dtype, maximum):
    """The interpreter does not check types as the compiler does; compiling needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from papers.hpm.kernels import triton_pyramid_pool as module

    scales, pointer = (1, 2, 4, 8), f"*{dtype}"
    constant = {"n_scales": 4, "AVG": True, "MAX": maximum, "FINE": 8, "M": 24, "WIDE": 32, "BLOCK": 16}
    constant |= {"ACC": triton.language.float64 if dtype == "fp64" else triton.language.float32}
    sizes = {"n_images": "i32", "channels": "i32", "scales": ("constexpr",) * 4, **dict.fromkeys(constant, "constexpr")}
    for kernel, signature in (
        (module._forward, {"x": pointer, "out": pointer, "place": "*i32", **sizes}),
        (module._backward, {"grad": pointer, "place": "*i32", "d_x": pointer, **sizes}),
    ):
        order = kernel.arg_names
        constants = {(order.index(name),): value for name, value in constant.items()}
        constants |= {(order.index("scales"), k): scale for k, scale in enumerate(scales)}
        source = ASTSource(kernel, {name: signature[name] for name in order}, constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
