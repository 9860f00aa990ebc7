"""What a model costs: parameters, multiply-adds, memory, time. Each function says exactly what it counts.

The counts need no data and no compute when the model lives on the meta device, whatever its size:

    with torch.device("meta"):
        model, images = Network(), torch.empty(1, 3, 224, 224)
    mult_adds(model, images)
"""

import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError

NORM_AND_RELU = {nn.BatchNorm2d: 2, nn.ReLU: 1}


# ------------------------------------------------------------------------------------------------ size and arithmetic
def parameters(module: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, shared ones counted once; `trainable_only` leaves out those with requires_grad False."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


@contextmanager
def _evaluating(module: nn.Module):
    """eval() and no_grad inside; each submodule's own training flag comes back, also after an error."""
    training = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, flag in training.items():
            m.training = flag


@contextmanager
def _unfused():
    """Attention and recurrent layers as plain matrix products: torch has no FLOP formula for some fused ones."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        warnings.simplefilter("ignore")  # switching oneDNN off warns about Intel GPUs
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def mult_adds(module: nn.Module, *inputs) -> int:
    """Multiply-adds of one forward pass in eval mode: convolutions, linear layers, (batched) matrix products.

    Half the FLOPs of torch.utils.flop_counter; biases, norms, activations and pooling count nothing, a block that is
    skipped counts nothing, the whole batch counts (papers mean batch 1). Inputs are on the module's device. A custom
    op counts nothing until it has a formula: `torch.utils.flop_counter.register_flop_formula`.
    """
    counter = FlopCounterMode(display=False)
    with _evaluating(module), _unfused(), counter:
        module(*inputs)
    return counter.get_total_flops() // 2


def element_ops(module: nn.Module, *inputs, per_element: Mapping[type, int] = NORM_AND_RELU) -> int:
    """Element-wise operations of one forward pass in eval mode, for papers whose count includes them.

    Sum over calls of output elements x factor for submodules of the given types (subclasses too; the first type that
    fits decides), e.g. PC-DARTS: mult_adds + 2 per BatchNorm2d element + 1 per ReLU element. Functional calls
    (F.relu) are not modules and are not seen. Batch and device as in `mult_adds`.
    """
    total = 0

    def hook_for(factor):
        def count(_module, _inputs, output):
            nonlocal total
            total += factor * output.numel()

        return count

    hooks = []
    for m in module.modules():
        factor = next((f for kind, f in per_element.items() if isinstance(m, kind)), None)
        if factor is not None:
            hooks.append(m.register_forward_hook(hook_for(factor)))
    try:
        with _evaluating(module):
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total


# ------------------------------------------------------------------------------------------------ memory
def saved_bytes(fn: Callable[[], object], exclude: Iterable[torch.Tensor] = ()) -> int:
    """Bytes autograd keeps for the backward pass of what `fn()` computes: the activation memory of training.

    Sum over distinct storages, whole ones (a saved slice keeps all of its tensor alive), without those of the tensors
    in `exclude`, e.g. [*model.parameters(), *model.buffers(), images]. `fn` runs a forward pass only. Exact, on any
    device including meta. What an autograd.Function keeps outside save_for_backward is not seen.
    """
    saved = {}  # holding the storages keeps their identities from being reused while fn runs

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    excluded = {tensor.untyped_storage()._cdata for tensor in exclude}
    return sum(storage.nbytes() for identity, storage in saved.items() if identity not in excluded)


def peak_memory(fn: Callable[[], object], device: torch.device | str) -> int:
    """Most bytes of tensors alive at once while `fn()` runs, beyond those alive when it starts.

    CUDA: torch.cuda.max_memory_allocated (the allocator's blocks; not its cache, not the CUDA context). CPU: the same
    quantity from the profiler's record of torch's CPU allocator; scratch of oneDNN and BLAS is outside of both. To
    count the weights, build the model inside `fn`. `fn` runs once: warm up before, if it caches.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise UserError(f"peak_memory on device {device}; expected cpu or cuda")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        fn()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    peak = alive = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


# ------------------------------------------------------------------------------------------------ time
@dataclass(frozen=True)
class Latency:
    """Seconds per call over all rounds, and this candidate's time over the first one's, one ratio a round."""

    median: float
    iqr: float
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def latency(fns: dict[str, Callable[[], object]], min_run_time: float = 0.5, rounds: int = 5) -> dict[str, Latency]:
    """Time candidates against each other: {name: fn} -> {name: Latency}, in the same order; the first is the baseline.

    Rounds are interleaved and every other one runs backwards, so that a drifting clock or a busy neighbour meets all
    candidates alike; trust `ratio` before `median`. Each candidate runs `min_run_time` seconds a round, after the
    warm-up of torch.utils.benchmark.Timer, which also waits for CUDA; all threads of torch.get_num_threads() are used.
    """
    from torch.utils.benchmark import Timer  # here: it warns at import when CUDA_HOME is set and there is no GPU

    if not fns or rounds < 1:
        raise UserError(f"latency of {len(fns)} candidates in {rounds} rounds; expected at least one of each")
    timers = {name: Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads()) for name, fn in fns.items()}
    runs = {name: [] for name in fns}
    for i in range(rounds):
        for name in reversed(fns) if i % 2 else fns:
            runs[name].append(timers[name].blocked_autorange(min_run_time=min_run_time))
    baseline = next(iter(runs.values()))
    results = {}
    for name, measured in runs.items():
        times = torch.tensor([t for m in measured for t in m.times], dtype=torch.float64)
        low, median, high = times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        ratios = tuple(m.median / b.median for m, b in zip(measured, baseline, strict=True))
        results[name] = Latency(median, high - low, ratios)
    return results
