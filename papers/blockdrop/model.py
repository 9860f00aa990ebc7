"""ResNets whose residual blocks can be dropped, each image its own (section 3.1; official files: models/{base,resnet}.py)."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class Block(nn.Module):
    """y = ReLU(shortcut(x) + residual(x)) if kept. Dropped, y = shortcut(x): the ReLU goes with the residual branch."""

    def __init__(self, residual: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.residual, self.shortcut = residual, shortcut

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (B, C, H, W); keep (B,) bool, or None: keep all. Everything is computed for all rows, then chosen."""
        passed = self.shortcut(x)
        y = self.residual(x).add_(passed).relu_()
        return y if keep is None else torch.where(keep[:, None, None, None], y, passed)

    def skip(self, x: Tensor) -> Tensor:
        return self.shortcut(x)


class PoolAndPad(nn.Module):
    """The shortcut without parameters ("type B"): averages over stride x stride pixels, then channels of zeros.

    (B, C, H, W) -> (B, channels_out, ceil(H / stride), ceil(W / stride)), the size that a strided 3x3 convolution gives.
    """

    def __init__(self, channels_out: int, stride: int):
        super().__init__()
        self.channels_out, self.stride = channels_out, stride

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.channels_out - x.shape[1]))


class DroppableResNet(nn.Module):
    """Images (B, 3, H, W) and a policy (B, K), 1 keep / 0 drop, float or bool -> logits (B, classes).

    stem: images -> features; blocks: K of them; head: features -> logits, a linear layer last.

    With a policy the batch is computed whole and each row mixed by its bits: x <- m block(x) + (1 - m) shortcut(x), the
    form for training. A block that no image keeps is not run, so its batch norms stay as they are; one that all keep is
    not mixed, so a policy of ones gives the bits of no policy. `engine.SkippingEngine` skips for each image.
    """

    def __init__(self, stem: nn.Module, blocks: Sequence[Block], head: nn.Sequential):
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head
        self.num_blocks, self.classes = len(blocks), head[-1].out_features

    def forward(self, images: Tensor, policy: Tensor | None = None) -> Tensor:
        """policy None: all blocks. ValueError: images or policy of another shape, policy not of zeros and ones."""
        return self.forward_from(self.features(images), policy)

    def features(self, images: Tensor, upto: int = 0) -> Tensor:
        """Images (B, 3, H, W) -> what the stem and the first `upto` blocks make of them, all of these kept."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images {tuple(images.shape)}, expected (B, 3, H, W)")
        x = self.stem(images)
        for block in self.blocks[:upto]:
            x = block(x)
        return x

    def forward_from(self, x: Tensor, policy: Tensor | None = None, start: int = 0) -> Tensor:
        """x of `features(images, start)` -> logits (B, classes); policy (B, K) as in forward, its first columns unread."""
        if policy is None:
            kept = [len(x)] * self.num_blocks
        else:
            check_policy(policy, len(x), self.num_blocks)
            kept = kept_counts(policy)
        for k in range(start, self.num_blocks):
            if kept[k] == 0:
                x = self.blocks[k].skip(x)
            elif kept[k] == len(x):
                x = self.blocks[k](x)
            else:
                x = self.blocks[k](x, policy[:, k] != 0)
        return self.head(x)


def check_policy(policy: Tensor, images: int, blocks: int) -> None:
    if policy.shape != (images, blocks):
        raise ValueError(f"policy {tuple(policy.shape)}, expected ({images}, {blocks}): a bit an image and block")


def kept_counts(policy: Tensor) -> list[int]:
    """(B, K) -> how many images keep each block. On a GPU this waits, once: what is run depends on it."""
    ones, zeros = torch.stack([(policy == 1).sum(0), (policy == 0).sum(0)]).tolist()
    if any(a + b != len(policy) for a, b in zip(ones, zeros, strict=True)):
        raise ValueError("policy with other values than 0 (drop) and 1 (keep)")
    return ones


# ------------------------------------------------------------------------------------------------ CIFAR
def resnet_cifar(depth: int, classes: int = 10, widths: Sequence[int] = (16, 32, 64)) -> DroppableResNet:
    """The paper's CIFAR networks: depth = 6n + 2, n blocks a stage (R-32: K = 15, R-110: K = 54).

    Made for 32x32; the mean over the last map (8x8 there, where it is the AvgPool2d(8) of the official code) takes any
    size. Convolutions start as N(0, 2 / (k k c_out)), the rest as in torch; one seed gives the official code's weights.
    """
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        raise ValueError(f"depth={depth}, expected 6n + 2 with n >= 1: 8, 14, 20, 32, 56, 110, ...")
    if len(widths) != 3 or classes < 1 or widths[0] < 1 or sorted(widths) != list(widths):
        raise ValueError(f"widths={tuple(widths)}, classes={classes}: expected three widths, none below the one before")
    conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
    stem = nn.Sequential(conv, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
    blocks, c_in = [], widths[0]
    for stage, c_out in enumerate(widths):
        for i in range(n):
            stride = 2 if stage and not i else 1
            shortcut = PoolAndPad(c_out, stride) if stage and not i else nn.Identity()
            blocks.append(Block(_two_convolutions(c_in, c_out, stride), shortcut))
            c_in = c_out
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes))
    model = DroppableResNet(stem, blocks, head)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
    return model


def _two_convolutions(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
        nn.BatchNorm2d(c_out),
    )


# ------------------------------------------------------------------------------------------------ torchvision
def from_torchvision(net: torchvision.models.ResNet) -> DroppableResNet:
    """Any torchvision ResNet in droppable form: the same modules, so the same weights, and the same logits to the bit."""
    blocks = []
    for block in (b for layer in (net.layer1, net.layer2, net.layer3, net.layer4) for b in layer):
        layers = [block.conv1, block.bn1, nn.ReLU(inplace=True), block.conv2, block.bn2]
        if hasattr(block, "conv3"):
            layers += [nn.ReLU(inplace=True), block.conv3, block.bn3]
        blocks.append(Block(nn.Sequential(*layers), block.downsample or nn.Identity()))
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return DroppableResNet(stem, blocks, nn.Sequential(net.avgpool, nn.Flatten(), net.fc))


def resnet101(classes: int = 1000) -> DroppableResNet:
    """The paper's ImageNet network, K = 33 bottleneck blocks, with random weights: see `load_torchvision`."""
    return from_torchvision(torchvision.models.resnet101(weights=None, num_classes=classes))


