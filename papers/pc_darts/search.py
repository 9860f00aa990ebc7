"""Search a cell: bi-level, first order. Weights learn on one half of the training set, {alpha, beta} on the other.

    python -m papers.pc_darts.search --tier quick --seed 0
    torchrun --nproc-per-node 4 -m papers.pc_darts.search --tier full --config full-imagenet

Ends with `genotype.json` in the work dir. Paper section 4.2; official files train_search.py, architect.py.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress, write_atomic
from common.cli import Job
from common.metrics.accuracy import accuracies, evaluating
from common.results.records import Measured

from .data import search_loaders
from .schedule import learning_rate
from .supernet import SuperNet

SCRIPT = "pc_darts.search"


@dataclass
class Config:
    dataset: str = "cifar10"  # any set of common.datasets, or imagenet
    train_images: int = 0  # the first n of the training set; 0: all
    image_size: int = 0  # 0: as it is; smaller: averaged down (cluttered_digits: drawn at this size)
    fractions: tuple[float, float] = (0.1, 0.025)  # imagenet: of every class, for weights and for the architecture
    workers: int = 4  # imagenet: loader processes a rank
    crop_pad: int = 4
    flip: bool = True
    C: int = 16  # initial channels
    layers: int = 8
    K: int = 4  # 1/K of the channels pass through the operations; 1: all, as in DARTS
    edge_norm: bool = True  # beta; off together with K=1: DARTS
    cell: Literal["shared", "plain"] = "shared"  # the fast cell, or the definition
    epochs: int = 50
    arch_start: int = 15  # epochs before {alpha, beta} are touched
    batch_size: int = 256  # over all ranks
    lr: float = 0.1
    lr_min: float = 0.0
    lr_warmup: int = 0  # epochs of linear warm-up
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0  # norm of the weights' gradient
    arch_lr: float = 6e-4
    arch_betas: tuple[float, float] = (0.5, 0.999)
    arch_weight_decay: float = 1e-3
    arch_clip: float = 0.0  # norm of the architecture's gradient; 0: not clipped
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = False
    compile: Literal["off", "default", "reduce-overhead"] = "off"  # reduce-overhead: CUDA graphs
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1 or self.log_every < 1 or self.save_every < 1:
            raise ValueError("epochs, batch_size, log_every and save_every must be at least 1")
        if not 0 <= self.arch_start <= self.epochs:
            raise ValueError(f"arch_start must lie in 0..epochs ({self.epochs})")
        if self.K < 1 or self.C % self.K:
            raise ValueError(f"K must divide C ({self.C}), as C/K channels pass through the operations; K is {self.K}")


def build(config: Config, classes: int) -> SuperNet:
    stem = "imagenet" if config.dataset == "imagenet" else "cifar"
    return SuperNet(config.C, classes, config.layers, config.K, stem, config.edge_norm, config.cell)


def optimisers(config: Config, model: SuperNet):
    """SGD for the weights, Adam for {alpha, beta}, which the first never sees."""
    weights = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True
    )
    arch = torch.optim.Adam(
        model.arch_parameters(), config.arch_lr, config.arch_betas, weight_decay=config.arch_weight_decay
    )
    return weights, arch


def architecture_step(config, forward, arch, optimiser, x, y) -> torch.Tensor:
    """One Adam step of {alpha, beta} at the current weights (first order). No gradient is made for the weights."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
        loss = F.cross_entropy(forward(x), y)
    gradients = torch.autograd.grad(loss, arch)
    runtime.average_gradients(gradients)
    for parameter, gradient in zip(arch, gradients, strict=True):
        parameter.grad = gradient
    if config.arch_clip:
        torch.nn.utils.clip_grad_norm_(arch, config.arch_clip)
    optimiser.step()
    return loss.detach()


def weight_step(config, forward, weights, optimiser, x, y) -> torch.Tensor:
    """One SGD step of the weights at the current {alpha, beta}."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
        loss = F.cross_entropy(forward(x), y)
    optimiser.zero_grad()
    loss.backward(inputs=weights)
    runtime.average_gradients(p.grad for p in weights)
    torch.nn.utils.clip_grad_norm_(weights, config.clip)
    optimiser.step()
    return loss.detach()


def run(config: Config, job: Job) -> Measured:
    """Search; returns held-out accuracy of the supernet, seconds, and the genotype (also `genotype.json`)."""
    runtime.seed_everything(job.seed, job.deterministic)
    loader, arch_loader, held_out, classes, images, digests = search_loaders(config, job)
    model = build(config, classes).to(job.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    weights, arch = list(model.parameters()), list(model.arch_parameters())
    runtime.broadcast_from_main([*weights, *arch])
    weight_optimiser, arch_optimiser = optimisers(config, model)
    forward = model if config.compile == "off" else torch.compile(model, mode=config.compile)

    identity = {"script": SCRIPT, "seed": job.seed, **dataclasses.asdict(config)}
    progress = Progress(job, identity, model=model, weights=weight_optimiser, arch=arch_optimiser)
    per_epoch = min(len(loader), len(arch_loader))
    stop = runtime.StopFlag(job.world)

    for epoch in range(progress.step // per_epoch, config.epochs):
        lr = learning_rate(config, epoch)
        for group in weight_optimiser.param_groups:
            group["lr"] = lr
        searching, start = epoch >= config.arch_start, progress.step % per_epoch
        batches = zip(loader.epoch(epoch, start), arch_loader.epoch(epoch, start), strict=False)
        for (x, y), (x_arch, y_arch) in tqdm(batches, f"search {epoch}", per_epoch - start, leave=False, disable=None):
            if searching:
                architecture_step(config, forward, arch, arch_optimiser, x_arch, y_arch)
            loss = weight_step(config, forward, weights, weight_optimiser, x, y)
            progress.loss_sum += loss
            progress.step += 1
            if progress.step % config.log_every == 0:
                runtime.require_finite(loss, progress.step, lr)
            if progress.step % per_epoch == 0:
                mean = runtime.require_finite(progress.loss_sum / per_epoch, progress.step, lr)
                progress.log(f"search epoch {epoch + 1}/{config.epochs}", epoch=epoch, lr=lr, train_loss=round(mean, 5))
                progress.save(lr)
            elif progress.step % config.save_every == 0:
                progress.save(lr)
            if stop.at(progress.step):
                progress.save(lr)
                raise runtime.Stopped(f"search at step {progress.step} of {per_epoch * config.epochs}")

    seconds, genotype = progress.seconds, model.genotype()
    with evaluating(model, config.amp):
        accuracy = accuracies(((model(x), y) for x, y in held_out.epoch(0)), job.world).item()
    if job.world.is_main:
        write_atomic(job.work_dir / "genotype.json", lambda file: file.write(genotype.to_json().encode()))
    return Measured.of(
        {
            "held_out_accuracy": accuracy,
            "search_seconds": round(seconds, 2),
            "gpu_days": seconds / 86400 * job.world.size,
        },
        config=dataclasses.asdict(config),
        scale={"epochs": config.epochs, "steps": progress.step, "batch": config.batch_size, "images": images},
        data=digests,
        numerics={"amp": config.amp, "compile": config.compile, "channels_last": config.channels_last},
        curve=progress.curve,
        artifacts={"genotype": genotype._asdict(), "alphas_betas": [p.detach().cpu().tolist() for p in arch]},
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
