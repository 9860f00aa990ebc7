"""condensed_conv by definition: the test-time form of a learned group convolution (section 4), in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, index: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Gather, batch norm as scale and shift, ReLU, 1x1 group convolution, channel shuffle: the official five passes.

    x (N, R, H, W); index (G K,) int64: the K channels that group 0 reads, then group 1, ...; scale, shift (G K,);
    weight (O, K), rows by group. -> (N, O, H, W) in the dtype and the memory format of x, output o of group g at
    channel o G + g. Scale and shift act in float32 at least; the convolution takes x's dtype, as under autocast.
    """
    a = x.index_select(1, index) * scale[:, None, None] + shift[:, None, None]  # float16 * float32 is float32
    y = F.conv2d(torch.relu(a).to(x.dtype), weight.to(x.dtype)[:, :, None, None], groups=groups)
    n, channels, h, w = y.shape
    shuffled = y.view(n, groups, channels // groups, h, w).transpose(1, 2).reshape(y.shape)
    return shuffled.contiguous(memory_format=memory_format(x))


def memory_format(x: Tensor) -> torch.memory_format:
    """The one that the result gets: channels_last for an x that is in it and is not contiguous as well."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
