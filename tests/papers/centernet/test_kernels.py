"""Corner and center pooling: the definition by hand, the torch implementation, its operators, and the Triton one's checks."""

import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from papers.centernet.kernels import bench as pools_bench
from papers.centernet.kernels import center_pool, corner_pool, reference, torch_pools
from papers.centernet.kernels.bench import RowLoop, cummax_pool, kernel_bench, kernel_table

DIRECTIONS = ("top", "bottom", "left", "right")
SHAPES = [  # B, C, H, W: odd, single, over one and over four blocks of 16, empty
    (2, 3, 7, 5),
    (1, 2, 1, 1),
    (1, 1, 123, 3),
    (2, 18, 20, 33),
    (1, 2, 70, 81),
    (1, 3, 1, 40),
    (1, 17, 128, 1),
    (0, 2, 3, 3),
    (2, 0, 3, 3),
    (2, 3, 0, 4),
    (2, 3, 4, 0),
]


def whole(shape, dtype=torch.float32, channels_last=False):
    """A map with many equal maxima, infinities among them; whole numbers, whose sums are exact."""
    x = torch.randint(-3, 4, shape).to(dtype)
    x[torch.rand(shape) < 0.05] = float("-inf")
    x[torch.rand(shape) < 0.02] = float("inf")
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def both(pool, definition, maps):
    """Results and gradients of the two, which must be equal to the bit; leaves are the maps."""
    leaves = [x.detach().requires_grad_() for x in maps]
    grad = torch.randint(-4, 5, maps[0].shape).to(maps[0].dtype)
    found = []
    for f in (pool, definition):
        y = f(*leaves)
        found.append((y, *torch.autograd.grad(y, leaves, grad)))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))  # inf - inf of a center pool is NaN on both sides
    with torch.no_grad():
        assert torch.equal(pool(*leaves).nan_to_num(7), found[0][0].nan_to_num(7))
    return found[0][0]


@pytest.mark.parametrize("pool", [corner_pool, reference.corner_pool])
def test_examples(pool):
    column, tied = torch.tensor([2.0, 1, 3, 0, 2]), torch.tensor([0.0, 2, 2, 1])
    for direction, values, gradient in (
        ("top", [3, 3, 3, 2, 2], [0, 0, 3, 1]),
        ("bottom", [2, 2, 3, 3, 3], [1, 3, 0, 0]),
        ("left", [3, 3, 3, 2, 2], [0, 0, 3, 1]),
        ("right", [2, 2, 3, 3, 3], [1, 3, 0, 0]),
    ):
        shape = (1, 1, -1, 1) if direction in ("top", "bottom") else (1, 1, 1, -1)
        assert pool(column.view(shape), direction).flatten().tolist() == values
        x = tied.view(shape).requires_grad_()
        (found,) = torch.autograd.grad(pool(x, direction).sum(), x)
        assert found.flatten().tolist() == gradient


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_definition_by_windows(direction):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 7)
    y, axis = reference.corner_pool(x, direction), 2 if direction in ("top", "bottom") else 3
    for i in range(x.shape[axis]):
        window = x.narrow(axis, i, x.shape[axis] - i) if direction in ("top", "left") else x.narrow(axis, 0, i + 1)
        assert torch.equal(y.select(axis, i), window.amax(axis))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, channels_last):
    torch.manual_seed(0)
    x, other = whole(shape, channels_last=channels_last), whole(shape, channels_last=channels_last)
    layout = torch.channels_last if channels_last and not x.is_contiguous() else torch.contiguous_format
    for direction in DIRECTIONS:
        y = both(lambda x, d=direction: corner_pool(x, d), lambda x, d=direction: reference.corner_pool(x, d), [x])
        assert y.is_contiguous(memory_format=layout)
    assert both(center_pool, reference.center_pool, [x, other]).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    x, other = whole((2, 17, 19, 20), dtype), whole((2, 17, 19, 20), dtype, channels_last=True)
    for direction in DIRECTIONS:
        for z in (x, other):
            both(lambda x, d=direction: corner_pool(x, d), lambda x, d=direction: reference.corner_pool(x, d), [z])
    both(center_pool, reference.center_pool, [x, other])


