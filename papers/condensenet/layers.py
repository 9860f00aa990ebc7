"""Learned group convolution, and the group convolution that it becomes at test time (paper section 3.1).

Symbols as in the paper: R input channels, O output channels, G groups, C condensation factor, F the O x R weight.
Groups are interleaved, as in the official layers.py: group g owns the output channels g, g + G, g + 2G, ..., so that
a 3x3 convolution with contiguous groups, coming next, reads outputs of every group (the Permute of section 4.1).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import condensed_conv, scale_shift


def stage_of(progress: float, condense_factor: int) -> int:
    """Condensing stages that are over at `progress` in [0, 1] of the training: 0 .. C-1.

    Stage i ends at progress i / (2(C - 1)): the C - 1 stages fill the first half (section 3.1). The comparison is the
    one of the official code, so that both prune at the same iteration.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress}: expected a number in [0, 1], iterations done / iterations in total")
    return sum(2 * progress >= i / (condense_factor - 1) for i in range(1, condense_factor))


def _check(in_channels: int, out_channels: int, groups: int, condense_factor: int) -> None:
    r, o, g, c = in_channels, out_channels, groups, condense_factor
    if min(r, o, g, c) < 1 or r % g or r % c or o % g:
        raise ValueError(f"R={r}, O={o}, G={g}, C={c}: expected R divisible by G and by C, and O divisible by G")


class LearnedGroupConv(nn.Module):
    """BN - ReLU - (dropout) - 1x1 convolution whose groups are learned: (N, R, H, W) -> (N, O, H, W).

    Starts dense. Each condensing stage removes, in every group on its own, R/C of the inputs it still has: the ones of
    least sum_i |F_ij| over the group's outputs i ("magnitude"), or any ("random", the baseline). C = 1 stays dense.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, condense_factor: int, dropout=0.0, score="magnitude"
    ):
        super().__init__()
        _check(in_channels, out_channels, groups, condense_factor)
        if score not in ("magnitude", "random"):
            raise ValueError(f"score {score!r}: expected 'magnitude' or 'random'")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.groups, self.condense_factor = groups, condense_factor
        self.dropout, self.score = dropout, score
        self.norm = nn.BatchNorm2d(in_channels)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        nn.init.normal_(self.weight, std=math.sqrt(2 / out_channels))
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.stage = 0  # condensing stages done; a plain int, so that looking at it never waits for the device

    def get_extra_state(self) -> Tensor:
        """The stage, in the state dict beside weight and mask."""
        return torch.tensor(self.stage, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.stage = int(state)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(x), inplace=True)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return F.conv2d(x, self.weight * self.mask if self.condense_factor > 1 else self.weight)

    def kept(self) -> Tensor:
        """(G, R) float, 1 where group g reads input j: the mask's rows g, g + G, ... are the same."""
        return self.mask[: self.groups, :, 0, 0]

    @torch.no_grad()
    def prune_to(self, stage: int) -> bool:
        """Remove all inputs due by the end of `stage` (0 .. C-1); True if some were. Each group keeps R(1 - stage/C).

        A short run may jump over stages: everything due is removed, where the official code takes one slice a call and
        ends too dense. A stage already reached does nothing.
        """
        if not 0 <= stage < self.condense_factor:
            raise ValueError(f"stage {stage}: expected 0 .. C - 1 = {self.condense_factor - 1}")
        if stage <= self.stage:
            return False
        kept = self.kept()
        scores = self.weight.abs().view(-1, self.groups, self.in_channels).sum(0)
        if self.score == "random":
            scores = torch.rand_like(scores)
        # Inputs removed before come first, whatever their weights: the ranks after them are the ones to remove now.
        order = scores.masked_fill(kept == 0, -1).argsort(dim=1, stable=True)
        size = self.in_channels // self.condense_factor
        kept = kept.scatter(1, order[:, self.stage * size : stage * size], 0)
        self.mask.copy_(kept.repeat(self.out_channels // self.groups, 1)[:, :, None, None])
        self.stage = stage
        return True

    def lasso(self) -> Tensor:
        """Group lasso, sum_g sum_j sqrt(sum_{i in g} F_ij^2) of the masked weight (section 3.1); a scalar.

        A column of zeros adds nothing and gets gradient zero (the slope of the root there is infinite).
        """
        squares = (self.weight * self.mask).square().view(-1, self.groups, self.in_channels).sum(0)
        positive = squares > 0
        return (torch.where(positive, squares, 1).sqrt() * positive).sum()

    @property
    def density(self) -> float:
        """Fraction of the weights that is not masked: 1 at the start, 1/C after the last stage."""
        return self.mask.count_nonzero().item() / self.mask.numel()

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, groups={self.groups}, condense_factor={self.condense_factor}"


class CondensedConv(nn.Module):
    """Gather - BN - ReLU - 1x1 group convolution - channel shuffle: (N, R, H, W) -> (N, O, H, W).

    With C, the test-time form of LearnedGroupConv: group g reads the R/C channels that `index` lists for it, so
    G R/C channels are gathered; some may repeat, others be absent (section 3.1, the index layer). Without C, the
    static group convolution: group g reads channels g R/G .. (g+1) R/G - 1, nothing is gathered; C = G by nature.
    The shuffle puts output o of group g at channel o G + g, the order of LearnedGroupConv.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, condense_factor: int | None = None, dropout=0.0
    ):
        super().__init__()
        self.gathers = condense_factor is not None
        condense_factor = groups if condense_factor is None else condense_factor
        _check(in_channels, out_channels, groups, condense_factor)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.groups, self.condense_factor = groups, condense_factor
        self.dropout = dropout
        gathered = groups * in_channels // condense_factor
        self.register_buffer("index", torch.arange(gathered) % in_channels)
        self.norm = nn.BatchNorm2d(gathered)
        self.conv = nn.Conv2d(gathered, out_channels, 1, groups=groups, bias=False)
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / out_channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and not (self.training or torch.is_grad_enabled()):  # one pass over memory
            return condensed_conv(x, self.index, *scale_shift(self.norm), self.conv.weight, self.groups)
        x = F.relu(self.norm(x.index_select(1, self.index) if self.gathers else x), inplace=True)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return F.channel_shuffle(self.conv(x), self.groups)


class CondensedLinear(nn.Module):
    """Linear layer on the `keep` features listed in `index`: (N, in_features) -> (N, out_features)."""

    def __init__(self, in_features: int, out_features: int, keep: int):
        super().__init__()
        if not 1 <= keep <= in_features:
            raise ValueError(f"keep={keep} of {in_features} features: expected 1 .. {in_features}")
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("index", torch.arange(keep))
        self.linear = nn.Linear(keep, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.index_select(1, self.index))
