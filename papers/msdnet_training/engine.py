"""Adaptive inference that really skips: a sample that is confident enough leaves the batch (section 3 of the paper).

    engine = AdaptiveEngine(model, thresholds)  # thresholds of common/metrics/early_exit.py
    logits, exits = engine(images)

`for_inference` makes the network itself fast and `in_chunks` runs it to the end: compare the engine with these.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .model import Layer

CHUNK = 32  # images at a time: on CPU the finest maps of a larger batch leave the cache between two layers
STEP = 8  # a large rest of a chunk goes on at once, in multiples of this: each new batch size has to be set up
FOLD = {nn.BatchNorm2d: fuse_conv_bn_eval, nn.BatchNorm1d: fuse_linear_bn_eval}


def for_inference(model: nn.Module) -> nn.Module:
    """A copy that computes what `model` does in eval mode, faster; it is not for training.

    Every batch norm is folded into the convolution or linear layer before it; weights are channels_last.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Sequential) and len(module) > 1 and type(module[1]) in FOLD:
            module[0] = FOLD[type(module[1])](module[0], module[1])
            del module[1]
    return model.to(memory_format=torch.channels_last)


@torch.inference_mode()
def in_chunks(model: nn.Module, images: Tensor, chunk: int = CHUNK) -> list[Tensor]:
    """The logits (N, classes) of all k exits for images (N, 3, H, W), computed `chunk` images at a time."""
    images = images.contiguous(memory_format=torch.channels_last)
    return [torch.cat(logits) for logits in zip(*(model(x) for x in images.split(chunk)), strict=True)]


class Stage(nn.Module):
    """A block up to its exit, which reads the coarsest scale alone; then, for samples that stay, what it has left out.

    Left out are the finer scales of the last layer, unless a transition follows, which makes the state small. `split`
    gives tensors to carry, the last of which is the coarsest map after the block; `finish` makes them the state after
    the block.
    """

    def __init__(self, block: nn.Sequential):
        super().__init__()
        self.parted = isinstance(block[-1], Layer) and len(block[-1].scales) > 1
        self.body = block[:-1] if self.parted else block
        if self.parted:
            self.coarsest, self.finer = _scales(block[-1], slice(-1, None)), _scales(block[-1], slice(-1))

    def split(self, state: Tensor | list[Tensor]) -> list[Tensor]:
        state = self.body(state)
        return [*state[:-1], *self.coarsest(state)] if self.parted else state

    def finish(self, carried: list[Tensor]) -> list[Tensor]:
        return [*self.finer(carried[:-1]), carried[-1]] if self.parted else carried


class Queue:
    """Samples that wait for a block until there is a chunk of them: a fixed batch size is what convolutions are set up for.

    A sample is one row in each of a list of tensors, (N, ...) with channels in dimension 1. Memory is kept for good.
    """

    def __init__(self, chunk: int):
        self.chunk, self.filled, self.buffers = chunk, 0, []

    def add(self, tensors: list[Tensor], rows: Tensor) -> None:
        """Copy these rows, at most a chunk, behind those that wait, less than a chunk."""
        last = [x.movedim(1, -1) for x in tensors]  # channels_last: as they lie in memory
        if [(x.shape[1:], x.dtype, x.device) for x in last] != [(b.shape[1:], b.dtype, b.device) for b in self.buffers]:
            self.buffers = [x.new_empty(2 * self.chunk, *x.shape[1:]) for x in last]
        end = self.filled + len(rows)
        for x, buffer in zip(last, self.buffers, strict=True):
            torch.index_select(x, 0, rows, out=buffer[self.filled : end])
        self.filled = end

    def first(self) -> list[Tensor]:
        """The first chunk, or what there is, without a copy: to be used before `drop_first`."""
        return [b[: min(self.filled, self.chunk)].movedim(-1, 1) for b in self.buffers]

    def drop_first(self) -> None:
        for b in self.buffers:
            b[: max(0, self.filled - self.chunk)] = b[self.chunk : max(self.filled, self.chunk)]
        self.filled = max(0, self.filled - self.chunk)


