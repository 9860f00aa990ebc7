"""Auxiliary nets of a local module: the decoder w and the head psi. Training needs them, the test does not.

Official files: networks/auxiliary_nets.py (CIFAR, SVHN, STL-10), networks/resnet.py of the ImageNet experiments.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .model import conv_norm_relu

HEADS = ("0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f")  # convolutions and linear layers


class Decoder(nn.Module):
    """Features (B, C, h, w) and a size (H, W) -> logits (B, 3, H, W) of the image in [0, 1]: its sigmoid is w(h).

    Bilinear to the size of the image, 3x3 to 12 channels, 3x3 to 3.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(*conv_norm_relu(channels, 12, 3, bias=True), nn.Conv2d(12, 3, 3, padding=1))

    def forward(self, h: Tensor, size: Sequence[int]) -> Tensor:
        return self.net(resize(h, size))


class ImageNetDecoder(nn.Module):
    """As Decoder, by way of a quarter and a half of the size: 1x1 to 128 channels, then 3x3 to 32, to 12, to 3."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = nn.Sequential(*conv_norm_relu(channels, 128, 1, bias=True))
        self.first = nn.Sequential(*conv_norm_relu(128, 32, 3, bias=True))
        self.middle = nn.Sequential(*conv_norm_relu(32, 12, 3, bias=True))
        self.last = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, h: Tensor, size: Sequence[int]) -> Tensor:
        H, W = size
        h = self.first(resize(self.reduce(h), (H // 4, W // 4)))
        h = self.middle(resize(h, (H // 2, W // 2)))
        return self.last(resize(h, size))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def head(kind: str, channels: int, outputs: int, last_width: int = 64, hidden: int = 128) -> nn.Sequential:
    """psi: features (B, channels, h, w) -> (B, outputs): `kind` of HEADS, a mean over pixels between its two parts.

    The first convolution doubles the channels and halves the map, up to `last_width`, the width of the network's last
    stage; from there on both stay. outputs: classes, or the dimension of the contrastive features.
    """
    if kind not in HEADS:
        raise ValueError(f"unknown head {kind!r}; expected one of {', '.join(HEADS)}")
    convolutions, linears = int(kind[0]), int(kind[2])
    layers, c = [], channels
    for i in range(convolutions):
        c_out, stride = (min(2 * c, last_width), 1 + (c < last_width)) if i == 0 else (c, 1)
        layers += conv_norm_relu(c, c_out, 3, stride)
        c = c_out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(linears - 1):
        layers += [nn.Linear(c, hidden), nn.ReLU(inplace=True)]
        c = hidden
    return nn.Sequential(*layers, nn.Linear(c, outputs))


def imagenet_head(channels: int, classes: int) -> nn.Sequential:
    """psi of the ImageNet networks: 1x1 to 128, two strided 3x3 to 256 and 512, 1x1 to 2048, mean, linear."""
    layers = conv_norm_relu(channels, 128, 1) + conv_norm_relu(128, 256, 3, 2)
    layers += conv_norm_relu(256, 512, 3, 2) + conv_norm_relu(512, 2048, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, classes))
