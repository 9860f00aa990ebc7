"""Does stopping early save the time that it saves in multiply-adds? And crops at once, against a loop over the images.

    python -m papers.gfnet.bench [--device auto|cpu|cuda] [--batch 256 32 1] [--rounds 5] [--encoder tiny mobilenet_v3_large]

Random weights and images; thresholds chosen so that the steps are taken as p asks (early_exit.exit_fractions). The engine
with thresholds takes turns with the engine without, which runs all T steps in the same folded weights, layout and chunks;
a ratio is the median over rounds. `saving` is (1 - time) / (1 - multiply-adds): 1 where time falls as multiply-adds do.
The glance's resize, the same for both, pulls it down, crops and a slow policy push it up: they cost time and few or no
multiply-adds.
"""

import argparse

import torch
from torch import Tensor, nn

from common.cli import exit_codes
from common.metrics.compute import latency
from common.metrics.early_exit import confidence, exit_fractions, exits_taken, thresholds
from common.metrics.kernel_time import copy_gb_per_s
from common.runtime import select_device

from .cost import step_costs
from .crop import crop
from .engine import CHUNK, GlanceFocusEngine
from .model import GFNet
from .policy import Locator, Policy

BUDGETS = (0.3, 0.5, 1.0, 2.0)
SETTINGS = {"tiny": (10, 72, 24), "mobilenet_v3_large": (1000, 224, 96)}  # classes, side of the images, P; T = 3


def networks(encoder: str) -> tuple[GFNet, Policy]:
    """Random weights in eval mode. Batch norms have the statistics of noise: with mean 0 and variance 1 the signal fades
    in a deep network, until all images have the same confidence."""
    classes, _, patch = SETTINGS[encoder]
    torch.manual_seed(0)
    model = GFNet(encoder, classes, patch, steps=3, hidden=64)
    channels, n = model.global_encoder.channels, model.global_encoder.map_size(patch)
    policy = Policy.conv(channels, n, conv=16, hidden=64) if encoder == "tiny" else Policy.conv(channels, n)
    for network in (model.global_encoder, model.local_encoder):
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = None  # an average over all batches, here one
        with torch.no_grad():
            network.train()(torch.randn(32, 3, patch, patch))
    return model.eval(), policy.eval()


@torch.inference_mode()
def every_step(model: GFNet, policy: Policy, images: Tensor) -> Tensor:
    """Logits (N, T, classes) of the whole sequence, by the model itself."""
    found = [model(x, Locator(policy)) for x in images.split(CHUNK)]
    return torch.cat([torch.stack([step.logits for step in steps], dim=1) for steps in found])


def safe_thresholds(confidence: Tensor, p: float) -> Tensor:
    """Thresholds for p, each half-way to the next confidence below, so that rounding decides nothing: (N, T) -> (T,)."""
    chosen = thresholds(confidence, exit_fractions(p, confidence.shape[1]))
    return (chosen + torch.where(confidence < chosen, confidence, 0).amax(0)) / 2


