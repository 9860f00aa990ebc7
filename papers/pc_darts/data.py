"""What search.py and train.py read: loaders with `.epoch(epoch, start)` and `len()`, whatever the data set.

Small sets live on the device (DeviceLoader); ImageNet comes from its folder tree through worker processes.
"""

import torch
import torch.nn.functional as F
from torchvision import transforms

from common import datasets
from common.datasets import DeviceLoader, imagenet
from common.errors import UserError
from common.runtime import keyed_order

IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FolderLoader:
    """An image folder with DeviceLoader's interface. `batch_size` is that of one rank."""

    def __init__(self, dataset, batch_size, seed, world, workers, classes, drop_last=True):
        self.dataset, self.batch_size, self.seed, self.world, self.workers = dataset, batch_size, seed, world, workers
        self.classes, self.drop_last = classes, drop_last
        share = len(range(world.rank, len(dataset), world.size))
        if drop_last and batch_size > len(dataset) // world.size:
            raise UserError(f"batch size {batch_size} a rank exceeds its {len(dataset) // world.size} images; lower it")
        self.batches = len(dataset) // world.size // batch_size if drop_last else -(-share // batch_size)

    def __len__(self):
        return self.batches

    def epoch(self, epoch: int, start: int = 0):
        loader = imagenet.folder_loader(
            self.dataset,
            self.batch_size,
            self.seed,
            epoch,
            self.workers,
            start_batch=start,
            rank=self.world.rank,
            world=self.world.size,
            drop_last=self.drop_last,
        )
        for x, y in loader:
            yield x.to(self.world.device, non_blocking=True), y.to(self.world.device, non_blocking=True)


def small_set(config, job, split: str) -> datasets.Images:
    """The split of a set that fits in memory, at `config.image_size`, cut to `config.{train,test}_images` (0: all)."""
    count = config.train_images if split == "train" else config.test_images
    if config.dataset == "cluttered_digits":
        return datasets.load("cluttered_digits", split, n=count or None, size=config.image_size or 32)
    images = datasets.load(config.dataset, split, job.data)
    if count:
        if count > len(images):
            raise UserError(
                f"{split}_images is {count}, but {images.name} {split} has {len(images)}; lower it, 0 is all"
            )
        images = images.subset(range(count))
    native = images.images.shape[1]
    if config.image_size and config.image_size != native:
        if native % config.image_size:
            raise UserError(f"image_size {config.image_size} does not divide {native}, the size of {images.name}")
        images = shrink(images, native // config.image_size)
    if images.images.shape[3] != 3:
        raise UserError(f"{images.name} has {images.images.shape[3]} channel(s); PC-DARTS networks take 3 (RGB)")
    return images


def shrink(images: datasets.Images, factor: int) -> datasets.Images:
    """Average pooling by `factor`, rounded back to uint8."""
    pooled = [F.avg_pool2d(part.permute(0, 3, 1, 2).float(), factor) for part in images.images.split(4096)]
    small = torch.cat(pooled).round().byte().permute(0, 2, 3, 1).contiguous()
    return datasets.Images(**{**vars(images), "images": small})


def device_loader(images, config, job, seed, train: bool = True, **changed) -> DeviceLoader:
    """Batches of `config.batch_size` over all ranks; augmented as configured when training, in order otherwise."""
    options = (
        {"crop_pad": config.crop_pad, "flip": config.flip, "cutout": getattr(config, "cutout", 0)} if train else {}
    )
    return DeviceLoader(
        images,
        per_rank(config.batch_size, job.world),
        seed,
        job.device,
        shuffle=train,
        drop_last=train,
        rank=job.world.rank,
        world=job.world.size,
        channels_last=config.channels_last,
        **{**options, **changed},
    )


def per_rank(batch_size: int, world) -> int:
    if batch_size % world.size:
        raise UserError(f"batch_size {batch_size} cannot be shared by {world.size} processes; make it a multiple")
    return batch_size // world.size


def imagenet_transform(train: bool, jitter: bool, size: int = 224):
    """RandomResizedCrop and flip (and colour jitter 0.4/0.4/0.4/0.2); or resize and centre crop."""
    if not train:
        steps = [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)]
    else:
        steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        steps += [transforms.ColorJitter(0.4, 0.4, 0.4, 0.2)] if jitter else []
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(*IMAGENET_STATISTICS)])


def search_loaders(config, job) -> tuple:
    """(weights' loader, architecture's loader, the latter's images in order, classes, images of both, data digests).

    The training set is cut in two by a permutation that is a pure function of the seed. ImageNet: the first two disjoint
    fractions `config.fractions` of every class.
    """
    if config.dataset == "imagenet":
        size = config.image_size or 224
        folder = imagenet.image_folder("train", job.data, imagenet_transform(True, False, size))
        plain = imagenet.image_folder("train", job.data, imagenet_transform(False, False, size))
        parts = imagenet.class_fraction_split(folder.targets, config.fractions, job.seed)
        sets = [torch.utils.data.Subset(folder, parts[0]), torch.utils.data.Subset(folder, parts[1])]
        sets.append(torch.utils.data.Subset(plain, parts[1]))
        batch, classes = per_rank(config.batch_size, job.world), len(folder.classes)
        made = [
            FolderLoader(s, batch, job.seed + i, job.world, config.workers, classes, i < 2) for i, s in enumerate(sets)
        ]
        return *made, classes, len(parts[0]) + len(parts[1]), {"imagenet": f"{len(folder)} files"}
    images = small_set(config, job, "train")
    order = keyed_order(len(images), job.seed, -1)
    halves = [images.subset(part) for part in order.split(-(-len(images) // 2))]
    weights = device_loader(halves[0], config, job, job.seed)
    architecture = device_loader(halves[1], config, job, job.seed + 1)
    held_out = device_loader(halves[1], config, job, job.seed, train=False)
    return weights, architecture, held_out, images.classes, len(images), {images.name: images.digest}


def train_loader(config, job) -> tuple:
    """(loader, number of classes, data digests) of the whole training set."""
    if config.dataset == "imagenet":
        folder = imagenet.image_folder("train", job.data, imagenet_transform(True, True, config.image_size or 224))
        batch, classes = per_rank(config.batch_size, job.world), len(folder.classes)
        loader = FolderLoader(folder, batch, job.seed, job.world, config.workers, classes)
        return loader, classes, {"imagenet/train": f"{len(folder)} files"}
    images = small_set(config, job, "train")
    return device_loader(images, config, job, job.seed), images.classes, {f"{images.name}/train": images.digest}


def test_loader(config, job) -> tuple:
    """(loader in order, number of images, number of classes, data digests) of the test split."""
    if config.dataset == "imagenet":
        folder = imagenet.image_folder("val", job.data, imagenet_transform(False, False, config.image_size or 224))
        batch, classes = per_rank(config.batch_size, job.world), len(folder.classes)
        loader = FolderLoader(folder, batch, job.seed, job.world, config.workers, classes, drop_last=False)
        return loader, len(folder), classes, {"imagenet/val": f"{len(folder)} files"}
    images = small_set(config, job, "test")
    loader = device_loader(images, config, job, job.seed, train=False)
    return loader, len(images), images.classes, {f"{images.name}/test": images.digest}
