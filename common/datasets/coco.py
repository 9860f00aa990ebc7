"""Sets in COCO's layout (Lin et al. 2014): `annotations/instances_{train,val}2017.json` and `{train,val}2017/*.jpg`.

COCO itself: https://cocodataset.org, 118,287 training and 5,000 validation images, 80 classes; annotations CC BY 4.0,
images under the terms of Flickr. Nothing here downloads it. Boxes are written as x, y, width, height, continuous, on the
pixels as they are stored. An image that no annotation names is an image without objects (1,021 of the training images).
"""

import json
import math
import os
from pathlib import Path

from common.datasets.pictures import Picture
from common.errors import UserError

SPLITS = ("train", "val")
UNPACK = "unpack train2017.zip, val2017.zip and annotations_trainval2017.zip of https://cocodataset.org there"


def splits(folder: Path) -> list[str]:
    """Those of train and val whose annotations are there."""
    return [split for split in SPLITS if _annotations(folder, split).is_file()]


def read(folder: Path, split: str) -> tuple[list[Picture], dict[int, str]]:
    """The pictures, by image id, and the classes, category id -> name; label k is the k-th category of the file.

    Raises UserError for a file that is missing, broken or contradicts itself, and for images that are not there.
    """
    path = _annotations(folder, split)
    if not path.is_file():
        raise UserError(f"{path} is missing; expected COCO's layout in {folder}; {UNPACK}")
    try:
        return _parse(json.loads(path.read_bytes()), path, folder / f"{split}2017")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is broken or not in COCO's form ({type(error).__name__}: {' '.join(str(error).split())[:80]}); "
            "expected JSON with images, annotations and categories; replace it by a sound copy"
        ) from error


def _annotations(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}2017.json"


def _parse(content: dict, path: Path, folder: Path) -> tuple[list[Picture], dict[int, str]]:
    for what in ("images", "categories"):
        if len({entry["id"] for entry in content[what]}) < len(content[what]):
            raise UserError(f"{path} lists {what} with the same id; expected one each; replace it by a sound copy")
    classes = {category["id"]: category["name"] for category in content["categories"]}
    label = {category_id: k for k, category_id in enumerate(classes)}
    there = {entry.name: entry.stat().st_size for entry in os.scandir(folder)} if folder.is_dir() else {}
    missing = [image["file_name"] for image in content["images"] if image["file_name"] not in there]
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(content['images']):,} images of {path.name} are missing in {folder}, {missing[0]} "
            "among them; expected all of them; unpack the images again"
        )
    pictures = {
        image["id"]: Picture(
            folder / image["file_name"],
            there[image["file_name"]],
            image["id"],
            int(image["height"]),
            int(image["width"]),
        )
        for image in sorted(content["images"], key=lambda image: image["id"])
    }
    for annotation in content["annotations"]:
        where = f"{path}: annotation {annotation['id']}"
        if annotation["category_id"] not in label:
            raise UserError(f"{where} has category {annotation['category_id']}; expected one that the file lists")
        if annotation["image_id"] not in pictures:
            raise UserError(f"{where} is of image {annotation['image_id']}; expected one that the file lists")
        x, y, width, height = map(float, annotation["bbox"])
        area = float(annotation.get("area", math.nan))
        if not all(map(math.isfinite, (x, y, width, height))):
            raise UserError(f"{where} has the box {annotation['bbox']}; expected finite numbers")
        crowd = bool(annotation.get("iscrowd", 0))
        box = (x, y, x + width, y + height)
        pictures[annotation["image_id"]].objects.append((*box, label[annotation["category_id"]], crowd, area))
    return list(pictures.values()), classes
