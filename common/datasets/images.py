"""Small image sets in one plain form: `<root>/<name>/{train,test}.npz` with `images` and `labels`, checked at load."""

import hashlib
import os
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from common.checkpoints import write_atomic
from common.errors import UserError

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Images:
    """A set of labelled images that fits in memory.

    images: (N, H, W, C) uint8. labels: (N,) int64 in 0..classes-1. mean, std: per channel, of values in 0..1.
    digest: `fingerprint` of the content, the same in whatever order the samples are kept.
    """

    name: str
    split: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices) -> "Images":
        """The samples at `indices` (a sequence or 1-D tensor of int), in that order, with a digest of their own."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        images, labels = self.images[indices], self.labels[indices]
        return replace(self, images=images, labels=labels, digest=fingerprint(images, labels))


@dataclass(frozen=True)
class Published:
    """What is known about a set before its file is opened. `fingerprints`: of the complete official splits."""

    classes: int
    shape: tuple[int, int, int]
    counts: dict[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprints: dict[str, str] = field(default_factory=dict)


CIFAR100 = Published(
    classes=100,
    shape=(32, 32, 3),
    counts={"train": 50_000, "test": 10_000},
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)

PUBLISHED = {
    # Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html
    "cifar10": Published(
        classes=10,
        shape=(32, 32, 3),
        counts={"train": 50_000, "test": 10_000},
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        fingerprints={
            "train": "6c3d94351344c6460973c9795f4a4fcc19984b1b894a9b39889a02e380f4d4d3",
            "test": "7742db831caeba84ea1d4663e0d07ca1879cbb76e501e036935be5fd5506749b",
        },
    ),
    "cifar100": CIFAR100,
    # 100 training and 50 test images of each CIFAR-100 class, normalised like the complete set.
    "cifar100_subset": replace(
        CIFAR100,
        counts={"train": 10_000, "test": 5_000},
        fingerprints={
            "train": "5c506d501fe28ee99446ce7ed47750d1b9633475b8dbb961c90edad22ce5baa1",
            "test": "93b1747f4f201930c10398b141055c338e5185d558baaa14d6dcbff759d1cfb5",
        },
    ),
    # LeCun, Cortes, Burges, http://yann.lecun.com/exdb/mnist
    "mnist": Published(
        classes=10,
        shape=(28, 28, 1),
        counts={"train": 60_000, "test": 10_000},
        mean=(0.1307,),
        std=(0.3081,),
        fingerprints={
            "train": "ceb7dae35f33b78023fdd631afb40f55178e62cdc2ffb9a9914d62cf00c16f13",
            "test": "4be5dbf3279c06a13f5ec5886b40e9a0b86af9449a6194a03782ddd01e20fd11",
        },
    ),
    # Netzer et al. 2011, http://ufldl.stanford.edu/housenumbers, cropped digits
    "svhn": Published(
        classes=10,
        shape=(32, 32, 3),
        counts={"train": 73_257, "test": 26_032},
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
    ),
    # Coates et al. 2011, https://cs.stanford.edu/~acoates/stl10, the labelled images
    "stl10": Published(
        classes=10,
        shape=(96, 96, 3),
        counts={"train": 5_000, "test": 8_000},
        mean=(0.4467, 0.4398, 0.4066),
        std=(0.2603, 0.2566, 0.2713),
    ),
}
DOWNLOADABLE = ("cifar10", "cifar100", "mnist", "svhn", "stl10")


def data_root() -> Path:
    """The folder that holds all data sets: environment variable REPRO_DATA, else `data`."""
    return Path(os.environ.get("REPRO_DATA") or "data")


def make_data(name: str, root: Path) -> str:
    """The command that fetches and checks `name`, as it is printed in messages."""
    return f"make data DATASET={name}" + ("" if Path(root) == Path("data") else f" DATA={root}")


def fingerprint(images, labels) -> str:
    """sha256 over the sorted sha256 digests of the samples (image bytes, then the label as 8 bytes).

    images: (N, ...) uint8, labels: (N,) int64, tensors or arrays. Independent of the order of the samples.
    """
    images = np.ascontiguousarray(images).reshape(len(labels), -1)
    samples = []
    for image, label in zip(images, np.ascontiguousarray(labels, dtype="<i8"), strict=True):
        digest = hashlib.sha256(image)
        digest.update(label)
        samples.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(samples))).hexdigest()


def load_npz(name: str, split: str, root: Path) -> Images:
    """Read and check `<root>/<name>/<split>.npz`.

    A set of `PUBLISHED` must have its published shape, counts and, where known, fingerprint. For any other set the
    number of classes, mean and std are taken from its train split (from the split itself when there is no other).
    Raises UserError for a missing, damaged or unfit file: it names the file and what mends it.
    """
    path = root / name / f"{split}.npz"
    images, labels = _read(path, name, root)
    known = PUBLISHED.get(name)
    if known is None:
        train = root / name / "train.npz"
        classes, mean, std = statistics(
            *(_read(train, name, root) if split != "train" and train.exists() else (images, labels))
        )
    else:
        classes, mean, std = known.classes, known.mean, known.std
        expected = (known.counts[split], *known.shape)
        if images.shape != expected:
            raise UserError(f"{path}: images has shape {images.shape}; expected {expected}; {_mend(path, name, root)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{path}: labels run from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}; "
            f"{_mend(path, name, root)}"
        )
    digest = fingerprint(images, labels)
    if known and digest != known.fingerprints.get(split, digest):
        raise UserError(
            f"{path} is not the official {name} {split} set: its fingerprint is {digest}; expected "
            f"{known.fingerprints[split]}; {_mend(path, name, root)}"
        )
    return Images(name, split, torch.from_numpy(images), torch.from_numpy(labels), classes, mean, std, digest)


def save_npz(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write the plain form (N,H,W,C uint8 and N int64), all or nothing."""
    write_atomic(path, lambda file: np.savez(file, images=images, labels=labels))