@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded", "columns"])
def test_any_strides(layout):
    torch.manual_seed(0)
    x = whole((2, 6, 18, 20))
    x = {
        "transposed": lambda: x.transpose(2, 3),
        "every other": lambda: x[:, ::2],
        "expanded": lambda: x[:1, :1].expand(2, 3, -1, -1),
        "columns": lambda: x[..., 1:4],
    }[layout]()
    for direction in DIRECTIONS:
        both(lambda x, d=direction: corner_pool(x, d), lambda x, d=direction: reference.corner_pool(x, d), [x])
    both(center_pool, reference.center_pool, [x, x.flip(3)])


@pytest.mark.parametrize("elements", [1, 50, 500])
def test_cut_into_chunks(elements, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch_pools, "CHUNK", elements)
    x = whole((3, 2, 18, 17))
    for direction in DIRECTIONS:
        both(lambda x, d=direction: corner_pool(x, d), lambda x, d=direction: reference.corner_pool(x, d), [x])
    both(center_pool, reference.center_pool, [x, x.flip(2)])


def test_a_nan_stays_and_is_not_spread_elsewhere():
    x = torch.randn(2, 3, 20, 40)
    x[1, 2, 5, 7] = float("nan")
    for pool in (corner_pool, reference.corner_pool):
        for direction, there in (
            ("top", (slice(None, 6), 7)),
            ("bottom", (slice(5, None), 7)),
            ("left", (5, slice(None, 8))),
            ("right", (5, slice(7, None))),
        ):
            found = pool(x, direction).isnan()
            assert found[1, 2][there].all()
            assert found.sum() == found[1, 2][there].numel()
    found = center_pool(x, x).isnan()
    assert torch.equal(found, reference.center_pool(x, x).isnan())
    assert found.sum() == 20 + 40 - 1


@pytest.mark.parametrize("shape", [(1, 2, 5, 3), (1, 1, 3, 18)])
def test_gradcheck(shape):
    torch.manual_seed(0)
    draw = lambda: torch.randperm(shape[2] * shape[3] * shape[1]).double().view(shape).requires_grad_()  # noqa: E731
    for direction in DIRECTIONS:
        assert torch.autograd.gradcheck(lambda x, d=direction: corner_pool(x, d), draw())
    assert torch.autograd.gradcheck(center_pool, (draw(), draw()))


