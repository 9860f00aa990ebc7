"""Train an evaluation network: a genotype, stacked, from scratch on the whole training set.

    python -m papers.pc_darts.train --tier full --set genotype=PC_DARTS_cifar
    python -m papers.pc_darts.train --tier full --set genotype=runs/pc_darts/search-full-s0/genotype.json
    torchrun --nproc-per-node 8 -m papers.pc_darts.train --tier full --config full-imagenet

Cutout, auxiliary head, drop-path. Ends with the test error of the last epoch. Official files train.py, train_imagenet.py.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress
from common.cli import Job
from common.datasets.classification import part
from common.errors import UserError
from common.metrics.accuracy import accuracies, evaluating
from common.results.records import Measured, metric

from .genotypes import PUBLISHED, Genotype, random_genotype
from .model import NetworkCIFAR, NetworkImageNet
from .schedule import learning_rate

SCRIPT = "pc_darts.train"


@dataclass
class Config:
    genotype: str = "PC_DARTS_cifar"  # a published name, a JSON file of search.py, or random:<seed>
    dataset: str = "cifar10"  # any set of common.datasets, or imagenet
    train_images: int = 0  # the first n of the split; 0: all
    test_images: int = 0
    held_out: int = 0  # training images that are not trained on
    image_size: int = 0  # 0: as it is; smaller: averaged down (cluttered_digits: drawn at this size)
    workers: int = 4  # imagenet: loader processes a rank
    crop_pad: int = 4
    flip: bool = True
    cutout: int = 16  # side of the square; 0: none
    colour_jitter: bool = True  # imagenet alone
    C: int = 36
    layers: int = 20
    auxiliary: float = 0.4  # weight of the auxiliary head's loss; 0: no head (it needs 32x32 images, or 224x224)
    drop_path: float = 0.3  # reached linearly at the end
    label_smoothing: float = 0.0
    epochs: int = 600
    batch_size: int = 96  # over all ranks
    schedule: Literal["cosine", "linear"] = "cosine"
    lr: float = 0.025
    lr_min: float = 0.0
    lr_warmup: int = 0  # epochs of linear warm-up
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = True
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    test_every: int = 0  # epochs between looks at the test set, for the curve; 0: only at the end
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1 or self.log_every < 1 or self.save_every < 1:
            raise ValueError("epochs, batch_size, log_every and save_every must be at least 1")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is a probability below 1; it is {self.drop_path}")


def find_genotype(name: str) -> Genotype:
    if name in PUBLISHED:
        return PUBLISHED[name]
    if name.startswith("random:") and name.removeprefix("random:").isdigit():
        return random_genotype(runtime.keyed_generator(int(name.removeprefix("random:")), "genotype"))
    path = Path(name)
    if not path.is_file():
        raise UserError(f"no genotype {name!r}; expected one of {', '.join(PUBLISHED)}, random:<seed>, or a JSON file")
    try:
        return Genotype.from_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def build(config: Config, genotype: Genotype, classes: int):
    network = NetworkImageNet if config.dataset == "imagenet" else NetworkCIFAR
    return network(genotype, config.C, classes, config.layers, config.auxiliary > 0)


def error_rates(config, model, loader, world) -> list[float]:
    """Top-1 and top-5 error in percent over all ranks."""
    with evaluating(model, config.amp):
        return (100 - accuracies(((model(x)[0], y) for x, y in loader.epoch(0)), world, (1, 5))).tolist()


def run(config: Config, job: Job) -> Measured:
    """Train; returns test error (last, and best over the looked-at epochs), and the curve."""
    runtime.seed_everything(job.seed, job.deterministic)
    genotype = find_genotype(config.genotype)
    train, tests = (part(config, job, which) for which in ("train", "test"))
    model = build(config, genotype, train.classes).to(job.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    weights = list(model.parameters())
    optimiser = torch.optim.SGD(weights, config.lr, config.momentum, weight_decay=config.weight_decay, fused=True)
    forward = DistributedDataParallel(model) if job.world.size > 1 else model
    forward = forward if config.compile == "off" else torch.compile(forward, mode=config.compile)

    # The genotype itself, not the name of its file, is what a resume must agree on.
    identity = {"script": SCRIPT, "seed": job.seed, **dataclasses.asdict(config)}
    identity |= {"genotype": genotype.to_json(), "classes": train.classes}
    progress = Progress(job, identity, model=model, optimiser=optimiser)
    per_epoch = len(train.loader)
    stop = runtime.StopFlag(job.world)

    for epoch in range(progress.step // per_epoch, config.epochs):
        lr = learning_rate(config, epoch)
        for group in optimiser.param_groups:
            group["lr"] = lr
        model.drop_path_prob = config.drop_path * epoch / config.epochs
        start = progress.step % per_epoch
        batches = train.loader.epoch(epoch, start)
        for x, y in tqdm(batches, f"train {epoch}", per_epoch - start, leave=False, disable=None):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
                logits, aux_logits = forward(x)
                loss = F.cross_entropy(logits, y, label_smoothing=config.label_smoothing)
                if aux_logits is not None:
                    aux_loss = F.cross_entropy(aux_logits, y, label_smoothing=config.label_smoothing)
                    loss = loss + config.auxiliary * aux_loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, config.clip)
            optimiser.step()
            progress.loss_sum += loss.detach()
            progress.step += 1
            if progress.step % config.log_every == 0:
                runtime.require_finite(loss, progress.step, lr)
            if progress.step % per_epoch == 0:
                line = {"epoch": epoch, "lr": lr}
                line["train_loss"] = round(runtime.require_finite(progress.loss_sum / per_epoch, progress.step, lr), 5)
                if epoch + 1 == config.epochs or (config.test_every and (epoch + 1) % config.test_every == 0):
                    runtime.broadcast_from_main(model.buffers())
                    line["test_error"], line["test_error_top5"] = error_rates(config, model, tests.loader, job.world)
                progress.log(f"train epoch {epoch + 1}/{config.epochs}", **line)
                progress.save(lr)
            elif progress.step % config.save_every == 0:
                progress.save(lr)
            if stop.at(progress.step):
                progress.save(lr)
                raise runtime.Stopped(f"training at step {progress.step} of {per_epoch * config.epochs}")

    looked = [line for line in progress.curve if "test_error" in line]
    return Measured(
        metrics={
            name: {"last": looked[-1][name], "best_test": min(line[name] for line in looked), "n": tests.samples}
            for name in ("test_error", "test_error_top5")
        }
        | {"train_seconds": metric(round(progress.seconds, 2))},
        config=dataclasses.asdict(config),
        scale={"epochs": config.epochs, "steps": progress.step, "batch": config.batch_size},
        data=train.digests | tests.digests,
        numerics={"amp": config.amp, "compile": config.compile, "channels_last": config.channels_last},
        curve=progress.curve,
        artifacts={"genotype": genotype._asdict()},
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
