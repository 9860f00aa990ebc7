"""MSDNet, a multi-scale dense network with k exits, as the authors train it (official file: models/msdnet_ge.py)."""

import math
from collections.abc import Sequence
from itertools import islice, pairwise

import torch
from torch import Tensor, nn

from .gradient_equilibrium import MODES, scale_branch


def conv_bn_relu(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, padded to keep the size at stride 1."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


def bottleneck(c_in: int, c_out: int, factor: int, stride: int = 1) -> nn.Sequential:
    """1x1 convolution to at most factor * c_out channels, then 3x3."""
    inner = min(c_in, factor * c_out)
    return nn.Sequential(conv_bn_relu(c_in, inner, 1), conv_bn_relu(inner, c_out, 3, stride))


class FirstLayer(nn.Module):
    """Images -> S scales, finest first, each half the size of the one before; `widths` are their channels."""

    def __init__(self, widths: Sequence[int], stem: str):
        super().__init__()
        if stem == "cifar":
            first, stride = conv_bn_relu(3, widths[0], 3), 1
        else:  # the only convolution with a bias
            conv = nn.Conv2d(3, widths[0], 7, stride=2, padding=3)
            pool = nn.MaxPool2d(3, stride=2, padding=1)
            first, stride = nn.Sequential(conv, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True), pool), 4
        self.scales = nn.ModuleList([first, *(conv_bn_relu(a, b, 3, stride=2) for a, b in pairwise(widths))])
        self.smallest = stride * 2 ** (len(widths) - 1)  # image whose coarsest map is one pixel

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < self.smallest:
            expected = f"(N, 3, H, W) with H and W at least {self.smallest}"
            raise ValueError(f"images of shape {tuple(x.shape)}, expected {expected}: resize them or use fewer scales")
        state = []
        for scale in self.scales:
            x = scale(x)
            state.append(x)
        return state


class Grow(nn.Module):
    """One scale of one layer: cat[x, down(finer), normal(x)], or cat[x, normal(x)] where there is no finer scale."""

    def __init__(self, down: nn.Module | None, normal: nn.Module):
        super().__init__()
        self.down, self.normal = down, normal

    def forward(self, x: Tensor, finer: Tensor | None) -> Tensor:
        new = [self.normal(x)] if self.down is None else [self.down(finer), self.normal(x)]
        return torch.cat([x, *new], dim=1)


class Layer(nn.Module):
    """Adds growth * gF_s channels to every scale that stays; reads one finer scale more where one is dropped.

    Half of the new channels come from the finer scale, through a strided bottleneck, where there is one.
    """

    def __init__(self, width: int, growth: int, gF: Sequence[int], bF: Sequence[int], n_in: int, n_out: int):
        super().__init__()
        self.scales = nn.ModuleList()
        for s in range(len(gF) - n_out, len(gF)):
            if s == len(gF) - n_in:  # the finest there is
                down, new = None, growth * gF[s]
            else:
                new = growth * gF[s] // 2
                down = bottleneck(width * gF[s - 1], new, bF[s - 1], stride=2)
            self.scales.append(Grow(down, bottleneck(width * gF[s], new, bF[s])))

    def forward(self, state: list[Tensor]) -> list[Tensor]:
        n = len(self.scales)
        finer = [None, *state[:-1]]
        return [grow(x, f) for grow, x, f in zip(self.scales, state[-n:], finer[-n:], strict=True)]


class Transition(nn.Module):
    """1x1 convolutions to fewer channels, one a scale, after a layer that dropped a scale."""

    def __init__(self, width: int, reduced: int, gF: Sequence[int]):
        super().__init__()
        self.scales = nn.ModuleList(conv_bn_relu(width * f, reduced * f, 1) for f in gF)

    def forward(self, state: list[Tensor]) -> list[Tensor]:
        return [conv(x) for conv, x in zip(self.scales, state, strict=True)]


