"""Time of CondenseNet-86, dense against condensed, as layers and in the engine; then of the kernel.

    python -m papers.condensenet.bench [--device auto|cpu|cuda] [--batch 64 1] [--rounds 5]

Speed-ups are over the better of the two dense rows, the median over rounds in which all rows take turns; `theory` is
the ratio of mult-adds. All threads of torch.get_num_threads() are used, one with OMP_NUM_THREADS=1. With several, trust
the numbers of an idle machine alone: next to other work, the rows that split every operation over threads wait for the
slowest in each (10 times their time and more was seen), the engine once in a batch. One thread is fair at any time.
`make reproduce PAPER=condensenet CLAIM=speed-64` records it.
"""

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.cli import exit_codes
from common.metrics.compute import latency, mult_adds
from common.runtime import select_device

from .conversion import condense
from .engine import FastCondenseNet
from .kernels.bench import kernel_bench, kernel_table
from .model import CondenseNet, condensenet, densenet_bc

ROWS = {
    "dense": "dense 1x1, the training form without masks",
    "dense_last": "  in channels_last",
    "dense_frozen": "  in channels_last, torch.jit.freeze",
    "dense_engine": "  in the engine",
    "layers": "condensed, as layers (the released form)",
    "layers_last": "  in channels_last",
    "engine": "  in the engine",
    "static": "static groups, as layers",
    "static_engine": "  in the engine",
    "densenet": "DenseNet-BC-100 (k=12), channels_last",
    "densenet_engine": "  in the engine",
}


def networks(depth: int) -> dict[str, CondenseNet]:
    """In eval mode: the dense and the condensed form of one network, the same with static groups, DenseNet-BC-100."""
    torch.manual_seed(0)
    model = condensenet(depth)
    made = {"static": condensenet(depth, conv="static"), "densenet": densenet_bc(100)}
    for norm in (m for net in (model, *made.values()) for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, 1, 0.5)  # some negative, the slower case of the engine
        nn.init.normal_(norm.bias, 0, 0.5)
    model.prune(0.5)
    dense = copy.deepcopy(model)
    for layer in dense.learned():  # zeros in a dense weight, and no product with the mask in every pass
        layer.weight.data.mul_(layer.mask)
        layer.mask.fill_(1)
        layer.groups = layer.condense_factor = 1
    made |= {"dense": dense, "layers": condense(model, classifier=False)}
    return {name: net.eval() for name, net in made.items()}


def variants(net: CondenseNet, name: str, images: Tensor, which: tuple[str, ...]) -> dict[str, Callable[[], Tensor]]:
    """Calls for the rows `name`, `name`_last, ... that are in `which`. The engine is for the CPU alone."""
    net, calls = copy.deepcopy(net).to(images.device), {}
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)
    engine = "engine" if name == "layers" else f"{name}_engine"
    if name in which:
        calls[name] = (lambda: last(images_last)) if name == "densenet" else lambda: net(images)
    if f"{name}_last" in which:
        calls[f"{name}_last"] = lambda: last(images_last)
    if f"{name}_frozen" in which:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the check of the image size is traced as passed
            frozen = torch.jit.freeze(torch.jit.trace(last, images_last))
        calls[f"{name}_frozen"] = lambda: frozen(images_last)
    if engine in which and images.device.type == "cpu":
        fast = FastCondenseNet(net)
        calls[engine] = lambda: fast(images)
    return calls


@torch.inference_mode()
def speed_bench(
    batch: int = 64, rounds: int = 5, device: str = "cpu", depth: int = 86, which: tuple[str, ...] = tuple(ROWS)
) -> dict[str, dict[str, float]]:
    """{row: {ms, speedup, theory, of_theory}} for 32x32 images; raises if two forms of a network differ.

    speedup: time of the better of "dense" and "dense_last" over the row's, the median over rounds; theory: mult-adds of
    the dense form over the row's.
    """
    if batch < 1 or rounds < 1 or not {"dense", "dense_last"} <= set(which) <= set(ROWS):
        raise ValueError(
            f"batch={batch}, rounds={rounds}, which={which}: expected dense and dense_last among {[*ROWS]}"
        )
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    tolerance = 1e-5 if images.device.type == "cpu" else 1e-2  # there convolutions are in TF32
    calls, macs, expected = {}, {}, {}
    for name, net in networks(depth).items():
        new = variants(net, name, images, which)
        if not new:
            continue
        # the dense and the condensed form compute one function: the logits of the first are expected of both
        logits = expected.setdefault("dense" if name == "layers" else name, net.to(device)(images))
        for row, call in new.items():
            error = ((call() - logits).abs().max() / logits.abs().max()).item()
            if not error <= tolerance:
                raise RuntimeError(f"{row} differs by {error:.1e} of the largest logit, expected at most {tolerance}")
        macs |= dict.fromkeys(new, mult_adds(net.to("meta"), torch.empty(1, 3, 32, 32, device="meta")))
        calls |= new
    calls = {row: calls[row] for row in ROWS if row in calls}
    times = latency(calls, min_run_time=0.1, rounds=rounds)
    better = min(("dense", "dense_last"), key=lambda row: times[row].ratio)
    rows = {}
    for row, time in times.items():
        speedup = statistics.median(a / b for a, b in zip(times[better].ratios, time.ratios, strict=True))
        saving = macs["dense"] / macs[row]
        rows[row] = {"ms": 1e3 * time.median, "speedup": speedup, "theory": saving, "of_theory": speedup / saving}
    return rows


def table(rows: dict[str, dict[str, float]], batch: int) -> str:
    lines = [f"{f'batch {batch}':46}{'ms':>9}{'ms/image':>10}{'speed-up':>10}{'theory':>8}{'of it':>7}"]
    for row, r in rows.items():
        ms = f"{r['ms']:9.1f}{r['ms'] / batch:10.2f}"
        lines.append(f"{ROWS[row]:46}{ms}{r['speedup']:10.2f}{r['theory']:8.2f}{r['of_theory']:7.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 1])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with exit_codes():
        device = str(select_device(args.device))
        print(f"{torch.get_num_threads()} threads")
        for batch in args.batch:
            print(table(speed_bench(batch, args.rounds, device), batch))
        print(kernel_table(kernel_bench(device.split(":")[0])))


if __name__ == "__main__":
    main()
