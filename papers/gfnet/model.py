"""GFNet: one glance at the whole image, then small crops of it, all P x P (paper, section 3)."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .classifiers import ConcatClassifier, RecurrentClassifier
from .crop import crop
from .encoders import FAMILY
from .encoders import encoder as build_encoder

Locate = Callable[[int, Tensor], Tensor]


class Step(NamedTuple):
    """What step t gives: softmax(logits) is p_t, softmax(own_logits) is q_t."""

    logits: Tensor  # (B, classes), of the classifier f_C
    own_logits: Tensor | None  # (B, classes), of the encoder's own head; for type B at step 1 the same tensor
    e: Tensor  # (B, C, h, w), the feature map the policy reads


class GFNet(nn.Module):
    """Images (B, 3, H, W) -> a Step for each t = 1..T; H and W at least P.

    encoder: a name in encoders.NETWORKS; f_G (step 1) and f_L (steps 2..T) are two of them with weights of their own.
    patch: P, side of the glance and of the crops. steps: T; with 1 there is no f_L (`local_encoder` is None), and what
        is left is the network that only glances.
    hidden: width of the GRU of type A.
    global_frozen: f_G takes no gradient and stays in eval mode under `.train()`. The official code trains type B so,
        and this is the default there.
    """

    def __init__(
        self,
        encoder: str = "resnet50",
        classes: int = 1000,
        patch: int = 96,
        steps: int = 5,
        hidden: int = 1024,
        global_frozen: bool | None = None,
    ):
        super().__init__()
        if steps < 1 or hidden < 1:
            raise ValueError(f"steps={steps}, hidden={hidden}: expected at least 1 of each")
        self.global_encoder = build_encoder(encoder, classes)
        if patch < self.global_encoder.smallest:
            raise ValueError(f"patch {patch}: {encoder} needs at least {self.global_encoder.smallest}")
        self.local_encoder = build_encoder(encoder, classes) if steps > 1 else None
        self.family, self.patch, self.steps = FAMILY[encoder], patch, steps
        feature_dim = self.global_encoder.feature_dim
        if self.family == "recurrent":
            self.classifier = RecurrentClassifier(feature_dim, classes, hidden)
        else:
            self.classifier = ConcatClassifier(feature_dim, classes, steps)
        self.global_frozen = self.family == "concat" if global_frozen is None else global_frozen
        self.global_encoder.requires_grad_(not self.global_frozen)
        self.train()

    def train(self, mode: bool = True) -> "GFNet":
        super().train(mode)
        if self.global_frozen:
            self.global_encoder.eval()
        return self

    def glance(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, P, P), the whole image made small."""
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < self.patch:
            raise ValueError(f"images {tuple(images.shape)}: expected (B, 3, H, W) with H and W at least {self.patch}")
        size = (self.patch, self.patch)
        return F.interpolate(images, size=size, mode="bicubic", align_corners=True, antialias=False)

    def step(self, t: int, x: Tensor, state: Tensor | None, own: bool = True) -> tuple[Step, Tensor]:
        """Step t on x (B, 3, P, P), the glance (t = 1) or a crop, with the state of step t - 1 (None at t = 1).

        own: run the encoder's own head. Nothing but the training loss needs it; without, `own_logits` is None, but at
        step 1 of type B, where it is the classifier.
        """
        if not 1 <= t <= self.steps or (t == 1) != (state is None):
            given = "no state" if state is None else "a state"
            raise ValueError(f"step {t} with {given}: expected step 1 with none, or 2..{self.steps} with one")
        encoder = self.global_encoder if t == 1 else self.local_encoder
        e, feature = encoder(x)
        logits, state = self.classifier(feature, state)
        own_logits = encoder.fc(feature) if own or logits is None else None
        return Step(own_logits if logits is None else logits, own_logits, e), state

    def forward(self, images: Tensor, locate: Locate | None = None) -> list[Step]:
        """All T steps. locate(t, e_t) -> l (B, 2) in [0, 1], the place of the crop of step t + 1, for t = 1..T-1."""
        if locate is None and self.steps > 1:
            raise ValueError(f"{self.steps} steps: expected a `locate`, which places the crops")
        step, state = self.step(1, self.glance(images), None)
        steps = [step]
        for t in range(1, self.steps):
            x = crop(images, locate(t, steps[-1].e), self.patch)
            step, state = self.step(t + 1, x, state)
            steps.append(step)
        return steps
