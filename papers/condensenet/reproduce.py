"""Which experiment measures which claim of paper.yaml.

python -m papers.condensenet.reproduce --tier quick
"""

import statistics
from collections.abc import Callable

import torch
from torch import nn

from common.cli import Job
from common.metrics.compute import mult_adds, parameters
from common.results.records import Measured, metric
from common.results.reproduce import Experiment, main
from common.results.stages import gpu_tests, one_record, run_stage, share_of, tier_config

from . import train
from .bench import speed_bench
from .conversion import condense, condensed_like
from .cost import authors_mult_adds, counted_parameters
from .kernels.bench import SHAPES, kernel_bench
from .model import CondenseNet, condensenet, condensenet_imagenet, condensenet_light, densenet_bc

IMAGES_SEEN = {"cifar10": 300 * 50_000, "cifar100": 300 * 50_000, "cluttered_digits": 300 * 50_000,
               "imagenet": 120 * 1_281_167}  # fmt: skip


# ------------------------------------------------------------------------------------------------ costs and properties
def costs(tier: str, job: Job) -> Measured:
    """Everything that needs no training: counts of every network, conversion, densities."""
    found = {}
    with torch.device("meta"):
        for depth in (50, 74, 86, 98, 110, 122, 182):
            model = condensenet(depth)
            found[f"c{depth}_training_params"] = parameters(model)
            found |= as_the_authors_count(f"c{depth}", model, 32)
        networks = {
            "c86": (condensenet(86), 32),
            "c86_c100": (condensenet(86, classes=100), 32),
            "i4": (condensenet_imagenet(4), 224),
            "i8": (condensenet_imagenet(8), 224),
        }
        for name, (model, size) in networks.items():
            image, condensed = torch.empty(1, 3, size, size), condensed_like(model)
            found |= as_the_authors_count(f"{name}_condensed", condensed, size)
            found[f"{name}_training_params"], found[f"{name}_condensed_params"] = map(parameters, (model, condensed))
            found[f"{name}_condensed_mparams"] = parameters(condensed) / 1e6
            found[f"{name}_dense_mmacs"] = mult_adds(model, image) / 1e6
            found[f"{name}_condensed_mmacs"] = mult_adds(condensed, image) / 1e6
        baselines = {
            "light94": condensenet_light(94, 16),
            "light160": condensenet_light(160, 32),
            "d100": densenet_bc(100, 12),
            "d190": densenet_bc(190, 40),
        }
        for name, model in baselines.items():
            found |= as_the_authors_count(name, model, 32)
            found[f"{name}_params"], found[f"{name}_mparams"] = parameters(model), parameters(model) / 1e6
    found["conversion_difference"] = conversion_difference(torch.float32)
    found["conversion_difference_float64"] = conversion_difference(torch.float64)
    found["largest_density_error"] = max(density_error(steps) for steps in (6, 7, 10, 100))
    return Measured.of(found)


def as_the_authors_count(name: str, model: CondenseNet, size: int) -> dict[str, float]:
    found = {f"{name}_paper_mmacs": authors_mult_adds(model, size) / 1e6}
    return found | {f"{name}_paper_mparams": counted_parameters(model) / 1e6}


@torch.no_grad()
def conversion_difference(dtype: torch.dtype) -> float:
    """Largest difference of the pooled features, relative to the largest, over four (G, C); weights and norms random."""
    worst = 0.0
    for groups, factor in ((4, 4), (4, 2), (4, 8), (8, 4)):
        torch.manual_seed(0)
        model = condensenet(86, groups=groups, condense_factor=factor).to(dtype).eval()
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        model.prune(0.5)
        images = torch.randn(2, 3, 32, 32, dtype=dtype)
        expected, found = model.features(images), condense(model).features(images)
        worst = max(worst, ((expected - found).abs().max() / expected.abs().max()).item())
    return worst


def density_error(steps: int) -> float:
    """Largest |density - 1/C| of any group of any layer after a schedule of so many steps (6: two stages at once)."""
    torch.manual_seed(0)
    model = CondenseNet((2, 2, 2))
    for step in range(steps):
        if steps != 6 or step not in (1, 2):
            model.prune(step / steps)
    return max((layer.kept().mean(1) - 1 / layer.condense_factor).abs().max().item() for layer in model.learned())


