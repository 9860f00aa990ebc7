"""The Triton kernels on the CPU, under the interpreter; run by test_kernels.py with TRITON_INTERPRET=1."""

import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"),
]

from papers.centernet.kernels import center_pool, corner_pool, reference  # noqa: E402

DIRECTIONS = ("top", "bottom", "left", "right")
SHAPES = [  # B, C, H, W
    (2, 3, 7, 5),
    (1, 2, 1, 1),
    (1, 9, 17, 2),  # over one word of marks
    (1, 1, 37, 9),  # over two words
    (1, 1, 2, 37),
    (1, 9, 33, 8),  # more lanes than a program, more than two strips
    (0, 2, 3, 3),
    (2, 3, 0, 4),
    (2, 3, 4, 0),
]


def whole(shape, dtype=torch.float32, channels_last=False):
    """A map with many equal maxima, infinities among them; whole numbers, whose sums are exact."""
    torch.manual_seed(0)
    x = torch.randint(-3, 4, shape).to(dtype)
    x[torch.rand(shape) < 0.05] = float("-inf")
    x[torch.rand(shape) < 0.02] = float("inf")
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def compare(pool, definition, maps):
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


def compare_all(x, other, directions=DIRECTIONS):
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    for d in directions:
        y = compare(lambda x, d=d: corner_pool(x, d, "triton"), lambda x, d=d: reference.corner_pool(x, d), [x])
        assert y.is_contiguous(memory_format=layout)
    y = compare(lambda x, z: center_pool(x, z, "triton"), reference.center_pool, [x, other])
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, channels_last):
    x = whole(shape, channels_last=channels_last)
    compare_all(x, x.flip(0, 3).contiguous(memory_format=torch.channels_last) if channels_last else x.flip(0, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    x = whole((1, 2, 5, 9), dtype)  # whole numbers: a bfloat16 is cut, not rounded, here, and nothing is lost
    compare_all(x, x.flip(3), ("top", "right"))


def test_wide_maps_with_few_channels():
    """Fewer lanes side by side than a walk wants: scans as a tree, over elements that do not lie side by side."""
    x = whole((2, 3, 4, 20), channels_last=True)
    assert x.stride() == (240, 1, 60, 3)
    compare_all(x, x.flip(2).contiguous(memory_format=torch.channels_last), ("left", "right"))


@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded"])
def test_any_strides(layout):
    x = whole((2, 4, 5, 6))
    x = {
        "transposed": lambda: x.transpose(2, 3),
        "every other": lambda: x[:, ::2],
        "expanded": lambda: x[:1].expand(2, -1, -1, -1),
    }[layout]()
    for d in ("top", "left"):
        compare(lambda x, d=d: corner_pool(x, d, "triton"), lambda x, d=d: reference.corner_pool(x, d), [x])
    compare(lambda x, z: center_pool(x, z, "triton"), reference.center_pool, [x, x.flip(1)])


def test_a_nan_stays():
    for shape in ((1, 1, 5, 9), (1, 1, 9, 3)):
        x = torch.randn(shape)
        x[0, 0, 2, 1] = float("nan")
        for d in DIRECTIONS:
            found, expected = corner_pool(x, d, "triton"), reference.corner_pool(x, d)
            assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
        found, expected = center_pool(x, x, "triton"), reference.center_pool(x, x)
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("shape", [(1, 1, 2, 8), (1, 1, 3, 3)])
def test_gradcheck(shape):
    torch.manual_seed(0)
    draw = lambda: torch.randperm(shape[1] * shape[2] * shape[3]).double().view(shape).requires_grad_()  # noqa: E731
    for d in ("top", "right"):
        assert torch.autograd.gradcheck(lambda x, d=d: corner_pool(x, d, "triton"), draw())
    assert torch.autograd.gradcheck(lambda x, z: center_pool(x, z, "triton"), (draw(), draw()))


def test_what_is_kept_for_the_backward_pass():
    kept = []
    x = torch.randn(2, 3, 20, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        for d, words in (("top", 2 * 3 * 2 * 24), ("left", 2 * 3 * 20 * 2)):
            kept.clear()
            corner_pool(x, d, "triton")
            assert [(t.dtype, t.numel()) for t in kept] == [(torch.int16, words)], "one bit an element"
        kept.clear()
        with torch.no_grad():
            corner_pool(x, "top", "triton")
            center_pool(x, x, "triton")
        center_pool(x.detach(), x.detach(), "triton")
    assert not kept


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    operators = torch.ops.repro_centernet
    for m in (2, 9):
        x = torch.randn(2, 18, m, requires_grad=grad)
        torch.library.opcheck(operators.corner_pool.default, (x, True, grad, "triton"))
    columns, rows = (torch.randn(2, 3, 4, 3, requires_grad=grad) for _ in range(2))
    torch.library.opcheck(operators.center_pool.default, (columns, rows, grad, "triton"))


def test_torch_compile():
    x = torch.randn(1, 9, 5, 3, requires_grad=True)
    call = lambda x: center_pool(corner_pool(x, "left", "triton"), x, "triton").sin()  # noqa: E731
    found = []
    for f in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        y = f(x)
        found.append((y, *torch.autograd.grad(y.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_two_copies_of_the_folder(tmp_path, monkeypatch):
    import papers.centernet.kernels

    shutil.copytree(Path(papers.centernet.kernels.__file__).parent, tmp_path / "pools_copy")
    monkeypatch.syspath_prepend(str(tmp_path))
    copied = importlib.import_module("pools_copy")
    assert Path(copied.__file__).is_relative_to(tmp_path)
    x = whole((1, 2, 3, 4))
    for kernels in (copied, sys.modules["papers.centernet.kernels"]):
        assert torch.equal(kernels.corner_pool(x, "top", "triton"), reference.corner_pool(x, "top"))
