"""Which experiment measures which claim of paper.yaml.

python -m papers.msdnet_training.reproduce --tier quick
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.cli import Job
from common.datasets.classification import part
from common.metrics.compute import latency, parameters
from common.metrics.early_exit import accuracy_at, confidence, exit_fractions, thresholds
from common.results.records import Measured, metric
from common.results.reproduce import Experiment, main
from common.results.stages import by_stage, one_record, run_stage, share_of, tier_config

from . import evaluate, finetune, train
from .bench import BUDGETS, adaptive_bench
from .collaboration import IMTA, CollaborativeHeads
from .cost import exit_costs
from .distillation import one_for_all_loss, sum_of_cross_entropies
from .engine import CHUNK, AdaptiveEngine
from .model import MSDNet, msdnet_cifar, msdnet_imagenet

IMAGES_SEEN = {"cifar10": 300 * 45_000, "cifar100": 300 * 45_000, "cluttered_digits": 300 * 45_000,
               "imagenet": 90 * 1_231_167}  # fmt: skip


# ------------------------------------------------------------------------------------------------ costs and properties
def costs(tier: str, job: Job) -> Measured:
    """Everything that needs no training: sizes, costs of every exit, gradient scales, loss identities."""
    found = {}
    networks = {
        "imagenet4": (msdnet_imagenet, {"step": 4}, 224),
        "imagenet6": (msdnet_imagenet, {"step": 6}, 224),
        "c100_even7": (msdnet_cifar, {"exits": 7}, 32),
        "c100_lin7": (msdnet_cifar, {"exits": 7, "step_mode": "lin_grow"}, 32),
        "c100_lin5": (msdnet_cifar, {"exits": 5, "step_mode": "lin_grow"}, 32),
        "c10_even5": (msdnet_cifar, {"exits": 5, "classes": 10}, 32),
    }
    for name, (build, arguments, size) in networks.items():
        with torch.device("meta"):
            model = build(**arguments)
            imta = IMTA(model, CollaborativeHeads(model.feature_dims, model.classes))
        found[f"{name}_params"] = parameters(model)
        found[f"{name}_imta_params"] = parameters(imta)  # with the old linear classifiers: the last one teaches
        for count in ("ops", "mult_adds"):
            for i, cost in enumerate(exit_costs(model, size, count), 1):
                found[f"{name}_exit{i}_m{count}"] = cost / 1e6
    found |= gradient_properties() | loss_properties()
    return Measured.of(found)


def block_gradients(model: MSDNet, x, y, losses: list[int] | None = None) -> list[torch.Tensor]:
    """The gradient of the sum of the chosen exits' losses (default: all) for each block, flat; None entries are 0."""
    logits = model(x)
    chosen = range(len(logits)) if losses is None else losses
    loss = sum_of_cross_entropies([logits[i] for i in chosen], y)
    groups = [list(block.parameters()) for block in model.blocks]
    flat = torch.autograd.grad(loss, [p for group in groups for p in group], allow_unused=True, materialize_grads=True)
    flat = iter(flat)
    return [torch.cat([next(flat).flatten() for _ in group]) for group in groups]


def gradient_properties() -> dict[str, float]:
    """GE against its definition, the mean over the exits above, on the 3-scale five-exit CIFAR-10 network, float64."""
    torch.manual_seed(0)
    model = msdnet_cifar(exits=5, classes=10).double()
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.double), torch.randint(10, (4,))
    each, found = [block_gradients(model, x, y, [j]) for j in range(5)], {}
    plain = block_gradients(model, x, y)
    for mode in ("all", "last"):
        model.equilibrium = mode
        scaled = block_gradients(model, x, y)
        for i in range(5):
            mean = sum(each[j][i] for j in range(i, 5)) / (5 - i)
            found[f"ge_{mode}_block{i + 1}_distance"] = ((scaled[i] - mean).norm() / mean.norm()).item()
        found[f"ge_{mode}_distance"] = max(found[f"ge_{mode}_block{i}_distance"] for i in range(1, 6))
        found[f"ge_{mode}_over_sum"] = (scaled[0].norm() / plain[0].norm()).item()
    model.equilibrium = None
    heads = [p for exit in model.exits for p in exit.linear.parameters()]
    gradients, outputs = [], []
    for mode in (None, "all"):
        model.equilibrium = mode
        logits = model(x)
        outputs.append(torch.stack(logits))
        gradients.append(torch.autograd.grad(sum_of_cross_entropies(logits, y), heads))
    found["ge_classifier_difference"] = max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))
    found["ge_forward_difference"] = (outputs[0] - outputs[1]).abs().max().item()
    return found