# ------------------------------------------------------------------------------------------------ speed
def speed(tier: str, job: Job) -> Measured:
    """CondenseNet-86: relative times at batch 64 and 1, the better dense layout being 1; rows take turns."""
    found, tables = {}, {}
    for batch in (64, 1):
        rows = tables[f"batch_{batch}"] = speed_bench(batch, rounds=5, device=job.device.type)
        for row, r in rows.items():
            found[f"{row}_b{batch}_time"] = 1 / r["speedup"]
            found[f"{row}_b{batch}_speedup"], found[f"{row}_b{batch}_theory"] = r["speedup"], r["theory"]
            found[f"{row}_b{batch}_ms"] = r["ms"]
        for row in ("dense", "layers"):
            found[f"{row}_b{batch}_time"] = min(found[f"{row}_b{batch}_time"], found[f"{row}_last_b{batch}_time"])
    settings = {"depth": 86, "batches": [64, 1], "size": 32, "threads": torch.get_num_threads()}
    return Measured.of(found, config=settings, artifacts=tables)


def kernels(tier: str, job: Job) -> Measured:
    """The Triton kernel against copying, the eager definition and its torch.compile: the last layers of block 3, NCHW."""
    rows = kernel_bench(job.device.type)
    mine = [row for row in rows if row["shape"] == SHAPES[2] and row["layout"] == "nchw"]
    found = {f"{row['impl']}_{row['dtype']}_ms": row["ms"] for row in mine}
    found |= {f"{row['impl']}_{row['dtype']}_gb_per_s": row["gb_per_s"] for row in mine}
    found["copy_gb_per_s"] = mine[0]["gb_per_s"] / mine[0]["of_copy"]
    return Measured.of(found, artifacts={"rows": rows})


# ------------------------------------------------------------------------------------------------ trainings
def recorded(metrics: dict[str, dict], stages: dict[str, Measured], main: str) -> Measured:
    whole = stages[main]
    return one_record(metrics, stages, main, share_of(IMAGES_SEEN[whole.config["dataset"]], whole))


def arms(tier: str, job: Job) -> Measured:
    """Learned, static and random groups at equal mult-adds, and the dense network: same schedule and data order."""
    stages, metrics = {}, {}
    for arm in ("learned", "static", "random", "dense"):
        stages[arm] = run_stage(train, tier_config(tier, job), job, arm, conv=arm)
        metrics |= {f"{arm}_{name}": value for name, value in stages[arm].metrics.items()}
    for arm in ("learned", "random"):
        jumps = [line for line in stages[arm].curve if "loss_after" in line]
        prefix = "" if arm == "learned" else "random_"
        for when in ("before", "after"):
            metrics[f"{prefix}loss_{when}_pruning"] = metric(statistics.fmean(line[f"loss_{when}"] for line in jumps))
    return recorded(metrics, stages, "learned")


def train_only(config: str = "full", **overrides) -> Callable[[str, Job], Measured]:
    def measure(tier: str, job: Job) -> Measured:
        found = run_stage(train, config, job, "train", **overrides)
        return recorded(found.metrics, {"train": found}, "train")

    return measure


C10, C100, IMAGENET = ({"full": (name,)} for name in ("cifar10", "cifar100", "imagenet"))
EXPERIMENTS = {
    "costs": Experiment(costs, ("quick",)),
    "speed": Experiment(speed, ("quick",)),
    "kernels": Experiment(kernels, ("quick",)),
    "gpu-tests": Experiment(lambda tier, job: gpu_tests(__file__), ("quick",)),
    "arms": Experiment(arms, ("quick",)),
    "c10-arms": Experiment(arms, ("short",), {"short": ("cifar10",)}),
    **{
        f"c10-{depth}": Experiment(train_only(blocks=((depth - 2) // 6,) * 3), ("full",), C10)
        for depth in (50, 74, 86, 98, 110, 122)
    },
    "c100-86": Experiment(train_only(dataset="cifar100"), ("full",), C100),
    "c10-182": Experiment(train_only("full-182"), ("full",), C10),
    "c100-182": Experiment(train_only("full-182", dataset="cifar100"), ("full",), C100),
    "c100-182-no-dropout": Experiment(train_only("full-182", dataset="cifar100", dropout=0.0), ("full",), C100),
    "c10-light94": Experiment(train_only("full-light"), ("full",), C10),
    "c100-light94": Experiment(train_only("full-light", dataset="cifar100"), ("full",), C100),
    "c10-light160": Experiment(train_only("full-light160"), ("full",), C10),
    "c100-light160": Experiment(train_only("full-light160", dataset="cifar100"), ("full",), C100),
    "imagenet-g4": Experiment(train_only("full-imagenet"), ("full",), IMAGENET),
    "imagenet-g8": Experiment(
        train_only("full-imagenet", groups=8, condense_factor=8, groups_3x3=8), ("full",), IMAGENET
    ),
}

if __name__ == "__main__":
    main(EXPERIMENTS, __file__)
