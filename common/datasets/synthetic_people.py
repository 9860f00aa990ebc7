"""Synthetic people: an identity-and-camera set for person re-identification, with no download.

A person is drawn from segments, each with its own colour and texture: hair, face, torso, sleeves, legs or trousers,
shoes, and for every other one a bag. All clothes take their colours from one small wardrobe, so that it is their
arrangement from head to foot which tells two people apart, not one colour. A camera has a colour matrix, tone curve,
blur, noise, scene, and a viewpoint that makes people smaller or larger. An image is a person x a camera, with pose and
light of its own, in a box that is off by up to 15 % of its height, and with probability 0.4 behind an obstacle that
hides the top, middle or bottom third.

What each image carries: `ids`, `cameras`, and the flags `occluder` (0 none, 1 top, 2 middle, 3 bottom), `shift` (of the
person in the box, as a share of its height, downwards), `occluded`, and `shifted` (by more than 5 %). Training and test
people are drawn from separate streams and have separate numbers (from 1, and from 100,001); cameras are the same, as in
real sets. The query is the first image of every test person on every camera, the gallery has the others.

`occlusion` and `shift` only change obstacle and box: with the same other arguments the same people stand in the same
pose, light and noise, so clean and occluded queries can be compared image by image. The figure `synthetic_people.png`
beside this file shows six people on four cameras, and the same queries clean, shifted and occluded.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoints import write_atomic
from common.datasets.cluttered_digits import enlarge
from common.datasets.person_reid import SPLITS, People
from common.errors import UserError
from common.runtime import keyed_generator

NAME = "synthetic_people"
IDENTITIES = {"train": 300, "test": 100}
SIZES = range(32, 257, 8)
TEST_IDS = 100_000
CHUNK = 128  # images drawn at once, so that the planes stay in the cache
MEAN, STD = (0.45, 0.45, 0.45), (0.23, 0.23, 0.23)
WARDROBE = torch.tensor(  # black, white, grey, red, blue, green, yellow, brown
    [[20, 20, 24], [225, 225, 220], [125, 125, 128], [170, 35, 40], [40, 60, 150], [45, 110, 60], [205, 175, 60], [110, 75, 45]]
) / 255  # fmt: skip
HAIR = torch.tensor([[25, 20, 18], [90, 60, 35], [190, 155, 90], [150, 150, 150]]) / 255
SKIN = torch.tensor([[235, 195, 165], [190, 140, 105], [120, 80, 60]]) / 255


def load(
    split: str,
    identities: int | None = None,
    cameras: int = 4,
    per_camera: int = 4,
    size: int = 64,
    occlusion: float = 0.4,
    shift: float = 0.15,
    seed: int = 0,
) -> People:
    """Images (N, size, 3/8 size, 3) uint8 of "train", "query" or "gallery", person by person, camera by camera.

    identities: people (300 to train on, 100 to test); per_camera: images of a person on a camera, at least 2 in the test splits.
    occlusion: probability of an obstacle; shift: the box is off by at most this share of its height.

    A pure function of the arguments; the images of the first k people are the same for every number of people. Only
    exactly rounded arithmetic is used, so that the digest does not depend on the machine. UserError for arguments out of range.
    """
    part = "train" if split == "train" else "test"
    identities = IDENTITIES[part] if identities is None else identities
    _check(split, identities, cameras, per_camera, size, occlusion, shift)
    shape = (identities, cameras, per_camera)
    who, camera, number = torch.cartesian_prod(*(torch.arange(n) for n in shape)).unbind(1)

    def stream(n: int, *key):
        return lambda what, *shape: torch.rand(n, *shape, generator=keyed_generator(seed, NAME, *key, what))

    people, (views, scenes) = _people(stream(identities, part)), _views(stream(cameras, "camera"), size)
    draw = stream(len(who), part, "image")
    noise = keyed_generator(seed, NAME, part, "noise")
    images = {
        name: draw(name, count)
        for name, count in (("pose", 6), ("light", 1), ("window", 2), ("obstacle", 12), ("box", 1))
    }
    kept = {"train": number >= 0, "query": number == 0, "gallery": number > 0}[split]
    moved = (2 * images["box"][:, 0] - 1) * shift
    hidden, third = images["obstacle"][:, :2].unbind(1)
    occluder = torch.where(hidden < occlusion, 1 + (third * 3).long(), 0)
    pixels = torch.empty(int(kept.sum()), size, size * 3 // 8, 3, dtype=torch.uint8)
    done = 0
    for start in range(0, len(who), CHUNK):
        c = slice(start, start + CHUNK)
        grain = torch.rand(len(who[c]), size, size * 3 // 8, 2, generator=noise)
        k = kept[c]
        if k.any():
            here = {name: values[c][k] for name, values in images.items()}
            person = {name: values[who[c][k]] for name, values in people.items()}
            view = {name: values[camera[c][k]] for name, values in views.items()}
            canvas = _cut(scenes, camera[c][k], here["window"], size, size * 3 // 8)
            drawn = _draw(canvas, person, view, here, moved[c][k], occluder[c][k], grain[k])
            pixels[done : done + len(drawn)] = drawn
            done += len(drawn)
    flags = {"occluder": occluder[kept], "shift": moved[kept]}
    flags |= {"occluded": flags["occluder"] > 0, "shifted": flags["shift"].abs() > 0.05}
    ids = who[kept] + 1 + (0 if split == "train" else TEST_IDS)
    return People.of_images(NAME, split, pixels, ids, camera[kept], MEAN, STD, flags)


def _check(split, identities, cameras, per_camera, size, occlusion, shift) -> None:
    if split not in SPLITS:
        raise UserError(f"{NAME} has no split {split!r}; expected one of {', '.join(SPLITS)}")
    if not 1 <= identities <= TEST_IDS or cameras < 1 or per_camera < (1 if split == "train" else 2):
        raise UserError(
            f"{NAME} was asked for {identities} identities, {cameras} cameras, {per_camera} images of each on each; expected "
            f"1 to {TEST_IDS} identities, at least one camera, and two images, one for the query (training: one)"
        )
    if size not in SIZES:
        raise UserError(f"{NAME} cannot be drawn at size {size}; expected a multiple of 8, {SIZES[0]} to {SIZES[-1]}")
    if not 0 <= occlusion <= 1 or not 0 <= shift <= 0.5:
        raise UserError(f"occlusion is {occlusion} and shift {shift}; expected 0 to 1, and 0 to 0.5")


# ------------------------------------------------------------------------------------------------ what is drawn once
def _people(draw) -> dict[str, Tensor]:
    """Attributes of each person. Colours (P, 3), two of a textured segment (P, 2, 3); the rest (P, k) in 0..1."""
    found = {}
    for name in ("torso", "sleeves", "legs", "shoes", "bag"):
        found[name] = _colours(WARDROBE, draw(name, 2, 4))
    same = draw("plain", 1)[..., None] < 0.6  # most sleeves have the colour of the torso
    found["sleeves"] = torch.where(same, found["torso"], found["sleeves"])
    found["hair"] = _colours(HAIR, draw("hair", 1, 4))[:, 0]
    found["skin"] = _colours(SKIN, draw("skin", 1, 4))[:, 0]
    return found | {"texture": draw("texture", 3, 3), "build": draw("build", 8)}


def _colours(palette: Tensor, draws: Tensor) -> Tensor:
    """(..., 4) draws to (..., 3) colours: one of the palette, and a little off."""
    return palette[(draws[..., 0] * len(palette)).long()] + 0.12 * (draws[..., 1:] - 0.5)


def _views(draw, size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Attributes of each camera; scenes (K, 3, 2 size, 2 size): what it sees when nobody is there."""
    mix = torch.eye(3) * 0.9 + 0.45 * (draw("matrix", 3, 3) - 0.5)
    scene = 0.15 + 0.7 * enlarge(draw("scene", 3, 5, 5), 2 * size)
    scene = scene + 0.3 * (enlarge(draw("detail", 3, 17, 17), 2 * size) - 0.5)
    return {"matrix": mix, "optics": draw("optics", 5)}, scene