def loss_properties() -> dict[str, float]:
    """Identities of OFA and of the second stage."""
    torch.manual_seed(0)
    logits, labels = [torch.randn(8, 100, dtype=torch.double) for _ in range(5)], torch.randint(100, (8,))
    teacher = torch.randn(8, 100, dtype=torch.double)

    def distilled(gamma, reduction):
        return one_for_all_loss(logits, teacher, labels, gamma, 1.0, reduction)

    plain = sum_of_cross_entropies(logits, labels)
    rest = F.cross_entropy(logits[-1], labels) + 0.5 * sum(F.cross_entropy(p, labels) for p in logits[:-1])
    share = (distilled(0.5, "mean") - rest) / (distilled(0.5, "batchmean") - rest)
    found = {"ofa_gamma0_difference": (distilled(0.0, "batchmean") - plain).abs().item(), "kl_mean_share": share.item()}
    for freeze_norm in (True, False):
        backbone = msdnet_cifar(exits=5, classes=10)
        model = IMTA(backbone, CollaborativeHeads(backbone.feature_dims, 10), freeze_norm=freeze_norm).train()
        before = [b.clone() for b in backbone.buffers()]
        model(torch.randn(4, 3, 32, 32))
        moved = sum(not torch.equal(a, b) for a, b in zip(before, backbone.buffers(), strict=True) if a.ndim)
        found[f"buffers_moved_{'frozen' if freeze_norm else 'official'}"] = moved
    return found


def mechanism(tier: str, job: Job) -> Measured:
    """Norm of the first block's gradient against the number of exits, untrained networks, with the sum and with GE."""
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    found, exits = {}, (2, 4, 6, 8)
    for k in exits:
        for mode in (None, "all", "last"):
            torch.manual_seed(job.seed)
            sizes = {"exits": k, "base": 2, "step": 1, "channels": 8, "growth": 4, "classes": 10}
            model = msdnet_cifar(**sizes, equilibrium=mode)
            found[f"{mode or 'sum'}_k{k}_norm"] = block_gradients(model, x, y)[0].norm().item()
    for mode in ("sum", "all", "last"):
        found[f"{mode}_growth"] = found[f"{mode}_k8_norm"] / found[f"{mode}_k2_norm"]
    return Measured.of(found, config={"exits": exits, "batch": 16})


def exits_that_exit(tier: str, job: Job) -> Measured:
    """Share of the time, and of the multiply-adds, that leaving early saves, at several budgets and batch sizes."""
    found, rows = {}, []
    for batch in (256, 32, 1):
        figures = adaptive_bench(batch, rounds=3, min_run_time=0.5, device=job.device)
        found[f"b{batch}_full_ms"] = 1e3 * figures["full_s"]
        for p in BUDGETS:
            row = {"batch": batch, "p": p, "mult_adds": figures[f"mult_adds_{p:g}"], "time": figures[f"time_{p:g}"]}
            found |= {f"b{batch}_p{p:g}_{name}_saved": 1 - row[name] for name in ("mult_adds", "time")}
            rows.append(row)
    settings = {"network": "CIFAR, 5 exits, lin_grow", "size": 32, "threads": torch.get_num_threads()}
    return Measured.of(found, config=settings, artifacts={"rows": rows})


# ------------------------------------------------------------------------------------------------ trainings
STAGE_1 = {"sum": {"equilibrium": "none"}, "last": {"equilibrium": "last"}, "ge": {"equilibrium": "all"}}
STAGE_2 = {"isc": {"gamma": 0.0}, "ofa": {"collaboration": False}, "imta": {}}


