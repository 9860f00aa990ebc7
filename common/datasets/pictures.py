"""Image files of any usual kind, served as (3, H, W) uint8 RGB, and what is annotated on them."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Picture:
    """An image file and its annotation, as it is written there.

    file_bytes: size of the file. height, width: in pixels, as annotated. objects: one tuple each of x1, y1, x2, y2 in
    pixels, label in 0..classes-1, whether it is a crowd, and area in pixels (nan: that of the box).
    """

    file: Path
    file_bytes: int
    image_id: int | str
    height: int
    width: int
    objects: list[tuple[float, float, float, float, int, bool, float]] = field(default_factory=list)


class Pictures(Sequence):
    """The pixels of some pictures, as `read_picture` gives them; a file is read each time its item is asked for."""

    def __init__(self, pictures: list[Picture], longest_side: int = 0):
        self.files = [(picture.file, picture.height, picture.width) for picture in pictures]
        self.longest_side = longest_side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        return read_picture(*self.files[i], self.longest_side)


def served_size(height: int, width: int, longest_side: int) -> tuple[int, int]:
    """(height, width) once the longer side is at most `longest_side`; 0: as it is. Rounded, each side 1 at least."""
    longest = max(height, width)
    if not longest_side or longest <= longest_side:
        return height, width
    return tuple(max(1, (2 * side * longest_side + longest) // (2 * longest)) for side in (height, width))


def read_picture(file: Path, height: int, width: int, longest_side: int = 0) -> torch.Tensor:
    """(3, h, w) uint8 RGB of a file that should have height x width pixels, shrunk to `served_size`, antialiased.

    Grey is repeated, a palette looked up, alpha dropped, 16 bits scaled to 8. An EXIF orientation is not followed:
    boxes are drawn on the pixels as they are stored. Raises UserError, naming the file, for one that is missing,
    damaged, cut short, of another size, or so large that it may be a decompression bomb.
    """
    with _opened(file) as image:
        if image.size != (width, height):
            raise UserError(
                f"{file} has {image.width} x {image.height} pixels, its annotation says {width} x {height}; expected "
                "the same; replace the image or its annotation"
            )
        pixels = _rgb(image)
    height, width = served_size(height, width, longest_side)
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)  # PIL's filters widen when they shrink
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


def stored_size(file: Path) -> tuple[int, int]:
    """(height, width) from the header of an image file. Raises UserError as `read_picture` does."""
    with _opened(file) as image:
        return image.height, image.width


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(
            f"{file} does not open as an image ({' '.join(str(error).split())}); expected a sound JPEG or PNG file; "
            "replace it by a sound copy"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits in one channel, which PIL's own conversion clips at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values from {values.min()} to {values.max()}, not 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating point values, not 8 or 16 bits")
    elif image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, PIL warns of palettes with transparency
    return image.convert("RGB")