# ------------------------------------------------------------------------------------------------ one image
def _draw(canvas: Tensor, person, view, image, moved: Tensor, occluder: Tensor, grain: Tensor) -> Tensor:
    """Draw people on the windows (b, 3, H, W) of the scenes, and what the cameras make of them: (b, H, W, 3) uint8."""
    _, height, width, _ = grain.shape
    y, x = (torch.arange(height) + 0.5)[:, None] / height, (torch.arange(width) + 0.5)[None] / height
    scale, across, lean, swing, spread, stretch = image["pose"][..., None, None].unbind(1)
    tall = (0.80 + 0.14 * view["optics"][:, 0, None, None]) * (0.96 + 0.08 * scale)
    v = (y - 0.5 - moved[:, None, None]) / tall + 0.5  # 0 at the top of the head, 1 at the soles
    u = (x - width / (2 * height) - 0.06 * (across - 0.5)) / tall + 0.10 * (lean - 0.5) * (v - 0.5)
    soft = height * 0.85

    def box(left, right, top, bottom) -> Tensor:
        columns = ((u - left) * soft).clamp(0, 1) * ((right - u) * soft).clamp(0, 1)
        return columns * (((v - top) * soft).clamp(0, 1) * ((bottom - v) * soft).clamp(0, 1))

    def pair(middle, half, top, bottom) -> Tensor:
        """A left and a right box, their middles `middle` from the axis."""
        return torch.maximum(
            box(-middle - half, half - middle, top, bottom), box(middle - half, middle + half, top, bottom)
        )

    def oval(middle, half_width, half_height) -> Tensor:
        du, dv = u / half_width, (v - middle) / half_height
        return ((1 - du * du - dv * dv) * 4).clamp(0, 1)

    build, hem, sleeve, trousers, hair, bag, side, large = person["build"][..., None, None].unbind(1)
    shoulder = 0.085 + 0.03 * build
    hem = 0.46 + 0.09 * hem
    sleeve = torch.where(sleeve < 0.5, 0.16 + 0.13, 0.16 + 0.33)
    trousers = torch.where(trousers < 0.7, 0.95, 0.70)
    hang = shoulder + 0.02 + 0.02 * swing
    step = 0.042 + 0.05 * spread * (v - 0.45).clamp(min=0)

    def paint(ink: Tensor, colour: Tensor) -> None:
        canvas.add_(ink[:, None] * (colour - canvas))

    def plain(name: str) -> Tensor:
        return person[name][..., None, None]

    def textured(name: str, number: int) -> Tensor:
        first, second = person[name][..., None, None].unbind(1)
        return first + _pattern(person["texture"][:, number], u, v)[:, None] * (second - first)

    paint(pair(step, 0.034, 0.5, 0.97), plain("skin"))
    paint(pair(step, 0.04 + 0.012 * build, 0.46, trousers), textured("legs", 1))
    paint(pair(step, 0.045, 0.945, 1.0), plain("shoes")[:, 0])
    paint(pair(hang, 0.022, 0.17, 0.53), plain("skin"))
    paint(pair(hang, 0.027, 0.165, sleeve), plain("sleeves")[:, 0])
    paint(box(-shoulder, shoulder, 0.15, hem), textured("torso", 0))
    sling = torch.where(side < 0.5, -1.0, 1.0) * (0.05 + 0.07 * stretch)
    wide, long = 0.045 + 0.03 * large, 0.08 + 0.08 * large
    paint(box(sling - wide, sling + wide, 0.42 - long, 0.42 + long) * (bag < 0.5), textured("bag", 2))
    paint(oval(0.082, 0.048, 0.08), plain("skin"))
    paint(torch.maximum(oval(0.035, 0.055, 0.045), (hair < 0.4) * pair(0.048, 0.016, 0.03, 0.16)), plain("hair"))
    _obstruct(paint, image["obstacle"], occluder, y, x * height / width)
    canvas = _expose(canvas, view, image["light"], grain)
    return (canvas.clamp_(0, 1) * 255 + 0.5).byte().permute(0, 2, 3, 1)


