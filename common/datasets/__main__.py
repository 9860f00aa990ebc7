"""`python -m common.datasets NAME`: get a data set if need be, check it, say what is there. Behind `make data`."""

import argparse
import sys
from pathlib import Path

from common.datasets import EMBEDDED, data_root, detection, load, prepare, splits
from common.errors import UserError
from common.runtime import EXIT_BAD_INPUT


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m common.datasets", description=__doc__)
    parser.add_argument(
        "name",
        help="digits, cluttered_digits, large_canvas, cifar10, mnist, imagenet, digit_scenes, coco, bccd, market1501...",
    )
    parser.add_argument("--root", type=Path, default=data_root(), help="data root (default: REPRO_DATA, else data)")
    parser.add_argument("--allow-partial", action="store_true", help="accept an incomplete imagenet")
    args = parser.parse_args(argv)
    try:
        report(args.name, args.root, args.allow_partial)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def report(name: str, root: Path, allow_partial: bool) -> None:
    if name == "imagenet":
        from common.datasets import imagenet

        print(imagenet.check(root, allow_partial))
        return
    if detection.is_set(name, root):
        if name == detection.SCENES:
            print(f"{name} is embedded: nothing to fetch")
        print("\n".join(detection.describe(name, root)))
        return
    from common.datasets import person_reid

    if name in person_reid.NAMES:
        print(person_reid.check(name, root))
        return
    prepare(name, root)
    if name in EMBEDDED:
        print(f"{name} is embedded: nothing to fetch")
    for split in splits(name, root):
        there = load(name, split, root)
        shape = " x ".join(map(str, there.images.shape[1:]))
        print(f"{name} {split}: {len(there):,} images of {shape}, {there.classes} classes, {there.digest}")


if __name__ == "__main__":
    sys.exit(main())
