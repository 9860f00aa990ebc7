"""Which experiment measures which claim of paper.yaml.

python -m papers.pc_darts.reproduce --tier quick
"""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from common.cli import Job, load_config
from common.metrics.compute import mult_adds, parameters
from common.results.records import Measured
from common.results.reproduce import Experiment, main

from . import search, train
from .bench import median_ratio, saved_mib, saved_table, search_step_bench
from .evaluate import cost
from .genotypes import PUBLISHED, Genotype, space_size
from .kernels.bench import kernel_bench
from .model import AuxiliaryHead, NetworkCIFAR, NetworkImageNet
from .supernet import SuperNet

FOLDER = Path(__file__).parent
IMAGES_SEEN = {
    "cifar10": 600 * 50_000,
    "cluttered_digits": 600 * 50_000,
    "imagenet": 250 * 1_281_167,
}  # paper's training


def metric(value: float) -> dict:
    return {"last": value}


# ------------------------------------------------------------------------------------------------ costs and properties
def costs(tier: str, job: Job) -> Measured:
    """Everything of the card that needs no training: counts, bytes kept for backward, the fast cell's exactness."""
    found = {"space_size": space_size()}
    networks = {
        "cifar_cell_c10": (NetworkCIFAR, 10, "PC_DARTS_cifar", 36, 20, 32),
        "cifar_cell_c100": (NetworkCIFAR, 100, "PC_DARTS_cifar", 36, 20, 32),
        "darts_v1_c10": (NetworkCIFAR, 10, "DARTS_V1", 36, 20, 32),
        "image_cell_imagenet": (NetworkImageNet, 1000, "PC_DARTS_image", 48, 14, 224),
        "cifar_cell_imagenet": (NetworkImageNet, 1000, "PC_DARTS_cifar", 48, 14, 224),
    }
    for name, (network, classes, cell, C, layers, size) in networks.items():
        counted = cost(network, classes, PUBLISHED[cell], C, layers, size)
        found[f"{name}_params"], found[f"{name}_macs"] = counted["parameters"], counted["mult_adds"]
        found[f"{name}_mparams"] = counted["parameters"] / 1e6
        found[f"{name}_paper_mmacs"] = counted["mult_adds_paper"] / 1e6
    found["aux_c10_params"] = parameters(AuxiliaryHead(4 * 4 * 36, 10))
    found["aux_imagenet_params"] = parameters(AuxiliaryHead(4 * 4 * 48, 1000, imagenet=True))
    for K in (1, 2, 4):
        with torch.device("meta"):
            model, image = SuperNet(K=K, cell="plain"), torch.empty(1, 3, 32, 32)
        found[f"supernet_weights_k{K}"] = parameters(model)
        found[f"supernet_macs_k{K}"] = mult_adds(model, image) - model.classifier.weight.numel()
        found[f"saved_plain_k{K}"] = saved_mib(SuperNet(K=K, cell="plain"))
    found["saved_plain_darts"] = saved_mib(SuperNet(K=1, edge_norm=False, cell="plain"))
    found["fits_4gib_at_batch_64"] = int(64 * found["saved_plain_k4"] < 4 * 1024)
    found["shared_plain_difference_float64"] = shared_against_plain(torch.float64, 0)
    found["shared_plain_difference_float32"] = statistics.median(
        shared_against_plain(torch.float32, s) for s in range(5)
    )
    return Measured({name: metric(value) for name, value in found.items()})


def shared_against_plain(dtype: torch.dtype, seed: int) -> float:
    """Largest difference between the fast and the plain cell with the same weights, of logits and of the gradients of
    alphas, betas, images, stem and classifier, each relative to the largest entry of its tensor.
    """
    torch.manual_seed(seed)
    plain, shared = SuperNet(C=8, layers=3, K=4, cell="plain").to(dtype), SuperNet(C=8, layers=3, K=4).to(dtype)
    shared.load_plain(plain)
    images, found = torch.randn(4, 3, 16, 16, dtype=dtype), []
    for model in (plain, shared):
        x = images.clone().requires_grad_()
        logits = model(x)
        leaves = [*model.arch_parameters(), x, *model.stem0.parameters(), *model.classifier.parameters()]
        found.append([logits, *torch.autograd.grad(logits.logsumexp(1).mean(), leaves)])
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*found, strict=True))