class AdaptiveEngine:
    """images (N, 3, H, W) -> logits (N, classes) of the exit that each sample took, and that exit (N,) int64 from 0.

    model: MSDNet or IMTA. A copy is made for inference: later changes to `model` do not reach it.
    thresholds: (k,) confidence for leaving at each exit; the last exit takes the rest, whatever its own.
    chunk: samples at a time; survivors wait until they are as many. On a GPU take the whole batch.

    Logits and exits are those of running all exits and choosing by `exits_taken`, to rounding. `samples_run`: how many
    samples each block has computed since the engine was made. ValueError: thresholds of another shape or NaN, images
    that are not (N, 3, H, W).
    """

    def __init__(self, model: nn.Module, thresholds: Tensor, chunk: int = CHUNK):
        if thresholds.shape != (model.num_exits,) or thresholds.isnan().any():
            expected = f"one number for each of {model.num_exits} exits"
            raise ValueError(
                f"thresholds {thresholds.tolist()}, expected {expected}: see common.metrics.early_exit.thresholds"
            )
        if chunk < 1:
            raise ValueError(f"chunk={chunk}, expected at least 1")
        self.model, self.thresholds, self.chunk = for_inference(model), thresholds.tolist(), chunk
        self.thresholds[-1] = -torch.inf
        self.stages = [Stage(block) for block in getattr(self.model, "backbone", self.model).blocks]
        self.queues = [Queue(chunk) for _ in self.stages]
        self.samples_run = [0] * len(self.stages)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images {tuple(images.shape)}, expected (N, 3, H, W)")
        images = images.contiguous(memory_format=torch.channels_last)
        numbers = torch.arange(len(images), device=images.device)[:, None]
        answers = []
        for queue in self.queues:
            queue.filled = 0  # a call that was interrupted leaves samples behind
        for n, x in zip(numbers.split(self.chunk), images.split(self.chunk), strict=True):
            self._run(0, [n, None, x], answers)
            self._run_full_queues(answers)
        for i, queue in enumerate(self.queues):  # the rest, in this order: block i fills the queues after it
            if queue.filled:
                self._run(i, queue.first(), answers)
                queue.drop_first()
                self._run_full_queues(answers)
        numbers, logits, exits = (torch.cat(parts) for parts in zip(*answers, strict=True))
        order = numbers.argsort()
        return logits[order], exits[order]

    def _run_full_queues(self, answers: list[tuple]) -> None:
        """The deepest first: it fills only queues that have room for a chunk more."""
        while full := [i for i, queue in enumerate(self.queues) if queue.filled >= self.chunk]:
            self._run(full[-1], self.queues[full[-1]].first(), answers)
            self.queues[full[-1]].drop_first()

    def _run(self, i: int, samples: list[Tensor], answers: list[tuple]) -> None:
        """From block i on, as long as many stay: few wait in the queue of the next block.

        samples: numbers (N, 1) in the batch, logits of exit i - 1, and what stage i - 1 carries or the images.
        answers gets (numbers, logits, exit), one row for each sample that leaves.
        """
        while samples:
            samples = self._step(i, samples, answers)
            i += 1

    def _step(self, i: int, samples: list[Tensor], answers: list[tuple]) -> list[Tensor]:
        """Block and exit i -> the samples to go on with at once, or []."""
        numbers, logits, *carried = samples
        samples.clear()  # memory that is freed early is taken again while it is in the cache
        self.samples_run[i] += len(numbers)
        carried = self.stages[i - 1].finish(carried) if i else carried[0]
        carried = self.stages[i].split(carried)
        logits = self.model.exit_logits(i, carried, logits)
        confidence = logits.softmax(1).amax(1)
        leaves = (confidence >= self.thresholds[i]) | (i == len(self.stages) - 1)
        answers.append((numbers[leaves, 0], logits[leaves], torch.full_like(numbers[leaves, 0], i)))
        stay = (~leaves).nonzero()[:, 0]
        samples = [numbers, logits, *carried]
        if len(stay) == len(numbers):  # nothing to copy
            return samples if len(stay) else []
        at_once = len(stay) // STEP * STEP if len(stay) >= self.chunk // 2 else 0
        if at_once < len(stay):
            self.queues[i + 1].add(samples, stay[at_once:])
        return [_take(x, stay[:at_once]) for x in samples] if at_once else []


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of a channels_last x (N, C, ...), channels_last: index_select by itself would change the layout, slowly."""
    return x.movedim(1, -1).index_select(0, rows).movedim(-1, 1)


def _scales(layer: nn.Module, which: slice) -> nn.Module:
    """A layer or transition for some of its output scales; it reads the last scales of the state that it is given."""
    part = copy.deepcopy(layer)
    part.scales = part.scales[which]
    return part
