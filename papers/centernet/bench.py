"""The pools alone; a training step of Hourglass-52 before and after: time, and what it keeps for backward; the loading of images.

    python -m papers.centernet.bench [--device auto|cpu|cuda] [--side 127] [--batch 2] [--rounds 5]

Before: pools through torch.cummax on flipped maps (the official extension is a loop over rows that no longer builds), tags and
offsets computed for every cell. After: the pools of kernels/, tags and offsets at the objects' cells alone. Same weights, same
loss; sides take turns, a ratio is the median over rounds.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import write_jpeg
from torchvision.transforms.v2.functional import resize

from common.cli import exit_codes
from common.datasets.pictures import read_picture
from common.metrics.compute import saved_bytes
from common.runtime import select_device

from . import pooling
from .augment import random_crop
from .kernels.bench import cummax_pool, kernel_bench, kernel_table
from .losses import detection_loss
from .model import CenterNet, Output, centernet
from .targets import Targets, render_targets

OBJECTS = 16


def cummax_center_pool(columns: Tensor, rows: Tensor) -> Tensor:
    """Center pooling as four scans, as in the official code."""
    column = cummax_pool(cummax_pool(columns, "top"), "bottom")
    return column + cummax_pool(cummax_pool(rows, "left"), "right")


@contextmanager
def official_pools():
    ours = pooling.corner_pool, pooling.center_pool
    pooling.corner_pool, pooling.center_pool = cummax_pool, cummax_center_pool
    try:
        yield
    finally:
        pooling.corner_pool, pooling.center_pool = ours


def random_targets(batch: int, side: int, device, classes: int = 80) -> Targets:
    cells = (side + 1) // 4
    ends = torch.rand(batch, OBJECTS, 2, 2, device=device).sort(2).values * (side - 2)
    boxes = torch.cat([ends[:, :, 0], ends[:, :, 1] + 1], 2)
    labels = torch.randint(classes, (batch, OBJECTS), device=device)
    return render_targets(boxes, labels, torch.full((batch,), OBJECTS, device=device), classes, 3, (cells, cells))


def read_at(output: Output, cells: Tensor) -> Output:
    """A dense output, gathered at the objects' cells, as the official code does."""

    def gathered(maps: Tensor, k: int) -> Tensor:
        return maps.flatten(2).gather(2, cells[k][:, None].expand(-1, maps.shape[1], -1)).mT

    tags = tuple(gathered(tag, k)[..., 0] for k, tag in enumerate(output.tags))
    return Output(output.heats, tags, tuple(gathered(offset, k) for k, offset in enumerate(output.offsets)))


def dense_step(model: CenterNet, images: Tensor, wanted: Targets) -> Tensor:
    with official_pools():
        loss = detection_loss([read_at(output, wanted.cells) for output in model(images)], wanted).total
    loss.backward()
    return loss.detach()


def our_step(model: CenterNet, images: Tensor, wanted: Targets) -> Tensor:
    loss = detection_loss(model(images, wanted.cells), wanted).total
    loss.backward()
    return loss.detach()


def step_bench(
    device: str = "cpu", side: int = 127, batch: int = 2, rounds: int = 5, depth: int = 52
) -> dict[str, float]:
    """{"before_ms", "after_ms", "recompute_ms": an image, medians; "step_speedup": before over after, the median of rounds}.

    The steps take turns; their losses are checked first.
    """
    torch.manual_seed(0)
    model = centernet(depth).to(device).train().to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    wanted = random_targets(batch, side, device)

    def recomputed() -> Tensor:
        model.recompute = True
        try:
            return our_step(model, images, wanted)
        finally:
            model.recompute = False

    runs = {
        "before": lambda: dense_step(model, images, wanted),
        "after": lambda: our_step(model, images, wanted),
        "recompute": recomputed,
    }
    times = {name: [] for name in runs}
    for i in range(rounds + 1):  # the first is to warm up, and to compare
        losses = []
        for name, run in runs.items():
            start = time.perf_counter()
            losses.append(float(run()))  # waits for the device
            times[name].append(time.perf_counter() - start)
        if i == 0 and max(losses) - min(losses) > 1e-3 * max(losses):
            raise RuntimeError(f"the forms of the step differ: losses {losses}")
    found = {f"{name}_ms": 1e3 * statistics.median(seconds[1:]) / batch for name, seconds in times.items()}
    ratios = [before / after for before, after in zip(times["before"][1:], times["after"][1:], strict=True)]
    return found | {"step_speedup": statistics.median(ratios)}


def memory_bench(side: int = 511) -> dict[str, float]:
    """MiB an image that a training step of Hourglass-52 keeps for backward, on the meta device: exact, nothing computed."""
    found = {}
    with torch.device("meta"):
        images, cells = torch.empty(1, 3, side, side), torch.zeros(3, 1, OBJECTS, dtype=torch.int64)
        model = centernet(52).train()
        own = [*model.parameters(), *model.buffers(), images, cells]
        with official_pools():
            found["before_mib"] = saved_bytes(lambda: model(images), own) / 2**20
        found["after_mib"] = saved_bytes(lambda: model(images, cells), own) / 2**20
        model.recompute = True
        found["recompute_mib"] = saved_bytes(lambda: model(images, cells), own) / 2**20
    return found


def loading_bench(side: int = 511, images: int = 16) -> dict[str, float]:
    """{"crops_per_second"}: JPEG files of 640 x 480 pixels, decoded and cropped by one process on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        coarse = torch.randint(256, (3, 24, 32), dtype=torch.uint8)
        picture = resize(coarse, [480, 640], antialias=True)
        files = [Path(folder) / f"{i}.jpg" for i in range(images)]
        for file in files:
            write_jpeg(picture, str(file), quality=90)
        start = time.perf_counter()
        for file in files:
            random_crop(read_picture(file, 480, 640), torch.zeros(8, 4), side, [0.6, 0.8, 1.0, 1.2])
        seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    return {"crops_per_second": images / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--side", type=int, default=127)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with exit_codes():
        device = select_device(args.device).type
        print(kernel_table(kernel_bench(device)))
        found = step_bench(device, args.side, args.batch, args.rounds) | memory_bench() | loading_bench()
        for name, value in found.items():
            print(f"{name:>16}{value:12.3f}")


if __name__ == "__main__":
    main()
