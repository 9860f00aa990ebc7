"""Horizontal Pyramid Matching: one map, stripes of several heights, and for each stripe features and a classifier of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .erasing import HorizontalErasing
from .kernels import pyramid_pool

SCALES = (1, 2, 4, 8)  # bins of the paper's four scales, 15 in all


class PyramidHead(nn.Module):
    """Of each bin its own 1x1 convolution, batch norm and ReLU, and its own classifier; all bins in one grouped product.

    G (bins, N, C) -> H_ij = ReLU(BN(W_ij G_ij)), N x dim each, and logits V_ij H_ij, N x identities; no biases.
    """

    def __init__(self, bins: int, channels: int, dim: int, identities: int):
        super().__init__()
        self.reduce = nn.Parameter(torch.empty(bins, channels, dim))
        self.norm = nn.BatchNorm1d(bins * dim)
        self.classify = nn.Parameter(torch.empty(bins, dim, identities))
        nn.init.normal_(self.reduce, std=(2 / dim) ** 0.5)  # official: fan out
        nn.init.normal_(self.classify, std=0.001)

    def forward(self, pooled: Tensor) -> Tensor:
        """(bins, N, C) -> the bins' features side by side, (N, bins * dim)."""
        return F.relu(self.norm(torch.bmm(pooled, self.reduce).transpose(0, 1).flatten(1)))

    def logits(self, features: Tensor) -> Tensor:
        """(N, bins * dim) -> (bins, N, identities)."""
        bins, dim, _ = self.classify.shape
        return torch.bmm(features.unflatten(1, (bins, dim)).transpose(0, 1), self.classify)


class HPM(nn.Module):
    """Images (N, 3, H, W) -> in training the logits of every bin, (bins, N, identities); else descriptors (N, bins * dim).

    backbone: gives a map (N, channels, R, W); R is a multiple of the largest scale.
    pool: "avg+max" as in the paper; "avg" and "max" alone are ablations (the released code has only those).
    erasing: probability of horizontal random erasing in training (variant HPM+HRE: 0.5).
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        identities: int,
        dim: int = 256,
        scales: tuple[int, ...] = SCALES,
        pool: str = "avg+max",
        erasing: float = 0.0,
    ):
        super().__init__()
        self.backbone, self.scales, self.pool = backbone, tuple(scales), pool
        self.erasing = HorizontalErasing(erasing)
        self.head = PyramidHead(sum(scales), channels, dim, identities)

    def descriptor(self, images: Tensor) -> Tensor:
        """(N, bins * dim): the features of all bins, from the global one to the eighths, top to bottom."""
        return self.head(pyramid_pool(self.erasing(self.backbone(images)), self.scales, self.pool))

    def forward(self, images: Tensor) -> Tensor:
        features = self.descriptor(images)
        return self.head.logits(features) if self.training else features


def pyramid_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum over the bins of the cross entropy, each a mean over the batch. logits (bins, N, identities), labels (N,)."""
    each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), label_smoothing=smoothing)
    return each * len(logits)
