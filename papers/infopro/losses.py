"""The local loss lambda1 * (reconstruction) + lambda2 * (contrastive loss or cross-entropy) (section 3.3 of the paper)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(logits: Tensor, pixels: Tensor) -> Tensor:
    """-I(h, x) up to a constant: binary cross-entropy of sigmoid(logits) and pixels, both (B, 3, H, W), pixels in [0, 1].

    The mean over all elements.
    """
    return F.binary_cross_entropy_with_logits(logits, pixels)


def contrastive_loss(features: Tensor, labels: Tensor, tau: float = 0.07) -> Tensor:
    """-I(h, y) up to a constant: supervised contrastive loss of f = features / ||features||. (B, d), (B,) -> scalar.

    mean_i -1/|P(i)| sum_{j in P(i)} log( exp(f_i.f_j / tau) / sum_{k != i} exp(f_i.f_k / tau) ), P(i) the others with the
    label of i. An anchor without any counts 0 in the mean. Computed in float32, also under autocast.
    ValueError: fewer than two samples, or shapes that do not fit.
    """
    if features.ndim != 2 or len(features) < 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features {tuple(features.shape)}, labels {tuple(labels.shape)}: expected (B, d) and (B,), B >= 2"
        )
    with torch.autocast("cuda" if features.is_cuda else "cpu", enabled=False):
        f = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)
        similarity = f @ f.T / tau
    itself = torch.eye(len(f), dtype=torch.bool, device=f.device)
    log_p = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positives = (labels[:, None] == labels) & ~itself
    return -((log_p * positives).sum(1) / positives.sum(1).clamp(min=1)).mean()


def interpolated(first: float, last: float, modules: int) -> list[float]:
    """lambda of module 1 .. `modules` (K - 1 of them), linear from first to last; a single module takes the first."""
    steps = max(modules - 1, 1)
    return [first * (1 - k / steps) + last * (k / steps) for k in range(modules)]


def restore(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) -> pixels in [0, 1], what the decoder is to say. mean, std: (3, 1, 1)."""
    return (images * std + mean).clamp_(0, 1)  # rounding can leave the interval, and cross-entropy must not see that
