"""`python -m common.datasets.bench`: DeviceLoader against torchvision transforms in a torch DataLoader.

The same work on both sides: CIFAR-shaped images, random crop with padding 4, flip, normalisation, cutout 16. First
that the results agree (exactly for given draws, in distribution for random ones), then images/s, interleaved.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import functional as TF

from common.checkpoints import write_json
from common.datasets.device_loader import DeviceLoader
from common.datasets.images import PUBLISHED, Images
from common.errors import UserError
from common.runtime import EXIT_BAD_INPUT, keyed_generator, select_device

PAD, CUTOUT, BATCH = 4, 16, 128


class Cutout:
    """DARTS's cutout on a normalised (C, H, W) tensor."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[1:]
        y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
        half = self.length // 2
        image[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
        return image


class PerSample(Dataset):
    """The usual dataset: one PIL image after another through torchvision's transforms."""

    def __init__(self, images: Images):
        self.pixels, self.labels = images.images.permute(0, 3, 1, 2), images.labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.images.shape[1], padding=PAD),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(images.mean, images.std),
                Cutout(CUTOUT),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(TF.to_pil_image(self.pixels[index])), self.labels[index]


def synthetic(n: int) -> Images:
    """CIFAR-shaped noise; the speed does not depend on the content."""
    pixels = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=keyed_generator(0, "bench"))
    known = PUBLISHED["cifar10"]
    return Images("noise", "train", pixels, torch.arange(n) % 10, 10, known.mean, known.std, "")


def check_exact(images: Images, device: torch.device) -> None:
    """For the draws of a plan, the batch equals torchvision's functional operations, pixel for pixel."""
    loader = DeviceLoader(images, 64, 0, device, crop_pad=PAD, flip=True, cutout=0)
    plan = loader.plan(0)[:, :64]
    batch = loader.batch(plan.to(device))[0].cpu()
    for (index, down, right, flip, _, _), ours in zip(plan.T.tolist(), batch, strict=True):
        theirs = TF.pad(TF.to_pil_image(images.images[index].permute(2, 0, 1)), PAD)
        theirs = TF.crop(theirs, down, right, *images.images.shape[1:3])
        theirs = TF.hflip(theirs) if flip else theirs
        theirs = TF.normalize(TF.to_tensor(theirs), images.mean, images.std)
        # CPU: the same operations, the same bits. Elsewhere division may round differently by one unit.
        same = torch.equal(ours, theirs) if device.type == "cpu" else torch.allclose(ours, theirs, rtol=0, atol=1e-6)
        if not same:
            raise UserError(f"sample {index} differs from torchvision's; expected equality; run the tests: make test")


def moments(batches) -> torch.Tensor:
    """(2, C): per-channel mean and std over all batches."""
    stacked = torch.cat([x.cpu() for x, _ in batches])
    return torch.stack([stacked.mean((0, 2, 3)), stacked.std((0, 2, 3))])


def throughput(batches, device: torch.device) -> float:
    """Images a second of one pass; every batch is moved to the device."""
    begin, count = time.perf_counter(), 0
    for x, y in batches:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        count += len(y)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count / (time.perf_counter() - begin)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m common.datasets.bench", description=__doc__)
    parser.add_argument("--images", type=int, default=10_240)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved passes of each way; the median counts")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args(argv)
    try:
        run(args)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def run(args) -> None:
    device = select_device(args.device)
    images = synthetic(args.images)
    check_exact(images, device)
    ours = DeviceLoader(images, BATCH, 0, device, crop_pad=PAD, flip=True, cutout=CUTOUT)
    dataset = PerSample(images)

    def theirs(workers: int) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        pinned = device.type == "cuda"
        return DataLoader(dataset, BATCH, True, num_workers=workers, drop_last=True, generator=generator,
                          persistent_workers=workers > 0, pin_memory=pinned)  # fmt: skip

    loaders = {f"DataLoader, {workers} workers": theirs(workers) for workers in (0, 2)}
    gap = (moments(ours.epoch(0)) - moments(loaders["DataLoader, 0 workers"])).abs().max().item()
    if gap > 0.02:
        raise UserError(f"mean or std of the augmented batches differs by {gap:.3f} from torchvision's; expected less "
                        "than 0.02; run the tests: make test")  # fmt: skip
    print(f"equal to torchvision for given draws; mean and std of random batches agree within {gap:.4f}")

    for loader in loaders.values():  # starts the workers
        throughput(loader, device)
    speeds: dict[str, list[float]] = {"DeviceLoader": [], **{name: [] for name in loaders}}
    for epoch in range(args.rounds):
        speeds["DeviceLoader"].append(throughput(ours.epoch(epoch), device))
        for name, loader in loaders.items():
            speeds[name].append(throughput(loader, device))
    median = {name: statistics.median(values) for name, values in speeds.items()}
    for name, speed in median.items():
        print(f"{name:22} {speed:12,.0f} images/s   {median['DeviceLoader'] / speed:6.1f} x slower than DeviceLoader"
              if name != "DeviceLoader" else f"{name:22} {speed:12,.0f} images/s")  # fmt: skip
    if args.out:
        hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        write_json(args.out, {"device": device.type, "hardware": hardware, "threads": torch.get_num_threads(),
                              "torch": torch.__version__, "images": args.images, "batch": BATCH, "moment_gap": gap,
                              "images_per_second": median, "rounds": speeds})  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
