"""Small image sets by name, as plain tensors. `python -m common.datasets NAME` gets a set and checks it.

Sets with boxes are opened by `common.datasets.detection`, ImageNet by `common.datasets.imagenet`.
"""

import difflib
import functools
from pathlib import Path

from common.datasets.device_loader import DeviceLoader
from common.datasets.images import PUBLISHED, SPLITS, Images, data_root, load_npz
from common.errors import UserError

__all__ = ["DeviceLoader", "Images", "available", "data_root", "known", "load", "prepare", "splits"]

GENERATED = {"cluttered_digits": "digits", "large_canvas": "digits", "large_canvas_cifar10": "cifar10"}  # from what
EMBEDDED = ("digits", *(name for name, source in GENERATED.items() if source == "digits"))
OPTIONS = ("n", "size", "seed")  # of a generated set


def known(root: Path | None = None) -> list[str]:
    """Names that `load` takes: embedded, generated and published sets, and every `<root>/<name>/{train,test}.npz`."""
    root = Path(root or data_root())
    found = {path.parent.name for split in SPLITS for path in root.glob(f"*/{split}.npz")}
    return sorted({*EMBEDDED, *GENERATED, *PUBLISHED, *found})


def splits(name: str, root: Path | None = None) -> list[str]:
    """Train and test; of a set that is only a folder of yours, those that are there."""
    if name in EMBEDDED or name in GENERATED or name in PUBLISHED:
        return list(SPLITS)
    return [split for split in SPLITS if (Path(root or data_root()) / name / f"{split}.npz").exists()]


def load(name: str, split: str, root: Path | None = None, **options) -> Images:
    """The "train" or "test" split of a set, in memory. Never downloads: `make data DATASET=<name>` does.

    options (n, size, seed) go to a generated set; the others take none.
    Raises UserError for an unknown name, split or option, and for a missing or unsound file.
    """
    root = Path(root or data_root())
    require_known(name, root)
    if split not in SPLITS:
        raise UserError(f"{name} has no split {split!r}; expected train or test")
    if name in GENERATED:
        return _generate(name, split, root, **options)
    if options:
        raise UserError(
            f"{name} takes no options, got {', '.join(options)}; only {', '.join(GENERATED)} do; remove them"
        )
    if name == "digits":
        from common.datasets import digits  # scikit-learn takes a second to import

        return digits.load(split)
    return load_npz(name, split, root)


@functools.lru_cache(maxsize=2)  # stages of one process draw the same two splits again and again
def _generate(name: str, split: str, root: Path, **options) -> Images:
    from common.datasets import cluttered_digits, large_canvas  # here, so that they can also be run as scripts

    unknown = options.keys() - set(OPTIONS)
    if unknown:
        raise UserError(f"{name} has no option {', '.join(sorted(unknown))}; expected {', '.join(OPTIONS)}")
    if name == "cluttered_digits":
        return cluttered_digits.load(split, **options)
    if name == "large_canvas":
        return large_canvas.load(split, **options)
    return large_canvas.load_cifar10(split, root=root, **options)


def prepare(name: str, root: Path | None = None) -> None:
    """The step behind `make data DATASET=<name>`: fetch or find, verify, convert. Does nothing that is already done.

    Embedded sets need nothing, other generated ones what they are made from; of `imagenet`, of sets with boxes and of the
    person re-identification sets it is only checked that they are there.
    """
    from common.datasets import detection, imagenet, official, person_reid  # need torchvision; a small set does not

    root = Path(root or data_root())
    if name == "imagenet":
        imagenet.check(root)
        return
    if detection.is_set(name, root):
        detection.splits(name, root)
        return
    if name in person_reid.NAMES:
        person_reid.check(name, root)
        return
    require_known(name, root)
    name = GENERATED.get(name, name)
    if name in official.SOURCES:
        official.convert(name, root)


def available(name: str, root: Path | None = None) -> bool:
    """Whether `prepare` has all that it needs at hand. Never downloads; archives are looked for, not opened."""
    from common.datasets import official

    root, source = Path(root or data_root()), GENERATED.get(name, name)
    if source in PUBLISHED:
        return official.at_hand(source, root)
    try:
        prepare(name, root)  # of all other sets it only looks what is there
    except UserError:
        return False
    return True


def require_known(name: str, root: Path) -> None:
    """Raise UserError, with the closest match, unless `load` knows `name`."""
    if name == "imagenet":
        raise UserError(
            "imagenet does not fit in memory; expected one of the small sets; open it with "
            "common.datasets.imagenet.image_folder"
        )
    names = known(root)
    if name not in names:
        from common.datasets import detection  # here: it imports this package

        if detection.is_set(name, root):
            raise UserError(
                f"{name} is a set with boxes; expected one of {', '.join(names)}; open it with "
                "common.datasets.detection.load"
            )
        closest = difflib.get_close_matches(name, names, 1)
        hint = (
            f"did you mean {closest[0]}?"
            if closest
            else f"or put {root / name}/{{train,test}}.npz there, or a set with boxes"
        )
        raise UserError(f"unknown dataset {name!r}; expected one of {', '.join(names)}; {hint}")