def search_step(tier: str, job: Job) -> Measured:
    """Time and memory of a search step: K=1 against K=4, the fast cell against the plain one, interleaved."""
    seconds, saved = search_step_bench(device=job.device), saved_table()
    baseline = seconds["plain_k4"]
    metrics = {f"{name}_saved_mib": metric(value) for name, value in saved.items()}
    for (
        name,
        rounds,
    ) in seconds.items():  # against one baseline a round, so that a ratio of two is one of interleaved runs
        metrics[f"{name}_time"] = metric(1 / median_ratio(baseline, rounds))
        metrics[f"{name}_seconds"] = metric(statistics.median(rounds))
    return Measured(
        metrics,
        config={"C": 16, "layers": 8, "batch": 16, "size": 32},
        artifacts={"seconds": seconds, "kernel": kernel_bench(job.device.type, quick=True)},
    )


# ------------------------------------------------------------------------------------------------ searches and trainings
def config_name(tier: str, job: Job) -> str:
    return "short-cpu" if tier == "short" and job.device.type == "cpu" else tier


def searched(name: str, job: Job, stage: str, **overrides) -> tuple[Measured, str]:
    """(what the search measured, path of its genotype)."""
    here = job.sub(stage)
    found = search.run(load_config(search.Config, FOLDER, name, "search", **overrides), here)
    return found, str(here.work_dir / "genotype.json")


def trained(name: str, job: Job, stage: str, **overrides) -> Measured:
    return train.run(load_config(train.Config, FOLDER, name, "train", **overrides), job.sub(stage))


def merged(metrics: dict[str, float], stages: dict[str, Measured], of: str) -> Measured:
    """One record of several stages; its scale is that of stage `of`, an evaluation training."""
    main_stage, config = stages[of], stages[of].config
    seen = main_stage.scale["steps"] * config["batch_size"]
    return Measured(
        metrics={k: v if isinstance(v, dict) else metric(v) for k, v in metrics.items()},
        config={name: stage.config for name, stage in stages.items()},
        scale={**main_stage.scale, "fraction": min(1.0, seen / (0.99 * IMAGES_SEEN[config["dataset"]]))},
        data={key: digest for stage in stages.values() for key, digest in stage.data.items()},
        numerics=main_stage.numerics,
        curve=[{"stage": name, **line} for name, stage in stages.items() for line in stage.curve],
        artifacts={name: stage.artifacts for name, stage in stages.items()},
        weights_sha256=main_stage.weights_sha256,
    )


def search_vs_random(tier: str, job: Job, randoms: int, k1: bool = False) -> Measured:
    """A K=4 search; its cell and random ones trained alike. With `k1`, also a K=1 search of the same duration: the same
    schedule on so many fewer images.
    """
    name, stages, errors = config_name(tier, job), {}, {}
    stages["search"], path = searched(name, job, "search")
    cells = {"searched": path} | {f"random{i}": f"random:{100 * job.seed + i}" for i in range(randoms)}
    if k1:
        images = round(stages["search"].scale["images"] / k1_over_k4(name, job))
        stages["search_k1"], cells["k1"] = searched(name, job, "search_k1", K=1, train_images=images)
    for arm, genotype in cells.items():
        stages[arm] = trained(name, job, arm, genotype=genotype)
        errors[arm] = stages[arm].metrics["test_error"]["last"]
    metrics = {"searched_test_error": {**stages["searched"].metrics["test_error"]}}
    metrics["random_test_error"] = sum(errors[f"random{i}"] for i in range(randoms)) / randoms
    metrics |= {f"random{i}_test_error": errors[f"random{i}"] for i in range(randoms)}
    metrics |= {"k1_test_error": errors["k1"]} if k1 else {}
    for stage in ("search", "search_k1")[: 1 + k1]:
        metrics[f"{stage}_seconds"] = stages[stage].metrics["search_seconds"]["last"]
    return merged(metrics, stages, "searched")


def k1_over_k4(name: str, job: Job) -> float:
    """How much longer a step of the configured search takes at K=1, from a few steps of each now."""
    settings = load_config(search.Config, FOLDER, name, "search")
    size, batch = settings.image_size or 32, settings.batch_size
    which = (("shared", 4), ("shared", 1))
    seconds = search_step_bench(settings.C, settings.layers, batch, size, device=job.device, which=which)
    return median_ratio(seconds["shared_k1"], seconds["shared_k4"])