def statistics(images: np.ndarray, labels: np.ndarray) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Number of classes (largest label + 1), and per-channel mean and std of (N,H,W,C) uint8 images in 0..1."""
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[-1]):
        share = np.bincount(images[..., channel].reshape(-1), minlength=256) / images[..., channel].size
        means.append(float((share * values).sum()))
        stds.append(float(np.sqrt((share * (values - means[-1]) ** 2).sum())))
    return int(labels.max()) + 1, tuple(means), tuple(stds)


def _read(path: Path, name: str, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays of a plain file, with the dtypes and ranks that the form asks for."""
    mend = _mend(path, name, root)
    if not path.is_file():
        raise UserError(f"{path} is missing; expected an npz file with images and labels; {_get(name, root)}")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"images", "labels"} - set(file.files)
            arrays = None if missing else (file["images"], file["labels"])
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged or incomplete ({type(error).__name__}); expected an npz file with images "
            f"and labels; {mend}"
        ) from error
    if missing:
        raise UserError(f"{path} has no array {' and '.join(sorted(missing))}; expected images and labels; {mend}")
    images, labels = arrays
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise UserError(
            f"{path}: images is {images.dtype} of shape {images.shape}; expected uint8 of shape (N, H, W, C); {mend}"
        )
    if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: labels is {labels.dtype} of shape {labels.shape}; expected int64 of shape "
            f"({len(images)},); {mend}"
        )
    return images, labels


def _get(name: str, root: Path) -> str:
    if name in DOWNLOADABLE:
        return f"run: {make_data(name, root)}"
    return f"put {root / name}/{{train,test}}.npz there yourself ({name} has no public archive in this form)"


def _mend(path: Path, name: str, root: Path) -> str:
    if name in DOWNLOADABLE:
        return f"run: rm {path} && {make_data(name, root)}"
    return "replace it by a sound copy"
