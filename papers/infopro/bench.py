"""Time and memory of a training step of R-110: end to end, with gradient checkpointing, and in InfoPro*'s modules.

    python -m papers.infopro.bench [--device auto|cpu|cuda] [--batch 32] [--rounds 5]

Steps take turns; a ratio is the median over rounds. Memory is the most that the allocator holds at once beyond weights,
gradients and batch (CUDA: torch.cuda.max_memory_allocated). Then, on the CPU, modules on two processes (pipeline.py) against
one process with one thread and with two.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from common.cli import exit_codes
from common.metrics.compute import latency, mult_adds, peak_memory
from common.runtime import select_device

from .auxiliary import Decoder, head
from .checkpointing import checkpointed
from .cuts import cut_points
from .local import InfoPro
from .model import network
from .pipeline import train_pipelined

SEGMENTS = 8  # of 56 units: about the square root
RIVALS = ("end_to_end", "checkpointed", "k2", "k3", "k4")


def infopro(name: str, K: int, equal_memory: bool) -> InfoPro:
    """A CIFAR network in K modules with all auxiliary nets, as the official code builds them whatever the lambdas."""
    net = network(name, 10)
    cuts = cut_points(name, net, K, equal_memory)
    return InfoPro(net, cuts, Decoder, lambda c: head("1c2f", c, 128), (5, 5), (0.1, 0.1), "contrast")


def random_batch(batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, pixels and labels of 10 classes, 32x32."""
    images = torch.randn(batch, 3, 32, 32, device=device)
    return images, torch.rand(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10


def recomputed(name: str, segments: int = SEGMENTS) -> float:
    """Multiply-adds that checkpointing computes again, over those of a step (a forward pass and a backward pass of two)."""
    with torch.device("meta"):
        net, images = network(name, 10), torch.empty(1, 3, 32, 32)
        last = round((segments - 1) * len(net.units) / segments)
        return mult_adds(torch.nn.Sequential(*net.units[:last]), images) / (3 * mult_adds(net, images))


def step_bench(
    batch: int = 32, rounds: int = 5, min_run_time: float = 0.5, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """For each of RIVALS: "<rival>_ms" a step, "<rival>_time" and "<rival>_memory", shares of end-to-end training, and
    "<rival>_mib" an image.
    """
    torch.manual_seed(0)
    device = torch.device(device)
    images, pixels, labels = random_batch(batch, device)
    steps = {}
    for rival in RIVALS:
        model = infopro("r110", int(rival[1:]) if rival[1:].isdecimal() else 1, True).to(device)

        def step(model=model, rival=rival):
            model.zero_grad(set_to_none=False)
            if rival == "checkpointed":
                F.cross_entropy(checkpointed(model.network, images, SEGMENTS), labels).backward()
            else:
                model.backward(images, pixels, labels)

        step()
        steps[rival] = step
    peaks = {rival: peak_memory(step, device) for rival, step in steps.items()}
    times, found = latency(steps, min_run_time, rounds), {}
    for rival in RIVALS:
        found |= {f"{rival}_ms": 1e3 * times[rival].median, f"{rival}_time": times[rival].ratio}
        found |= {f"{rival}_mib": peaks[rival] / batch / 2**20, f"{rival}_memory": peaks[rival] / peaks["end_to_end"]}
    return found


# ------------------------------------------------------------------------------------------------ two processes
KINDS = ("one_thread", "two_threads", "two_processes")


def _worker(rank: int, folder: str, batch: int, steps: int, rounds: int) -> None:
    """Rounds of `steps` steps of each kind: both modules in rank 0, with one or two threads; then a module a rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, data = infopro("r110", 2, False), random_batch(batch, torch.device("cpu"))
    optimiser = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    seconds = {kind: [] for kind in KINDS}
    for i in range(rounds + 1):  # the first is to warm up
        for kind in KINDS if i % 2 else reversed(KINDS):
            torch.set_num_threads(2 if kind == "two_threads" else 1)
            dist.barrier()
            start = time.perf_counter()
            if kind == "two_processes":
                train_pipelined(model, optimiser, [data] * steps, 1)
            elif rank == 0:
                for _ in range(steps):
                    optimiser.zero_grad()
                    model.backward(*data)
                    optimiser.step()
            dist.barrier()
            seconds[kind].append(time.perf_counter() - start)
    if rank == 0:
        torch.save({kind: times[1:] for kind, times in seconds.items()}, f"{folder}/seconds.pt")
    dist.destroy_process_group()


def pipeline_bench(batch: int = 32, steps: int = 6, rounds: int = 3) -> dict[str, float]:
    """R-110 in K = 2 modules of equal layers on the CPU: "<kind>_ms" a step for each of KINDS, and "pipeline_time".

    That is two processes (a module and a thread each; the start, when the upper one waits, is in it) over the better of
    the others: the median.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (folder, batch, steps, rounds), nprocs=2)
        seconds = torch.load(Path(folder) / "seconds.pt", weights_only=True)
    ratios = [two / min(one) for *one, two in zip(*(seconds[kind] for kind in KINDS), strict=True)]
    found = {f"{kind}_ms": 1e3 * statistics.median(times) / steps for kind, times in seconds.items()}
    return found | {"pipeline_time": statistics.median(ratios)}


def table(found: dict[str, float], batch: int) -> str:
    lines = [f"R-110, batch {batch}{'':10}{'ms':>8}{'time':>8}{'MiB an image':>14}{'memory':>8}"]
    for rival in RIVALS:
        values = [found[f"{rival}_{what}"] for what in ("ms", "time", "mib", "memory")]
        lines.append(f"{rival:24}{values[0]:8.0f}{values[1]:8.3f}{values[2]:14.3f}{values[3]:8.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with exit_codes():
        device = select_device(args.device)
        for batch in args.batch:
            print(table(step_bench(batch, args.rounds, 1.0, device), batch), flush=True)
        if device.type == "cpu":
            found = pipeline_bench(min(args.batch), rounds=args.rounds)
            print("two processes: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))


if __name__ == "__main__":
    main()
