"""The network: a chain of units that local training cuts and testing does not (official files: networks/resnet.py).

Units are the stem, the residual blocks of all stages, and the head. A cut is (stage, block): the network is cut after that
block, both as the paper's tables count them: stages from 1, blocks from 0, and (0, 0) is after the stem.
"""

import math
from collections.abc import Sequence

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

Cut = tuple[int, int]


class ResNet(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes).

    stem: images -> features; stages: blocks in their order; head: features -> logits, a linear layer last.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Sequential], head: nn.Sequential):
        super().__init__()
        self.stem, self.stages, self.head = stem, nn.ModuleList(stages), head
        self.classes = head[-1].out_features

    @property
    def units(self) -> list[nn.Module]:
        return [self.stem, *(block for stage in self.stages for block in stage), self.head]

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Units start .. stop - 1 (None: to the last) on the output of unit start - 1, or on images."""
        for unit in self.units[start:stop]:
            x = unit(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images {tuple(images.shape)}, expected (B, 3, H, W)")
        return self.run(images)

    def units_before(self, cut: Cut) -> int:
        """How many units lie before a cut; ValueError where there is no such block."""
        stage, block = cut
        sizes = [1, *map(len, self.stages)]  # stage 0 is the stem
        if not (0 <= stage < len(sizes) and 0 <= block < sizes[stage]):
            blocks = ", ".join(f"{n} in stage {s}" for s, n in enumerate(sizes[1:], 1))
            raise ValueError(f"no block {block} in stage {stage} to cut after; blocks count from 0: {blocks}")
        return sum(sizes[:stage]) + block + 1


def width(unit: nn.Module) -> int:
    """Channels that the stem or a block puts out: those of its last batch norm."""
    return [m for m in unit.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features


def initialise(module: nn.Module) -> nn.Module:
    """Convolutions N(0, 2 / (k k c_out)), batch norms 1 and 0, as the paper's code does; linear layers as in torch."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, math.sqrt(2 / (math.prod(m.kernel_size) * m.out_channels)))
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
    return module


def conv_norm_relu(c_in: int, c_out: int, kernel: int, stride: int = 1, bias: bool = False) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=bias)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


def resnet_cifar(depth: int, classes: int = 10, widths: Sequence[int] = (16, 32, 64)) -> ResNet:
    """R-<depth>, depth = 6n + 2: n blocks a stage; a 1x1 convolution with batch norm in the shortcut where stages meet."""
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        raise ValueError(f"depth {depth}, expected 6n + 2 with n >= 1: 8, 14, 20, 32, 110, ...")
    if len(widths) != 3 or min(widths) < 1 or classes < 1:
        raise ValueError(f"widths={tuple(widths)}, classes={classes}: expected three widths and at least 1 of each")
    stages, c_in = [], widths[0]
    for stage, c_out in enumerate(widths):
        blocks = []
        for i in range(n):
            stride, shortcut = (2 if stage and not i else 1), None
            if stride != 1 or c_in != c_out:
                shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
            blocks.append(BasicBlock(c_in, c_out, stride, shortcut))
            c_in = c_out
        stages.append(nn.Sequential(*blocks))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes))
    return initialise(ResNet(nn.Sequential(*conv_norm_relu(3, widths[0], 3)), stages, head))


def from_torchvision(net: torchvision.models.ResNet) -> ResNet:
    """Any ResNet of torchvision as a chain of units: the same modules, so the same weights and logits, bit for bit."""
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    head = nn.Sequential(net.avgpool, nn.Flatten(), net.fc)
    return ResNet(stem, [net.layer1, net.layer2, net.layer3, net.layer4], head)


TORCHVISION = ("resnet101", "resnet152", "resnext101_32x8d")  # those that the paper trains


def network(name: str, classes: int, widths: Sequence[int] = (16, 32, 64)) -> ResNet:
    """ "r32", "r110", "r<6n+2>": the CIFAR networks; or one of `TORCHVISION`, without weights."""
    if name in TORCHVISION:
        return from_torchvision(getattr(torchvision.models, name)(weights=None, num_classes=classes))
    if not (name.startswith("r") and name[1:].isdecimal()):
        raise ValueError(f"unknown network {name!r}; expected r32, r110, another r<6n+2>, or {', '.join(TORCHVISION)}")
    return resnet_cifar(int(name[1:]), classes, widths)
