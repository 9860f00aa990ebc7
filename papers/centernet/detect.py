"""Draw what a detector finds on any image: boxes with class and score, and the three keypoints that each stands on.

    python -m papers.centernet.detect --set checkpoint=runs/centernet/train-quick-s0 images=photo.jpg
    python -m papers.centernet.detect --set checkpoint=... images=folder out=drawn threshold=0.4

Without `images` it takes the first test images of the training's own set. A file that does not open is told of in one line
and counted.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torchvision.io import encode_png
from torchvision.utils import draw_bounding_boxes, draw_keypoints

from common import cli, runtime
from common.checkpoints import write_atomic
from common.cli import Job
from common.datasets.pictures import SUFFIXES, read_picture, stored_size
from common.errors import UserError
from common.results.records import Measured

from . import train
from .detector import Detections, detect_objects
from .evaluate import trained_model

COLOURS = ("#e15759", "#4e79a7", "#59a14f", "#f28e2b", "#b07aa1", "#76b7b2", "#edc948", "#9c755f")
KEYPOINTS = ("#00ff00", "#ffff00", "#ff00ff")  # top left, bottom right, centre
LEGIBLE = 640  # drawings of smaller images are enlarged, by a whole factor, to about this many pixels


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, or its work dir (the newest one there)
    images: str = ""  # a file, or a folder of them; empty: test images of the set that it was trained on
    number: int = 8  # of those test images
    out: str = ""  # folder of the drawings; empty: `detections` in the work dir
    threshold: float = 0.4  # least score that is drawn

    def __post_init__(self):
        if self.number < 1 or not 0 <= self.threshold <= 1:
            raise ValueError("number must be at least 1, and threshold lie between 0 and 1")


def draw(image: Tensor, found: Detections, classes: list[str], threshold: float) -> Tensor:
    """(3, H, W) uint8 with its detections, enlarged by a whole factor if it is small."""
    factor = max(1, LEGIBLE // max(image.shape[1:]))
    image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    keep = found.scores >= threshold
    boxes, labels = found.boxes[keep].cpu() * factor, found.labels[keep].tolist()
    if not len(boxes):
        return image
    names = [f"{classes[k]} {score:.2f}" for k, score in zip(labels, found.scores[keep].tolist(), strict=True)]
    colours = [COLOURS[k % len(COLOURS)] for k in labels]
    image = draw_bounding_boxes(image, boxes.round(), names, colours, width=2)
    points = (boxes[:, :2], boxes[:, 2:], found.centers[keep].cpu() * factor)
    for colour, at in zip(KEYPOINTS, points, strict=True):
        at = at[at.isfinite().all(1)]
        if len(at):
            image = draw_keypoints(image, at[:, None], colors=colour, radius=3)
    return image


def chosen(config: Config, settings: train.Config, job: Job):
    """(name, function that reads the image) of everything that is to be drawn."""
    if not config.images:
        tests = train.open_set(settings, job, train=False)
        return [
            (f"{tests.name}-{tests.image_id(i)}", lambda i=i: tests.image(i))
            for i in range(min(config.number, len(tests)))
        ]
    path = Path(config.images)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no image; expected files ending in {', '.join(SUFFIXES)}")
    if not path.exists():
        raise UserError(f"{path} does not exist; give an image file or a folder of them")
    return [(p.stem, lambda p=p: read_picture(p, *stored_size(p), settings.longest_side)) for p in files]


def run(config: Config, job: Job) -> Measured:
    """Write one PNG an image; counts images, boxes above the threshold, and files that did not open."""
    runtime.require_one_process(job.world, "detect.py")
    model, settings, payload = trained_model(config.checkpoint)
    model, classes = model.to(job.device), payload["identity"]["classes"]
    mode = "triplets" if settings.center != "none" else "pairs"
    out, boxes, unreadable = Path(config.out or job.work_dir / "detections"), 0, 0
    wanted = chosen(config, settings, job)
    for name, read in wanted:
        try:
            image = read()
        except UserError as error:
            unreadable += 1
            print(f"passed over: {error}", flush=True)
            continue
        found = detect_objects(model, image[None].to(job.device), settings.settings(), mode)[0]
        boxes += int((found.scores >= config.threshold).sum())
        png = encode_png(draw(image, found, classes, config.threshold))
        write_atomic(out / f"{name}.png", lambda file, png=png: file.write(png.numpy().tobytes()))
        print(out / f"{name}.png", flush=True)
    if unreadable == len(wanted):
        raise UserError(f"none of {len(wanted)} image(s) opened; see the lines above")
    counts = {"images": len(wanted) - unreadable, "boxes": boxes, "unreadable": unreadable}
    return Measured.of(
        counts,
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
