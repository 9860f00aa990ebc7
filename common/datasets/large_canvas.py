"""Large canvas: one small object at a random place of a large textured canvas, where it pays to look twice.

`large_canvas`: a handwritten digit (10 to 14 pixels high at size 72) among halves of other digits and straight strokes,
which are fainter. Embedded. `large_canvas_cifar10`: a CIFAR-10 picture (24 x 24 at size 96) among pieces of others; it
is made from data/cifar10, so it needs `make data DATASET=cifar10`. Training and test images share no object.

Why looking twice pays: shrunk to a third, the canvas shows where the object may be, but hardly what it is; a crop a
third wide, in the right place, shows what it is. Measured on 2,000 test images at size 72, looks of 24 x 24, seeds 0
and 1 (6,000 training images; 3x3 convolutions of width 16, 32, 64, 64 with batch norm, three 2x max-pools, mean pool,
linear; AdamW, one-cycle, 1,000 steps of batch 64; shrinking is bicubic with align_corners and no antialiasing):

    glance, the canvas at 24 x 24             31 and 27 %   (seed 0, antialiased: 51 %)
    canvas at 34 x 34, the cost of two looks  60 % (seed 0)
    canvas at 42 x 42, the cost of three      68 and 75 %
    crop at the true middle                   96 and 96 %
    crop at a place told from the glance      84 and 85 %; 90 and 90 % by a net trained with crops up to 4 pixels off
    crop at a random place                    18 % after 3,000 steps (seed 0), chance after 1,000

The place is told by a net of the same convolutions on the glance, trained on the true middles (L1): 91 and 92 % of its
crops hold the digit's whole box, 95 and 95 % its middle. A net cannot soon learn to read from random crops alone, few of
which hold a digit: started from the 42 x 42 net above it gets 19 % on random crops after 1,000 steps, and 84 % at the
true middle. `large_canvas_cifar10` at size 96, looks of 32 x 32, seed 0: glance 29 %, true middle 58 %, told place 51 %
and 56 %, whole picture inside 85 %, middle inside 99 %. Chance is 10 %. The figure `large_canvas.png` beside this file
shows six canvases, each above its glance and its crop.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from common.checkpoints import write_atomic
from common.datasets.cluttered_digits import (
    background,
    base_colour,
    digit_box,
    draw_digit,
    draw_line,
    enlarge,
    handwriting,
    image_count,
    ink_colour,
    streams,
)
from common.datasets.images import Images, data_root, fingerprint, load_npz
from common.errors import UserError
from common.runtime import keyed_generator

DIGITS, CIFAR10 = "large_canvas", "large_canvas_cifar10"
SIZES = range(36, 257)
MEAN, STD = (0.5, 0.5, 0.5), (0.17, 0.17, 0.17)
HALVES, STROKES, FAINT = 2, 3, 0.6  # distractors of a digit, and their contrast as a share of its own
PIECES = 4  # distractors of a CIFAR-10 picture
CHUNK = 32  # images drawn at once, so that the planes stay in the cache


def load(split: str, n: int | None = None, size: int = 72, seed: int = 0) -> Images:
    """`n` images (default 10,000 train, 2,000 test) of (size, size, 3) uint8, one whole digit on each, labels 0..9.

    A pure function of the arguments, and the first k images are the same for every n >= k. Only exactly rounded
    arithmetic is used, so that the digest does not depend on the machine.
    """
    n = image_count(DIGITS, split, n, size, SIZES)
    ink, written = handwriting(split)
    draw, side = streams(DIGITS, split, n, seed), window(size)
    chosen = (draw("chosen", 1 + HALVES) * len(ink)).long()
    place, cut, strokes = draw("place", 1 + HALVES, 5), draw("cut", HALVES, 2), draw("strokes", STROKES, 5)
    colours = draw("colours", 1 + HALVES + STROKES, 4)

    def things(c: slice, base: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        colour = [ink_colour(base, draws)[..., None, None] for draws in colours[c].unbind(1)]
        for k in range(STROKES):
            yield FAINT * draw_line(strokes[c, k], side), colour[1 + HALVES + k]
        for k in range(1, 1 + HALVES):
            yield FAINT * draw_digit(ink[chosen[c, k]], place[c, k], side, cut[c, k - 1]), colour[k]
        yield draw_digit(ink[chosen[c, 0]], place[c, 0], side), colour[0]

    images = _paint(DIGITS, split, n, size, seed, STROKES + HALVES, things)
    labels = written[chosen[:, 0]]
    return Images(DIGITS, split, images, labels, 10, MEAN, STD, fingerprint(images, labels))


def load_cifar10(split: str, n: int | None = None, size: int = 96, seed: int = 0, root: Path | None = None) -> Images:
    """The same with one whole picture of `<root>/cifar10` on each image, a quarter of the canvas wide, labels 0..9."""
    n = image_count(CIFAR10, split, n, size, SIZES)
    source = load_npz("cifar10", split, Path(root or data_root()))
    chosen = (streams(CIFAR10, split, n, seed)("chosen", 1 + PIECES) * len(source)).long()
    side = window(size, CIFAR10)

    def things(c: slice, _: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        pictures = source.images[chosen[c]].permute(0, 1, 4, 2, 3).float() / 255  # (b, 1 + PIECES, 3, 32, 32)
        for k in range(1, 1 + PIECES):
            yield torch.ones(1, side // 2, side // 2), enlarge(pictures[:, k, :, 8:24, 8:24], side // 2)
        yield torch.ones(1, side, side), enlarge(pictures[:, 0], side)

    images = _paint(CIFAR10, split, n, size, seed, PIECES, things)
    labels = source.labels[chosen[:, 0]]
    return Images(CIFAR10, split, images, labels, 10, MEAN, STD, fingerprint(images, labels))


def boxes(split: str, n: int | None = None, size: int = 72, seed: int = 0, name: str = DIGITS) -> torch.Tensor:
    """(n, 4) where the objects of these images are: middle y, middle x, height, width, in pixels from the top left.

    Of a digit before its turn, so that its corners may stand out a little. name: which of the two sets.
    """
    if name not in (DIGITS, CIFAR10):
        raise UserError(f"the places of the objects of {name!r} are not known; expected {DIGITS} or {CIFAR10}")
    n = image_count(name, split, n, size, SIZES)
    draw, side = streams(name, split, n, seed), window(size, name)
    if name == DIGITS:
        box = digit_box(draw("place", 1 + HALVES, 5)[:, 0]) * side
    else:
        box = torch.tensor([0.5, 0.5, 1, 1]).repeat(n, 1) * side
    box[:, :2] += _corner(draw("where", 2), size, side)
    return box


def centres(split: str, n: int | None = None, size: int = 72, seed: int = 0, name: str = DIGITS) -> torch.Tensor:
    """(n, 2) middle y and x of the objects of these images, in pixels: what an oracle knows."""
    return boxes(split, n, size, seed, name)[:, :2]


def window(size: int, name: str = DIGITS) -> int:
    """Side of the square that an object is drawn in, in pixels."""
    return size * 2 // 9 if name == DIGITS else size // 4


def _corner(where: torch.Tensor, size: int, side: int) -> torch.Tensor:
    """Top left (..., 2) of a square that lies wholly on the canvas, every place as likely."""
    return (where * (size - side + 1)).long()


def _paint(name: str, split: str, n: int, size: int, seed: int, distractors: int, things: Callable) -> torch.Tensor:
    """(n, size, size, 3) uint8: on textured canvases, at random places, what `things(chunk, base colour)` yields.

    It yields squares from back to front, the object last: ink (b, w, w) in 0..1 and colour (b, 3, 1 or w, 1 or w).
    """
    draw = streams(name, split, n, seed)
    where = torch.cat([draw("scatter", distractors, 2), draw("where", 2)[:, None]], 1)
    tint, gradient = draw("base", 4), draw("gradient", 3, 2)
    coarse, middle = draw("coarse", 3, 4, 4), draw("middle", 3, 9, 9)
    grain = keyed_generator(seed, name, split, "fine")
    images = torch.empty(n, size, size, 3, dtype=torch.uint8)
    for start in range(0, n, CHUNK):
        c = slice(start, start + CHUNK)
        base = base_colour(tint[c])
        fine = torch.rand(len(base), size, size, generator=grain)
        canvas = background(base, gradient[c], coarse[c], middle[c], fine)
        for k, (ink, colour) in enumerate(things(c, base)):
            side = ink.shape[-1]
            squares = canvas.unfold(2, side, 1).unfold(3, side, 1)  # every square of that side, without a copy
            at = (torch.arange(len(base)), slice(None), *_corner(where[c, k], size, side).unbind(1))
            under = squares[at]
            squares[at] = under + ink[:, None] * (colour - under)
        images[c] = (canvas.clamp_(0, 1) * 255 + 0.5).byte().permute(0, 2, 3, 1)
    return images


def draw_samples(path: Path, size: int = 72) -> None:
    """A figure of the first 6 training images: the canvas, the glance (shrunk to a third), the crop at full size."""
    from matplotlib.figure import Figure

    samples, side = load("train", n=6, size=size), size // 3
    whole = samples.images.permute(0, 3, 1, 2).float() / 255
    glances = torch.nn.functional.interpolate(whole, (side, side), mode="bicubic", align_corners=True, antialias=False)
    corners = (centres("train", n=6, size=size) - side / 2).round().clamp(0, size - side).int().tolist()
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots(3, 6)
    for k, (y, x) in enumerate(corners):
        crop = samples.images[k, y : y + side, x : x + side]
        glance = glances[k].clamp(0, 1).permute(1, 2, 0)
        for axis, image in zip(axes[:, k], (samples.images[k], glance, crop), strict=True):
            axis.imshow(image.numpy(), interpolation="nearest")
            axis.set_axis_off()
        axes[0, k].set_title(str(int(samples.labels[k])), fontsize=10)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=90, metadata={"Software": None}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw 6 large canvases, each above its glance and its crop.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--size", type=int, default=72)
    args = parser.parse_args()
    draw_samples(args.out, args.size)
