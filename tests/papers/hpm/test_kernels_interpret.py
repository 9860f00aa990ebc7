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

from papers.hpm.kernels import pyramid_pool, reference  # noqa: E402

CASES = [  # C, H, W, scales, pool, dtype
    (5, 24, 8, (1, 2, 4, 8), "avg+max", torch.float32),  # bins of 24 values: not a power of two
    (5, 24, 8, (1, 2, 4, 8), "avg+max", torch.float64),
    (5, 24, 8, (1, 2, 4, 8), "avg", torch.float32),
    (5, 24, 8, (1, 2, 4, 8), "max", torch.float32),
    (1, 8, 1, (1, 2, 4, 8), "avg+max", torch.float32),
    (37, 16, 6, (1, 8), "avg+max", torch.float32),  # more channels than a block takes
    (2, 123, 7, (1,), "max", torch.float64),
    (3, 12, 5, (4, 1), "avg+max", torch.float32),
]


def gradients(op, x):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = op(x)
    weight = torch.linspace(0.5, 2, max(out.numel(), 1), dtype=out.dtype)[: out.numel()].view(out.shape)
    return out, torch.autograd.grad((out * weight).sum(), x)[0]


def compare(x, scales, pool, tolerance):
    found = gradients(lambda x: pyramid_pool(x, scales, pool, impl="triton"), x)
    for a, b in zip(found, gradients(lambda x: reference(x, scales, pool), x), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.numel():
            assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


@pytest.mark.parametrize(("channels", "rows", "columns", "scales", "pool", "dtype"), CASES)
def test_forward_and_gradient(channels, rows, columns, scales, pool, dtype):
    torch.manual_seed(0)
    shape = (channels, rows, columns)
    negative = -torch.rand(shape) - 1  # what is masked must not win
    ties = torch.randint(-1, 2, shape).float()
    x = torch.stack([torch.randn(shape), negative, ties, torch.zeros(shape)]).to(dtype)
    compare(x, scales, pool, 2e-6 if dtype == torch.float32 else 1e-12)


def test_no_images():
    compare(torch.randn(0, 4, 8, 2), (1, 8), "avg+max", 0)


def test_float16_computes_in_float32():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 24, 8).half()
    out = pyramid_pool(x, impl="triton")
    assert out.dtype == torch.float16
    exact = reference(x.double(), (1, 2, 4, 8))
    assert (out - exact).abs().max() <= 2**-10 * exact.abs().max()


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_any_strides(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = torch.randn(2, 2, 3, 4, dtype=torch.float64).transpose(2, 3)
    else:
        x = x[:1].expand(2, -1, -1, -1)
    compare(x, (1, 4), "avg+max", 1e-12)


def test_a_gradient_that_is_not_contiguous():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 5, dtype=torch.float64)
    grads = [
        torch.autograd.grad(op(x).permute(2, 1, 0), x, weight)[0]
        for op in (lambda x: pyramid_pool(x, (1, 4), impl="triton"), lambda x: reference(x, (1, 4)))
    ]
    assert torch.allclose(*grads, rtol=1e-12)


def test_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pyramid_pool(x, (1, 4), impl="triton"), x)


@pytest.mark.parametrize(("flags", "grad"), [((True, True), True), ((True, True), False), ((True, False), True)])
def test_opcheck(flags, grad):
    from papers.hpm.kernels.triton_pyramid_pool import pyramid_pool as op

    torch.manual_seed(0)
    torch.library.opcheck(op, (torch.randn(1, 3, 4, 3, requires_grad=grad), [1, 4], *flags))


def test_nothing_is_read_that_was_not_written(monkeypatch):
    """Outputs start as NaN: every number of the results is written, whatever the masks."""
    from papers.hpm.kernels import triton_pyramid_pool as module

    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else -7)

        return call

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    x = torch.randn(1, 37, 16, 6)
    out, place = module._op_forward(x, [1, 8], True, True)
    assert out.isfinite().all()
    assert ((place >= 0) & (place < 96)).all()
    assert module._op_backward(torch.randn(9, 1, 37), place, x, [1, 8], True, True).isfinite().all()


def test_the_whole_network_on_the_kernel(monkeypatch):
    from papers.hpm import HPM, model, small

    torch.manual_seed(0)
    net = HPM(small(16), 16, identities=5, dim=4).double()
    x, grads = torch.randn(2, 3, 32, 8, dtype=torch.float64), []
    for impl in ("torch", "triton"):
        monkeypatch.setattr(model, "pyramid_pool", lambda *a, impl=impl: pyramid_pool(*a, impl=impl))
        grads.append(torch.autograd.grad(net(x).square().sum(), list(net.parameters())))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*grads, strict=True))


def test_two_copies_of_the_folder(tmp_path, monkeypatch):
    import papers.hpm

    shutil.copytree(Path(papers.hpm.__file__).parent, tmp_path / "hpm_copy")
    monkeypatch.syspath_prepend(str(tmp_path))
    copied = importlib.import_module("hpm_copy.kernels")
    assert Path(copied.__file__).is_relative_to(tmp_path)
    x = torch.randn(2, 3, 8, 2)
    outs = [k.pyramid_pool(x, impl="triton") for k in (copied, sys.modules["papers.hpm.kernels"])]
    assert torch.equal(*outs)
