"""Digit scenes: a detection set made from the embedded digits, with no download.

One to six handwritten digits of different sizes on a textured colour canvas, over fainter strokes and halves of other
digits. Training and test scenes are drawn from disjoint handwriting.

What it is for: corners alone do not tell which of them belong together. Most digits of a scene are the same one, so a
top left and a bottom right corner of one class often lie on two objects, and half a digit has corners too. Of the 2,000
training scenes of size 128 (3.5 digits each), 67 % have two or more of a class, and pairing each top left corner with
each bottom right one of its class beyond it makes 1.6 boxes a digit. Digits are 10 to 47 pixels high, half of them 19 to
31; boxes are small for COCO's bounds, so cut areas elsewhere: 55 % are below 20^2 pixels, 40 % between that and 30^2.
The figure `digit_scenes.png` beside this file shows six scenes. 2,000 of size 96 take 5 seconds on one thread.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from common.checkpoints import write_atomic
from common.datasets.cluttered_digits import (
    background,
    base_colour,
    draw_digit,
    draw_line,
    handwriting,
    image_count,
    ink_colour,
)
from common.datasets.detection import SCENES, DetectionSet, Truth, content_digest
from common.errors import UserError
from common.runtime import keyed_generator

OPTIONS = ("n", "size", "seed", "classes")
COUNTS = {"train": 2_000, "test": 500}
SIZES = range(48, 513)
MOST = 6  # digits of a scene
SAME = 0.6  # share of the digits that are the scene's own digit; the others are any
STROKES, HALVES, FAINT = 2, 2, 0.6  # distractors, and their contrast as a share of a digit's
TRIES = 12  # places tried for a digit before the scene goes without it
OVERLAP = 15  # two boxes share at most this percentage of the smaller one
INKED = 0.25  # a pixel is the digit's from this much ink on
CHUNK = 128  # scenes drawn at once


def load(split: str, n: int | None = None, size: int = 128, seed: int = 0, classes: int = 10) -> DetectionSet:
    """`n` scenes (default 2,000 train, 500 test) of size x size pixels. The label of a digit is digit % classes.

    So 10 classes are the digits, 2 are even and odd, 1 is "digit"; the images are the same. A box is tight around the
    pixels that have at least a quarter of full ink, whether or not a later digit lies over some of them.
    A pure function of the arguments, and the first k scenes are the same for every n >= k. Only exactly rounded
    arithmetic is used, so that the digest does not depend on the machine.
    """
    n = image_count(SCENES, split, COUNTS.get(split) if n is None else n, size, SIZES)
    if classes not in range(1, 11):
        raise UserError(f"{SCENES} was asked for classes={classes}; expected 1 to 10")
    generator = functools.cache(lambda what: keyed_generator(seed, SCENES, split, what))  # one stream a purpose

    def draw(what: str, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator(what))

    source = handwriting(split)
    chunks = [_scenes(min(CHUNK, n - start), size, draw, *source) for start in range(0, n, CHUNK)]
    images, boxes, digits, placed = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    starts = [0, *placed.sum(1).cumsum(0).tolist()]
    boxes = boxes[placed].float()
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    objects = Truth(boxes, digits[placed] % classes, torch.zeros(len(boxes), dtype=torch.bool), area)
    names = ("digit",) if classes == 1 else tuple("0123456789"[k::classes] for k in range(classes))
    digest = content_digest(names, (image.numpy() for image in images), starts, objects)
    files, sizes = [f"{SCENES} {split} {i}" for i in range(n)], [(size, size)] * n
    ids = tuple(range(classes))
    return DetectionSet(SCENES, split, names, ids, digest, {}, images, range(n), files, sizes, starts, objects)


def _scenes(b: int, size: int, draw: Callable, ink: torch.Tensor, written: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The next b scenes: images (b, 3, S, S) uint8, boxes (b, MOST, 4), digits (b, MOST) and which of them are there."""
    digits = torch.where(
        draw("same", b, MOST) < SAME, _index(draw("own", b, 1), 10), _index(draw("other", b, MOST), 10)
    )
    chosen = _handwritten(digits, draw("chosen", b, MOST), written)
    shape = draw("shape", b, MOST, 5)
    sides = _side(draw("side", b, MOST), size)
    squares, extents = _squares(sides, lambda i, k, side: draw_digit(ink[chosen[i, k]], shape[i, k], side))
    boxes, corners, placed = _placed(
        extents, sides, 1 + _index(draw("count", b), MOST), draw("where", b, MOST, TRIES, 2), size
    )
    base = base_colour(draw("base", b, 4))
    coarse, middle, fine = draw("coarse", b, 3, 4, 4), draw("middle", b, 3, 9, 9), draw("fine", b, size, size)
    canvas = background(base, draw("gradient", b, 3, 2), coarse, middle, fine)
    _distract(canvas, base, size, draw, ink)
    colours = _colours(base, draw("colours", b, MOST, 4))
    for i, k in placed.nonzero().tolist():
        _paint(canvas[i], squares[i, k], corners[i, k], colours[i, k])
    return (canvas.clamp_(0, 1) * 255 + 0.5).byte(), boxes, digits, placed


