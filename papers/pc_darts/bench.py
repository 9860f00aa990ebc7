"""Time and memory of one search step, plain against shared cell and K=1 against K=4; then of the kernel.

    python -m papers.pc_darts.bench [--device auto|cpu|cuda] [--batch 16] [--rounds 3]

A step is two passes: the gradient of {alpha, beta}, then of the weights. Steps take turns, so that a slow moment of the
machine hits all; a ratio is the median over rounds. `make reproduce CLAIM=speed-shared` records it.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.cli import exit_codes
from common.metrics.compute import Latency, latency, saved_bytes
from common.runtime import select_device

from .kernels.bench import kernel_bench, kernel_table
from .supernet import SuperNet


def search_step(model: SuperNet, x: Tensor, y: Tensor, forward: Callable | None = None) -> None:
    """The two passes of a step, without the optimisers."""
    forward = forward or model
    torch.autograd.grad(F.cross_entropy(forward(x), y), model.arch_parameters())
    torch.autograd.grad(F.cross_entropy(forward(x), y), list(model.parameters()))


def saved_mib(model: SuperNet, batch: int = 4, size: int = 32) -> float:
    """MiB an image that a training-mode forward pass keeps for backward; parameters and buffers excluded."""
    images = torch.zeros(batch, 3, size, size)
    return saved_bytes(lambda: model(images), [*model.parameters(), *model.buffers()]) / batch / 2**20


def networks(C: int, layers: int, device: torch.device, which: list[tuple[str, int]]) -> dict[str, SuperNet]:
    """{"shared_k4": ...}: supernets of (cell, K), those of one K with the same weights."""
    made, plains = {}, {}
    for cell, K in which:
        torch.manual_seed(0)
        plain = plains.setdefault(K, SuperNet(C, 10, layers, K, cell="plain"))
        made[f"{cell}_k{K}"] = plain if cell == "plain" else SuperNet(C, 10, layers, K)
        if cell == "shared":
            made[f"{cell}_k{K}"].load_plain(plain)
    return {name: model.to(device) for name, model in made.items()}


def search_step_bench(
    C: int = 16,
    layers: int = 8,
    batch: int = 16,
    size: int = 32,
    rounds: int = 3,
    device: torch.device | str = "cpu",
    which: tuple[tuple[str, int], ...] = (("plain", 4), ("shared", 4), ("shared", 1)),
) -> dict[str, Latency]:
    """{"plain_k4": ..., ...}, the first of `which` being the baseline. On CUDA also the fast cell under every switch."""
    device = torch.device(device)
    if rounds < 1 or batch < 1:
        raise ValueError(f"rounds={rounds}, batch={batch}: expected at least 1")
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(10, (batch,), device=device)
    models = networks(C, layers, device, list(which))
    steps = {name: (lambda model=model: search_step(model, x, y)) for name, model in models.items()}
    if device.type == "cuda" and "shared_k4" in models:
        steps |= cuda_variants(models["shared_k4"], x, y)
    return latency(steps, 0.0, rounds)


def cuda_variants(model: SuperNet, x: Tensor, y: Tensor) -> dict[str, Callable[[], None]]:
    """channels_last, bf16, torch.compile, CUDA graph; one that fails is left out with a line saying why."""
    x_last = x.contiguous(memory_format=torch.channels_last)

    def bf16() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            search_step(model, x, y)

    def compiled(mode: str) -> Callable[[], None]:
        forward = torch.compile(model, mode=mode)
        return lambda: search_step(model, x, y, forward)

    def graphed() -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                search_step(model, x, y)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            search_step(model, x, y)
        return graph.replay

    makers = {
        "shared_k4_channels_last": lambda: lambda: search_step(model, x_last, y),
        "shared_k4_bf16": lambda: bf16,
        "shared_k4_compiled": lambda: compiled("default"),
        "shared_k4_cuda_graph": graphed,
    }
    variants = {}
    for name, make in makers.items():
        try:
            step = make()
            step()
            variants[name] = step
        except Exception as error:  # the bench must print the other rows
            print(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0]}")
    return variants


def table(measured: dict[str, Latency], saved: dict[str, float], batch: int) -> str:
    lines = [f"{'search step':26}{'s':>9}{'ms/image':>10}{'saved MiB/image':>17}{'x plain_k4':>12}"]
    for name in dict.fromkeys([*measured, *saved]):
        kept = f"{saved[name]:17.2f}" if name in saved else " " * 17
        if name in measured:
            seconds, speed = measured[name].median, f"{1 / measured[name].ratio:12.2f}"
            lines.append(f"{name:26}{seconds:9.3f}{1e3 * seconds / batch:10.1f}{kept}{speed}")
        else:
            lines.append(f"{name:26}{'':19}{kept}")
    return "\n".join(lines)


def saved_table() -> dict[str, float]:
    """Saved MiB/image of both cells for K in 1, 4, at the paper's size."""
    which = [(cell, K) for cell in ("plain", "shared") for K in (1, 4)]
    return {name: saved_mib(model, 16) for name, model in networks(16, 8, torch.device("cpu"), which).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with exit_codes():
        device = select_device(args.device)
        which = (("plain", 4), ("shared", 4), ("plain", 1), ("shared", 1))
        measured = search_step_bench(batch=args.batch, rounds=args.rounds, device=device, which=which)
        print(table(measured, saved_table(), args.batch))
        print(kernel_table(kernel_bench(device.type)))


if __name__ == "__main__":
    main()
