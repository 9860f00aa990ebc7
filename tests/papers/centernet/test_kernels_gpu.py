"""The Triton kernels on a GPU: values equal to the bit, gradients at most twice the error of torch at that precision."""

import pytest
import torch

from papers.centernet.kernels import center_pool, corner_pool, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DIRECTIONS = ("top", "bottom", "left", "right")
SHAPES = [  # B, C, H, W
    (6, 128, 128, 128),
    (2, 18, 123, 7),
    (2, 5, 7, 123),
    (1, 3, 1, 1),
    (1, 2, 33, 700),
    (1, 2, 5000, 3),
    (1, 2, 3, 20_000),
    (0, 2, 3, 3),
    (2, 3, 0, 4),
]


def draw(shape, dtype=torch.float32, channels_last=False):
    """Coarse enough to have equal maxima."""
    x = (8 * torch.randn(shape, device="cuda")).round().to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def pools(impl):
    corners = {d: lambda x, _, d=d: corner_pool(x, d, impl) for d in DIRECTIONS}
    return corners | {"center": lambda x, z: center_pool(x, z, impl)}


def definitions():
    corners = {d: lambda x, _, d=d: reference.corner_pool(x, d) for d in DIRECTIONS}
    return corners | {"center": reference.center_pool}


def run(pool, x, z, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (x, z)]
    y = pool(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad, materialize_grads=True, allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_equal_and_gradients_as_good_as_in_torch(shape, channels_last, dtype):
    torch.manual_seed(0)
    x, z = (draw(shape, dtype, channels_last) for _ in range(2))
    grad, plain = torch.randn(shape, device="cuda").to(dtype), pools("torch")
    for name, pool in pools("triton").items():
        y, *found = run(pool, x, z, grad)
        last = channels_last and not x.is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        if max(shape) > 1000:  # the definition is a host loop: compare with torch alone
            expected, *exact = run(plain[name], x, z, grad)
            exact = run(plain[name], x.double(), z.double(), grad.double())[1:]
        else:
            expected = definitions()[name](x, z)
            exact = run(definitions()[name], x.double(), z.double(), grad.double())[1:]
        assert torch.equal(y, expected), name
        for a, b, e in zip(found, run(plain[name], x, z, grad)[1:], exact, strict=True):
            if a.numel():
                error, allowed = (a - e).abs().max(), 2 * (b - e).abs().max()
                assert error <= allowed + torch.finfo(dtype).eps * e.abs().max(), name


def test_ties_and_infinities():
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (2, 17, 40, 33), device="cuda").float()
    x[torch.rand(x.shape, device="cuda") < 0.1] = float("-inf")
    z, grad = x.flip(3).contiguous(), torch.randint(-4, 5, x.shape, device="cuda").float()
    for last in (False, True):
        if last:
            x, z = (t.contiguous(memory_format=torch.channels_last) for t in (x, z))
        for name, pool in pools("triton").items():
            for a, b in zip(run(pool, x, z, grad), run(definitions()[name], x, z, grad), strict=True):
                assert torch.equal(a, b), name


def test_a_nan_stays():
    x = torch.randn(2, 9, 40, 33, device="cuda")
    x[1, 2, 30, 7] = float("nan")
    for name, pool in pools("triton").items():
        found, expected = pool(x, x), definitions()[name](x, x)
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)), name


def test_runs_are_bit_identical():
    x, z = (torch.randn(4, 32, 128, 128, device="cuda") for _ in range(2))
    grad = torch.randn_like(x)
    for pool in pools("triton").values():
        assert all(torch.equal(a, b) for a, b in zip(run(pool, x, z, grad), run(pool, x, z, grad), strict=True))


def test_auto_takes_the_kernels_and_keeps_one_bit_an_element():
    kept = []
    x = torch.randn(2, 16, 64, 64, device="cuda", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        corner_pool(x, "top")
        assert [(t.dtype, 16 * t.numel()) for t in kept] == [(torch.int16, x.numel())]
        kept.clear()
        with torch.no_grad():
            corner_pool(x, "left")
        assert not kept


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_and_compile(channels_last):
    x = draw((2, 16, 20, 24), channels_last=channels_last)
    torch.library.opcheck(
        torch.ops.repro_centernet.corner_pool.default, (torch.randn(4, 20, 16, device="cuda"), True, True, "triton")
    )
    call = lambda x: center_pool(corner_pool(x, "left"), corner_pool(x * 2, "top")) * 2  # noqa: E731
    found = []
    for f in (torch.compile(call, fullgraph=True), call):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        found.append((y, *torch.autograd.grad(y.sum(), leaf)))
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_beyond_2_to_the_31(channels_last):
    """4 GiB of float16: the last image starts at element 2^31."""
    x = torch.zeros(513, 1024, 64, 64, device="cuda", dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    x[-1].normal_()
    one = x[-1:].clone(memory_format=torch.preserve_format)
    for name, pool in pools("triton").items():
        with torch.no_grad():
            assert torch.equal(pool(x, x)[-1:], pool(one, one)), name
    leaf, small = x.requires_grad_(), one.requires_grad_()
    for direction in ("top", "left"):
        y, expected = corner_pool(leaf, direction), corner_pool(small, direction)
        (found,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        assert torch.equal(found[-1:], torch.autograd.grad(expected, small, torch.ones_like(expected))[0])
        del found, y
