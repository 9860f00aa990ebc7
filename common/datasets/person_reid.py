"""Person re-identification sets: images of people, each with an identity and a camera; train, query and gallery.

    market1501            Market-1501 (Zheng et al. 2015)          data/Market-1501-v15.09.15
    dukemtmc_reid         DukeMTMC-reID (Zheng et al. 2017)        data/DukeMTMC-reID (withdrawn by its owners in 2019)
    cuhk03_np_detected    CUHK03, the 767/700 protocol (Zhong      data/cuhk03-np/detected
    cuhk03_np_labeled     et al. 2017), detected or drawn boxes    data/cuhk03-np/labeled
    synthetic_people      drawn, see synthetic_people.py           embedded

The official trees are used as they are: `bounding_box_train`, `query` and `bounding_box_test` with identity and camera in the
names (0002_c1s1_000451_03.jpg). Identity -1 is junk and 0 a distractor (Market-1501; common.metrics.retrieval says what that
means): both stay in the gallery. None of the official sets may be redistributed; nothing here downloads them.
"""

import functools
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from common.datasets import DeviceLoader, Images
from common.datasets.classification import FolderLoader, per_rank
from common.datasets.imagenet import MEAN, STD, open_rgb
from common.datasets.images import data_root, fingerprint, make_data
from common.errors import UserError

SPLITS = ("train", "query", "gallery")
FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
EVALUATION_BATCH = 128
MARKET_NAME = re.compile(r"(-?\d+)_c(\d+)")
MATLAB_NAME = re.compile(r"(\d)_(\d+)_(\d)_\d+\.")  # CUHK03 made from its .mat file: camera pair, person, camera, image


@dataclass(frozen=True)
class Official:
    """An official tree. counts: images and identities (without -1 and 0) of each split; strays: gallery images of -1 and 0."""

    folder: str
    counts: dict[str, tuple[int, int]]
    strays: dict[int, int] = field(default_factory=dict)
    example: str = "0002_c1s1_000451_03.jpg"


CUHK03 = {"train": 767, "query": 700, "gallery": 700}
OFFICIAL = {
    "market1501": Official(
        "Market-1501-v15.09.15",
        {"train": (12_936, 751), "query": (3_368, 750), "gallery": (19_732, 750)},
        {-1: 3_819, 0: 2_798},
    ),
    "dukemtmc_reid": Official(
        "DukeMTMC-reID",
        {"train": (16_522, 702), "query": (2_228, 702), "gallery": (17_661, 1_110)},  # 408 of them only distract
        example="0005_c2_f0046985.jpg",
    ),
    "cuhk03_np_detected": Official(
        "cuhk03-np/detected",
        {"train": (7_365, 767), "query": (1_400, 700), "gallery": (5_332, 700)},
        example="0003_c1_21.png",
    ),
    "cuhk03_np_labeled": Official(
        "cuhk03-np/labeled",
        {"train": (7_368, 767), "query": (1_400, 700), "gallery": (5_328, 700)},
        example="0003_c1_21.png",
    ),
}
SYNTHETIC = "synthetic_people"
NAMES = (*OFFICIAL, SYNTHETIC)


@dataclass(frozen=True)
class People:
    """One split: N images in memory (`images`, (N, H, W, 3) uint8) or on disk (`paths`).

    ids, cameras: (N,) int64. flags: what else is known of each image, (N,) tensors. digest: of the images, or of the names.
    """

    name: str
    split: str
    ids: Tensor
    cameras: Tensor
    digest: str
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    images: Tensor | None = None
    paths: tuple[Path, ...] = ()
    flags: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_images(cls, name, split, images, ids, cameras, mean, std, flags) -> "People":
        digest = fingerprint(images, ids * 1000 + cameras)  # of image, identity and camera, in whatever order
        return cls(name, split, ids, cameras, digest, mean, std, images, flags=flags)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def identities(self) -> Tensor:
        """The different identities, sorted."""
        return self.ids.unique()

    @property
    def labels(self) -> Tensor:
        """(N,) int64: 0.. in the order of `identities`, for a classifier."""
        return torch.searchsorted(self.identities, self.ids)

    def subset(self, chosen: Tensor) -> "People":
        """The images at these indices or where this (N,) bool is true (one camera, no occluder, ...), in that order."""
        index = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
        flags = {name: values[index] for name, values in self.flags.items()}
        if self.images is not None:
            args = (self.images[index], self.ids[index], self.cameras[index], self.mean, self.std, flags)
            return People.of_images(self.name, self.split, *args)
        paths = tuple(self.paths[i] for i in index.tolist())
        return People(self.name, self.split, self.ids[index], self.cameras[index], _digest(paths), paths=paths)

    def picture(self, index: int) -> Tensor:
        """(H, W, 3) uint8, as it is, for figures."""
        if self.images is not None:
            return self.images[index]
        return transforms.functional.pil_to_tensor(open_rgb(str(self.paths[index]))).permute(1, 2, 0)


