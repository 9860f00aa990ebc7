"""Small image sets by name, as plain tensors. `python -m common.datasets NAME` gets a set and checks it."""

import difflib
from pathlib import Path

from common.datasets.device_loader import DeviceLoader
from common.datasets.images import PUBLISHED, SPLITS, Images, data_root, load_npz
from common.errors import UserError

__all__ = ["DeviceLoader", "Images", "data_root", "known", "load", "prepare", "splits"]

EMBEDDED = ("digits", "cluttered_digits")


def known(root: Path | None = None) -> list[str]:
    """Names that `load` takes: the embedded and the published sets, and every `<root>/<name>/{train,test}.npz`."""
    root = Path(root or data_root())
    found = {path.parent.name for split in SPLITS for path in root.glob(f"*/{split}.npz")}
    return sorted({*EMBEDDED, *PUBLISHED, *found})


def splits(name: str, root: Path | None = None) -> list[str]:
    """Train and test; of a set that is only a folder of yours, those that are there."""
    if name in EMBEDDED or name in PUBLISHED:
        return list(SPLITS)
    return [split for split in SPLITS if (Path(root or data_root()) / name / f"{split}.npz").exists()]


def load(name: str, split: str, root: Path | None = None, **options) -> Images:
    """The "train" or "test" split of a set, in memory. Never downloads: `make data DATASET=<name>` does.

    options go to a generated set (`cluttered_digits`: n, size, seed); sets read from files take none.
    Raises UserError for an unknown name, split or option, and for a missing or unsound file.
    """
    root = Path(root or data_root())
    require_known(name, root)
    if split not in SPLITS:
        raise UserError(f"{name} has no split {split!r}; expected train or test")
    if name == "cluttered_digits":
        from common.datasets import cluttered_digits  # here, so that it can also be run as a script

        unknown = options.keys() - {"n", "size", "seed"}
        if unknown:
            raise UserError(f"cluttered_digits has no option {', '.join(sorted(unknown))}; expected n, size, seed")
        return cluttered_digits.load(split, **options)
    if options:
        raise UserError(f"{name} takes no options, got {', '.join(options)}; only cluttered_digits does; remove them")
    if name == "digits":
        from common.datasets import digits  # scikit-learn takes a second to import

        return digits.load(split)
    return load_npz(name, split, root)


def prepare(name: str, root: Path | None = None) -> None:
    """The step behind `make data DATASET=<name>`: fetch or find, verify, convert. Does nothing that is already done.

    Embedded sets need nothing; of `imagenet` the folder tree is only checked.
    """
    from common.datasets import imagenet, official  # need torchvision; loading a small set does not

    root = Path(root or data_root())
    if name == "imagenet":
        imagenet.check(root)
        return
    require_known(name, root)
    if name in official.SOURCES:
        official.convert(name, root)


def require_known(name: str, root: Path) -> None:
    """Raise UserError, with the closest match, unless `load` knows `name`."""
    if name == "imagenet":
        raise UserError(
            "imagenet does not fit in memory; expected one of the small sets; open it with "
            "common.datasets.imagenet.image_folder"
        )
    names = known(root)
    if name not in names:
        closest = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {closest[0]}?" if closest else f"or put {root / name}/{{train,test}}.npz there"
        raise UserError(f"unknown dataset {name!r}; expected one of {', '.join(names)}; {hint}")