class Exit(nn.Module):
    """Classifier on the coarsest map (N, C, h, w): two strided convolutions, average pool, linear.

    The official 2x2 average pool leaves one pixel on the official image sizes only (32 and 224); the mean over what
    there is does the same there, and takes any size.
    """

    def __init__(self, c_in: int, classes: int, stem: str):
        super().__init__()
        width = 128 if stem == "cifar" else c_in
        self.convs = nn.Sequential(conv_bn_relu(c_in, width, 3, stride=2), conv_bn_relu(width, width, 3, stride=2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, d), what `linear` reads."""
        return self.pool(self.convs(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


def step_sizes(exits: int, base: int, step: int, step_mode: str) -> list[int]:
    """Layers of each block: `base`, then `step` ("even") or step * i + 1 for block i = 1.. counted from 0 ("lin_grow")."""
    if step_mode not in ("even", "lin_grow"):
        raise ValueError(f"unknown step_mode {step_mode!r}, expected 'even' or 'lin_grow'")
    if exits < 1 or base < 1 or step < 1:
        raise ValueError(f"exits={exits}, base={base}, step={step}: expected at least 1 of each")
    return [base, *(step if step_mode == "even" else step * i + 1 for i in range(1, exits))]


class MSDNet(nn.Module):
    """Images (N, 3, H, W) -> k logits (N, classes), one an exit. Paper: 32x32 ("cifar") or 224x224 ("imagenet").

    exits, base, step, step_mode: k blocks of `step_sizes` layers, n in all; exit i reads the output of block i.
    channels, growth: width c0 at the start and what each layer adds, per unit of growth_factor.
    growth_factor, bottleneck_factor: gF and bF, one number a scale, finest first; their length S is the number of
        scales. Every ceil(n/S) layers the finest scale is dropped and the others shrink to `reduction` of their width.
        If more than one is left at the end (in no published network), weights of the finer ones get no gradient.
    stem: "imagenet" (7x7 stride 2 and a max pool; exits keep their width) or "cifar" (3x3; exits 128 wide).
    equilibrium: None, or gradient equilibrium on "all" scales (the formula) or the "last" (official code). It acts on
        gradients alone: the function and the weights are the same, and it can be set later as an attribute.

    One exit at a time, `state` being the image at first and the list of scale tensors after block i:

        state = model.run_block(i, state)
        logits = model.exit_logits(i, state, logits)

    Weights keep torch's default initialisation, as in the official code, whose own loop reaches no convolution; they are
    made in its order too, so one seed gives both the same weights.
    """

    def __init__(
        self,
        exits: int = 5,
        base: int = 4,
        step: int = 4,
        step_mode: str = "even",
        channels: int = 32,
        growth: int = 16,
        growth_factor: Sequence[int] = (1, 2, 4, 4),
        bottleneck_factor: Sequence[int] = (1, 2, 4, 4),
        classes: int = 1000,
        stem: str = "imagenet",
        reduction: float = 0.5,
        equilibrium: str | None = None,
    ):
        super().__init__()
        gF, bF, S = growth_factor, bottleneck_factor, len(growth_factor)
        self.steps = step_sizes(exits, base, step, step_mode)
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"unknown stem {stem!r}, expected 'imagenet' or 'cifar'")
        if equilibrium not in MODES:
            raise ValueError(f"unknown equilibrium {equilibrium!r}, expected None, 'all' or 'last'")
        if len(bF) != S or S < 1 or min(*gF, *bF) < 1:
            raise ValueError(f"growth_factor {gF}, bottleneck_factor {bF}: expected one number >= 1 a scale in each")
        if channels < 1 or growth < 1 or classes < 1 or not 0 < reduction <= 1:
            sizes = f"channels={channels}, growth={growth}, classes={classes}, reduction={reduction}"
            raise ValueError(f"{sizes}: expected at least 1 of each and 0 < reduction <= 1")
        if any(growth * f % 2 for f in gF[1:]):
            raise ValueError(f"growth {growth} x growth_factor {gF}: expected even products after the first scale")
        self.num_exits, self.classes, self.equilibrium = exits, classes, equilibrium

        interval = math.ceil(sum(self.steps) / S)
        alive = [S - (l - 1) // interval for l in range(1, sum(self.steps) + 1)]  # scales after layer l
        self.blocks, self.exits = nn.ModuleList(), nn.ModuleList()
        scales = pairwise([S, *alive])  # before and after each layer
        width = channels
        for size in self.steps:
            layers = [] if self.blocks else [FirstLayer([channels * f for f in gF], stem)]
            for n_in, n_out in islice(scales, size):
                layers.append(Layer(width, growth, gF, bF, n_in, n_out))
                width += growth
                if n_out < n_in:
                    reduced = max(1, int(reduction * width))
                    layers.append(Transition(width, reduced, gF[-n_out:]))
                    width = reduced
            self.blocks.append(nn.Sequential(*layers))
            self.exits.append(Exit(width * gF[-1], classes, stem))

    @property
    def feature_dims(self) -> list[int]:
        """d_1..d_k, the widths of the pooled features the linear classifiers read."""
        return [exit.linear.in_features for exit in self.exits]

    def run_block(self, i: int, state: Tensor | list[Tensor]) -> list[Tensor]:
        """Block i (from 0): images, or the state after block i - 1 -> scale tensors (N, C_s, H_s, W_s), finest first."""
        k = self.num_exits
        if i > 0:
            state = scale_branch(state, k - i, self.equilibrium)
        return scale_branch(self.blocks[i](state), 1 / (k - i), self.equilibrium)

    def exit_features(self, i: int, state: list[Tensor]) -> Tensor:
        """State after block i -> pooled features (N, d_i) of exit i."""
        return self.exits[i].features(state[-1])

    def exit_logits(self, i: int, state: list[Tensor], previous_logits: Tensor | None = None) -> Tensor:
        """State after block i -> logits (N, classes) of exit i, which here owe nothing to those of the exit before."""
        return self.exits[i](state[-1])

    def features(self, x: Tensor) -> list[Tensor]:
        """Images -> pooled features (N, d_i) of every exit."""
        features = []
        for i in range(self.num_exits):
            x = self.run_block(i, x)
            features.append(self.exit_features(i, x))
        return features

    def forward(self, x: Tensor) -> list[Tensor]:
        return [exit.linear(f) for exit, f in zip(self.exits, self.features(x), strict=True)]


def msdnet_imagenet(step: int = 4, **changes) -> MSDNet:
    """The paper's three ImageNet networks, base = step = 4, 6 or 7; `changes` are arguments of MSDNet."""
    return MSDNet(**{"base": step, "step": step, **changes})


def msdnet_cifar(exits: int = 7, step_mode: str = "even", classes: int = 100, **changes) -> MSDNet:
    """The CIFAR networks: "even" (anytime prediction; base 4, step 2) or "lin_grow" (budgeted batch; base 1, step 1)."""
    base, step = (4, 2) if step_mode == "even" else (1, 1)
    settings = {"base": base, "step": step, "channels": 16, "growth": 6, "stem": "cifar"}
    factors = {"growth_factor": (1, 2, 4), "bottleneck_factor": (1, 2, 4)}
    return MSDNet(exits=exits, step_mode=step_mode, classes=classes, **{**settings, **factors, **changes})
