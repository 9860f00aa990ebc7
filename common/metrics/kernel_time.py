"""What every kernels/bench.py shares: calls timed in turns, the device's copy bandwidth, torch.compile where it works."""

import argparse
import statistics
from collections.abc import Callable

import torch

from common.cli import exit_codes


def times_ms(
    calls: dict[str, Callable[[], object]], device: str, rounds: int = 3, min_run_time: float = 0.1
) -> dict[str, float]:
    """Milliseconds of each call: the median over rounds, in which the calls take turns.

    CUDA: triton.testing.do_bench, which empties the L2 cache before every call. CPU: torch.utils.benchmark, all threads,
    `min_run_time` seconds a round, caches as the call leaves them.
    """
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_cuda_ms(call) if device == "cuda" else _cpu_ms(call, min_run_time))
    return {name: statistics.median(found) for name, found in times.items()}


def _cuda_ms(call: Callable) -> float:
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")


def _cpu_ms(call: Callable, min_run_time: float) -> float:
    from torch.utils.benchmark import Timer  # here: it warns at import where there is no GPU

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=min_run_time).median


def copy_gb_per_s(device: str, megabytes: int | None = None) -> float:
    """GB/s of copying float32s, bytes read and written both counted; by default far more of them than the caches hold."""
    source = torch.zeros((megabytes or (512 if device == "cuda" else 128)) * 2**18, device=device)
    target = torch.empty_like(source)
    ms = times_ms({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.numel() * source.element_size() / ms / 1e6


def compiled(fn: Callable, *inputs) -> dict[str, Callable]:
    """{"compiled": torch.compile(fn)}, tried on the inputs; {} and a line that says why where it fails."""
    torch._dynamo.reset()
    # the threads are named, or code in the cache that was compiled for another number of them is taken
    options = None if torch.cuda.is_available() else {"cpp.threads": torch.get_num_threads()}
    made = torch.compile(fn, options=options)
    try:
        made(*inputs)
    except Exception as error:  # a machine without a C++ compiler, for one: a bench must print its other rows
        print(f"compiled: left out, {type(error).__name__}: {str(error).splitlines()[0]}")
        return {}
    return {"compiled": made}


def main(
    bench: Callable[[str, bool], list[dict]],
    table: Callable[[list[dict]], str],
    description: str,
    argv: list[str] | None = None,
) -> None:
    """`python -m papers.<slug>.kernels.bench`: bench(device, quick) gives the rows, table(rows) the text that is printed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    with exit_codes():
        print(table(bench(args.device, args.quick)))
