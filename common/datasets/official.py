"""The data step of the sets that have official archives: fetch, verify, convert to the plain form.

CIFAR-10/100 (Krizhevsky 2009), MNIST (LeCun et al.), SVHN (Netzer et al. 2011) and the labelled part of STL-10 (Coates et
al. 2011), free for research. Archives in torchvision's layout that already lie in the root are used before any download:
`cifar-10-python.tar.gz` or `cifar-10-batches-py/`, `cifar-100-python.tar.gz` or `cifar-100-python/`, `MNIST/raw/`,
`{train,test}_32x32.mat`, `stl10_binary.tar.gz` or `stl10_binary/`.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from torchvision import datasets

from common.datasets.images import PUBLISHED, SPLITS, fingerprint, load_npz, make_data, save_npz
from common.errors import UserError


def _by_split(source):
    """A set that says `split` for `train`, puts channels first, and says `labels` for `targets`."""

    def opened(root: Path, train: bool, download: bool) -> SimpleNamespace:
        found = source(root, split="train" if train else "test", download=download)
        return SimpleNamespace(data=found.data.transpose(0, 2, 3, 1), targets=found.labels)

    return opened


SOURCES = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "mnist": datasets.MNIST,
    "svhn": _by_split(datasets.SVHN),
    "stl10": _by_split(datasets.STL10),
}

ARCHIVES = {  # where torchvision finds a set; one of these, but both of SVHN's files
    "cifar10": [("cifar-10-python.tar.gz",), ("cifar-10-batches-py",)],
    "cifar100": [("cifar-100-python.tar.gz",), ("cifar-100-python",)],
    "mnist": [("MNIST/raw",)],
    "svhn": [("train_32x32.mat", "test_32x32.mat")],
    "stl10": [("stl10_binary.tar.gz",), ("stl10_binary",)],
}


def at_hand(name: str, root: Path) -> bool:
    """Whether the plain form of a published set, or an archive to make it of, lies in the root."""
    plain = tuple(f"{name}/{split}.npz" for split in SPLITS)
    return any(all((root / file).exists() for file in files) for files in [plain, *ARCHIVES.get(name, ())])


def convert(name: str, root: Path) -> None:
    """Make the missing ones of `<root>/<name>/{train,test}.npz`; the only place that downloads.

    torchvision verifies the md5 of what it opens; the arrays are verified again (shape, classes, fingerprint where
    known) before a file gets its name. Raises UserError when the archive cannot be had or is not the official one.
    """
    for split in SPLITS:
        path = root / name / f"{split}.npz"
        if path.exists():
            load_npz(name, split, root)
            continue
        images, labels = _official(name, split, root)
        known = PUBLISHED[name]
        digest = fingerprint(images, labels)
        if images.shape != (known.counts[split], *known.shape) or digest != known.fingerprints.get(split, digest):
            raise UserError(
                f"the {name} archive in {root} holds {images.shape} {split} images with fingerprint "
                f"{digest}; expected {(known.counts[split], *known.shape)} and "
                f"{known.fingerprints.get(split, 'any')}; delete it and run: {make_data(name, root)}"
            )
        save_npz(path, images, labels)


def _official(name: str, split: str, root: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        official = SOURCES[name](root, train=split == "train", download=True)
    except Exception as error:  # network, disk, tar and pickle failures all end here
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the official {name} archive could not be fetched or opened ({reason}); expected it in {root} "
            "or on the network; copy the archive there (delete a damaged one), then run: "
            f"{make_data(name, root)}"
        ) from error
    images, labels = np.asarray(official.data), np.asarray(official.targets, dtype=np.int64)
    return images.reshape(len(images), *images.shape[1:3], -1), labels