def check(engine: GlanceFocusEngine, images: Tensor, logits: Tensor) -> Tensor:
    """Steps that the engine takes; AssertionError where it is not logits (N, T, classes) of the whole sequence, chosen.

    A confidence within rounding of its threshold, or a location within rounding of a whole pixel, may fall on either
    side: 1 % of the images at most, or one. Logits may differ by a hundredth of their deviation: deep random weights
    amplify the rounding of a few images.
    """
    found, steps = engine(images)
    expected = exits_taken(confidence(logits), torch.tensor(engine.thresholds, device=images.device))
    chosen = logits[torch.arange(len(images), device=images.device), expected]
    same = (steps == expected + 1) & ((found - chosen).abs() <= 0.01 * logits.std()).all(1)
    other = int((~same).sum())
    told = f"{other} of {len(images)} images do not stop where, or not with the logits, that the whole sequence says"
    assert other <= max(1, len(images) // 100), told
    return steps


def early_exit_bench(
    batch: int = 256,
    encoder: str = "tiny",
    rounds: int = 5,
    min_run_time: float = 1.0,
    device: torch.device | str = "cpu",
    budgets: tuple[float, ...] = BUDGETS,
) -> dict[str, float]:
    """Figures of one batch size, the engine checked first.

    "full_images_per_second": of the whole sequence; then for each p "mult_adds_p", "time_p": shares of the whole
    sequence's (policy and classifier included), "saving_p", and "images_per_second_p". ValueError: batch or rounds below
    1, another encoder than those of SETTINGS.
    """
    if rounds < 1 or batch < 1 or encoder not in SETTINGS:
        expected = f"at least 1 and one of {', '.join(SETTINGS)}"
        raise ValueError(f"rounds={rounds}, batch={batch}, encoder {encoder!r}: expected {expected}")
    model, policy = networks(encoder)
    costs = torch.tensor(step_costs(model, policy), dtype=torch.float64)
    model, policy, side = model.to(device), policy.to(device), SETTINGS[encoder][1]
    images = torch.randn(max(batch, 64), 3, side, side, device=device)
    images += torch.randn(len(images), 3, 1, 1, device=device)  # or all images look the same
    logits = every_step(model, policy, images)

    full, share = GlanceFocusEngine(model, policy), {}
    assert (check(full, images, logits) == 3).all()
    runs = {"full": lambda: [full(x) for x in images.split(batch)]}
    for p in budgets:
        engine = GlanceFocusEngine(model, policy, safe_thresholds(confidence(logits), p))
        share[p] = costs[check(engine, images, logits).cpu() - 1].mean().item() / costs[-1].item()
        runs[f"{p:g}"] = lambda engine=engine: [engine(x) for x in images.split(batch)]
    measured = latency(runs, min_run_time, rounds)
    figures = {"full_images_per_second": len(images) / measured["full"].median}
    for p in budgets:
        time = measured[f"{p:g}"].ratio
        figures |= {f"mult_adds_{p:g}": share[p], f"time_{p:g}": time, f"saving_{p:g}": (1 - time) / (1 - share[p])}
        figures |= {f"images_per_second_{p:g}": len(images) / measured[f"{p:g}"].median}
    return figures


def loop_of_slices(images: Tensor, locations: Tensor, size: int) -> Tensor:
    """crop as the official code does it: one slice an image, four integers read from the device for each."""
    starts = (locations * (images.shape[-1] - size)).floor().int()
    patches = []
    for x, start in zip(images, starts, strict=True):
        top, bottom, left, right = (i.item() for i in (start[0], start[0] + size, start[1], start[1] + size))
        patches.append(x[:, top:bottom, left:right])
    return torch.stack(patches)


def crop_bench(
    batch: int = 256,
    size: int = 224,
    patch: int = 96,
    rounds: int = 5,
    min_run_time: float = 0.5,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Milliseconds a batch of the crops of (batch, 3, size, size) images, checked to be equal bit for bit.

    "loop_ms", "crop_ms" and "speed_up" (median over rounds); on CUDA also "gb_per_s", bytes read and written by the
    crop, and "copy_gb_per_s", those of a plain copy of more than the cache holds.
    """
    torch.manual_seed(0)
    images, locations = torch.randn(batch, 3, size, size, device=device), torch.rand(batch, 2, device=device)
    found = crop(images, locations, patch)
    assert torch.equal(found, loop_of_slices(images, locations, patch)), "the crops differ from slices"
    runs = {
        "crop": lambda: crop(images, locations, patch),
        "loop": lambda: loop_of_slices(images, locations, patch),
    }
    measured = latency(runs, min_run_time, rounds)
    figures = {f"{name}_ms": 1e3 * measured[name].median for name in ("loop", "crop")}
    figures |= {"speed_up": measured["loop"].ratio}
    if images.is_cuda:
        figures |= {"gb_per_s": 2e-9 * found.nbytes / measured["crop"].median, "copy_gb_per_s": copy_gb_per_s("cuda")}
    return figures


def table(figures: dict[str, float], batch: int, encoder: str) -> str:
    """One row a budget."""
    lines = [f"{encoder}, batch {batch}: the whole sequence {figures['full_images_per_second']:.0f} images/s"]
    lines.append(f"{'p':>6}{'mult-adds':>11}{'time':>8}{'saving':>8}{'images/s':>10}")
    for key in figures:
        if key.startswith("saving_"):
            p = key.removeprefix("saving_")
            share, time, saving, speed = (
                figures[f"{name}_{p}"] for name in ("mult_adds", "time", "saving", "images_per_second")
            )
            lines.append(f"{p:>6}{share:11.3f}{time:8.3f}{saving:8.2f}{speed:10.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--encoder", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    args = parser.parse_args()
    with exit_codes():
        device = select_device(args.device)
        for encoder in args.encoder:
            for batch in args.batch:
                print(table(early_exit_bench(batch, encoder, args.rounds, device=device), batch, encoder), flush=True)
        print("crops of 96 from 256 images of 224:")
        for name, value in crop_bench(rounds=args.rounds, device=device).items():
            print(f"{name:>12}{value:10.2f}")


if __name__ == "__main__":
    main()