def edge_repeat(tier: str, job: Job) -> Measured:
    """How many of the 16 kept edges two searches share that differ in the seed only, with beta and without."""
    name, stages, shared = config_name(tier, job), {}, {}
    for beta in (True, False):
        kept = []
        for seed in (job.seed, job.seed + 100):
            stage = f"{'with' if beta else 'without'}_beta_{seed}"
            stages[stage], path = searched(name, dataclasses.replace(job, seed=seed), stage, edge_norm=beta)
            cell = Genotype.from_json(Path(path).read_text())
            kept.append(
                {(part, i // 2, s) for part in ("normal", "reduce") for i, (_, s) in enumerate(getattr(cell, part))}
            )
        shared[beta] = len(kept[0] & kept[1])
    settings = stages[stage].config
    steps = {"epochs": settings["epochs"], "steps": stages[stage].scale["steps"], "batch": settings["batch_size"]}
    fraction = min(1.0, stages[stage].scale["steps"] * settings["batch_size"] / (0.99 * 50 * 25_000))
    return Measured(
        {"edges_shared_with_beta": metric(shared[True]), "edges_shared_without_beta": metric(shared[False])},
        config={k: s.config for k, s in stages.items()},
        scale={**steps, "fraction": fraction},
        data=stages[stage].data,
        artifacts={k: s.artifacts for k, s in stages.items()},
    )


def search_and_train(search_config: str | None = None, **overrides) -> Callable[[str, Job], Measured]:
    """Search with these settings, then train what was found."""

    def measure(tier: str, job: Job) -> Measured:
        name, stages = config_name(tier, job), {}
        stages["search"], path = searched(search_config or name, job, "search", **overrides)
        stages["train"] = trained(name, job, "train", genotype=path)
        return merged({**stages["train"].metrics, **stages["search"].metrics}, stages, "train")

    return measure


def sampling_rate(tier: str, job: Job) -> Measured:
    """K=4 and K=8, each searched and trained."""
    stages, metrics = {}, {}
    for K in (4, 8):
        stages[f"search{K}"], path = searched(tier, job, f"search{K}", K=K)
        stages[f"train{K}"] = trained(tier, job, f"train{K}", genotype=path)
        metrics[f"k{K}_test_error"] = stages[f"train{K}"].metrics["test_error"]
    return merged(metrics, stages, "train4")


def train_only(config: str | None = None, **overrides) -> Callable[[str, Job], Measured]:
    def measure(tier: str, job: Job) -> Measured:
        found = trained(config or config_name(tier, job), job, "train", **overrides)
        return merged(found.metrics, {"train": found}, "train")

    return measure


def search_only(config: str, **overrides) -> Callable[[str, Job], Measured]:
    return lambda tier, job: searched(config, job, "search", **overrides)[0]


CIFAR = {"short": ("cifar10",), "full": ("cifar10",)}
IMAGENET = {"full": ("imagenet",)}
EXPERIMENTS = {
    "costs": Experiment(costs, ("quick",)),
    "search-step": Experiment(search_step, ("quick",)),
    "search-vs-random": Experiment(lambda tier, job: search_vs_random(tier, job, randoms=1), ("quick",)),
    "c10-short": Experiment(lambda tier, job: search_vs_random(tier, job, randoms=2, k1=True), ("short",), CIFAR),
    "edge-repeat": Experiment(edge_repeat, ("short",), CIFAR),
    "c10-train": Experiment(train_only(genotype="PC_DARTS_cifar"), ("full",), CIFAR),
    "c10-search-train": Experiment(search_and_train(), ("full",), CIFAR),
    "c10-darts": Experiment(search_and_train("full-darts"), ("full",), CIFAR),
    "c10-edge-norm-only": Experiment(search_and_train(K=1), ("full",), CIFAR),
    "c10-partial-only": Experiment(search_and_train(edge_norm=False), ("full",), CIFAR),
    "c10-sampling-rate": Experiment(sampling_rate, ("full",), CIFAR),
    "imagenet-train": Experiment(train_only("full-imagenet"), ("full",), IMAGENET),
    "imagenet-train-cifar-cell": Experiment(
        train_only("full-imagenet", genotype="PC_DARTS_cifar"), ("full",), IMAGENET
    ),
    "imagenet-search": Experiment(search_only("full-imagenet"), ("full",), IMAGENET),
    "imagenet-search-all": Experiment(
        search_only("full-imagenet", fractions=(0.5, 0.5), batch_size=2048), ("full",), IMAGENET
    ),
}

if __name__ == "__main__":
    main(EXPERIMENTS, __file__)
