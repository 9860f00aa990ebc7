"""Does leaving early save the time that it saves in multiply-adds? The engine against the whole network, all exits run.

    python -m papers.msdnet_training.bench [--device auto|cpu|cuda] [--batch 256 32 1] [--rounds 5]

The CIFAR network of the budgeted setting (5 exits, lin_grow) with random weights; thresholds chosen so that the exits are
taken as p asks (early_exit.exit_fractions). Both sides have the same folded weights, memory layout and chunks, and take
turns; a ratio is the median over rounds. `saving` is (1 - time) / (1 - multiply-adds): 1 where time falls as they do.
"""

import argparse

import torch
from torch import Tensor

from common.cli import exit_codes
from common.metrics.compute import latency
from common.metrics.early_exit import confidence, exit_fractions, expected_cost, thresholds
from common.runtime import select_device

from .cost import exit_costs
from .engine import CHUNK, AdaptiveEngine, for_inference, in_chunks
from .model import msdnet_cifar

BUDGETS = (0.3, 0.5, 1.0, 2.0)


def check(engine: AdaptiveEngine, images: Tensor, logits: Tensor) -> Tensor:
    """Exits that the engine takes; AssertionError where it is not logits (N, k, classes) of the whole network, chosen.

    A confidence within rounding of its threshold may fall on either side; 1 % of the samples at most.
    """
    found, exits = engine(images)
    torch.testing.assert_close(
        found, logits[torch.arange(len(images), device=images.device), exits], rtol=1e-3, atol=1e-4
    )
    reached = confidence(logits) >= torch.tensor(engine.thresholds, device=images.device)
    other = (reached.byte().argmax(1) != exits).double().mean().item()
    assert other <= 0.01, f"{other:.1%} of the samples take another exit than the thresholds say"
    return exits


def adaptive_bench(
    batch: int = 256, rounds: int = 5, min_run_time: float = 1.0, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Figures of one batch size, the engine checked first.

    "full_s": seconds of the whole network an image; then for each p of BUDGETS "mult_adds_p", "time_p": shares of the whole
    network's; "saving_p", and "throughput_p", its throughput gain over the multiply-add gain. ValueError: batch, rounds < 1.
    """
    if rounds < 1 or batch < 1:
        raise ValueError(f"rounds={rounds}, batch={batch}: expected at least 1")
    torch.manual_seed(0)
    device = torch.device(device)
    model = msdnet_cifar(5, "lin_grow").eval().to(device)
    images = torch.randn(max(batch, 64), 3, 32, 32, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    chunk = batch if device.type == "cuda" else min(batch, CHUNK)
    whole, costs = for_inference(model), exit_costs(model, 32)
    logits = torch.stack(in_chunks(whole, images, chunk), dim=1)

    runs, share = {"full": lambda: [in_chunks(whole, x, chunk) for x in images.split(batch)]}, {}
    for p in BUDGETS:
        bounds = thresholds(confidence(logits), exit_fractions(p, 5))
        engine = AdaptiveEngine(model, bounds, chunk)
        share[p] = expected_cost(check(engine, images, logits), costs).item() / costs[-1]
        runs[f"{p:g}"] = lambda engine=engine: [engine(x) for x in images.split(batch)]
    measured = latency(runs, min_run_time, rounds)
    figures = {"full_s": measured["full"].median / len(images)}
    for p in BUDGETS:
        time = measured[f"{p:g}"].ratio
        figures |= {f"mult_adds_{p:g}": share[p], f"time_{p:g}": time}
        figures |= {f"saving_{p:g}": (1 - time) / (1 - share[p]), f"throughput_{p:g}": share[p] / time}
    return figures


def forms_bench(batch: int = 256, rounds: int = 5, device: torch.device | str = "cpu") -> dict[str, float]:
    """Milliseconds an image of the whole network in the forms that the baseline was chosen from."""
    torch.manual_seed(0)
    model = msdnet_cifar(5, "lin_grow").eval().to(device)
    images, folded = torch.randn(batch, 3, 32, 32, device=device), for_inference(model)
    last = images.contiguous(memory_format=torch.channels_last)

    def plain(network, x):
        with torch.inference_mode():
            return network(x)

    contiguous = for_inference(model).to(memory_format=torch.contiguous_format)
    runs = {
        "as trained": lambda: plain(model, images),
        "folded": lambda: plain(contiguous, images),
        "folded, channels_last": lambda: plain(folded, last),
    }
    for chunk in (16, 32, 64, 128):
        if chunk < batch:
            runs[f"the same, chunks of {chunk}"] = lambda chunk=chunk: in_chunks(folded, last, chunk)
    return {name: 1e3 * t.median / batch for name, t in latency(runs, 0.5, rounds).items()}


def table(figures: dict[str, float], batch: int) -> str:
    """One row a budget."""
    lines = [f"batch {batch}: the whole network {1e3 * figures['full_s']:.2f} ms an image"]
    lines.append(f"{'p':>6}{'multiply-adds':>15}{'time':>8}{'saving':>8}{'throughput / multiply-adds':>28}")
    for key in figures:
        if key.startswith("saving_"):
            p = key.removeprefix("saving_")
            values = [figures[f"{name}_{p}"] for name in ("mult_adds", "time", "saving", "throughput")]
            lines.append(f"{p:>6}{values[0]:15.3f}{values[1]:8.3f}{values[2]:8.2f}{values[3]:28.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32, 1])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with exit_codes():
        device = select_device(args.device)
        for name, ms in forms_bench(max(args.batch), args.rounds, device).items():
            print(f"{name:32}{ms:8.2f} ms an image")
        for batch in args.batch:
            print(table(adaptive_bench(batch, args.rounds, device=device), batch), flush=True)


if __name__ == "__main__":
    main()