def _cut(scenes: Tensor, camera: Tensor, where: Tensor, height: int, width: int) -> Tensor:
    """A window (b, 3, height, width) of the scene of each camera, its corner `where` (b, 2) in 0..1 says."""
    windows = scenes.unfold(2, height, 1).unfold(3, width, 1)
    rows, columns = ((where[:, k] * windows.shape[2 + k]).long() for k in (0, 1))
    return windows[camera, :, rows, columns]


def _pattern(draws: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """0..1 (b, H, W): plain, stripes across, stripes along, or checks."""
    kind, period, phase = draws[..., None, None].unbind(1)
    frequency = 6 + 8 * period
    across, along = (_wave(t * frequency + phase) for t in (v, u))
    by_v, by_u = ((kind > 0.4) & (kind < 0.65)) | (kind > 0.85), kind > 0.65
    across, along = across * by_v, along * by_u
    return across + along - 2 * across * along


def _wave(t: Tensor) -> Tensor:
    """A square wave of period 1 with slanted edges."""
    return (((t - t.floor() - 0.5).abs() - 0.25) * 8 + 0.5).clamp(0, 1)


def _obstruct(paint, draws: Tensor, occluder: Tensor, y: Tensor, x: Tensor) -> None:
    """Cover a third of the box with an obstacle of a colour and texture of its own. x: 0..1 over the width."""
    top = (occluder - 1)[:, None, None] / 3
    more, edge, kind, period, phase = (draws[:, k, None, None] for k in range(2, 7))
    inside = (y > top - 0.06 * more) & (y < top + 1 / 3 + 0.06 * edge) & (occluder > 0)[:, None, None]
    texture = torch.stack([kind, period, phase], 1)[..., 0, 0]
    first, second = _colours(WARDROBE, draws[:, 7:11])[..., None, None], draws[:, 9:12][..., None, None]
    colour = first + _pattern(texture, x / 2, y)[:, None] * (second - first)
    paint(inside.float(), colour)


def _expose(canvas: Tensor, view, light: Tensor, grain: Tensor) -> Tensor:
    """What the camera makes of it: blur, colours, tone, light and noise. No powers and no matrix product: both round freely."""
    blur = 0.25 * view["optics"][:, 1, None, None, None]
    for dim in (2, 3):
        ahead, behind = (torch.cat(_ends(canvas, dim, back), dim) for back in (False, True))
        canvas = canvas + blur * (ahead + behind - 2 * canvas)
    red, green, blue = canvas.unbind(1)
    matrix = view["matrix"][..., None, None]
    mixed = [matrix[:, k, 0] * red + matrix[:, k, 1] * green + matrix[:, k, 2] * blue for k in range(3)]
    canvas = torch.stack(mixed, 1).clamp(0, 1)
    bend = (view["optics"][:, 2, None, None, None] - 0.5) * 1.2
    canvas = canvas + bend * canvas * (1 - canvas)
    gain = (0.75 + 0.35 * view["optics"][:, 3]) * (0.85 + 0.3 * light[:, 0])
    amount = 0.06 + 0.10 * view["optics"][:, 4]
    noise = (grain[..., 0] + grain[..., 1] - 1)[:, None]
    return canvas * gain[:, None, None, None] + amount[:, None, None, None] * noise


def _ends(canvas: Tensor, dim: int, back: bool) -> tuple[Tensor, Tensor]:
    """The canvas moved by one pixel along dim, its edge repeated."""
    n = canvas.shape[dim]
    if back:
        return canvas.narrow(dim, 0, 1), canvas.narrow(dim, 0, n - 1)
    return canvas.narrow(dim, 1, n - 1), canvas.narrow(dim, n - 1, 1)


def draw_samples(path: Path, size: int = 64) -> None:
    """A figure: six people, two images on each of four cameras; then queries as they are clean, shifted, and occluded."""
    from matplotlib.figure import Figure

    people = load("train", identities=6, size=size)
    chosen = people.subset((torch.arange(len(people)) % 4) < 2)
    rows = [("two people", part.images, _captions(part)) for part in map(chosen.subset, torch.arange(48).split(16))]
    for name, occlusion, shift in (("clean", 0.0, 0.0), ("shifted", 0.0, 0.15), ("occluded", 1.0, 0.0)):
        queries = load("query", identities=4, size=size, occlusion=occlusion, shift=shift)
        rows.append((f"queries, {name}", queries.images, _captions(queries)))
    figure = Figure(figsize=(9.5, 10), layout="constrained")
    for axis, (name, images, captions) in zip(figure.subplots(len(rows), 1), rows, strict=True):
        framed = torch.nn.functional.pad(images, (0, 0, 1, 1), value=255)
        axis.imshow(torch.cat(framed.unbind(), 1).numpy(), interpolation="nearest")
        axis.set_xticks([(k + 0.5) * framed.shape[2] for k in range(len(captions))], captions, fontsize=7)
        axis.set_yticks([])
        axis.set_ylabel(name, fontsize=8)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=64, metadata={"Software": None}))


def _captions(people: People) -> list[str]:
    return [f"{i} c{c}" for i, c in zip(people.ids.tolist(), people.cameras.tolist(), strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Draw six synthetic people on four cameras, and queries in three states."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args()
    draw_samples(args.out, args.size)
