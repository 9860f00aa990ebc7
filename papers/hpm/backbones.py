"""Networks whose last map still has many rows: the paper's ResNet-50, and a small one for small images."""

from collections import OrderedDict

import torchvision
from torch import Tensor, nn


def resnet50(weights: dict[str, Tensor] | None = None) -> nn.Sequential:
    """torchvision's ResNet-50 without its last pool and layer, stage 4 with stride 1: (N, 3, H, W) -> (N, 2048, H/16, W/16).

    The stride is taken from the 3x3 convolution of the stage's first block and from its shortcut; nothing is dilated.
    weights: torchvision's state dict for ImageNet (its fc is not used); ValueError when it is of another network.
    """
    net = torchvision.models.resnet50()
    if weights is not None:
        try:
            net.load_state_dict({**net.state_dict(), **{k: v for k, v in weights.items() if not k.startswith("fc.")}})
        except (RuntimeError, AttributeError) as error:
            raise ValueError(
                f"not the weights of torchvision's ResNet-50 ({str(error).splitlines()[-1].strip()})"
            ) from None
        missing = [k for k in net.state_dict() if k not in weights and not k.startswith("fc.")]
        if missing:
            raise ValueError(f"not the weights of torchvision's ResNet-50: {missing[0]} is missing")
    first = net.layer4[0]
    first.conv2.stride = first.downsample[0].stride = (1, 1)
    return nn.Sequential(OrderedDict(list(net.named_children())[:-2]))


def small(channels: int = 64) -> nn.Sequential:
    """Four 3x3 convolutions, the first two of stride 2: (N, 3, H, W) -> (N, channels, H/4, W/4)."""
    layers, before = [], 3
    for width, stride in ((channels // 4, 2), (channels // 2, 2), (channels, 1), (channels, 1)):
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        before = width
    return nn.Sequential(*layers)
