"""Top-k accuracy. Nothing here waits for the device in a loop: counts add up there and are read once, at the end."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from common.errors import UserError
from common.runtime import World, sum_over_ranks


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


@contextmanager
def evaluating(model: torch.nn.Module, amp: bool = False) -> Iterator[None]:
    """Eval mode, no gradients, and with `amp` bfloat16 autocast; the model is in its own mode again afterwards."""
    was_training, device = model.training, next(model.parameters()).device.type
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=amp):
            yield
    finally:
        model.train(was_training)


def accuracies(
    predictions: Iterable[tuple[torch.Tensor, torch.Tensor]], world: World, ks: tuple[int, ...] = (1,)
) -> torch.Tensor:
    """Top-k accuracies in percent over all batches of all ranks: (len(ks),) or (exits, len(ks)), float64 on the CPU.

    predictions: logits (N, C), or (exits, N, C) of a network that answers several times, and labels (N,) of each batch. Each
    rank gives its share. In a loop that evaluates a model:

        with evaluating(model, config.amp):
            top1, top5 = accuracies(((model(x), y) for x, y in loader.epoch(0)), world, (1, 5)).tolist()
    """
    right, seen = 0, 0
    for logits, labels in predictions:
        exits = logits.float().unsqueeze(0) if logits.ndim == 2 else logits.float()
        counts = torch.stack([topk_correct(one, labels, ks) for one in exits])
        right, seen = right + (counts[0] if logits.ndim == 2 else counts), seen + len(labels)
    if not seen:
        raise UserError("accuracy of no samples; expected at least one: is the split empty?")
    found = sum_over_ranks(torch.cat([right.reshape(-1), right.new_tensor([seen])])).cpu().double()
    return (100 * found[:-1] / found[-1]).view(right.shape)
