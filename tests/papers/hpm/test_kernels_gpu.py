"""The Triton kernel on a GPU: at most twice the error of plain torch at the same precision."""

import pytest
import torch

from papers.hpm.kernels import pyramid_pool, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(64, 2048, 24, 8), (3, 37, 16, 6), (1, 1, 8, 1), (2, 100, 16, 8)]


@pytest.mark.parametrize("pool", ["avg+max", "avg", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_torch(shape, dtype, pool):
    """Without ties: on a GPU the adaptive pool does not promise the first of equal values; the kernel does (next test)."""
    torch.manual_seed(0)
    x = torch.rand(shape, device="cuda").argsort(-1).to(dtype) + torch.rand(shape, device="cuda").to(dtype)
    grad = torch.randn(15, *shape[:2], device="cuda", dtype=dtype)

    def run(op, to):
        leaf = x.to(to).requires_grad_()
        out = op(leaf)
        return [t.double() for t in (out, torch.autograd.grad(out, leaf, grad.to(to))[0])]

    plain = run(lambda x: pyramid_pool(x, pool=pool, impl="torch"), dtype)
    kernel = run(lambda x: pyramid_pool(x, pool=pool, impl="triton"), dtype)
    exact = run(lambda x: reference(x, (1, 2, 4, 8), pool), torch.float64)
    assert (kernel[0] - exact[0]).abs().max() <= 2 * (plain[0] - exact[0]).abs().max() + 1e-6 * exact[0].abs().max()
    assert (kernel[1] - plain[1]).abs().max() <= 2**-7 * plain[1].abs().max()


def test_ties_go_to_the_first():
    x = torch.randint(0, 2, (8, 64, 24, 8)).float()
    grads = []
    for device, impl in (("cpu", "torch"), ("cuda", "triton")):
        leaf = x.to(device).requires_grad_()
        out = pyramid_pool(leaf, pool="max", impl=impl)
        grads.append(torch.autograd.grad(out.sum(), leaf)[0].cpu())
    assert torch.equal(*grads)
