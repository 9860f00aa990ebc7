"""The candidate operations (appendix of DARTS, unchanged in PC-DARTS). No convolution has a bias."""

import torch
from torch import Tensor, nn


def conv_unit(c_in: int, c_out: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    """ReLU, depthwise kxk, pointwise 1x1, BN: one unit of a separable or dilated convolution."""
    padding = dilation * (kernel - 1) // 2
    return [
        nn.ReLU(),
        nn.Conv2d(c_in, c_in, kernel, stride, padding, dilation, groups=c_in, bias=False),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        nn.BatchNorm2d(c_out, affine=affine),
    ]


class SepConv(nn.Sequential):
    """Two stacked depthwise-separable units; the stride is in the first. (N, c, H, W) -> (N, c, H/s, W/s)."""

    def __init__(self, c: int, kernel: int, stride: int, affine: bool = True):
        super().__init__(*conv_unit(c, c, kernel, stride, 1, affine), *conv_unit(c, c, kernel, 1, 1, affine))


class DilConv(nn.Sequential):
    """One depthwise-separable unit with dilation 2. (N, c, H, W) -> (N, c, H/s, W/s)."""

    def __init__(self, c: int, kernel: int, stride: int, affine: bool = True):
        super().__init__(*conv_unit(c, c, kernel, stride, 2, affine))


class ReLUConvBN(nn.Module):
    """ReLU, 1x1 convolution, BN. (N, c_in, H, W) -> (N, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, affine: bool = True):
        super().__init__()
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.relu(x)))


class FactorizedReduce(nn.Module):
    """Halve the resolution without losing pixels: two 1x1 stride-2 convolutions, one shifted by a pixel, concatenated.

    (N, c_in, H, W) -> (N, c_out, H/2, W/2); H and W even, c_out even (ValueError otherwise).
    """

    def __init__(self, c_in: int, c_out: int, affine: bool = True):
        super().__init__()
        if c_out % 2:
            raise ValueError(f"FactorizedReduce to {c_out} channels, expected an even number")
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"FactorizedReduce of a {x.shape[2]}x{x.shape[3]} map, expected even height and width")
        x = self.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


class Zero(nn.Module):
    """`none`: zeros of the output's shape."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


def operation(name: str, c: int, stride: int, affine: bool = True, search: bool = False) -> nn.Module:
    """The candidate `name` on c channels: (N, c, H, W) -> (N, c, H/stride, W/stride).

    search: pools are followed by BN without affine, so that the outputs of a mixture have comparable scale.
    """
    if name == "none":
        return Zero(stride)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(c, c, affine)
    if name in ("max_pool_3x3", "avg_pool_3x3"):
        pool = (
            nn.MaxPool2d(3, stride, padding=1)
            if name == "max_pool_3x3"
            else nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        )
        return nn.Sequential(pool, nn.BatchNorm2d(c, affine=False)) if search else pool
    kind, kernel = name[:3], int(name[-1]) if name[-1] in "35" else 0
    if name in ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"):
        return (SepConv if kind == "sep" else DilConv)(c, kernel, stride, affine)
    raise ValueError(f"unknown operation {name!r}")


def drop_path(x: Tensor, p: float) -> Tensor:
    """Zero each sample of x (N, C, H, W) with probability p in [0, 1), divide the others by 1 - p: the mean stays."""
    if not 0 <= p < 1:
        raise ValueError(f"drop-path probability {p}, expected 0 <= p < 1")
    keep = torch.empty(x.shape[0], 1, 1, 1, device=x.device, dtype=x.dtype).bernoulli_(1 - p)
    return x * (keep / (1 - p))
