"""The Triton kernel on a GPU: at most twice the error of plain torch at the same precision."""

import pytest
import torch
import torch.nn.functional as F

from papers.pc_darts import SuperNet
from papers.pc_darts.kernels import mix_bypass_shuffle, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(64, 4, 4, 32, 32, 5), (3, 3, 4, 5, 7, 3), (1, 1, 2, 1, 1, 1), (16, 8, 2, 56, 57, 2), (2, 2, 1, 3, 3, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_torch(shape, dtype):
    torch.manual_seed(0)
    n, c, K, h, w, edges = shape
    ys = [torch.randn(n, 3, c, h, w, device="cuda", dtype=dtype) for _ in range(edges)]
    xs = [torch.randn(n, K * c, h, w, device="cuda", dtype=dtype) for _ in range(edges)]
    beta, grad = torch.rand(edges, device="cuda"), torch.randn(n, K * c, h, w, device="cuda", dtype=dtype)

    def run(op, to):
        leaves = [t.to(to).requires_grad_() for t in (*ys, *xs)]
        b = beta.to(torch.promote_types(to, torch.float32)).requires_grad_()
        out = op([y[:, 1] for y in leaves[:edges]], [x[:, c:] for x in leaves[edges:]], b)
        found = torch.autograd.grad(out, (*leaves, b), grad.to(to), materialize_grads=True, allow_unused=True)
        return [t.double() for t in (out, *found)]

    def naive(mixed, bypass, b):  # the definition at this precision, nothing promoted
        edge = [torch.cat([m, s.to(m.dtype) * x], 1) for m, x, s in zip(mixed, bypass, b, strict=True)]
        return sum(e.view(n, K, c, h, w).transpose(1, 2).reshape(n, K * c, h, w) for e in edge)

    exact = run(reference, torch.float64)
    plain = run(naive, dtype)
    kernel = run(lambda *a: mix_bypass_shuffle(*a, impl="triton"), dtype)
    for a, b, e in zip(kernel, plain, exact, strict=True):
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + 1e-6 * max(1, e.abs().max())


def test_supernet_agrees_with_the_plain_one():
    torch.manual_seed(0)
    plain = SuperNet(C=8, layers=3, K=4, cell="plain")
    shared = SuperNet(C=8, layers=3, K=4)
    shared.load_plain(plain)
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    found = []
    for model in (plain.cuda().double(), shared.cuda().double()):
        logits = model(x.cuda().double())
        grads = torch.autograd.grad(F.cross_entropy(logits, y.cuda()), model.arch_parameters())
        found.append((logits, *grads))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))
