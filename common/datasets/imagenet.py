"""ImageNet (ILSVRC 2012) from the usual folder tree `<root>/imagenet/{train,val}/<wnid>/*.JPEG`.

Source: https://image-net.org, 1,000 classes, 1,281,167 training and 50,000 validation images, non-commercial research
terms, registration needed: nothing here downloads it. Any other set laid out like this opens with the same functions.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.checkpoints import rng_state, set_rng_state
from common.datasets.images import make_data
from common.errors import UserError
from common.runtime import keyed_generator, keyed_order, keyed_seed

SPLITS = ("train", "val")
CLASSES = 1000
FILES = {"train": 1_281_167, "val": 50_000}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check(root: Path, allow_partial: bool = False) -> str:
    """Count classes and image files in `<root>/imagenet`; one line a split, found against expected.

    Raises UserError when the tree is missing, a class folder is empty or, unless `allow_partial`, a count differs.
    """
    lines, partial = [], False
    for split in SPLITS:
        counts = {folder.name: sum(1 for _ in _image_files(folder)) for folder in _class_folders(root, split)}
        empty = sorted(name for name, count in counts.items() if not count)
        if empty:
            raise UserError(
                f"{_split_folder(root, split) / empty[0]} holds no image ({len(empty)} such folders); "
                "expected *.JPEG files; extract that class again, or remove the folder"
            )
        found = len(counts), sum(counts.values())
        partial |= found != (CLASSES, FILES[split])
        lines.append(f"imagenet {split}: {found[0]:,} classes of {CLASSES:,}, {found[1]:,} files of {FILES[split]:,}")
    if partial and not allow_partial:
        raise UserError(
            f"{'; '.join(lines)}: not the complete set; extract the missing archives, or accept it: "
            f"python -m common.datasets imagenet --root {root} --allow-partial"
        )
    return "\n".join([*lines, "complete" if not partial else "partial: accepted"])


def image_folder(
    split: str, root: Path, transform: Callable | None = None, classes: Sequence[str] | None = None
) -> ImageFolder:
    """`train` or `val` as a torchvision ImageFolder of (image, label), labels in the sorted order of the wnids.

    classes: the wnids to keep, labelled 0.. in the order given; default all. A file that does not open raises a
    UserError that names it, when it is read. Raises UserError for a missing tree, class or an empty class folder.
    """
    folder = _split_folder(root, split)
    there = {path.name for path in _class_folders(root, split)}
    missing = [name for name in classes or () if name not in there]
    if missing:
        raise UserError(
            f"{folder} has no class folder {missing[0]} ({len(missing)} missing); expected names out of "
            f"the {len(there)} folders there; correct the list of classes"
        )

    try:
        return _Folder(folder, transform, list(classes) if classes is not None else sorted(there))
    except FileNotFoundError as error:  # torchvision lists the classes without a file
        reason = str(error).split(". ")[0].removeprefix("Found no valid file for the classes ")
        raise UserError(
            f"{folder}: no image in class folder {reason}; expected *.JPEG files; extract that class "
            "again, or remove the folder"
        ) from error


def class_fraction_split(targets, fractions: Sequence[float], seed: int) -> list[torch.Tensor]:
    """Disjoint random parts of a set, each with its fraction of every class (PC-DARTS searches on 10 % + 2.5 %).

    targets: (N,) class labels. fractions: of each class, their sum at most 1. A pure function of the arguments.
    Part i of a class with n samples ends at round(n * (fractions[0] + ... + fractions[i])) of its keyed order.
    Returns one sorted int64 index tensor a fraction. Raises UserError when a part would lack a class.
    """
    targets = torch.as_tensor(targets)
    if min(fractions, default=0) <= 0 or sum(fractions) > 1 + 1e-9:
        raise UserError(f"fractions {tuple(fractions)} do not divide a class; expected positive ones, sum at most 1")
    order = keyed_order(len(targets), seed, 0)
    parts: list[list[torch.Tensor]] = [[] for _ in fractions]
    for label in targets.unique():
        members = order[targets[order] == label]
        bounds = [0, *(int(b * len(members) + 0.5 + 1e-9) for b in np.cumsum(fractions))]
        for part, begin, end in zip(parts, bounds, bounds[1:], strict=False):
            if begin == end:
                raise UserError(
                    f"class {int(label)} has only {len(members)} samples: fractions {tuple(fractions)} "
                    "leave it out of a part; expected at least one sample each; take larger fractions"
                )
            part.append(members[begin:end])
    return [torch.cat(part).sort().values for part in parts]


def folder_loader(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    epoch: int,
    workers: int,
    start_batch: int = 0,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = True,
) -> DataLoader:
    """One epoch of any map-style dataset, from batch `start_batch` on, the same for every number of workers.

    The order is a pure function of (seed, epoch); the generators of torch, numpy and random that the transforms of a
    sample see are seeded by (seed, epoch, index). Rank r takes every world-th sample of the order; `batch_size` is of
    one rank. With workers=0 the generators of the process are put back after each sample; nothing is drawn from them.
    Raises UserError when no full batch fits, or when a rank or start is out of range.
    """
    n = len(dataset)
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} of {world} does not exist; expected 0 <= rank < world")
    mine = keyed_order(n, seed, epoch)[rank::world]
    mine = mine[: n // world // batch_size * batch_size] if drop_last else mine
    if batch_size < 1 or not len(mine):
        raise UserError(
            f"batch size {batch_size} does not fit {n} samples on {world} ranks; expected 1 to "
            f"{n // world}, or drop_last=False"
        )
    seeds = torch.randint(2**63 - 1, (n,), generator=keyed_generator(seed, "sample", epoch))
    batches = [list(zip(b.tolist(), seeds[b].tolist(), strict=True)) for b in mine.split(batch_size)]
    return _Loader(
        _Seeded(dataset),
        batch_sampler=batches[start_batch:],
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(keyed_seed(seed, "loader", epoch)),
    )


class _Folder(ImageFolder):
    """An ImageFolder of these classes, labelled in this order, whose files open with a clear error."""

    def __init__(self, folder: Path, transform: Callable | None, names: list[str]):
        self.names = names
        super().__init__(folder, transform, loader=open_rgb)

    def find_classes(self, directory):
        return self.names, {name: label for label, name in enumerate(self.names)}


class _Loader(DataLoader):
    """Shows a worker's UserError as that one line, without the worker's traceback around it."""

    def __iter__(self) -> Iterator:
        try:
            yield from super().__iter__()
        except UserError as error:
            line = str(error).strip().splitlines()[-1]
            raise UserError(line.removeprefix(f"{UserError.__module__}.UserError: ")) from None


class _Seeded(Dataset):
    """Item (index, seed) of a dataset, its random transforms seeded by that seed."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]):
        index, seed = key
        before = rng_state() if get_worker_info() is None else None
        try:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed also walks the accelerators: 20 x slower
            np.random.seed(seed % 2**32)  # noqa: NPY002 - what transforms use
            random.seed(seed)
            return self.dataset[index]
        finally:
            if before is not None:
                set_rng_state(before)


def open_rgb(path: str) -> Image.Image:
    """The image of a file in RGB. Raises UserError, naming it, for one that does not open."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path} does not open as an image ({' '.join(str(error).split())}); expected a sound JPEG or "
            "PNG file; extract it again from the official archive"
        ) from error


def _split_folder(root: Path, split: str) -> Path:
    if split not in SPLITS:
        raise UserError(f"imagenet has no split {split!r}; expected train or val")
    return Path(root) / "imagenet" / split


def _class_folders(root: Path, split: str) -> list[Path]:
    folder = _split_folder(root, split)
    found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found:
        raise UserError(
            f"{folder} is missing or has no class folders; expected {folder}/<wnid>/*.JPEG; extract the "
            f"official archives there, then run: {make_data('imagenet', root)}"
        )
    return found


def _image_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
