"""Train a detector; ends with its average precision and false discovery rate, decoded as triplets and as pairs.

    python -m papers.centernet.train --tier quick --seed 0
    python -m papers.centernet.train --config short-cpu --set center=none corner=plain     (CornerNet)

Official files train.py, sample/coco.py and config/CenterNet-52.json.
"""

import dataclasses
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress
from common.cli import Job
from common.datasets import detection
from common.datasets.classification import per_rank
from common.datasets.imagenet import folder_loader
from common.errors import UserError
from common.results.records import Measured, metric

from .augment import coloured
from .crops import Crops
from .detector import Settings
from .losses import detection_loss
from .measure import measured
from .model import DIMS, MODULES, STRIDE, CenterNet
from .targets import render_targets

SCRIPT = "centernet.train"


@dataclass
class Config:
    dataset: str = "coco"  # a set of common.datasets.detection: digit_scenes, coco, or a folder in VOC's layout
    train_split: str = "train"
    test_split: str = "val"
    train_images: int = 0  # generated sets: how many are drawn; 0: the set's own number
    test_images: int = 0
    scene_size: int = 0  # generated sets: side in pixels
    scene_classes: int = 10
    longest_side: int = 0  # larger images are shrunk to it, in training and testing; 0: none
    cache: bool = False  # keep decoded images in memory
    workers: int = 8  # loader processes a rank
    side: int = 511  # of the training crops
    scales: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # of a crop, in units of `side`
    border: int = 128  # a crop's middle stays this far from the edge
    flip: bool = True
    colour: bool = True
    dims: tuple[int, ...] = DIMS  # channels of an hourglass's levels
    modules: tuple[int, ...] = MODULES  # residual blocks of each
    stacks: int = 1  # hourglasses
    corner: Literal["plain", "cascade"] = "cascade"  # plain: CornerNet's pools
    center: Literal["none", "plain", "pool"] = "pool"  # none: CornerNet; plain: centres without center pooling
    recompute: bool = False  # activation checkpointing of each hourglass
    radius_overlap: float = 0.7
    proper_radius: bool = False  # CornerNet's later formula (with radius_overlap=0.3)
    steps: int = 480_000
    batch_size: int = 48  # over all ranks
    lr: float = 2.5e-4
    milestones: tuple[int, ...] = (450_000,)  # steps after which the rate falls to a tenth
    pull: float = 0.1
    push: float = 0.1
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = False
    top_k: int = 70
    test_scales: tuple[float, ...] = (1.0,)
    test_flip: bool = True
    test_batch: int = 1  # images of one size that are tested together
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 5000  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if min(self.steps, self.batch_size, self.test_batch, self.log_every, self.save_every, self.top_k) < 1:
            raise ValueError("steps, batch_size, test_batch, log_every, save_every and top_k must be at least 1")
        if not self.scales or min(self.scales) <= 0 or self.border < 0:
            raise ValueError(
                f"scales {list(self.scales)} and border {self.border}: expected positive ones, and 0 or more"
            )
        if not 0 < self.radius_overlap < 1:
            raise ValueError(f"radius_overlap is {self.radius_overlap}; expected between 0 and 1")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m >= self.steps for m in self.milestones):
            raise ValueError(f"milestones are rising steps below {self.steps}; they are {list(self.milestones)}")
        self.settings()  # checks the test's own keys

    def settings(self) -> Settings:
        return Settings(top_k=self.top_k, flip=self.test_flip, scales=self.test_scales)


def open_set(config: Config, job: Job, train: bool) -> detection.DetectionSet:
    """The split that a config trains or tests on."""
    options = {}
    if config.dataset == detection.SCENES:
        sizes = {"n": config.train_images if train else config.test_images, "size": config.scene_size}
        options = {key: value for key, value in sizes.items() if value} | {"classes": config.scene_classes}
    elif config.train_images or config.test_images or config.scene_size:
        raise UserError(
            f"train_images, test_images and scene_size are of {detection.SCENES}; {config.dataset} has its own"
        )
    split = config.train_split if train else config.test_split
    return detection.load(config.dataset, split, job.data, config.longest_side, cache=config.cache and train, **options)


