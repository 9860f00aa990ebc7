"""Sets in the layout of PASCAL VOC (Everingham et al. 2010): Annotations/*.xml, JPEGImages, ImageSets/Main/<split>.txt.

A box is written as its first and last pixel, counted from 1, so it covers xmin - 1 to xmax. LabelImg and others write
the same form. A box whose last pixel is not beyond its first is a click, not an object. Objects marked `difficult` are
objects like the others. An annotation without objects is an image without objects. The image of `a.xml` is `a.jpg` (or
.png, ...), whatever the file says inside.
"""

import math
import os
import xml.etree.ElementTree as ET
from pathlib import Path

from common.datasets.pictures import SUFFIXES, Picture, stored_size
from common.errors import UserError

SPLITS = ("train", "val", "trainval", "test")
WHOLE = "all"  # the one split of a set without lists


def find(folder: Path) -> Path | None:
    """The folder with Annotations: this one, or the only one below that has them."""
    places = [place for place in (folder, *sorted(folder.glob("*/"))) if (place / "Annotations").is_dir()]
    if len(places) > 1 and places[0] != folder:
        raise UserError(f"{folder} holds {len(places)} sets; expected one; name it: {folder.name}/{places[0].name}")
    return places[0] if places else None


def splits(folder: Path) -> list[str]:
    """Those of train, val, trainval and test that have a list; a set without lists has the one split all."""
    return [split for split in SPLITS if _list(folder, split).is_file()] or [WHOLE]


def read(folder: Path, split: str) -> tuple[list[Picture], dict[int, str]]:
    """The pictures, by name, and the classes, label -> name: the sorted names found in all annotations of all splits.

    Raises UserError for annotations that are broken or not there, and for images that are not there.
    """
    annotated = {path.stem: path for path in sorted((folder / "Annotations").glob("*.xml"))}
    if not annotated:
        raise UserError(f"{folder / 'Annotations'} holds no *.xml; expected one an image; unpack the set again")
    parsed = {stem: _parse(path) for stem, path in annotated.items()}
    classes = sorted({name for _, objects in parsed.values() for name, _ in objects})
    label = {name: k for k, name in enumerate(classes)}
    chosen = list(annotated) if split == WHOLE else _names(_list(folder, split))
    _require(chosen, annotated, folder / "Annotations", ".xml")
    there = {Path(entry.name).stem: entry for entry in _images(folder / "JPEGImages")}
    _require(chosen, there, folder / "JPEGImages", ".jpg")
    pictures = []
    for stem in chosen:
        size, objects = parsed[stem]
        file = Path(there[stem].path)
        objects = [(*box, label[name], False, math.nan) for name, box in objects]
        pictures.append(Picture(file, there[stem].stat().st_size, stem, *(size or stored_size(file)), objects))
    return pictures, dict(enumerate(classes))


def _list(folder: Path, split: str) -> Path:
    return folder / "ImageSets" / "Main" / f"{split}.txt"


def _names(path: Path) -> list[str]:
    """The first word of each line, sorted."""
    names = sorted({line.split()[0] for line in path.read_text(errors="replace").splitlines() if line.strip()})
    if not names:
        raise UserError(f"{path} names no image; expected one a line; unpack the set again")
    return names


def _images(folder: Path) -> list[os.DirEntry]:
    entries = os.scandir(folder) if folder.is_dir() else ()
    return sorted((e for e in entries if Path(e.name).suffix.lower() in SUFFIXES), key=lambda e: e.name)


def _require(chosen: list[str], there: dict, folder: Path, suffix: str) -> None:
    missing = [name for name in chosen if name not in there]
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(chosen):,} files are missing in {folder}, {missing[0]}{suffix} among them; "
            "expected all of them; unpack the set again"
        )


def _parse(path: Path) -> tuple[tuple[int, int] | None, list[tuple[str, tuple[float, ...]]]]:
    """(height, width), None where it is not told; and the name and box of each object."""
    try:
        root = ET.parse(path).getroot()
        size = tuple(int(float(root.findtext(f"size/{side}", "0"))) for side in ("height", "width"))
        objects = []
        for found in root.findall("object"):  # not iter: VOC's people have parts, which are no objects
            ends = [float(found.findtext(f"bndbox/{end}")) for end in ("xmin", "ymin", "xmax", "ymax")]
            if not all(map(math.isfinite, ends)):
                raise ValueError(f"the box {ends}")
            x1, y1, x2, y2 = ends
            click = x2 <= x1 or y2 <= y1  # is left without area, to be passed over
            objects.append((found.findtext("name").strip(), tuple(ends) if click else (x1 - 1, y1 - 1, x2, y2)))
    except (OSError, ET.ParseError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is broken or not in VOC's form ({type(error).__name__}: {' '.join(str(error).split())[:80]}); "
            "expected XML with size and objects of name and bndbox; replace it by a sound copy"
        ) from error
    return (size if min(size) > 0 else None), objects
