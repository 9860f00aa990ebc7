"""Modules on two processes at once: local losses need nothing from above, so the lower half never waits for the upper one.

Rank 0 trains modules 0 .. split - 1 and hands their output on; it is a batch ahead of rank 1, which trains the rest. Every
module sees the inputs, weights and gradients of simultaneous training in one process: the same bits.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from .local import InfoPro


def train_pipelined(
    model: InfoPro, optimiser: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor, Tensor]], split: int
) -> None:
    """Both ranks of a process group call it with the same model and batches (images, pixels, labels) of one shape.

    Afterwards the first `split` modules of rank 0 and the others of rank 1 are trained; the rest is as it was.
    ValueError: split not in 1 .. K - 1, or a group that is not of two ranks.
    """
    if not 0 < split < model.K or dist.get_world_size() != 2:
        raise ValueError(
            f"split={split} of K={model.K} modules on {dist.get_world_size()} ranks; expected 1 to K - 1, and two ranks"
        )
    upper, sent, h = dist.get_rank() == 1, None, None
    for images, pixels, labels in batches:
        optimiser.zero_grad()
        if upper:
            h = _shape_of_input(images.device) if h is None else h
            dist.recv(h, 0)
            model.backward(h, pixels, labels, modules=range(split, model.K))
        else:
            _, out = model.backward(images, pixels, labels, modules=range(split))
            if h is None:
                dist.send(torch.tensor(out.shape), 1)
            else:
                sent.wait()  # one batch under way, at most
            h = out.contiguous()
            sent = dist.isend(h, 1)
        optimiser.step()
    if sent:
        sent.wait()


def _shape_of_input(device: torch.device) -> Tensor:
    shape = torch.empty(4, dtype=torch.int64)
    dist.recv(shape, 0)
    return torch.empty(shape.tolist(), device=device)
