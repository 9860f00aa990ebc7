"""Stage 2: on the trained network of stage 1, new exits that use the exit before (ISC) and learn from the last (OFA).

    python -m papers.msdnet_training.finetune --tier full --set checkpoint=runs/msdnet_training/train-full-s0

The backbone is frozen; its own last exit is the teacher. `collaboration=false` and `gamma=0` take one of the two away.
Ends with the accuracy of every exit. Official file main_IMTA.py.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import cli, runtime
from common.checkpoints import Progress, read_checkpoint
from common.cli import Job, config_of
from common.datasets.classification import part
from common.results.records import Measured, metric

from . import train
from .collaboration import IMTA, CollaborativeHeads, LinearHeads
from .distillation import one_for_all_loss

SCRIPT = "msdnet_training.finetune"


@dataclass
class Config:
    checkpoint: str = ""  # a checkpoint of train.py, or its work dir (the newest one there)
    collaboration: bool = True  # ISC: exit i + 1 also sees the prediction of exit i
    detach: bool = True  # no gradient along that path, as the paper says; false: the official code
    freeze_norm: bool = True  # batch norm of the frozen backbone rests too; false: the official code, where it drifts
    gamma: float = 0.1  # OFA: share of the distillation loss; 0: none
    temperature: float = 1.0
    kl: Literal["batchmean", "mean"] = "batchmean"  # mean: the official code, which also divides by the classes
    epochs: int = 300
    lr: float = 0.1
    milestones: tuple[int, ...] = (150, 225)  # epochs at whose start the rate falls to a tenth
    test_every: int = 0  # epochs between looks at the test set, for the curve; 0: only at the end
    log_every: int = 20  # steps between looks at the loss (each waits for the device)
    save_every: int = 500  # steps between checkpoints, besides one an epoch

    def __post_init__(self):
        if self.epochs < 1 or self.log_every < 1 or self.save_every < 1:
            raise ValueError("epochs, log_every and save_every must be at least 1")
        if not 0 <= self.gamma <= 1 or self.temperature <= 0:
            raise ValueError(f"gamma is {self.gamma} and temperature {self.temperature}; expected 0..1 and above 0")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m >= self.epochs for m in self.milestones):
            raise ValueError(f"milestones are rising epochs below {self.epochs}; they are {list(self.milestones)}")


def build(config: Config, settings: train.Config, classes: int) -> IMTA:
    """The network of this stage, around an untrained backbone."""
    backbone = train.build(settings, classes)
    if config.collaboration:
        heads = CollaborativeHeads(backbone.feature_dims, classes, config.detach)
    else:
        heads = LinearHeads(backbone.feature_dims, classes)
    return IMTA(backbone, heads, freeze_norm=config.freeze_norm)


def run(config: Config, job: Job) -> Measured:
    """Train the new exits; returns the accuracy of each on the test split after the last epoch, and the curve."""
    runtime.seed_everything(job.seed, job.deterministic)
    payload = read_checkpoint(config.checkpoint, train.SCRIPT)
    settings, classes = config_of(train.Config, payload["identity"], config.checkpoint), payload["identity"]["classes"]
    data, tests = (part(settings, job, which) for which in ("train", "test"))
    data.require_classes(classes)
    model = build(config, settings, classes)
    model.backbone.load_state_dict(payload["state"]["parts"]["model"])
    # The backbone itself, not the name of its file, is what a resume must agree on.
    identity = {"script": SCRIPT, "seed": job.seed, **dataclasses.asdict(config), "checkpoint": ""}
    identity |= {"backbone": runtime.weights_sha256(model.backbone), "classes": classes}
    identity |= {"trained": dataclasses.asdict(settings)}
    model = model.to(job.device).train()
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    momentum, decay = settings.momentum, settings.weight_decay
    optimiser = torch.optim.SGD(model.heads.parameters(), config.lr, momentum, weight_decay=decay, fused=True)
    heads = DistributedDataParallel(model.heads) if job.world.size > 1 else model.heads

    progress = Progress(job, identity, model=model, optimiser=optimiser)
    per_epoch = len(data.loader)
    stop = runtime.StopFlag(job.world)

    for epoch in range(progress.step // per_epoch, config.epochs):
        lr = train.learning_rate(config, epoch)
        for group in optimiser.param_groups:
            group["lr"] = lr
        start = progress.step % per_epoch
        batches = data.loader.epoch(epoch, start)
        for x, y in tqdm(batches, f"finetune {epoch}", per_epoch - start, leave=False, disable=None):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=settings.amp):
                with torch.no_grad():
                    features = model.backbone.features(x)
                    teacher = model.teacher_logits(features)
                loss = one_for_all_loss(heads(features), teacher, y, config.gamma, config.temperature, config.kl)
            optimiser.zero_grad()
            loss.backward()
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
                    line |= train.exit_accuracies(settings, model, tests.loader, job.world)
                progress.log(f"finetune epoch {epoch + 1}/{config.epochs}", **line)
                progress.save(lr)
            elif progress.step % config.save_every == 0:
                progress.save(lr)
            if stop.at(progress.step):
                progress.save(lr)
                raise runtime.Stopped(f"fine-tuning at step {progress.step} of {per_epoch * config.epochs}")

    metrics = train.exit_metrics(progress.curve[-1], tests.samples)
    return Measured(
        metrics=metrics | {"finetune_seconds": metric(round(progress.seconds, 2))},
        config=dataclasses.asdict(config) | {"trained": dataclasses.asdict(settings)},
        scale={"epochs": config.epochs, "steps": progress.step, "batch": settings.batch_size},
        data=data.digests | tests.digests,
        numerics={"amp": settings.amp, "channels_last": settings.channels_last},
        curve=progress.curve,
        weights_sha256=runtime.weights_sha256(model),
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
