"""The Triton kernel on a GPU: at most twice the error of plain torch at the same precision, 1e-4 in float32."""

import pytest
import torch

from papers.condensenet import condense, condensenet
from papers.condensenet.kernels import condensed_conv, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [  # N, R, H, G, K, O/G
    *((16, R, 32, G, R // G, O // G) for R, O in ((16, 32), (64, 32), (120, 64), (768, 128)) for G in (4, 8)),
    *((16, 1936, 7, G, 1936 // G, 512 // G) for G in (4, 8)),
    (1, 1936, 7, 8, 242, 64),
    (3, 7, 5, 1, 5, 17),
    (1, 1, 1, 1, 1, 1),
    (2, 9, 7, 8, 33, 150),
    (0, 8, 4, 8, 1, 4),
]


def inputs(n, R, size, G, K, outputs, dtype):
    torch.manual_seed(0)
    x, index = torch.randn(n, R, size, size, device="cuda", dtype=dtype), torch.randint(R, (G * K,), device="cuda")
    scale, shift = torch.randn(2, G * K, device="cuda")
    return x, index, scale, shift, torch.randn(G * outputs, K, device="cuda", dtype=dtype) / K**0.5, G


def exact(*args):
    return reference(*(t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_torch(shape, channels_last, dtype):
    x, *rest = inputs(*shape, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y, expected = condensed_conv(x, *rest, impl="triton"), exact(x, *rest)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = reference(x, *rest)
    assert y.dtype == dtype
    assert y.shape == plain.shape
    last = channels_last and not x.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if y.numel():
        error = (y - expected).abs().max()
        assert error <= 2 * (plain - expected).abs().max() + 1e-6 * expected.abs().max()
        assert dtype != torch.float32 or error < 1e-4


def test_slice_of_a_wider_buffer():
    x, index, scale, shift, weight, G = inputs(4, 64, 9, 4, 8, 16, torch.float32)
    args = x[:, 3:43], index % 40, scale, shift, weight, G
    assert (condensed_conv(*args, impl="triton") - exact(*args)).abs().max() < 1e-4


def test_nan_is_not_hidden():
    x, index, scale, shift, weight, G = inputs(2, 16, 8, 4, 4, 8, torch.float32)
    x[1, index[0]] = float("nan")  # a maximum with zero would hide it on a GPU, but not under the interpreter
    assert condensed_conv(x, index, scale, shift, weight, G, impl="triton")[1, ::G].isnan().all()


def test_auto_takes_the_kernel_without_gradients_and_torch_with_them():
    x, index, scale, shift, weight, G = inputs(2, 16, 8, 4, 4, 8, torch.float32)
    weight.requires_grad_()
    y = condensed_conv(x, index, scale, shift, weight, G)
    y.sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        kernel = condensed_conv(x, index, scale, shift, weight, G)
        assert torch.equal(kernel, condensed_conv(x, index, scale, shift, weight, G, impl="triton"))
    assert (y - kernel).abs().max() < 1e-2  # torch may use TF32


def test_opcheck_and_compile():
    args = inputs(2, 16, 8, 4, 4, 8, torch.float32)
    torch.library.opcheck(torch.ops.repro_condensenet.condensed_conv.default, args)
    compiled = torch.compile(lambda *a: condensed_conv(*a, impl="triton") * 2, fullgraph=True)
    assert torch.allclose(compiled(*args), 2 * condensed_conv(*args, impl="triton"))


def test_offsets_beyond_2_to_the_31():
    """4 GiB of float16: the last image starts at element 2^31 - 2^22."""
    n, R, size = 512, 1024, 64
    x = torch.zeros(n + 1, R, size, size, device="cuda", dtype=torch.float16)
    x[-1].normal_()
    _, index, scale, shift, weight, G = inputs(1, R, 1, 4, 16, 4, torch.float16)
    y = condensed_conv(x, index, scale, shift, weight, G, impl="triton")
    assert torch.allclose(y[-1:], condensed_conv(x[-1:].clone(), index, scale, shift, weight, G, impl="triton"))


@torch.inference_mode()
@pytest.mark.parametrize("conv", ["learned", "static"])
def test_networks_use_it_and_answer_as_on_the_cpu(conv):
    torch.manual_seed(0)
    model = condensenet(50, conv=conv).eval()
    model.prune(0.5)
    model, images = condense(model), torch.randn(4, 3, 32, 32)
    expected = model(images)
    with torch.profiler.profile() as profiler:
        found = model.cuda()(images.cuda()).cpu()
    assert any("condensed_conv" in event.key for event in profiler.key_averages())
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
