"""CondenseNet, and DenseNet-BC with the same learned group convolutions (paper sections 3.2 and 4)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import CondensedConv, LearnedGroupConv, stage_of


def pointwise(
    conv: str, in_channels: int, out_channels: int, groups: int, condense_factor: int, dropout=0.0
) -> nn.Module:
    """BN - ReLU - 1x1 convolution: "learned", "random" (pruned at random), "static" (fixed groups) or "dense"."""
    if conv == "dense":
        return LearnedGroupConv(in_channels, out_channels, 1, 1, dropout)
    if conv == "static":
        if condense_factor != groups:
            raise ValueError(f"static groups, G={groups}, C={condense_factor}: expected C = G, their density is 1/G")
        return CondensedConv(in_channels, out_channels, groups, dropout=dropout)
    if conv not in ("learned", "random"):
        raise ValueError(f"conv {conv!r}: expected 'learned', 'random', 'static' or 'dense'")
    score = "random" if conv == "random" else "magnitude"
    return LearnedGroupConv(in_channels, out_channels, groups, condense_factor, dropout, score)


class DenseLayer(nn.Module):
    """1x1 to `bottleneck` k channels, 3x3 to k channels, joined to the input: (N, R, H, W) -> (N, R + k, H, W)."""

    def __init__(self, conv1: nn.Module, growth: int, groups_3x3: int):
        super().__init__()
        width = conv1.out_channels
        self.conv1 = conv1
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3x3 = nn.Conv2d(width, growth, 3, padding=1, groups=groups_3x3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv3x3(F.relu(self.norm2(self.conv1(x)), inplace=True))
        return torch.cat([x, new], 1)


class CondenseNet(nn.Module):
    """(N, 3, H, W) -> logits (N, classes), for any H and W that leave a pixel to the last block.

    blocks and growth: dense layers and new channels per layer k_m of each block; k_m doubles from block to block
    (exponentially increasing growth rate). Between blocks there is a 2x2 average pool alone, so every layer reads the
    features of all layers before it, in all blocks (fully dense connectivity). With `reduction` the transition is
    that of DenseNet-BC instead: a pointwise convolution to this fraction of the channels comes before the pool.
    stem_stride: 1 (CIFAR) or 2 (ImageNet). `conv` is the kind of the 1x1 convolutions, see `pointwise`.
    """

    def __init__(
        self,
        blocks=(14, 14, 14),
        growth=(8, 16, 32),
        groups=4,
        condense_factor=4,
        groups_3x3=4,
        classes=10,
        conv="learned",
        dropout=0.0,
        stem_stride=1,
        bottleneck=4,
        reduction: float | None = None,
    ):
        super().__init__()
        if len(blocks) != len(growth) or not blocks or min(*blocks, *growth, classes) < 1:
            raise ValueError(f"blocks={blocks}, growth={growth}, classes={classes}: expected as many blocks as growths")
        self.condense_factor, self.stem_stride = condense_factor, stem_stride
        channels = 2 * growth[0]
        self.stem = nn.Conv2d(3, channels, 3, stride=stem_stride, padding=1, bias=False)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for m, (layers, k) in enumerate(zip(blocks, growth, strict=True)):
            if m > 0:
                transition = [nn.AvgPool2d(2)]
                if reduction is not None:
                    reduced = groups * math.ceil(math.ceil(channels * reduction) / groups)
                    transition.insert(0, pointwise(conv, channels, reduced, groups, condense_factor))
                    channels = reduced
                self.transitions.append(nn.Sequential(*transition))
            block = nn.Sequential()
            for _ in range(layers):
                conv1 = pointwise(conv, channels, bottleneck * k, groups, condense_factor, dropout)
                block.append(DenseLayer(conv1, k, groups_3x3))
                channels += k
            self.blocks.append(block)
        self.norm = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # out_channels of the whole convolution also where it has groups, as in the official models
                nn.init.normal_(module.weight, std=math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
        nn.init.zeros_(self.classifier.bias)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features before the classifier: (N, 3, H, W) -> (N, channels)."""
        smallest = self.stem_stride * (2 ** len(self.transitions) - 1) + 1  # the stem rounds up, each pool down
        if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < smallest:
            raise ValueError(f"images {tuple(x.shape)}: expected (N, 3, H, W) with H and W at least {smallest}")
        x = self.stem(x)
        for m, block in enumerate(self.blocks):
            x = block(self.transitions[m - 1](x) if m else x)
        return self.pool(F.relu(self.norm(x), inplace=True)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))

    def learned(self) -> list[LearnedGroupConv]:
        """The learned group convolutions that are or will be pruned (not the dense ones, C = 1)."""
        return [m for m in self.modules() if isinstance(m, LearnedGroupConv) and m.condense_factor > 1]

    def prune(self, progress: float) -> bool:
        """Before each training step: remove what is due at `progress` (iterations done / total); True if anything."""
        stage = stage_of(progress, self.condense_factor)
        return any([layer.prune_to(stage) for layer in self.learned()])  # a list: every layer is pruned, not the first

    def group_lasso(self) -> Tensor:
        """Sum of the group lasso over the layers that still have a stage to come; a scalar, without its lambda."""
        zero = self.classifier.weight.new_zeros(())
        return sum((layer.lasso() for layer in self.learned() if layer.stage < layer.condense_factor - 1), zero)

    def densities(self) -> list[float]:
        """Density of every learned group convolution."""
        return [layer.density for layer in self.learned()]


def condensenet(depth: int = 86, classes: int = 10, **options) -> CondenseNet:
    """CondenseNet-`depth` for 32x32 images: depth = 6n + 2, n layers a block; growth 8-16-32, 12-24-48 for 182."""
    growth = (12, 24, 48) if depth == 182 else (8, 16, 32)
    return CondenseNet(**{"blocks": _blocks(depth, 2), "growth": growth, "classes": classes, **options})


def condensenet_imagenet(groups: int = 4, classes: int = 1000, **options) -> CondenseNet:
    """CondenseNet-74 for 224x224 images, G = C = G of the 3x3 convolutions: 4 or 8 in the paper."""
    return CondenseNet(
        (4, 6, 8, 10, 8), (8, 16, 32, 64, 128), groups, groups, groups, classes, stem_stride=2, **options
    )


def condensenet_light(depth: int = 94, growth: int = 16, classes: int = 10, **options) -> CondenseNet:
    """CondenseNet-light: DenseNet-BC, depth = 6n + 4, with learned group convolutions (94: k = 16; 160: k = 32)."""
    options = {"reduction": 0.5, "classes": classes, **options}
    return CondenseNet(_blocks(depth, 4), (growth,) * 3, **options)


def densenet_bc(depth: int = 100, growth: int = 12, classes: int = 10, **options) -> CondenseNet:
    """DenseNet-BC itself, the dense baseline: the light network without groups."""
    dense = {"conv": "dense", "groups": 1, "condense_factor": 1, "groups_3x3": 1}
    return condensenet_light(depth, growth, classes, **dense, **options)


def _blocks(depth: int, rest: int) -> tuple[int, int, int]:
    """Three blocks of n layers, two convolutions each."""
    if depth < 6 + rest or (depth - rest) % 6:
        raise ValueError(f"depth {depth}: expected 6n + {rest} with n at least 1, e.g. {6 * 14 + rest}")
    return ((depth - rest) // 6,) * 3
