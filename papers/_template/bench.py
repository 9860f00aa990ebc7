"""Time of a training step, with the paper's idea and without.

    python -m papers._template.bench [--device auto|cpu|cuda] [--batch 64] [--rounds 5]

Both take turns, so that a slow moment of the machine hits both; a ratio is the median over rounds.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F

from common.cli import exit_codes
from common.metrics.compute import latency
from common.runtime import select_device

from .model import Network


def training_step(model: Network, x: torch.Tensor, y: torch.Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


def step_bench(batch: int = 64, rounds: int = 5, device: torch.device | str = "cpu") -> dict[str, float]:
    """{"plain_ms", "norm_ms", "norm_time": over plain} of 32 x 32 images, forward and backward."""
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10
    models = {name: Network(norm=name == "norm").to(device) for name in ("plain", "norm")}
    measured = latency({name: partial(training_step, model, x, y) for name, model in models.items()}, 0.1, rounds)
    return {f"{name}_ms": 1e3 * time.median for name, time in measured.items()} | {"norm_time": measured["norm"].ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with exit_codes():
        found = step_bench(args.batch, args.rounds, select_device(args.device))
        print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))


if __name__ == "__main__":
    main()