def _distract(canvas: torch.Tensor, base: torch.Tensor, size: int, draw: Callable, ink: torch.Tensor) -> None:
    """Paint faint strokes, then halves of digits, anywhere on the (b, 3, S, S) canvas."""
    b = len(canvas)
    strokes, halves = draw("strokes", b, STROKES, 5), _index(draw("halves", b, HALVES), len(ink))
    shape, cut = draw("half shape", b, HALVES, 5), draw("cut", b, HALVES, 2)
    kinds = (
        ("stroke", STROKES, lambda i, k, side: draw_line(strokes[i, k], side)),
        ("half", HALVES, lambda i, k, side: draw_digit(ink[halves[i, k]], shape[i, k], side, cut[i, k])),
    )
    for what, count, drawn in kinds:
        sides = _side(draw(f"{what} side", b, count), size)
        squares, _ = _squares(sides, drawn)
        corners = _corner(draw(f"{what} where", b, count, 2), sides, size)
        colours = _colours(base, draw(f"{what} colours", b, count, 4))
        for (i, k), square in squares.items():
            _paint(canvas[i], FAINT * square, corners[i, k], colours[i, k])


def _index(draws: torch.Tensor, n) -> torch.Tensor:
    """Draws in [0, 1) to integers in 0..n-1; their product may round up to n."""
    return torch.minimum((draws * n).long(), torch.as_tensor(n) - 1)


def _handwritten(digits: torch.Tensor, draws: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """For each of the digits (b, K), the index of one that was written, each as likely."""
    count = written.bincount(minlength=10)
    first = count.cumsum(0) - count
    return written.argsort(stable=True)[first[digits] + _index(draws, count[digits])]


def _side(draws: torch.Tensor, size: int) -> torch.Tensor:
    """Sides of the squares that things are drawn in, in pixels, each as likely. Of its height a digit takes 65 to 90 %."""
    low, high = max(12, size * 14 // 100), size * 38 // 100
    return low + _index(draws, high - low + 1)


def _squares(sides: torch.Tensor, drawn: Callable) -> tuple[dict, torch.Tensor]:
    """Thing k of scene i as ink in 0..1, (i, k) -> (side, side), and all extents: (b, K, 4) x1, y1, x2, y2 of the inked.

    drawn(i, k, side): ink (m, side, side) of these things, all of one side.
    """
    squares, extents = {}, torch.zeros(*sides.shape, 4, dtype=torch.int64)
    for side in sides.unique().tolist():
        i, k = (sides == side).nonzero(as_tuple=True)
        ink = drawn(i, k, side)
        squares.update(zip(zip(i.tolist(), k.tolist(), strict=True), ink, strict=True))
        inked = ink >= INKED
        ends = []
        for line in (inked.any(1), inked.any(2)):  # columns, rows
            ends += [line.int().argmax(1), side - line.flip(1).int().argmax(1)]
        extents[i, k] = torch.stack([ends[0], ends[2], ends[1], ends[3]], 1)
    return squares, extents


def _corner(where: torch.Tensor, sides: torch.Tensor, size: int) -> torch.Tensor:
    """Top left (..., 2), x and y, of squares that lie wholly on the canvas, every place as likely."""
    return _index(where, (size - sides + 1)[..., None])


def _placed(extents, sides, count, where, size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes (b, K, 4) and corners (b, K, 2) of the digits, and (b, K) whether they are there.

    One after the other takes the first of its TRIES places where it does not cover another too much.
    """
    b, most = sides.shape
    boxes, corners = torch.zeros(b, most, 4, dtype=torch.int64), torch.zeros(b, most, 2, dtype=torch.int64)
    placed, scene = torch.zeros(b, most, dtype=torch.bool), torch.arange(b)
    for k in range(most):
        tried = _corner(where[:, k], sides[:, k, None], size)  # (b, TRIES, 2)
        candidates = extents[:, k, None] + tried.repeat(1, 1, 2)
        free = ~(_covers(candidates[:, :, None], boxes[:, None, :k]) & placed[:, None, :k]).any(2)
        first = free.int().argmax(1)
        boxes[:, k], corners[:, k] = candidates[scene, first], tried[scene, first]
        placed[:, k] = free.any(1) & (k < count)
    return boxes, corners, placed


def _covers(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Whether boxes (..., 4) share more than OVERLAP % of the smaller one."""
    shared = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (one, other)]
    return 100 * shared.prod(-1) > OVERLAP * torch.minimum(*areas)


def _colours(base: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """(b, K, 3, 1, 1) ink colours, clearly lighter or darker than the (b, 3) mean colours of the backgrounds."""
    return torch.stack([ink_colour(base, some) for some in draws.unbind(1)], 1)[..., None, None]


def _paint(canvas: torch.Tensor, ink: torch.Tensor, corner: torch.Tensor, colour: torch.Tensor) -> None:
    """Blend a colour (3, 1, 1) into the (3, S, S) canvas where the (side, side) ink, put at `corner`, says so."""
    x, y = corner.tolist()
    under = canvas[:, y : y + len(ink), x : x + len(ink)]
    under += ink * (colour - under)


def draw_samples(path: Path, size: int = 128) -> None:
    """A figure of the first 6 training scenes with their boxes and labels."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    samples = load("train", n=6, size=size)
    figure = Figure(figsize=(6.6, 4.5), layout="constrained")
    for i, axis in enumerate(figure.subplots(2, 3).flat):
        axis.imshow(samples.image(i).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_axis_off()
        truth = samples.truth(i)
        for (x1, y1, x2, y2), label in zip(truth.boxes.tolist(), truth.labels.tolist(), strict=True):
            axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color="yellow", linewidth=0.8))
            axis.text(x1, y1 - 2, samples.classes[label], color="yellow", fontsize=7)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=75, metadata={"Software": None}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw 6 digit scenes with their boxes.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_args()
    draw_samples(args.out, args.size)