def timed_budgets(checkpoint: str, job: Job, budgets: tuple[float, ...] = (0.3, 0.5, 0.75, 1, 1.5, 2)) -> list[dict]:
    """Budgeted prediction with the engine, in batches of 256 test images: {p, ms an image, accuracy}; in turns."""
    model, settings, _ = evaluate.trained_model(checkpoint)
    held_out, _ = evaluate.all_logits(settings, model.to(job.device), part(settings, job, "held_out").loader)
    batches = list(part(dataclasses.replace(settings, batch_size=256), job, "test").loader.epoch(0))
    chunk = 256 if job.device.type == "cuda" else CHUNK
    engines = {
        p: AdaptiveEngine(model, thresholds(confidence(held_out), exit_fractions(p, model.num_exits)), chunk)
        for p in budgets
    }
    runs = {str(p): lambda engine=engine: [engine(x) for x, _ in batches] for p, engine in engines.items()}
    times = latency(runs, 0.1, 3)
    found, samples = [], sum(len(y) for _, y in batches)
    for p, engine in engines.items():
        right = sum((engine(x)[0].argmax(1) == y).sum().item() for x, y in batches)
        found.append({"p": p, "ms": 1e3 * times[str(p)].median / samples, "accuracy": 100 * right / samples})
    return found


def arms(stage_1: tuple[str, ...], stage_2: tuple[str, ...], config: str | None = None, **overrides) -> Callable:
    """An experiment: the networks of stage 1 with the same weights and data order, then heads on that of `ge`."""

    def measure(tier: str, job: Job) -> Measured:
        name, stages, curves = config or tier_config(tier, job), {}, {}
        for arm in stage_1:
            stages[arm] = run_stage(train, name, job, arm, **STAGE_1[arm], **overrides)
        for arm in stage_2:
            stages[arm] = run_stage(finetune, name, job, arm, **STAGE_2[arm], checkpoint=str(job.work_dir / "ge"))
        metrics = by_stage(stages)
        for arm in stages if job.world.size == 1 else ():  # the budget curve is drawn in one process: evaluate.py
            found = evaluate.run(evaluate.Config(str(job.work_dir / arm)), job.sub(f"{arm}-evaluated"))
            curves[arm] = found.artifacts
            if arm in ("sum", "imta"):
                curves[arm]["timed_budgets"] = timed_budgets(str(job.work_dir / arm), job)
            middle = sum(found.artifacts["exit_mult_adds"][:: len(found.artifacts["exit_mult_adds"]) - 1]) / 2
            at = accuracy_at(found.artifacts["budget_curve"], middle)
            metrics[f"{arm}_budgeted_accuracy"] = metric(at, found.metrics["last_exit_accuracy"]["n"])
        share = share_of(IMAGES_SEEN[stages["ge"].config["dataset"]], stages["ge"])
        return one_record(metrics, stages, stage_2[-1], share, curves)

    return measure


EVERYTHING = (("sum", "last", "ge"), ("isc", "ofa", "imta"))
PAPER = (("sum", "ge"), ("imta",))
EXPERIMENTS = {
    "costs": Experiment(costs, ("quick",)),
    "mechanism": Experiment(mechanism, ("quick",)),
    "exits-that-exit": Experiment(exits_that_exit, ("quick",)),
    "arms": Experiment(arms(("sum", "ge"), ("isc", "ofa", "imta")), ("quick",)),
    "c10-arms": Experiment(arms(*EVERYTHING), ("short",), {"short": ("cifar10",)}),
    "c100": Experiment(arms(*PAPER), ("full",), {"full": ("cifar100",)}),
    "c10": Experiment(arms(*PAPER, dataset="cifar10"), ("full",), {"full": ("cifar10",)}),
    "imagenet": Experiment(arms(*PAPER, config="full-imagenet"), ("full",), {"full": ("imagenet",)}),
}

if __name__ == "__main__":
    main(EXPERIMENTS, __file__)
