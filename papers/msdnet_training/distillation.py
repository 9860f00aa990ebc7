"""Losses over the exits: the plain sum, and One-For-All distillation (OFA): the last exit teaches all others."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def sum_of_cross_entropies(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """sum_i CE(p_i, y), unit weights, each the mean over the batch. logits: k times (N, classes); labels (N,) int64."""
    return sum(F.cross_entropy(p, labels) for p in logits)


def one_for_all_loss(
    logits: Sequence[Tensor],
    teacher_logits: Tensor,
    labels: Tensor,
    gamma: float = 0.1,
    temperature: float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    """CE(p_k, y) + sum_{i<k} (1-gamma) CE(p_i, y) + gamma T^2 KL(softmax(z/T) || softmax(p_i/T)).

    logits: k times (N, classes). teacher_logits z: (N, classes), detached here; official: the last classifier of the
    network of the first stage. labels: (N,) int64. reduction of the KL term: "batchmean", per sample, the formula;
    "mean" divides by the number of classes too, as the official nn.KLDivLoss() does: gamma acts classes times weaker.
    """
    if not 0 <= gamma <= 1 or temperature <= 0:
        raise ValueError(f"gamma={gamma}, temperature={temperature}: expected 0 <= gamma <= 1 and temperature > 0")
    if reduction not in ("batchmean", "mean"):
        raise ValueError(f"unknown reduction {reduction!r}, expected 'batchmean' or 'mean'")
    *early, last = logits
    if teacher_logits.shape != last.shape:  # kl_div would broadcast
        raise ValueError(
            f"teacher logits {tuple(teacher_logits.shape)}, expected those of the exits, {tuple(last.shape)}"
        )
    target = F.softmax(teacher_logits.detach() / temperature, dim=1)
    weight = gamma * temperature**2 / (last.shape[1] if reduction == "mean" else 1)
    loss = F.cross_entropy(last, labels)
    for p in early:
        kl = F.kl_div(F.log_softmax(p / temperature, dim=1), target, reduction="batchmean")
        loss = loss + (1 - gamma) * F.cross_entropy(p, labels) + weight * kl
    return loss
