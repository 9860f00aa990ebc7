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

from papers.pc_darts.kernels import mix_bypass_shuffle, reference  # noqa: E402

SHAPES = [  # N, c, K, H, W, edges
    (2, 3, 4, 5, 7, 3),
    (1, 1, 2, 1, 1, 1),
    (2, 2, 1, 3, 3, 2),
    (1, 2, 8, 1, 123, 5),
    (1, 1, 2, 50, 50, 2),  # more pixels than a block
    (0, 2, 4, 3, 3, 2),
    (2, 2, 4, 0, 3, 2),
]


def inputs(n, c, K, h, w, edges, dtype=torch.float64):
    torch.manual_seed(0)
    ys = [torch.randn(n, 3, c, h, w, dtype=dtype).requires_grad_() for _ in range(edges)]
    xs = [torch.randn(n, K * c, h, w, dtype=dtype).requires_grad_() for _ in range(edges)]
    return ys, xs, torch.rand(edges, dtype=dtype).requires_grad_()


def compare(mixed, bypass, beta, leaves, tolerance):
    found = []
    for op in (lambda *a: mix_bypass_shuffle(*a, impl="triton"), reference):
        out = op(mixed, bypass, beta)
        weight = torch.linspace(0.5, 2, max(out.numel(), 1), dtype=out.dtype)[: out.numel()].view(out.shape)
        grads = torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True, allow_unused=True)
        found.append((out, *grads))
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.numel():
            assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape, dtype):
    ys, xs, beta = inputs(*shape, dtype)
    c = shape[1]
    compare(
        [y[:, 1] for y in ys], [x[:, c:] for x in xs], beta, (*ys, *xs, beta), 1e-5 if dtype == torch.float32 else 1e-12
    )


def test_float16_computes_in_float32():
    ys, xs, beta = inputs(2, 4, 4, 8, 8, 5, torch.float16)
    beta = beta.detach().float().requires_grad_()
    mixed, bypass = [y[:, 1] for y in ys], [x[:, 4:] for x in xs]
    out = mix_bypass_shuffle(mixed, bypass, beta, impl="triton")
    exact = reference([m.double() for m in mixed], [b.double() for b in bypass], beta.double())
    assert (out - exact).abs().max() <= 2**-10 * exact.abs().max()


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_any_strides(layout):
    ys, xs, beta = inputs(2, 2, 3, 4, 4, 2)
    mixed, bypass = [y[:, 1] for y in ys], [x[:, 2:] for x in xs]
    if layout == "channels_last":
        mixed, bypass = ([t.contiguous(memory_format=torch.channels_last) for t in ts] for ts in (mixed, bypass))
    elif layout == "transposed":
        mixed, bypass = ([t.transpose(2, 3) for t in ts] for ts in (mixed, bypass))
    else:
        mixed, bypass = ([t[:1].expand(2, -1, -1, -1) for t in ts] for ts in (mixed, bypass))
    compare(mixed, bypass, beta, (*ys, *xs, beta), 1e-12)


def test_gradcheck():
    ys, xs, beta = inputs(2, 2, 3, 2, 1, 2)
    leaves = [t.detach().requires_grad_() for t in (ys[0][:, 0], ys[1][:, 0], xs[0][:, 2:], xs[1][:, 2:], beta)]
    assert torch.autograd.gradcheck(
        lambda *t: mix_bypass_shuffle(list(t[:2]), list(t[2:4]), t[4], impl="triton"), leaves
    )


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 7, 3), (1, 2, 1, 3, 3, 1)])
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(shape, grad):
    from papers.pc_darts.kernels.triton_mix_bypass_shuffle import mix_bypass_shuffle as op

    ys, xs, beta = inputs(*shape, torch.float32)
    mixed = [y[:, 1].detach().clone().requires_grad_(grad) for y in ys]
    bypass = [x[:, shape[1] :].detach().clone().requires_grad_(grad) for x in xs]
    torch.library.opcheck(op, (mixed, bypass, beta.detach().requires_grad_(grad)))


def test_runs_are_bit_identical():
    ys, xs, beta = inputs(2, 3, 4, 9, 7, 3, torch.float32)
    runs = []
    for _ in range(2):
        out = mix_bypass_shuffle([y[:, 1] for y in ys], [x[:, 3:] for x in xs], beta, impl="triton")
        runs.append((out, *torch.autograd.grad(out.square().sum(), (*ys, *xs, beta))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_whole_supernet_on_the_kernel(monkeypatch):
    from papers.pc_darts import SuperNet, shared

    torch.manual_seed(0)
    model = SuperNet(C=4, layers=3, K=2).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    leaves = [*model.arch_parameters(), *model.parameters()]
    grads = [torch.autograd.grad(model(x).square().sum(), leaves)]
    monkeypatch.setattr(shared, "mix_bypass_shuffle", lambda *a: mix_bypass_shuffle(*a, impl="triton"))
    grads.append(torch.autograd.grad(model(x).square().sum(), leaves))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*grads, strict=True))


def test_two_copies_of_the_folder(tmp_path, monkeypatch):
    import papers.pc_darts

    shutil.copytree(Path(papers.pc_darts.__file__).parent, tmp_path / "pc_darts_copy")
    monkeypatch.syspath_prepend(str(tmp_path))
    copied = importlib.import_module("pc_darts_copy.kernels")
    assert Path(copied.__file__).is_relative_to(tmp_path)
    ys, xs, beta = inputs(2, 2, 2, 3, 3, 2)
    args = [y[:, 1] for y in ys], [x[:, 2:] for x in xs], beta
    outs = [k.mix_bypass_shuffle(*args, impl="triton") for k in (copied, sys.modules["papers.pc_darts.kernels"])]
    assert torch.equal(*outs)