def load(name: str, split: str, root: Path | None = None, partial: bool = False, **options) -> People:
    """The "train", "query" or "gallery" of a set. options go to the generated set (see synthetic_people.load).

    UserError for an unknown set or split, a missing tree, a file whose name says no identity and camera, and, unless
    `partial`, for other numbers of images and identities than the official ones.
    """
    if name not in NAMES:
        raise UserError(f"unknown person re-identification set {name!r}; expected one of {', '.join(NAMES)}")
    if split not in SPLITS:
        raise UserError(f"{name} has no split {split!r}; expected one of {', '.join(SPLITS)}")
    if name == SYNTHETIC:
        return _synthetic(split, **options)
    if options:
        raise UserError(f"{name} takes no options, got {', '.join(options)}; only {SYNTHETIC} does; remove them")
    root = Path(root or data_root())
    people = _read(name, split, root)
    if not partial and (wrong := _miscounted(people)):
        raise UserError(
            f"{root / OFFICIAL[name].folder / FOLDERS[split]} holds {wrong}; it is not the complete set: extract the "
            f"official archive again, then run: {make_data(name, root)}"
        )
    return people


@functools.lru_cache(maxsize=8)  # stages of one process draw the same splits again and again
def _synthetic(split: str, **options) -> People:
    from common.datasets import synthetic_people  # it imports this module

    return synthetic_people.load(split, **options)


def check(name: str, root: Path) -> str:
    """What is there, a line a split; UserError where it is not the official set."""
    lines = []
    for split in SPLITS:
        people = load(name, split, root)
        proper = (people.identities > 0).sum()
        lines.append(
            f"{name} {split}: {len(people):,} images of {proper:,} identities on {len(people.cameras.unique())} cameras, "
            f"{people.digest}"
        )
    return "\n".join(lines)


def batches(
    people: People,
    batch_size: int,
    seed: int,
    world,
    train: bool,
    size: tuple[int, int] = (384, 128),
    workers: int = 8,
    channels_last: bool = False,
):
    """A loader (`.epoch(epoch, start)`, `len`) of (images, labels): `batch_size` over all ranks, in a shuffled order keyed
    by the seed, flipped with probability 1/2, only full batches, labels 0..P-1. Not `train`: each image once, as it is, and its
    number in `people` instead of a label. Images in memory keep their size; files are resized to `size` (H, W).
    """
    labels = people.labels if train else torch.arange(len(people))
    batch = per_rank(batch_size, world) if train else EVALUATION_BATCH
    if people.images is not None:
        about = {"name": people.name, "split": people.split, "classes": int(labels.max()) + 1, "digest": people.digest}
        images = Images(images=people.images, labels=labels, mean=people.mean, std=people.std, **about)
        share = {"rank": world.rank, "world": world.size, "channels_last": channels_last}
        return DeviceLoader(images, batch, seed, world.device, flip=train, shuffle=train, drop_last=train, **share)
    steps = [transforms.Resize(size, antialias=True)]
    steps += [transforms.RandomHorizontalFlip()] if train else []
    steps += [transforms.ToTensor(), transforms.Normalize(people.mean, people.std)]
    pictures = _Pictures(people.paths, labels.tolist(), transforms.Compose(steps))
    return FolderLoader(pictures, batch, seed, world, workers, drop_last=train)


class _Pictures(Dataset):
    def __init__(self, paths, labels, transform):
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        return self.transform(open_rgb(str(self.paths[index]))), self.labels[index]


# ------------------------------------------------------------------------------------------------ official trees
def _read(name: str, split: str, root: Path) -> People:
    official = OFFICIAL[name]
    folder = root / official.folder / FOLDERS[split]
    paths = tuple(sorted(p for p in folder.glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")))
    if not paths:
        raise UserError(
            f"{folder} is missing or has no images; expected files like {official.example}; extract the official archive "
            f"in {root}, then run: {make_data(name, root)}"
        )
    found = [_identity_and_camera(path, official, name) for path in paths]
    ids, cameras = (torch.tensor(values) for values in zip(*found, strict=True))
    return People(name, split, ids, cameras, _digest(paths), paths=paths)


def _identity_and_camera(path: Path, official: Official, name: str) -> tuple[int, int]:
    if match := MARKET_NAME.match(path.name):
        return int(match[1]), int(match[2])
    if name.startswith("cuhk03") and (match := MATLAB_NAME.match(path.name)):
        pair, person, camera = (int(group) for group in match.groups())
        return pair * 10_000 + person, camera
    raise UserError(
        f"{path} does not say who it shows and on which camera; expected a name like {official.example}; remove the file, "
        "or extract the official archive again"
    )


def _miscounted(people: People) -> str:
    """What differs from the official counts, or nothing."""
    official = OFFICIAL[people.name]
    images, identities = official.counts[people.split]
    found = {"images": len(people), "identities": int((people.identities > 0).sum())}
    expected = {"images": images, "identities": identities}
    if people.split == "gallery":
        found |= {f"images of {stray}": int((people.ids == stray).sum()) for stray in official.strays}
        expected |= {f"images of {stray}": count for stray, count in official.strays.items()}
    return "; ".join(f"{found[k]:,} {k} where {n:,} are expected" for k, n in expected.items() if found[k] != n)


def _digest(paths) -> str:
    return "names:" + hashlib.sha256("\n".join(path.name for path in paths).encode()).hexdigest()[:16]
