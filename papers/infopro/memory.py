"""What autograd keeps alive for the backward pass, counted while a whole step runs, forward and backward."""

import torch
from torch import Tensor


class _Kept:
    """Stands in for a saved tensor: autograd drops it when the graph is freed, and with it the count."""

    def __init__(self, meter: "SavedMemory", tensor: Tensor):
        self.meter, self.tensor = meter, tensor
        self.key, self.size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        meter._count(self, 1)

    def __del__(self):
        self.meter._count(self, -1)


class SavedMemory:
    """with SavedMemory(exclude) as memory: step()  ->  memory.alive, memory.peak: bytes saved for backward, now and at most.

    Whole storages, each once however often it is saved, without those of `exclude`: give it the parameters, to have the
    activation memory of training. Any device, meta too. Not seen: what torch.utils.checkpoint computes again, and what an
    autograd.Function keeps outside save_for_backward.
    """

    def __init__(self, exclude=()):
        self.exclude = {tensor.untyped_storage()._cdata for tensor in exclude}
        self.alive = self.peak = 0
        self._uses: dict[int, int] = {}  # storage -> how often it is saved

    def _count(self, kept: _Kept, change: int) -> None:
        if kept.key in self.exclude:
            return
        before = self._uses.get(kept.key, 0)
        self._uses[kept.key] = before + change
        self.alive += kept.size * (bool(before + change) - bool(before))
        self.peak = max(self.peak, self.alive)

    def __enter__(self) -> "SavedMemory":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(self, t), lambda kept: kept.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)
