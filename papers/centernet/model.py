"""CenterNet: an hourglass backbone and, for each keypoint of a box, a pooling module and its heads.

Keypoints are named in this order everywhere: top_left, bottom_right, center. With center="none" the network is
CornerNet: two keypoints.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hourglass import Hourglass, Residual, conv_bn, conv_bn_relu, recomputed
from .pooling import CascadeCornerPooling, CenterPooling, CornerPooling

STRIDE = 4  # input pixels of an output cell
HEAT_BIAS = -2.19  # a sigmoid of 0.1 at the start

Corner = Literal["plain", "cascade"]
Center = Literal["none", "plain", "pool"]  # plain: a centre branch without center pooling


class Output(NamedTuple):
    """What one stack predicts. k keypoints: 3, or 2 for CornerNet; corners alone have tags.

    Dense: tags (B, 1, h, w), offsets (B, 2, h, w). At M cells an image: tags (B, M), offsets (B, M, 2).
    """

    heats: tuple[Tensor, ...]  # k of logits (B, classes, h, w)
    tags: tuple[Tensor, Tensor]  # associative embedding
    offsets: tuple[Tensor, ...]  # k of x, y: how far the keypoint lies from its cell's corner, in cells


class Head(nn.Sequential):
    """3x3 convolution, ReLU, 1x1 convolution."""

    def __init__(self, c: int, channels: int):
        super().__init__(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(c, channels, 1))

    def at(self, x: Tensor, cells: Tensor) -> Tensor:
        """The head's output at some cells only: x (B, c, h, w), flat cells (B, M) int64 -> (B, M, channels).

        Tags and offsets are read where keypoints are, at most 128 of 128 x 128 cells: nothing else is computed.
        """
        conv, _, last = self
        _, c, _, w = x.shape
        padded = F.pad(x, (1, 1, 1, 1)).flatten(2)
        wide = w + 2
        middle = cells.div(w, rounding_mode="floor") * wide + cells % w  # the cell's top left neighbour, padded
        steps = torch.arange(3, device=x.device)
        around = (middle[..., None, None] + steps[:, None] * wide + steps).flatten(1)  # (B, M 9)
        patches = padded.gather(2, around[:, None].expand(-1, c, -1)).unflatten(2, (-1, 9))  # (B, c, M, 9)
        hidden = torch.einsum("bcmk,ock->bmo", patches, conv.weight.flatten(2)) + conv.bias
        return F.linear(F.relu(hidden), last.weight.flatten(1), last.bias)


class Keypoint(nn.Module):
    """One keypoint of a stack: pooling module, heat map, offsets, and for a corner its tag."""

    def __init__(self, pooling: nn.Module, c: int, classes: int, tagged: bool):
        super().__init__()
        self.pooling, self.heat, self.offset = pooling, Head(c, classes), Head(c, 2)
        self.tag = Head(c, 1) if tagged else None
        nn.init.constant_(self.heat[-1].bias, HEAT_BIAS)


class Stack(nn.Module):
    """One hourglass with the keypoints that are predicted from it."""

    def __init__(self, dims: Sequence[int], modules: Sequence[int], classes: int, corner: Corner, center: Center):
        super().__init__()
        c = dims[0]
        self.hourglass, self.features = Hourglass(dims, modules), conv_bn_relu(3, c, c)
        corner_pooling = CascadeCornerPooling if corner == "cascade" else CornerPooling
        poolings = [corner_pooling(c, "top_left"), corner_pooling(c, "bottom_right")]
        poolings += [] if center == "none" else [CenterPooling(c, pool=center == "pool")]
        self.keypoints = nn.ModuleList(Keypoint(p, c, classes, tagged=k < 2) for k, p in enumerate(poolings))

    def predict(self, x: Tensor, cells: Tensor | Callable | None) -> Output:
        maps = [keypoint.pooling(x) for keypoint in self.keypoints]
        heats = tuple(keypoint.heat(y) for keypoint, y in zip(self.keypoints, maps, strict=True))
        if callable(cells):
            cells = cells(heats)

        def read(head: Head, k: int) -> Tensor:
            return head(maps[k]) if cells is None else head.at(maps[k], cells[k])

        tags = tuple(read(self.keypoints[k].tag, k) for k in (0, 1))
        offsets = tuple(read(keypoint.offset, k) for k, keypoint in enumerate(self.keypoints))
        return Output(heats, tags if cells is None else tuple(tag[..., 0] for tag in tags), offsets)


class CenterNet(nn.Module):
    """Images (B, 3, H, W), normalised, to an `Output` a stack in training mode, and of the last stack in eval mode.

    dims, modules: of each hourglass, see `Hourglass`. H and W are one less than a multiple of `multiple` = 4 x 2^depth:
    511 gives 128 x 128 cells. recompute=True keeps nothing of the inside of the hourglasses for the backward pass.
    ValueError for widths that do not fit and for other image sizes.
    """

    def __init__(
        self,
        classes: int,
        dims: Sequence[int],
        modules: Sequence[int],
        stacks: int = 1,
        corner: Corner = "cascade",
        center: Center = "pool",
        recompute: bool = False,
    ):
        super().__init__()
        if len(dims) < 2 or len(dims) != len(modules) or min(modules) < 1 or min(dims) < 2 or dims[0] % 2:
            raise ValueError(f"dims {list(dims)} and modules {list(modules)}: expected as many of each, at least two, "
                             "an even first width and at least one module a level")  # fmt: skip
        if classes < 1 or stacks < 1:
            raise ValueError(f"{classes} classes and {stacks} stacks: expected at least one of each")
        c = dims[0]
        self.classes, self.multiple, self.recompute = classes, STRIDE * 2 ** (len(dims) - 1), recompute
        self.stem = nn.Sequential(conv_bn_relu(7, 3, c // 2, stride=2), Residual(c // 2, c, stride=2))
        self.stacks = nn.ModuleList(Stack(dims, modules, classes, corner, center) for _ in range(stacks))
        self.carried = nn.ModuleList(conv_bn(1, c, c) for _ in range(stacks - 1))
        self.brought = nn.ModuleList(conv_bn(1, c, c) for _ in range(stacks - 1))
        self.between = nn.ModuleList(Residual(c, c) for _ in range(stacks - 1))

    def forward(self, images: Tensor, cells: Tensor | Callable | None = None) -> list[Output]:
        """cells: where tags and offsets are wanted, (k, B, M) flat cells y w + x, or a function that picks them from the
        heat maps; None: everywhere.
        """
        if any((side + 1) % self.multiple for side in images.shape[-2:]):
            raise ValueError(f"images of {images.shape[-2]} x {images.shape[-1]}, expected sides one less than a "
                             f"multiple of {self.multiple}")  # fmt: skip
        x, outputs = self.stem(images), []
        for i, stack in enumerate(self.stacks):
            keep = self.training and self.recompute and torch.is_grad_enabled()
            features = stack.features(recomputed(stack.hourglass, x) if keep else stack.hourglass(x))
            last = i == len(self.stacks) - 1
            if self.training or last:
                outputs.append(stack.predict(features, cells))
            if not last:
                x = F.relu(self.carried[i](x) + self.brought[i](features), inplace=True)
                x = self.between[i](x)
        return outputs


DIMS, MODULES = (256, 256, 384, 384, 384, 512), (2, 2, 2, 2, 2, 4)


def centernet(depth: Literal[52, 104], classes: int = 80, **changed) -> CenterNet:
    """The paper's networks: Hourglass-52 is one hourglass, Hourglass-104 two. changed: corner, center, recompute."""
    if depth not in (52, 104):
        raise ValueError(f"Hourglass-{depth}: expected 52 or 104")
    return CenterNet(classes, DIMS, MODULES, stacks=depth // 52, **changed)