def build(config: Config, classes: int) -> CenterNet:
    """The network of a config; UserError where its numbers do not fit each other."""
    try:
        model = CenterNet(
            classes, config.dims, config.modules, config.stacks, config.corner, config.center, config.recompute
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if (config.side + 1) % model.multiple:
        near = (config.side + 1) // model.multiple * model.multiple
        raise UserError(
            f"side is {config.side}; a network of depth {len(config.dims) - 1} takes multiples of {model.multiple} less "
            f"one; the nearest are {max(near, model.multiple) - 1} and {near + model.multiple - 1}"
        )
    return model


def on_device(batch: dict[str, Tensor], device: torch.device, k: int, classes: int, config: Config):
    """(images, targets) of a batch of crops: only as many object slots as its fullest image needs."""
    most = max(1, int(batch["count"].max()))  # on the CPU still: no wait
    batch = batch | {"boxes": batch["boxes"][:, :most], "labels": batch["labels"][:, :most]}
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    cells = (config.side + 1) // STRIDE
    wanted = render_targets(
        batch["boxes"],
        batch["labels"],
        batch["count"],
        classes,
        k,
        (cells, cells),
        config.radius_overlap,
        config.proper_radius,
    )
    return coloured(batch["image"], batch["colour"]), wanted


def learning_rate(config: Config, step: int) -> float:
    return config.lr * 0.1 ** sum(step >= milestone for milestone in config.milestones)


def run(config: Config, job: Job) -> Measured:
    """Train for `steps`; returns the metrics of the weights after the last one, and the curve of the losses."""
    runtime.seed_everything(job.seed, job.deterministic)
    batch = per_rank(config.batch_size, job.world)
    data, tests = open_set(config, job, train=True), open_set(config, job, train=False)
    if data.classes != tests.classes:
        raise UserError(f"{data.name}: {data.split} and {tests.split} have different classes; expected the same")
    classes = len(data.classes)
    model = build(config, classes).to(job.device).train()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(memory_format=memory_format)
    k = len(model.stacks[-1].keypoints)
    crops = Crops(data, config.side, config.scales, config.border, config.flip, config.colour)
    optimiser = torch.optim.Adam(model.parameters(), config.lr, fused=True)
    forward = DistributedDataParallel(model) if job.world.size > 1 else model
    identity = {"script": SCRIPT, "seed": job.seed, "classes": list(data.classes), **dataclasses.asdict(config)}
    progress = Progress(job, identity, model=model, optimiser=optimiser)
    per_epoch = len(data) // job.world.size // batch
    if not per_epoch:
        raise UserError(f"batch_size {config.batch_size} exceeds the {len(data)} images of {data.name}; lower it")
    unreadable = 0
    stop = runtime.StopFlag(job.world)

    while progress.step < config.steps:
        epoch, start = divmod(progress.step, per_epoch)
        order = (job.seed, epoch, config.workers, start)
        loader = folder_loader(crops, batch, *order, rank=job.world.rank, world=job.world.size)
        until = min(per_epoch - start, config.steps - progress.step)
        # islice does not read the loader beyond the last step
        for sample in tqdm(islice(loader, until), f"train {epoch}", until, leave=False, disable=None):
            lr = learning_rate(config, progress.step)
            for group in optimiser.param_groups:
                group["lr"] = lr
            unreadable += int(sample["unreadable"].sum())
            images, wanted = on_device(sample, job.device, k, classes, config)
            images = images.contiguous(memory_format=memory_format)
            with torch.autocast(job.device.type, torch.bfloat16, enabled=config.amp):
                outputs = forward(images, wanted.cells)
            losses = detection_loss(outputs, wanted, config.pull, config.push)
            optimiser.zero_grad()
            losses.total.backward()
            optimiser.step()
            progress.loss_sum += losses.total.detach()
            progress.step += 1
            if progress.step % config.log_every == 0:
                runtime.require_finite(losses.total, progress.step, lr)
            if progress.step % per_epoch == 0 or progress.step == config.steps:
                number = (progress.step - 1) % per_epoch + 1
                mean = runtime.require_finite(progress.loss_sum / number, progress.step, lr)
                line = {"epoch": epoch, "step": progress.step, "lr": lr, "train_loss": round(mean, 5)}
                parts = {name: round(float(part.detach()), 5) for name, part in losses._asdict().items()}
                progress.log(f"train step {progress.step}/{config.steps}", **line, **parts)  # parts: of the last batch
                progress.save(lr)
            elif progress.step % config.save_every == 0:
                progress.save(lr)
            if stop.at(progress.step):
                progress.save(lr)
                raise runtime.Stopped(f"training at step {progress.step} of {config.steps}")

    if unreadable:
        print(f"{unreadable} times an image did not open and another took its place", flush=True)
    seconds = progress.seconds
    runtime.broadcast_from_main(model.buffers())
    metrics, artifacts = measured(model, tests, config.settings(), config.test_batch, job.world, config.amp)
    metrics |= {
        "train_seconds": metric(round(seconds, 2)),
        "images_per_second": metric(round(progress.step * config.batch_size / seconds, 2)),
        "unreadable": metric(unreadable),
    }
    return Measured(
        metrics=metrics,
        config=dataclasses.asdict(config),
        scale={"steps": progress.step, "batch": config.batch_size},
        data={f"{one.name}/{one.split}": one.digest for one in (data, tests)},
        numerics={"amp": config.amp, "channels_last": config.channels_last},
        curve=progress.curve,
        artifacts=artifacts,
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
