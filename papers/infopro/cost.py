"""What local training costs beside the network: memory for the backward pass, multiply-adds of the auxiliary nets."""

import torch
from torch import Tensor

from common.metrics.compute import mult_adds

from .local import InfoPro
from .memory import SavedMemory

COUNTED_BATCH = 16  # what batch norm keeps a batch is a few KiB; it counts a 16th an image


def empty_batch(batch: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, pixels and labels on the meta device."""
    with torch.device("meta"):
        return torch.empty(batch, 3, size, size), torch.empty(batch, 3, size, size), torch.empty(batch).long()


def saved_mib(model: InfoPro, size: int, batch: int = COUNTED_BATCH) -> float:
    """Most MiB an image that are kept for backward at any time of a step of `model`, which is on the meta device.

    Tensors that autograd saves, each storage once, all but the parameters; float32.
    """
    with SavedMemory(model.parameters()) as memory:
        model.backward(*empty_batch(batch, size))
    return memory.peak / batch / 2**20


def auxiliary_mult_adds(model: InfoPro, size: int) -> int:
    """Multiply-adds of all auxiliary nets for one image, forward; `model` is on the meta device."""
    h, _, _ = empty_batch(1, size)
    total = 0
    for k in range(model.K - 1):
        h = model.network.run(h, model.bounds[k], model.bounds[k + 1])
        if str(k) in model.decoders:
            total += mult_adds(model.decoders[str(k)], h, (size, size))
        if str(k) in model.heads:
            total += mult_adds(model.heads[str(k)], h)
    return total
