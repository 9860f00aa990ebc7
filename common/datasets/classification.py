"""What a classification script reads: `part(config, job, "train" | "held_out" | "test")`, whatever the data set.

Small sets live on the device (DeviceLoader); ImageNet comes from its folder tree through worker processes. Both kinds of
loader have `.epoch(epoch, start)` and `len()`. The config is the script's own; these of its fields are read:

    dataset         a set of common.datasets, or imagenet
    train_images, test_images    the first n of a split; 0: all
    held_out        training images kept out of "train" (for thresholds, or to choose by); a permutation keyed by the seed
    image_size      0: as it is; smaller: averaged down (generated sets: drawn at this size; imagenet: 224 unless given)
    batch_size      over all ranks
    crop_pad, flip  augmentation of the small sets
    workers         loader processes a rank (imagenet)
    channels_last   memory format of the batches
    cutout          side of the square cut out of training images of the small sets; a config need not have it
    colour_jitter   imagenet training images: brightness, contrast, saturation by 0.4, hue by 0.2; need not have it either
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision import transforms

from common import datasets
from common.datasets import DeviceLoader, imagenet
from common.errors import UserError
from common.runtime import keyed_generator

EVALUATION_BATCH = 250  # of a rank, at least: evaluation needs no small batches


@dataclass(frozen=True)
class Part:
    """A split, ready to loop over. size: side of its images; digests: data set id -> digest, for the record."""

    loader: object
    samples: int
    classes: int
    size: int
    digests: dict[str, str]

    def require_classes(self, classes: int) -> None:
        """UserError unless the split has as many classes as a checkpoint."""
        if self.classes != classes:
            raise UserError(f"the checkpoint has {classes} classes, {next(iter(self.digests))} has {self.classes}")


def part(config, job, which: str) -> Part:
    """Training batches are shuffled, augmented, of full size; held-out and test: each image once, in a fixed order."""
    train = which == "train"
    if config.dataset == "imagenet":
        size = config.image_size or 224
        transform = imagenet_transform(train, size, getattr(config, "colour_jitter", False))
        folder = imagenet.image_folder("val" if which == "test" else "train", job.data, transform)
        chosen = folder
        if which != "test" and config.held_out:
            chosen = torch.utils.data.Subset(folder, divided(len(folder), config.held_out, job.seed)[which].tolist())
        loader = files_loader(chosen, config, job, train)
        return Part(loader, len(chosen), len(folder.classes), size, {f"imagenet/{which}": f"{len(chosen)} files"})
    images = small_set(config, job, "test" if which == "test" else "train")
    if which != "test" and config.held_out:
        images = images.subset(divided(len(images), config.held_out, job.seed)[which])
    digests = {f"{images.name}/{which}": images.digest}
    return Part(device_loader(images, config, job, train), len(images), images.classes, images.images.shape[1], digests)


def device_loader(images: datasets.Images, config, job, train: bool, seed: int | None = None) -> DeviceLoader:
    """Batches of a small set, as the config says; seed: of order and augmentation, the job's unless given."""
    options = {"rank": job.world.rank, "world": job.world.size, "channels_last": config.channels_last}
    if train:
        options |= {"crop_pad": config.crop_pad, "flip": config.flip, "cutout": getattr(config, "cutout", 0)}
    seed = job.seed if seed is None else seed
    return DeviceLoader(images, _batch(config, job, train), seed, job.device, shuffle=train, drop_last=train, **options)


def files_loader(dataset, config, job, train: bool, seed: int | None = None) -> "FolderLoader":
    """The same of a dataset of files."""
    seed = job.seed if seed is None else seed
    return FolderLoader(dataset, _batch(config, job, train), seed, job.world, config.workers, drop_last=train)


def _batch(config, job, train: bool) -> int:
    batch = per_rank(config.batch_size, job.world)
    return batch if train else max(batch, EVALUATION_BATCH)


def divided(n: int, held_out: int, seed: int) -> dict[str, torch.Tensor]:
    """Indices of the training split, cut in two by a permutation that is a pure function of the seed."""
    if not 0 < held_out < n:
        raise UserError(f"held_out is {held_out} of {n} training images; expected at least one, and some to train on")
    order = torch.randperm(n, generator=keyed_generator(seed, "held_out"))
    return {"train": order[held_out:].sort().values, "held_out": order[:held_out].sort().values}


def per_rank(batch_size: int, world) -> int:
    if batch_size % world.size:
        raise UserError(f"batch_size {batch_size} cannot be shared by {world.size} processes; make it a multiple")
    return batch_size // world.size


def small_set(config, job, split: str) -> datasets.Images:
    """The split of an RGB set that fits in memory, at `config.image_size`, cut to `config.{train,test}_images`."""
    count = config.train_images if split == "train" else config.test_images
    if config.dataset in datasets.GENERATED:
        size = {"size": config.image_size} if config.image_size else {}
        return datasets.load(config.dataset, split, job.data, n=count or None, **size)
    images = datasets.load(config.dataset, split, job.data)
    if count > len(images):
        raise UserError(f"{split}_images is {count}, but {images.name} {split} has {len(images)}; lower it, 0 is all")
    if count:
        images = images.subset(range(count))
    native = images.images.shape[1]
    if config.image_size and config.image_size != native:
        if native % config.image_size:
            raise UserError(f"image_size {config.image_size} does not divide {native}, the size of {images.name}")
        images = shrink(images, native // config.image_size)
    if images.images.shape[3] != 3:
        raise UserError(f"{images.name} has {images.images.shape[3]} channel(s); the networks here take 3 (RGB)")
    return images


def shrink(images: datasets.Images, factor: int) -> datasets.Images:
    """Average pooling by `factor`, rounded back to uint8."""
    pooled = [F.avg_pool2d(some.permute(0, 3, 1, 2).float(), factor) for some in images.images.split(4096)]
    small = torch.cat(pooled).round().byte().permute(0, 2, 3, 1).contiguous()
    return datasets.Images(**{**vars(images), "images": small})


def imagenet_transform(train: bool, size: int = 224, colour_jitter: bool = False):
    """RandomResizedCrop and flip (and jitter of the colours); or resize to size * 256/224 and centre crop."""
    if train:
        steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        steps += [transforms.ColorJitter(0.4, 0.4, 0.4, 0.2)] if colour_jitter else []
    else:
        steps = [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(imagenet.MEAN, imagenet.STD)])


class FolderLoader:
    """An image folder (or a subset of one) with DeviceLoader's interface. `batch_size` is that of one rank."""

    def __init__(self, dataset, batch_size, seed, world, workers, drop_last=True):
        self.dataset, self.batch_size, self.seed, self.world, self.workers = dataset, batch_size, seed, world, workers
        self.drop_last = drop_last
        share = len(range(world.rank, len(dataset), world.size))
        if drop_last and batch_size > len(dataset) // world.size:
            raise UserError(f"batch size {batch_size} a rank exceeds its {len(dataset) // world.size} images; lower it")
        self.batches = len(dataset) // world.size // batch_size if drop_last else -(-share // batch_size)

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, start: int = 0):
        rank, device = {"rank": self.world.rank, "world": self.world.size}, self.world.device
        order = (self.seed, epoch, self.workers, start)
        loader = imagenet.folder_loader(self.dataset, self.batch_size, *order, **rank, drop_last=self.drop_last)
        for x, y in loader:
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