def test_every_scan_hands_on_its_whole_gradient():
    torch.manual_seed(0)
    x, grad = whole((2, 18, 33, 40), torch.float64).requires_grad_(), torch.randn(2, 18, 33, 40, dtype=torch.float64)
    for direction in DIRECTIONS:
        (found,) = torch.autograd.grad(corner_pool(x, direction), x, grad)
        axis = reference.AXIS[direction]
        assert torch.allclose(found.sum(axis), grad.sum(axis), rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(center_pool(x, x), x, grad)
    assert torch.allclose(found.sum((2, 3)), 2 * grad.sum((2, 3)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_summed_in_float32(dtype):
    x = torch.zeros(1, 18, 40, 41, dtype=dtype)
    x[..., 0, :] = x[..., 0] = 1
    x.requires_grad_()
    for direction, length in (("bottom", 40), ("right", 41)):
        (found,) = torch.autograd.grad(corner_pool(x, direction), x, torch.full_like(x, 1 + 2**-7))
        assert found.select(reference.AXIS[direction], 0).unique().item() == torch.tensor(length * (1 + 2**-7)).to(
            dtype
        )


def test_center_pool_gives_the_last_of_equal_maxima():
    x, grad = (
        torch.tensor([[1.0, 5, 5], [5, 2, 5]]).view(1, 1, 2, 3),
        torch.tensor([[1.0, 2, 3], [4, 5, 6]]).view(1, 1, 2, 3),
    )
    columns, rows = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = torch.autograd.grad(center_pool(columns, rows), (columns, rows), grad)
    assert found[0].tolist() == [[[[0, 7, 0], [5, 0, 9]]]]
    assert found[1].tolist() == [[[[0, 0, 6], [0, 0, 15]]]]


def test_the_official_loop_has_the_same_ties():
    torch.manual_seed(0)
    x = whole((2, 3, 9, 20))
    for direction in DIRECTIONS:
        both(lambda x, d=direction: RowLoop.apply(x, d), lambda x, d=direction: corner_pool(x, d), [x])
        assert torch.equal(cummax_pool(x, direction), corner_pool(x, direction))


def test_what_is_kept_for_the_backward_pass(monkeypatch):
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    x = torch.randn(2, 3, 20, 24, requires_grad=True)
    with hooks:
        y = corner_pool(x, "left")
        assert [t.data_ptr() for t in kept] == [y.data_ptr()], "its own output"
        kept.clear()
        center_pool(x, x + 0)
        assert sorted((t.dtype, t.numel()) for t in kept if t.dtype == torch.int32) == [
            (torch.int32, 2 * 3 * 20),
            (torch.int32, 2 * 3 * 24),
        ]
        assert len(kept) == 2
        kept.clear()
        monkeypatch.setattr(torch_pools, "_last_maximum", None)  # no places are looked for without a gradient
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                corner_pool(x, "left")
                assert not center_pool(x, x).requires_grad
        assert not corner_pool(x.detach(), "top").requires_grad
        center_pool(x.detach(), x.detach())
    assert not kept


def test_opcheck():
    torch.manual_seed(0)
    operators = torch.ops.repro_centernet
    for grad in (False, True):
        for m in (3, 18):
            x = torch.randn(2, 20, m, requires_grad=grad)
            torch.library.opcheck(operators.corner_pool.default, (x, True, grad, "torch"))
        columns, rows = (torch.randn(2, 5, 4, 3, requires_grad=grad) for _ in range(2))
        torch.library.opcheck(operators.center_pool.default, (columns, rows, grad, "torch"))


@pytest.mark.parametrize("channels_last", [False, True])
def test_torch_compile(channels_last):
    torch.manual_seed(0)
    x = torch.randn(2, 18, 20, 9)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    call = lambda x: center_pool(corner_pool(x, "left"), corner_pool(x * 2, "top")).sin()  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = []
    for f in (compiled, call):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        found.append((y, *torch.autograd.grad(y.sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(x), found[1][0])


def test_torch_needs_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    (corner_pool(x, "left") + center_pool(x, x)).sum().backward()
    assert x.grad.sum() == 3 * 24


def test_bad_inputs():
    x = torch.randn(1, 2, 3, 4)
    for call, message in (
        (lambda: corner_pool(x, "up"), "direction 'up', expected top, bottom, left or right"),
        (lambda: corner_pool(x[0], "top"), r"a map is (2, 3, 4) torch.float32, expected (B, C, H, W)"),
        (lambda: corner_pool(x.long(), "top"), "torch.int64, expected (B, C, H, W) of a floating dtype"),
        (lambda: corner_pool(x, "top", impl="cuda"), "unknown impl 'cuda', expected auto, torch or triton"),
        (lambda: center_pool(x, x[..., 1:]), "rows (1, 2, 3, 3) torch.float32 on cpu: expected the same of both"),
        (lambda: center_pool(x, x.double()), "torch.float64 on cpu: expected the same"),
        (lambda: center_pool(x, x.to("meta")), "on meta: expected the same"),
        (lambda: center_pool(x[0], x[0]), "a map is (2, 3, 4)"),
    ):
        with pytest.raises(ValueError) as told:  # noqa: PT011
            call()
        assert message in str(told.value)
        assert "\n" not in str(told.value)


def test_triton_on_the_cpu_is_refused():
    pytest.importorskip("triton")
    x = torch.randn(1, 2, 3, 4)
    for call in (lambda: corner_pool(x, "top", impl="triton"), lambda: center_pool(x, x, impl="triton")):
        with pytest.raises(ValueError, match="impl='triton' on cpu, expected CUDA tensors; take impl='auto'"):
            call()


def test_bench_rows(monkeypatch):
    monkeypatch.setattr(pools_bench, "SHAPES", ((1, 2, 4, 3), (1, 1, 5, 5), (2, 1, 5, 5)))
    monkeypatch.setattr(pools_bench, "times_ms", lambda calls, *_: {name: (c(), 2.0)[1] for name, c in calls.items()})
    monkeypatch.setattr(pools_bench, "copy_gb_per_s", lambda device: 1.0)
    monkeypatch.setattr(pools_bench, "compiled", lambda call, x: {"compiled": call})
    for quick, shapes, impls in ((True, 2, {"cummax", "row_loop", "torch"}), (False, 3, None)):
        impls = impls or {"cummax", "row_loop", "torch", "compiled"}
        rows = kernel_bench("cpu", quick)
        assert {row["impl"] for row in rows} == impls
        assert len(rows) == len({(r["op"], r["shape"], r["mode"], r["impl"]) for r in rows}) == shapes * 10 * len(impls)
        assert {(row["ms"], row["over_cummax"], row["over_row_loop"]) for row in rows} == {(2.0, 1.0, 1.0)}
        assert len(kernel_table(rows).splitlines()) == 1 + len(rows)
    with pytest.raises(UserError, match="unknown device 'mps'"):
        kernel_bench("mps")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 2, 128, 128)])
def test_maps_of_the_bench_have_no_ties(shape, dtype):
    """So that all forms agree on the gradients, to the bit."""
    x, grad = pools_bench._drawn(shape, "cpu", dtype)
    for axis in (2, 3):
        assert (x.sort(axis).values.diff(dim=axis) > 0).all()
    found = []
    for pool in (cummax_pool, RowLoop.apply, corner_pool, reference.corner_pool):
        leaf = x.clone().requires_grad_()
        found.append([torch.autograd.grad(pool(leaf, d), leaf, grad)[0] for d in DIRECTIONS])
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, found[0], strict=True))


