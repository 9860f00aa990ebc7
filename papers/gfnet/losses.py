"""The loss of stages I and III."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Step


def sequence_loss(steps: Sequence[Step], labels: Tensor, own_weight: float) -> Tensor:
    """L = (1/T) sum_t [CE(p_t, y) + lambda CE(q_t, y)]: the mean over the batch, a scalar (paper, section 3.3).

    steps: T of them, logits (B, classes); labels (B,); own_weight: lambda, of the encoders' own heads q_t.
    """
    if not steps:
        raise ValueError("no steps, expected at least one")
    each = [F.cross_entropy(s.logits, labels) + own_weight * F.cross_entropy(s.own_logits, labels) for s in steps]
    return torch.stack(each).mean()
