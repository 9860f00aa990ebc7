"""The rival: end-to-end training with gradient checkpointing, which keeps less and computes the forward pass twice."""

import contextlib
from itertools import pairwise

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .model import ResNet


@contextlib.contextmanager
def _statistics_rest(units: list[nn.Module]):
    """Batch norm as in training, but its running statistics stay: the second forward pass must not move them again."""
    norms = [m for unit in units for m in unit.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta, counts = [m.momentum for m in norms], [m.num_batches_tracked for m in norms]
    for m in norms:
        m.momentum, m.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for m, momentum, count in zip(norms, momenta, counts, strict=True):
            m.momentum, m.num_batches_tracked = momentum, count


def require_segments(network: ResNet, segments: int) -> None:
    if not 1 <= segments <= len(network.units):
        raise ValueError(f"{segments} segments, expected 1 to {len(network.units)}, the units of the network")


def checkpointed(network: ResNet, images: Tensor, segments: int) -> Tensor:
    """network(images) of which only `segments` segments' inputs are kept: same logits, gradients and buffers, bit for bit.

    segments: of equal numbers of units, 1 to all of them; about the square root of their number keeps least. ValueError
    else. The last segment is kept whole: its backward pass comes first.
    """
    require_segments(network, segments)
    units = network.units
    bounds = [round(i * len(units) / segments) for i in range(segments + 1)]
    x = images
    for start, stop in pairwise(bounds[:-1]):
        mine = units[start:stop]
        contexts = lambda mine=mine: (contextlib.nullcontext(), _statistics_rest(mine))  # noqa: E731
        x = checkpoint(network.run, x, start, stop, use_reentrant=False, context_fn=contexts)
    return network.run(x, bounds[-2])