def test_bench_times_and_stops_at_a_wrong_implementation(monkeypatch):
    monkeypatch.setattr(pools_bench, "SHAPES", ((1, 2, 4, 3),))
    monkeypatch.setattr(pools_bench, "OPS", ("top",))
    rows = kernel_bench("cpu", quick=True)
    assert len(rows) == 6
    assert all(min(row["ms"], row["gb_per_s"], row["of_copy"]) > 0 for row in rows)
    for wrong in (lambda x, direction: x, lambda x, direction: cummax_pool(x, direction).detach() + 0 * x):
        monkeypatch.setattr(pools_bench, "cummax_pool", wrong)  # of the second the gradients alone are wrong
        with pytest.raises(RuntimeError, match="cummax differs from the definition of top"):
            kernel_bench("cpu", quick=True)


def test_triton_under_the_interpreter(passes_under_the_interpreter):
    """In a process of its own: TRITON_INTERPRET is read when a kernel is decorated."""
    passes_under_the_interpreter(Path(__file__).with_name("test_kernels_interpret.py"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_compiles_for_a_gpu(dtype):
    """The interpreter does not check types as the compiler does; compiling needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from papers.centernet.kernels import triton_center_pool, triton_corner_pool

    def compiled(kernel, **constants):
        options = {"num_warps": constants.pop("num_warps")}
        constants |= {name: value for name, value in flags.items() if name in kernel.arg_names}
        types = pointers | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        found = triton.compile(ASTSource(kernel, signature, indices), target=GPUTarget("cuda", 90, 32), options=options)
        assert found.asm["cubin"]
        assert found.metadata.shared <= 227 * 1024  # bytes that sm_90 gives one program

    flags = {"REVERSE": True, "TRAIN": True, "ACC": triton.language.float32}
    maps = ("x", "y", "grad", "out", "maxima", "across")
    pointers = {**dict.fromkeys(maps, f"*{dtype}"), "marks": "*i16", "places": "*i32", "down": "*fp32"}
    for m, kernels in (
        (128, (triton_corner_pool._walk, triton_corner_pool._walk_back)),
        (1, (triton_corner_pool._tree, triton_corner_pool._tree_back)),
    ):
        for kernel in kernels:
            compiled(kernel, **triton_corner_pool._plan(768 * 128, 128, m)[2])
    module = triton_center_pool
    compiled(module._column_maxima, BLOCK=64, num_warps=1)
    compiled(module._add_row_maxima, LANES=32, WIDTH=128, num_warps=8)
    compiled(module._sums, STRIP=16, ROWS=2, WIDTH=128, CHANNELS=16, num_warps=8)
