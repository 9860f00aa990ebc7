"""The Triton kernel on the CPU, under the interpreter; run by test_kernels.py with TRITON_INTERPRET=1."""

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

from papers.condensenet import LearnedGroupConv  # noqa: E402
from papers.condensenet.kernels import condensed_conv, reference, scale_shift  # noqa: E402

SHAPES = [  # N, R, H, W, G, K, O/G
    (2, 16, 3, 5, 4, 4, 2),
    (1, 1, 1, 1, 1, 1, 1),
    (3, 7, 1, 1, 1, 5, 17),
    (2, 130, 5, 7, 8, 33, 3),  # K over one step, not a power of two
    (1, 6, 1, 123, 4, 3, 16),
    (1, 5, 4, 4, 1, 9, 150),  # O/G over one tile, K > R
    (1, 4, 50, 50, 1, 2, 1),  # more pixels than a tile
    (0, 8, 4, 4, 8, 1, 4),
    (1, 16, 32, 32, 4, 4, 8),  # the first convolution of a CIFAR network
    (1, 1936, 7, 7, 4, 484, 128),  # the last ones of the ImageNet networks
    (1, 1936, 7, 7, 8, 242, 64),
]


def inputs(n, R, h, w, G, K, outputs, dtype=torch.float32):
    """x, index, scale, shift, weight, groups; the index repeats some channels and leaves others out."""
    torch.manual_seed(0)
    x, index = torch.randn(n, R, h, w).to(dtype), torch.randint(R, (G * K,))
    return x, index, torch.randn(G * K), torch.randn(G * K), (torch.randn(G * outputs, K) / K**0.5).to(dtype), G


def exact(*args):
    return reference(*(t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in args))


def compare(*args):
    y, plain = condensed_conv(*args, impl="triton"), reference(*args)
    assert y.shape == plain.shape
    assert y.dtype == plain.dtype
    last = args[0].is_contiguous(memory_format=torch.channels_last) and not args[0].is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if y.numel():
        assert (y - exact(*args)).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape):
    compare(*inputs(*shape))


@pytest.mark.parametrize("shape", SHAPES[:8])
def test_equals_the_definition_in_channels_last(shape):
    x, *rest = inputs(*shape)
    compare(x.contiguous(memory_format=torch.channels_last), *rest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[5]])
def test_error_is_at_most_twice_that_of_torch(shape, dtype):
    args = inputs(*shape, dtype)
    y, expected = condensed_conv(*args, impl="triton"), exact(*args)
    # the interpreter cuts float32 to bfloat16 where a GPU rounds: up to one unit in the last place more
    truncation = torch.finfo(dtype).eps * expected.abs().max() if dtype == torch.bfloat16 else 0
    assert y.dtype == dtype
    assert (y - expected).abs().max() <= 2 * (reference(*args) - expected).abs().max() + truncation


@pytest.mark.parametrize("layout", ["slice", "every other", "transposed", "expanded", "columns"])
def test_any_strides(layout):
    x, index, scale, shift, weight, G = inputs(2, 12, 6, 4, 2, 3, 5)
    x = {
        "slice": lambda: x[:, 2:9],  # of a buffer that holds all features of a block: no copy is made
        "every other": lambda: x[:, ::2],
        "transposed": lambda: x.transpose(2, 3),
        "expanded": lambda: x[:1].expand(2, -1, -1, -1),
        "columns": lambda: x[..., 1:3],
    }[layout]()
    index = torch.randint(x.shape[1], (12,))[::2]
    compare(x, index, scale.repeat(2)[::2], shift, weight.t().contiguous().t(), G)


def test_mixed_precision_of_the_parameters():
    x, index, scale, shift, weight, G = inputs(2, 12, 3, 3, 2, 3, 5, torch.float16)
    args = x, index, scale.half(), shift.double(), weight.float(), G
    y, expected = condensed_conv(*args, impl="triton"), exact(*args)
    assert y.dtype == torch.float16
    assert (y - expected).abs().max() <= 4 * torch.finfo(torch.float16).eps * expected.abs().max()


def test_nan_is_not_hidden_and_stays_where_it_is():
    x, _, scale, shift, weight, G = inputs(2, 8, 3, 3, 4, 2, 3)
    x[1, 5, 2, 0] = float("nan")
    index = torch.tensor([0, 1, 2, 5, 3, 4, 6, 7])  # channel 5 is kept by group 1 alone
    found = condensed_conv(x, index, scale, shift, weight, G, impl="triton").isnan().nonzero().tolist()
    assert found == [[1, o * G + 1, 2, 0] for o in range(3)]


@pytest.mark.parametrize(("channels_last", "dtype"), [(False, torch.float32), (True, torch.float16)])
def test_opcheck(channels_last, dtype):
    x, *rest = inputs(2, 6, 3, 4, 2, 3, 5, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.repro_condensenet.condensed_conv.default, (x, *rest))


def test_runs_are_bit_identical():
    args = inputs(2, 20, 5, 5, 4, 7, 3)
    assert torch.equal(*(condensed_conv(*args, impl="triton") for _ in range(2)))


@pytest.mark.parametrize(("G", "C"), [(4, 4), (8, 4), (4, 2), (1, 2)])
def test_equals_the_masked_training_form(G, C):
    """Condensed by hand: group g is the rows g, g + G, ... of the weight and the columns that its mask keeps."""
    torch.manual_seed(0)
    layer = LearnedGroupConv(32, 24, G, C).eval()
    layer.prune_to(C - 1)
    for tensor in (*layer.norm.parameters(), layer.norm.running_mean):
        torch.nn.init.normal_(tensor)
    index = [layer.mask[g, :, 0, 0].nonzero()[:, 0] for g in range(G)]
    weight = torch.cat([layer.weight[g::G, kept, 0, 0] for g, kept in enumerate(index)])
    index = torch.cat(index)
    x = torch.randn(2, 32, 5, 5)
    with torch.no_grad():
        scale, shift = scale_shift(layer.norm)
        y = condensed_conv(x, index, scale[index], shift[index], weight, G, impl="triton")
        assert (y - layer(x)).abs().max() < 1e-5


def test_two_copies_of_the_folder(tmp_path, monkeypatch):
    import papers.condensenet

    shutil.copytree(Path(papers.condensenet.__file__).parent, tmp_path / "condensenet_copy")
    monkeypatch.syspath_prepend(str(tmp_path))
    copied = importlib.import_module("condensenet_copy.kernels")
    assert Path(copied.__file__).is_relative_to(tmp_path)
    args = inputs(2, 4, 2, 3, 2, 2, 3)
    outs = [k.condensed_conv(*args, impl="triton") for k in (copied, sys.modules["papers.condensenet.kernels"])]
    assert torch.equal(*outs)
