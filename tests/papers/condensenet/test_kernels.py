"""condensed_conv: the definition by loops, its dispatch and its checks, and the interpreter run of the Triton kernel."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.metrics.compute import mult_adds
from papers.condensenet import CondensedConv
from papers.condensenet.kernels import condensed_conv, reference, scale_shift
from papers.condensenet.kernels.bench import kernel_bench, kernel_table


def inputs(n, R, h, w, G, K, outputs, dtype=torch.float64):
    """x, index, scale, shift, weight, groups; the index repeats some channels and leaves others out."""
    x, scale, shift = torch.randn(n, R, h, w, dtype=dtype), torch.randn(G * K).to(dtype), torch.randn(G * K).to(dtype)
    return x, torch.randint(R, (G * K,)), scale, shift, torch.randn(G * outputs, K, dtype=dtype), G


def test_definition_by_loops():
    torch.manual_seed(0)
    n, G, K, outputs, h, w = 2, 2, 3, 4, 2, 3
    x, _, scale, shift, weight, _ = inputs(n, 6, h, w, G, K, outputs)
    index = torch.tensor([0, 0, 5, 2, 5, 1])  # 0 twice in a group, 5 in both, 3 and 4 in none
    y = condensed_conv(x, index, scale, shift, weight, G)
    assert y.shape == (n, G * outputs, h, w)
    for i, row, column in torch.cartesian_prod(torch.arange(n), torch.arange(h), torch.arange(w)).tolist():
        for g in range(G):
            for o in range(outputs):
                total = 0.0
                for k in range(K):
                    at = g * K + k
                    normed = scale[at] * x[i, index[at], row, column] + shift[at]
                    total += weight[g * outputs + o, k] * max(normed, 0)
                assert abs(y[i, o * G + g, row, column] - total) < 1e-12


def test_hand_example_of_the_condensed_index():
    """Rows [[9,1,5,3],[1,9,3,5],[8,2,5,3],[2,8,3,5]], G = C = 2: channels {0, 2} for rows 0 and 2, {1, 3} for 1 and 3."""
    index, weight = torch.tensor([0, 2, 1, 3]), torch.tensor([[9.0, 5], [8, 5], [9, 5], [8, 5]])
    x = torch.tensor([1.0, 10, 100, -7]).view(1, 4, 1, 1)
    y = condensed_conv(x, index, torch.ones(4), torch.zeros(4), weight, 2)
    assert y.flatten().tolist() == [509, 90, 508, 80]  # ReLU leaves 1, 10, 100, 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_the_layer_in_eval_mode(channels_last):
    torch.manual_seed(0)
    layer = CondensedConv(24, 20, groups=4, condense_factor=3).double().eval()
    layer.index.copy_(torch.randint(24, (32,)))
    for tensor in (*layer.norm.parameters(), layer.norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(layer.norm.running_var, 0.5, 2)
    x = torch.randn(2, 24, 5, 3, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = condensed_conv(x, layer.index, *scale_shift(layer.norm), layer.conv.weight, 4)
    assert torch.allclose(y, layer(x), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_normalises_in_float32(dtype):
    torch.manual_seed(0)
    x, index, _, _, weight, G = inputs(1, 8, 4, 4, 2, 4, 3, dtype)
    args = 200 + x, index, torch.ones(8), torch.full((8,), -200.0)  # in x's dtype the shift would round x away
    y = condensed_conv(*args, weight.float(), G)
    exact = reference(*(t.double() if t.is_floating_point() else t for t in args), weight.double(), G)
    assert y.dtype == dtype
    assert (y - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_torch_is_differentiable_and_needs_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "papers.condensenet.kernels.triton_condensed_conv", raising=False)
    x, index, scale, shift, weight, G = inputs(1, 3, 2, 1, 2, 2, 1)
    leaves = [t.requires_grad_() for t in (x, scale, shift, weight)]
    assert torch.autograd.gradcheck(lambda x, a, b, w: condensed_conv(x, index, a, b, w, G), leaves)


def test_multiply_adds_are_counted_on_either_implementation():

    class Layer(nn.Module):
        def forward(self, *args):
            return condensed_conv(*args)

    n, h, w, G, K, outputs = 3, 5, 7, 4, 6, 2
    args = [t.to("meta") if torch.is_tensor(t) else t for t in inputs(n, 9, h, w, G, K, outputs, torch.float32)]
    found = [mult_adds(Layer(), *args, impl) for impl in ("torch", "triton")]
    assert found == [n * h * w * G * outputs * K] * 2


def test_bad_inputs():
    x, index, scale, shift, weight, G = inputs(2, 6, 3, 3, 2, 3, 4)
    for args, message in (
        ((x[0], index, scale, shift, weight, G), r"x is \(6, 3, 3\)"),
        ((x.long(), index, scale, shift, weight, G), "torch.int64, expected .N, R, H, W. of a floating dtype"),
        ((x, index, scale, shift, weight[:7], G), r"weight \(7, 3\) in 2 groups"),
        ((x, index, scale, shift, weight, 0), "in 0 groups"),
        ((x, index[:5], scale, shift, weight, G), r"index \(5,\) torch.int64.*expected \(6,\) each"),
        ((x, index.int(), scale, shift, weight, G), "torch.int32.*int64 index"),
        ((x, index, scale[:1], shift, weight, G), r"scale \(1,\)"),
        ((x, index, scale, shift[:, None], weight, G), r"shift \(6, 1\)"),
        ((x, index.to("meta"), scale, shift, weight, G), "index on meta.*expected one device"),
    ):
        with pytest.raises(ValueError, match=message):
            condensed_conv(*args)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        condensed_conv(x, index + 6, scale, shift, weight, G)
    args = [t.float() if t is not index else t for t in (x, index, scale, shift, weight)]
    for call, message in (
        (lambda: condensed_conv(*args, G, impl="cuda"), "unknown impl 'cuda'"),
        (lambda: condensed_conv(x, *args[1:], G, impl="triton"), "torch.float64, expected float32"),
        (lambda: condensed_conv(*args[:4], nn.Parameter(args[4]), G, impl="triton"), "has no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_triton_on_the_cpu_is_refused():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="on cpu, expected CUDA"):
        condensed_conv(*inputs(1, 3, 1, 1, 2, 2, 1, torch.float32), impl="triton")


def test_bench_rows(monkeypatch):
    monkeypatch.setattr("papers.condensenet.kernels.bench.SHAPES", ((16, 8, 4, 8, 2, 2), (1, 8, 4, 16, 4, 4)))
    rows = kernel_bench("cpu", quick=True)
    assert [(row["impl"], row["shape"]) for row in rows] == [
        ("eager", (1, 8, 4, 8, 2, 2)),
        ("eager", (1, 8, 4, 16, 4, 4)),
    ]
    assert all(row["ms"] > 0 and row["gb_per_s"] > 0 and row["of_copy"] > 0 and row["speedup"] == 1 for row in rows)
    assert len(kernel_table(rows).splitlines()) == 3
    with pytest.raises(UserError, match="unknown device 'mps'"):
        kernel_bench("mps")


def test_bench_stops_at_a_wrong_implementation(monkeypatch):
    monkeypatch.setattr("papers.condensenet.kernels.bench.SHAPES", ((1, 8, 4, 8, 2, 2),))
    wrong = lambda x, *a: reference(x, *a) + (x.dtype == torch.float32) * 1e-2  # noqa: E731
    monkeypatch.setattr("papers.condensenet.kernels.bench.reference", wrong)
    with pytest.raises(RuntimeError, match="eager differs from the definition"):
        kernel_bench("cpu", quick=True)


def test_triton_under_the_interpreter(passes_under_the_interpreter):
    """In a process of its own: TRITON_INTERPRET is read when a kernel is decorated."""
    passes_under_the_interpreter(Path(__file__).with_name("test_kernels_interpret.py"))


@pytest.mark.parametrize(
    ("dtype", "outputs", "K"), [("fp32", 128, 484), ("fp32", 8, 4), ("bf16", 128, 484), ("fp16", 8, 30)]
)
def test_triton_compiles_for_a_gpu(dtype, outputs, K):
    """The interpreter does not check types as the compiler does; compiling needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from papers.condensenet.kernels import triton_condensed_conv as module

    constants = module._blocks(outputs, K, 256 * 49, 4, dtype != "fp32")
    options = {"num_warps": constants.pop("num_warps")}
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    constants["DOT"] = getattr(triton.language, names[dtype])
    pointers = {"x": f"*{dtype}", "index": "*i64", "scale": "*fp32", "shift": "*fp32", "weight": f"*{dtype}"}
    types = {**pointers, "y": f"*{dtype}", "x_n": "i64", "y_n": "i64", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in module._kernel.arg_names}
    indices = {(list(signature).index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(module._kernel, signature, indices), target=GPUTarget("cuda", 90, 32), options=options
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 227 * 1024  # bytes that sm_90 gives one program