def load_torchvision(model: DroppableResNet, state_dict: Mapping[str, Tensor]) -> None:
    """Put a state dict with torchvision's names (conv1, bn1, layer1.0.conv1, ..., fc) into the model, CIFAR ones too.

    ValueError naming what is missing, unexpected, or of another shape; the model is then left as it was.
    """
    own, modules, names = model.state_dict(), _torchvision_names(model), {}
    for ours in own:
        module, tensor = ours.rsplit(".", 1)
        names[f"{modules[module]}.{tensor}"] = ours
    missing = [n for n in names if n not in state_dict and not n.endswith("num_batches_tracked")]  # old files have none
    wrong = {"missing": missing, "unexpected": [n for n in state_dict if n not in names]}
    wrong["of another shape"] = [n for n in names if n in state_dict and state_dict[n].shape != own[names[n]].shape]
    if any(wrong.values()):
        told = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"
            for what, keys in wrong.items()
            if keys
        ]
        raise ValueError(f"this state dict does not fit: {'; '.join(told)}")
    model.load_state_dict({names[n]: value for n, value in state_dict.items()}, strict=False)


def _torchvision_names(model: DroppableResNet) -> dict[str, str]:
    """{name of a module with weights: its name in torchvision}."""
    names = {"stem.0": "conv1", "stem.1": "bn1"}
    stage = index = 0
    for k, block in enumerate(model.blocks):
        if k == 0 or not isinstance(block.shortcut, nn.Identity):
            stage, index = stage + 1, 0
        layer = f"layer{stage}.{index}"
        for i in range(0, len(block.residual), 3):  # convolution, batch norm, ReLU
            names[f"blocks.{k}.residual.{i}"] = f"{layer}.conv{i // 3 + 1}"
            names[f"blocks.{k}.residual.{i + 1}"] = f"{layer}.bn{i // 3 + 1}"
        for i in range(2):
            names[f"blocks.{k}.shortcut.{i}"] = f"{layer}.downsample.{i}"
        index += 1
    return names | {"head.2": "fc"}
