"""Top-k accuracy. Nothing here waits for the device: add the counts up there and read them once, after the loop."""

import torch

from common.errors import UserError


def topk_correct(logits: torch.Tensor, labels: torch.Tensor, ks: tuple[int, ...] = (1, 5)) -> torch.Tensor:
    """For each k, how many samples have their label among the k largest logits.

    logits (N, C), labels (N,) integers in [0, C) -> (len(ks),) int64 on the device of the logits; N may be 0.

    Equal logits rank by class index, so the count is the same on every device and top-1 agrees with argmax. A k above
    C counts as C. A label whose own logit is NaN is never correct. Raises UserError on other shapes or k < 1.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise UserError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected (N, C) and (N,): flatten first"
        )
    if not ks or min(ks) < 1:
        raise UserError(f"ks is {tuple(ks)}; expected one or more k >= 1")
    label = labels.long().unsqueeze(1)
    own = logits.gather(1, label)
    classes = torch.arange(logits.shape[1], device=logits.device)
    rank = ((logits > own) | ((logits == own) & (classes < label))).sum(1, keepdim=True)
    return ((rank < torch.tensor(ks, device=logits.device)) & ~own.isnan()).sum(0)


def accuracy(logits: torch.Tensor, labels: torch.Tensor, k: int = 1) -> torch.Tensor:
    """Top-k accuracy in percent, as a float32 scalar on the device; shapes and errors as in `topk_correct`, N > 0."""
    if len(labels) == 0:
        raise UserError("accuracy of no samples; expected at least one: is the split empty?")
    return topk_correct(logits, labels, (k,))[0] * 100 / len(labels)
