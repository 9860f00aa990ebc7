"""The backbone: stacked hourglass networks, as CornerNet made them (no max pooling; widths that grow with depth)."""

import contextlib
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def conv_bn_relu(kernel: int, channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def conv_bn(kernel: int, channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    return conv_bn_relu(kernel, channels_in, channels, stride)[:2]


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut; a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1):
        super().__init__()
        self.branch = nn.Sequential(*conv_bn_relu(3, channels_in, channels, stride), *conv_bn(3, channels, channels))
        same = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if same else conv_bn(1, channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x), inplace=True)


def residuals(channels_in: int, channels: int, number: int, stride: int = 1) -> nn.Sequential:
    """`number` residual blocks; the first changes width and resolution."""
    return nn.Sequential(
        Residual(channels_in, channels, stride), *(Residual(channels, channels) for _ in range(number - 1))
    )


class Hourglass(nn.Module):
    """One hourglass, (B, c_0, h, w) -> the same shape; h and w are multiples of 2^depth.

    dims: channels c_0 .. c_depth of the levels; modules: residual blocks at each.
    """

    def __init__(self, dims: Sequence[int], modules: Sequence[int]):
        super().__init__()
        (c, low), m = dims[:2], modules[0]
        self.up1 = residuals(c, c, m)
        self.low1 = residuals(c, low, m, stride=2)
        self.low2 = Hourglass(dims[1:], modules[1:]) if len(dims) > 2 else residuals(low, low, modules[1])
        self.low3 = nn.Sequential(*(Residual(low, low) for _ in range(m - 1)), Residual(low, c))

    def forward(self, x: Tensor) -> Tensor:
        low = self.low3(self.low2(self.low1(x)))
        return self.up1(x) + F.interpolate(low, scale_factor=2.0, mode="nearest")


def recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), whose inside is not kept but computed again for the backward pass (activation checkpointing).

    The second computation leaves the running statistics of batch norm as they are: gradients and buffers are those of the
    plain call.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]

    @contextlib.contextmanager
    def second_time():
        kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0  # running statistics move by a share of 0
        try:
            yield
        finally:
            for norm, (momentum, number) in zip(norms, kept, strict=True):
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(number)

    return checkpoint(module, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), second_time()))
