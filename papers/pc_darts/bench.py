"""Time and memory of one search step: plain against shared supernet, K=1 against K=4.

python -m papers.pc_darts.bench [--device cpu|cuda] [--batch 16] [--rounds 5] [--quick]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .supernet import SuperNet


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, parameters excluded."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    total = sum(s.nbytes() for s in storages.values())
    del out
    return total


def search_step(model: SuperNet, x: Tensor, y: Tensor, forward: Callable | None = None) -> None:
    """The two passes of a step: gradient of the architecture alone, then of the weights."""
    forward = forward or model
    arch = model.arch_parameters()
    torch.autograd.grad(F.cross_entropy(forward(x), y), arch)
    torch.autograd.grad(F.cross_entropy(forward(x), y), list(model.parameters()))


def _seconds(step: Callable[[], None], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every step in every round; the steps take turns, so that a slow moment of the machine hits all."""
    cuda = device == "cuda"
    for step in steps.values():
        step()  # warm-up
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_seconds(step, cuda))
    return times


def _graphed(model: SuperNet, x: Tensor, y: Tensor) -> Callable[[], None]:
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


def search_step_bench(
    C: int = 16,
    layers: int = 8,
    K: int = 4,
    batch: int = 16,
    size: int = 32,
    rounds: int = 5,
    device: str = "cpu",
) -> dict:
    """Rows of seconds and saved MiB per image for {plain, shared} x {K, 1}; ratios are medians over rounds.

    {"rows": [{name, seconds, ms_per_image, saved_mib_per_image, speedup over plain-K}], "speedup": plain / shared at K,
    "saved_ratio", "k1_over_k_time", "k1_over_k_saved", "k1_over_k_time_plain", "k1_over_k_saved_plain"}.
    On CUDA, rows of the shared cell with channels_last, bf16 autocast, torch.compile and CUDA graphs are added.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r}: expected cpu, or cuda on a machine that has it")
    if rounds < 1 or batch < 1:
        raise ValueError(f"rounds={rounds}, batch={batch}: expected at least 1")
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size, device=device)
    y = torch.randint(10, (batch,), device=device)
    models, steps = {}, {}
    for k in dict.fromkeys((K, 1)):
        plain = SuperNet(C, 10, layers, k, cell="plain").to(device)
        shared = SuperNet(C, 10, layers, k).to(device)
        shared.load_plain(plain)
        models |= {f"plain K={k}": plain, f"shared K={k}": shared}
    saved = {name: saved_bytes(model, x) / batch / 2**20 for name, model in models.items()}
    for name, model in models.items():
        steps[name] = lambda model=model: search_step(model, x, y)
    if device == "cuda":
        steps |= _cuda_variants(models[f"shared K={K}"], x, y)
    times = interleaved(steps, rounds, device)

    def ratio(a: str, b: str) -> float:
        return statistics.median(p / q for p, q in zip(times[a], times[b], strict=True))

    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append(
            {
                "name": name,
                "seconds": median,
                "ms_per_image": 1e3 * median / batch,
                "saved_mib_per_image": saved.get(name),
                "speedup": ratio(f"plain K={K}", name),
            }
        )
    return {
        "rows": rows,
        "speedup": ratio(f"plain K={K}", f"shared K={K}"),
        "saved_ratio": saved[f"plain K={K}"] / saved[f"shared K={K}"],
        "k1_over_k_time": ratio("shared K=1", f"shared K={K}"),
        "k1_over_k_saved": saved["shared K=1"] / saved[f"shared K={K}"],
        "k1_over_k_time_plain": ratio("plain K=1", f"plain K={K}"),
        "k1_over_k_saved_plain": saved["plain K=1"] / saved[f"plain K={K}"],
    }


def _cuda_variants(shared: SuperNet, x: Tensor, y: Tensor) -> dict[str, Callable[[], None]]:
    """The shared cell under every switch a GPU user would try; one that fails is left out with a line saying why."""
    x_last = x.contiguous(memory_format=torch.channels_last)

    def bf16() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            search_step(shared, x, y)

    variants = {"shared channels_last": lambda: search_step(shared, x_last, y), "shared bf16": bf16}
    for name, make in (
        ("shared compile", lambda: (lambda f: lambda: search_step(shared, x, y, f))(torch.compile(shared))),
        ("shared CUDA graph", lambda: _graphed(shared, x, y)),
    ):
        try:
            step = make()
            step()
            variants[name] = step
        except Exception as error:  # the bench must print the other rows
            print(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0]}")
    return variants


def table(result: dict) -> str:
    lines = [f"{'':24}{'s / step':>10}{'ms / image':>12}{'saved MiB / image':>19}{'x plain':>9}"]
    for row in result["rows"]:
        saved = "" if row["saved_mib_per_image"] is None else f"{row['saved_mib_per_image']:.2f}"
        lines.append(
            f"{row['name']:24}{row['seconds']:10.4f}{row['ms_per_image']:12.2f}{saved:>19}{row['speedup']:9.2f}"
        )
    lines += [f"{name:24}{value:10.2f}" for name, value in result.items() if name != "rows"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="C=8, 5 cells, 16x16: seconds instead of minutes")
    args = parser.parse_args()
    small = {"C": 8, "layers": 5, "size": 16} if args.quick else {}
    print(table(search_step_bench(batch=args.batch, rounds=args.rounds, device=args.device, **small)))


if __name__ == "__main__":
    main()
