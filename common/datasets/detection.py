"""Sets of images with boxes, by name: `load("digit_scenes", "train")`. `python -m common.datasets NAME` checks one.

    digit_scenes    generated from the embedded digits, always there
    coco            and every other folder of the data root in COCO's layout
    bccd, ...       every folder of the data root in the layout of PASCAL VOC

Nothing here downloads. The pixels of a file are read when its image is asked for, or all of them at once and kept.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from common.datasets import coco, voc
from common.datasets.images import data_root
from common.datasets.pictures import SUFFIXES, Picture, Pictures, served_size
from common.errors import UserError

SCENES = "digit_scenes"
SOURCES = {  # of sets that have to be brought
    "coco": coco.UNPACK,
    "bccd": "get the folder BCCD of https://github.com/Shenggan/BCCD_Dataset (MIT) and put it there",
}
NO_AREA, OUTSIDE = "box without area", "box outside the image"


@dataclass(frozen=True)
class Truth:
    """The objects of one image, M >= 0 of them.

    boxes: (M, 4) float32 x1, y1, x2, y2, continuous, in pixels of the image as served, inside it, with an area.
    labels: (M,) int64 in 0..classes-1. crowd: (M,) bool, COCO's iscrowd. area: (M,) float32 in pixels: COCO's is that
    of the object's outline, scaled where the image was; elsewhere it is that of the box.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    crowd: torch.Tensor
    area: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DetectionSet:
    """A split of a set, in a fixed order: `image(i)` and what is on it, `truth(i)`.

    classes: names, in the order of the labels; class_ids: what the source calls them (COCO's 1..90), in that order.
    digest: sha256 of class names, objects, and of each file the name, bytes in size and pixels in size, not of what is
    in it (of a generated set: of all pixels); it does not depend on `longest_side`. passed_over: reason -> number of
    objects of the source that are left out. objects: of all images, one after another.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    class_ids: tuple[int, ...]
    digest: str
    passed_over: dict[str, int]
    images: Sequence[torch.Tensor]
    image_ids: Sequence[int | str]
    files: Sequence[Path | str]
    sizes: Sequence[tuple[int, int]]
    starts: Sequence[int]
    objects: Truth

    def __len__(self) -> int:
        return len(self.image_ids)

    def image(self, i: int) -> torch.Tensor:
        """(3, H, W) uint8 RGB. Raises UserError, naming the file, for one that does not open or is cut short."""
        return self.images[i]

    def truth(self, i: int) -> Truth:
        return part(self.objects, self.starts[i], self.starts[i + 1])

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of the image as served, without reading it."""
        return self.sizes[i]

    def image_id(self, i: int) -> int | str:
        """COCO's number, or the name of the file without its suffix."""
        return self.image_ids[i]

    def file(self, i: int) -> str:
        """Where the image is from, for messages."""
        return str(self.files[i])


def load(
    name: str, split: str, root: Path | None = None, longest_side: int = 0, cache: bool = False, **options
) -> DetectionSet:
    """A split of a set. COCO has train and val, digit_scenes train and test, a VOC folder what `voc.splits` says.

    longest_side: images with a longer side are shrunk to it, and boxes and areas with them; 0: none is. cache: read all
    images now and keep them in memory. options (n, size, seed, classes) go to a generated set; the others take none.
    Boxes are clipped to the image; those without area, or wholly outside, are passed over and counted.
    Raises UserError for an unknown name, split or option, and for a missing or unsound file.
    """
    if longest_side < 0:
        raise UserError(
            f"longest_side is {longest_side}; expected a number of pixels, or 0 to leave the images as they are"
        )
    if name == SCENES:
        scenes = _generate(split, **options)
        height, width = scenes.size(0)
        if 0 < longest_side < max(height, width):
            raise UserError(
                f"{SCENES} is {width} pixels wide and longest_side is {longest_side}; expected scenes drawn as they are "
                f"served; draw them at size={longest_side}"
            )
        return scenes
    if options:
        raise UserError(f"{name} takes no options, got {', '.join(options)}; only {SCENES} does; remove them")
    layout, folder = _layout(name, Path(root or data_root()))
    if split not in layout.splits(folder):
        raise UserError(f"{name} in {folder} has no split {split!r}; expected {' or '.join(layout.splits(folder))}")
    pictures, classes = layout.read(folder, split)
    if not pictures:
        raise UserError(f"{name} {split} in {folder} has no images; expected at least one; unpack the set again")
    names = tuple(classes.values())
    starts, objects, passed_over = _fitted(pictures)
    heads = (f"{p.file.name} {p.file_bytes} {p.height} {p.width}".encode() for p in pictures)
    digest = content_digest(names, heads, starts, objects)
    sizes = [served_size(p.height, p.width, longest_side) for p in pictures]
    objects = _scaled(objects, starts, [(p.height, p.width) for p in pictures], sizes)
    images = Pictures(pictures, longest_side)
    if cache:
        images = list(tqdm(images, desc=f"reading {name} {split}", disable=None))
    return DetectionSet(
        name,
        split,
        names,
        tuple(classes),
        digest,
        passed_over,
        images,
        [picture.image_id for picture in pictures],
        [picture.file for picture in pictures],
        sizes,
        starts,
        objects,
    )


