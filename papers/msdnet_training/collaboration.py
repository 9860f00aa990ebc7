"""Inline Subnetwork Collaboration (ISC): each exit reads the prediction of the one before it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LinearHeads(nn.Module):
    """One linear classifier an exit, without collaboration: features (N, d_i) -> logits (N, classes), for each exit."""

    def __init__(self, feature_dims: Sequence[int], classes: int):
        super().__init__()
        _check_sizes(feature_dims, classes)
        self.feature_dims = list(feature_dims)
        self.classifiers = nn.ModuleList(nn.Linear(d, classes) for d in feature_dims)

    def head(self, i: int, features: Tensor, previous_logits: Tensor | None = None) -> Tensor:
        """Exit i (from 0): features (N, d_i) -> logits (N, classes), whatever the exit before has said."""
        return self.classifiers[i](features)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [classify(f) for classify, f in zip(self.classifiers, features, strict=True)]


class CollaborativeHeads(nn.Module):
    """Features f_1..f_k, (N, d_i) each -> logits p_1..p_k, (N, classes) each.

        p_1 = W_1 f_1,    t_{i+1} = ReLU(BN(V_i p_i)),    p_{i+1} = W_{i+1} [f_{i+1}; t_{i+1}]

    V_i brings the raw logits to d_{i+1} dimensions, with a bias. `detach`: no gradient runs back along the predictions
    (the paper's text), so a loss at exit j moves W_j and V_{j-1} alone; False is the official code
    (models/msdnet_imta.py), where it moves every earlier W and V too.
    """

    def __init__(self, feature_dims: Sequence[int], classes: int, detach: bool = True):
        super().__init__()
        _check_sizes(feature_dims, classes)
        self.feature_dims, self.detach = list(feature_dims), detach
        first, *later = feature_dims
        self.classifiers = nn.ModuleList([nn.Linear(first, classes), *(nn.Linear(2 * d, classes) for d in later)])
        self.transfers = nn.ModuleList(
            nn.Sequential(nn.Linear(classes, d), nn.BatchNorm1d(d), nn.ReLU(inplace=True)) for d in later
        )

    def head(self, i: int, features: Tensor, previous_logits: Tensor | None = None) -> Tensor:
        """Exit i (from 0): features (N, d_i), logits (N, classes) of exit i - 1 (None at the first) -> logits."""
        if i > 0:
            if previous_logits is None:
                raise ValueError(
                    f"exit {i} has no previous_logits, expected those of exit {i - 1}, for the same images"
                )
            previous_logits = previous_logits.detach() if self.detach else previous_logits
            features = torch.cat([features, self.transfers[i - 1](previous_logits)], dim=1)
        return self.classifiers[i](features)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        if len(features) != len(self.classifiers):
            raise ValueError(f"features of {len(features)} exits, expected {len(self.classifiers)}")
        logits = [None]
        for i, f in enumerate(features):
            logits.append(self.head(i, f, logits[-1]))
        return logits[1:]


class IMTA(nn.Module):
    """A trained network with new heads, collaborative or not, in the place of its linear classifiers: the second stage.

    backbone: MSDNet, or any module with its num_exits, run_block, exit_features, features and exits[i].linear.
    freeze_backbone: no weight of it learns; only the heads have gradients. False trains the whole.
    freeze_norm: its batch norms stay in eval mode, so that it is one fixed function in training and in use: the plain
        reading of the paper, and its features may be computed once. False is the official code: `train()` reaches the
        frozen network too, which then normalises by the batch and whose running statistics move on.

    images (N, 3, H, W) -> k logits (N, classes); exit by exit as in MSDNet, `previous_logits` being needed here. In
    training, with the backbone's own last classifier as the teacher:

        features = model.backbone.features(images)
        loss = one_for_all_loss(model.heads(features), model.teacher_logits(features), labels)
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: CollaborativeHeads | LinearHeads,
        freeze_backbone: bool = True,
        freeze_norm: bool = True,
    ):
        super().__init__()
        if heads.feature_dims != backbone.feature_dims:
            raise ValueError(
                f"heads for features of {heads.feature_dims}, expected the backbone's {backbone.feature_dims}"
            )
        self.backbone, self.heads = backbone, heads
        self.num_exits, self.freeze_norm = backbone.num_exits, freeze_norm
        if freeze_backbone:
            backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "IMTA":
        super().train(mode)
        if self.freeze_norm:
            self.backbone.eval()  # its only layers that tell training from use are the batch norms
        return self

    def run_block(self, i: int, state: Tensor | list[Tensor]) -> list[Tensor]:
        return self.backbone.run_block(i, state)

    def exit_logits(self, i: int, state: list[Tensor], previous_logits: Tensor | None = None) -> Tensor:
        return self.heads.head(i, self.backbone.exit_features(i, state), previous_logits)

    def teacher_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Features of every exit -> logits (N, classes) of the backbone's last classifier, no gradient."""
        return self.backbone.exits[-1].linear(features[-1]).detach()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.heads(self.backbone.features(x))


def _check_sizes(feature_dims: Sequence[int], classes: int) -> None:
    if len(feature_dims) < 1 or min(feature_dims) < 1 or classes < 1:
        raise ValueError(f"feature_dims {feature_dims}, classes {classes}: expected at least one exit and sizes >= 1")