def splits(name: str, root: Path | None = None) -> list[str]:
    """The splits that `load` has of a set. Raises UserError when it is not there."""
    if name == SCENES:
        return ["train", "test"]
    layout, folder = _layout(name, Path(root or data_root()))
    return layout.splits(folder)


def is_set(name: str, root: Path | None = None) -> bool:
    """Whether `name` is a set with boxes: a known one, or a folder of the root in either layout."""
    folder = Path(root or data_root()) / name
    return name == SCENES or name in SOURCES or bool(coco.splits(folder) or voc.find(folder))


def describe(name: str, root: Path | None = None) -> list[str]:
    """One line a split: images, boxes, classes, what was passed over, digest.

    Reads all annotations and sees that all files are there; whether an image is sound shows when it is read.
    """
    lines = []
    for split in splits(name, root):
        there = load(name, split, root)
        names = ", ".join(there.classes[:10]) + (", ..." if len(there.classes) > 10 else "")
        over = ", ".join(f"{count:,} x {reason}" for reason, count in there.passed_over.items()) or "nothing"
        lines.append(
            f"{name} {split}: {len(there):,} images, {len(there.objects):,} boxes, {len(there.classes)} classes ({names}), "
            f"passed over: {over}, {there.digest}"
        )
    return lines


def part(objects: Truth, begin: int, end: int) -> Truth:
    """The objects from `begin` to before `end`, without a copy."""
    return Truth(*(values[begin:end] for values in vars(objects).values()))


def content_digest(classes: tuple[str, ...], heads: Iterable[bytes], starts: Sequence[int], objects: Truth) -> str:
    """sha256 of the class names, and of each image its head (what identifies its pixels) and its objects."""
    digest = hashlib.sha256(repr(classes).encode())
    for head, begin, end in zip(heads, starts[:-1], starts[1:], strict=True):
        digest.update(hashlib.sha256(head).digest())
        for values in vars(part(objects, begin, end)).values():
            array = values.numpy()
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _layout(name: str, root: Path):
    """The module that reads the set, and the folder that it reads."""
    folder = root / name
    if coco.splits(folder):
        return coco, folder
    place = voc.find(folder)
    if place:
        return voc, place
    if name in SOURCES or not folder.is_dir():
        how = SOURCES.get(name, f"put a set there, or take one of {SCENES}, {', '.join(SOURCES)}")
        state = "holds no annotations" if folder.is_dir() else "is missing"
        raise UserError(f"{folder} {state}; expected a set in the layout of COCO or VOC; {how}")
    images = sum(path.suffix.lower() in SUFFIXES for path in folder.rglob("*"))
    raise UserError(
        f"{folder} holds {images:,} images and no annotations; expected JPEGImages with Annotations/*.xml (VOC), or "
        "train2017, val2017 with annotations/instances_*2017.json (COCO); annotate the images in either form"
    )


def _fitted(pictures: list[Picture]) -> tuple[list[int], Truth, dict[str, int]]:
    """Where each image's objects begin and end, the objects in pixels as stored, and what was passed over."""
    rows = [row for picture in pictures for row in picture.objects]
    image = torch.arange(len(pictures)).repeat_interleave(torch.tensor([len(p.objects) for p in pictures]))
    written = torch.tensor([row[:4] for row in rows], dtype=torch.float32).view(-1, 4)
    limits = torch.tensor([(p.width, p.height) for p in pictures], dtype=torch.float32)[image].repeat(1, 2)
    boxes = torch.minimum(written.clamp(min=0), limits)
    empty = (written[:, 2:] <= written[:, :2]).any(1)
    outside = ~empty & (boxes[:, 2:] <= boxes[:, :2]).any(1)
    kept = ~(empty | outside)
    box_area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    area = torch.tensor([row[6] for row in rows])
    objects = Truth(
        boxes,
        torch.tensor([row[4] for row in rows], dtype=torch.int64),
        torch.tensor([row[5] for row in rows], dtype=torch.bool),
        torch.where(area.isnan(), box_area, area),
    )
    objects = Truth(*(values[kept] for values in vars(objects).values()))
    starts = [0, *image[kept].bincount(minlength=len(pictures)).cumsum(0).tolist()]
    over = Counter({NO_AREA: int(empty.sum()), OUTSIDE: int(outside.sum())})
    return starts, objects, dict(+over)


def _scaled(objects: Truth, starts: list[int], stored: list, served: list) -> Truth:
    """The objects in pixels of images whose sizes (height, width) went from `stored` to `served`."""
    image = torch.arange(len(stored)).repeat_interleave(torch.tensor(starts).diff())
    before, after = (torch.tensor(sizes, dtype=torch.float64).flip(1)[image] for sizes in (stored, served))
    ratio = after / before
    boxes = torch.minimum(objects.boxes * ratio.repeat(1, 2), after.repeat(1, 2)).float()
    return replace(objects, boxes=boxes, area=(objects.area * ratio.prod(1)).float())


@functools.lru_cache(maxsize=2)  # stages of one process draw the same two splits again and again
def _generate(split: str, **options) -> DetectionSet:
    from common.datasets import digit_scenes  # here: it imports this module

    unknown = options.keys() - set(digit_scenes.OPTIONS)
    if unknown:
        raise UserError(
            f"{SCENES} has no option {', '.join(sorted(unknown))}; expected {', '.join(digit_scenes.OPTIONS)}"
        )
    return digit_scenes.load(split, **options)
