"""Which experiment measures which claim of paper.yaml.

python -m papers.pc_darts.reproduce --tier quick
"""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from common.checkpoints import write_atomic
from common.cli import Job, load_config
from common.metrics.compute import mult_adds, parameters
from common.results.records import Measured
from common.results.reproduce import Experiment, main
from common.results.stages import gpu_tests, one_record, run_stage, share_of, tier_config
from common.runtime import broadcast_from_main

from . import search, train
from .bench import saved_mib, saved_table, search_step_bench
from .evaluate import cost
from .genotypes import PUBLISHED, Genotype, space_size
from .kernels.bench import SHAPES, kernel_bench
from .model import AuxiliaryHead, NetworkCIFAR, NetworkImageNet
from .supernet import SuperNet

IMAGES_SEEN = {
    "cifar10": 600 * 50_000,
    "cluttered_digits": 600 * 50_000,
    "imagenet": 250 * 1_281_167,
}  # paper's training


# ------------------------------------------------------------------------------------------------ costs and properties
def costs(tier: str, job: Job) -> Measured:
    """Everything that needs no training: counts, bytes kept for backward, the fast cell's exactness."""
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
    return Measured.of(found)


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
    """Time and memory of a search step: K=1 against K=4, the fast cell against the plain one, in turns."""
    measured = search_step_bench(device=job.device)
    found = {f"{name}_saved_mib": value for name, value in saved_table().items()}
    for name, latency in measured.items():  # a time: against the plain cell's in the same rounds
        found |= {f"{name}_time": latency.ratio, f"{name}_seconds": latency.median}
    return Measured.of(found, config={"C": 16, "layers": 8, "batch": 16, "size": 32})


def kernels(tier: str, job: Job) -> Measured:
    """The kernel against copying, the eager definition and its torch.compile: a node of 5 edges at 32 x 32, batch 256."""
    rows = kernel_bench(job.device.type)
    mine, found = [row for row in rows if row["shape"] == SHAPES[1]], {}
    for row in mine:
        name = f"{row['impl']}_{row['mode']}_{row['dtype']}"
        found |= {f"{name}_ms": row["ms"], f"{name}_gb_per_s": row["gb_per_s"]}
    found["copy_gb_per_s"] = mine[0]["gb_per_s"] / mine[0]["of_copy"]
    return Measured.of(found, artifacts={"rows": rows})


# ------------------------------------------------------------------------------------------------ searches and trainings
def searched(config: str, job: Job, stage: str, **changed) -> tuple[Measured, str]:
    """(what the search measured, path of its genotype)."""
    return run_stage(search, config, job, stage, **changed), str(job.work_dir / stage / "genotype.json")


def recorded(metrics: dict[str, dict], stages: dict[str, Measured], main: str) -> Measured:
    """The scale is that of stage `main`, an evaluation training."""
    whole = stages[main]
    return one_record(metrics, stages, main, share_of(IMAGES_SEEN[whole.config["dataset"]], whole))


def search_vs_random(tier: str, job: Job, randoms: int, k1: bool = False) -> Measured:
    """A K=4 search; its cell and random ones trained alike. With `k1`, also a K=1 search of the same duration: the same
    schedule on so many fewer images.
    """
    name, stages, errors = tier_config(tier, job), {}, {}
    stages["search"], path = searched(name, job, "search")
    cells = {"searched": path} | {f"random{i}": f"random:{100 * job.seed + i}" for i in range(randoms)}
    if k1:
        images = images_of_k1(stages["search"].scale["images"], name, job)
        stages["search_k1"], cells["k1"] = searched(name, job, "search_k1", K=1, train_images=images)
    for arm, genotype in cells.items():
        stages[arm] = run_stage(train, name, job, arm, genotype=genotype)
        errors[arm] = stages[arm].metrics["test_error"]["last"]
    found = {f"{arm}_test_error": error for arm, error in errors.items() if arm != "searched"}
    found["random_test_error"] = sum(errors[f"random{i}"] for i in range(randoms)) / randoms
    for stage in ("search", "search_k1")[: 1 + k1]:
        found[f"{stage}_seconds"] = stages[stage].metrics["search_seconds"]["last"]
    metrics = {"searched_test_error": stages["searched"].metrics["test_error"]}
    return recorded(metrics | Measured.of(found).metrics, stages, "searched")


def images_of_k1(images: int, name: str, job: Job) -> int:
    """Training images for a K=1 search that takes as long as the K=4 one on `images`.

    Measured once, and kept beside the stages: a run that goes on, and every process of it, takes the same.
    """
    kept, found = job.work_dir / "search_k1_images.txt", torch.zeros((), dtype=torch.int64, device=job.device)
    if job.world.is_main:
        if job.resume == "never" or not kept.exists():
            text = f"{round(images / k1_over_k4(name, job))}\n"
            write_atomic(kept, lambda file: file.write(text.encode()))
        found.fill_(int(kept.read_text()))
    broadcast_from_main([found])
    return found.item()


def k1_over_k4(name: str, job: Job) -> float:
    """How much longer a step of the configured search takes at K=1, from a few steps of each now."""
    settings = load_config(search.Config, Path(search.__file__).parent, name, "search")
    size, batch = settings.image_size or 32, settings.batch_size
    which = (("shared", 4), ("shared", 1))
    measured = search_step_bench(settings.C, settings.layers, batch, size, device=job.device, which=which)
    return measured["shared_k1"].ratio


def edge_repeat(tier: str, job: Job) -> Measured:
    """How many of the 16 kept edges two searches share that differ in the seed only, with beta and without."""
    name, stages, shared = tier_config(tier, job), {}, {}
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
    found = {"edges_shared_with_beta": shared[True], "edges_shared_without_beta": shared[False]}
    share = share_of(50 * 25_000, stages[stage])
    return one_record(Measured.of(found).metrics, stages, stage, share)


def search_and_train(search_config: str | None = None, **overrides) -> Callable[[str, Job], Measured]:
    """Search with these settings, then train what was found."""

    def measure(tier: str, job: Job) -> Measured:
        name, stages = tier_config(tier, job), {}
        stages["search"], path = searched(search_config or name, job, "search", **overrides)
        stages["train"] = run_stage(train, name, job, "train", genotype=path)
        return recorded(stages["train"].metrics | stages["search"].metrics, stages, "train")

    return measure


def sampling_rate(tier: str, job: Job) -> Measured:
    """K=4 and K=8, each searched and trained."""
    stages, metrics = {}, {}
    for K in (4, 8):
        stages[f"search{K}"], path = searched(tier, job, f"search{K}", K=K)
        stages[f"train{K}"] = run_stage(train, tier, job, f"train{K}", genotype=path)
        metrics[f"k{K}_test_error"] = stages[f"train{K}"].metrics["test_error"]
    return recorded(metrics, stages, "train4")


def train_only(config: str | None = None, **overrides) -> Callable[[str, Job], Measured]:
    def measure(tier: str, job: Job) -> Measured:
        found = run_stage(train, config or tier_config(tier, job), job, "train", **overrides)
        return recorded(found.metrics, {"train": found}, "train")

    return measure


def search_only(config: str, **overrides) -> Callable[[str, Job], Measured]:
    return lambda tier, job: run_stage(search, config, job, "search", **overrides)


CIFAR = {"short": ("cifar10",), "full": ("cifar10",)}
IMAGENET = {"full": ("imagenet",)}
EXPERIMENTS = {
    "costs": Experiment(costs, ("quick",)),
    "search-step": Experiment(search_step, ("quick",)),
    "kernels": Experiment(kernels, ("quick",)),
    "gpu-tests": Experiment(lambda tier, job: gpu_tests(__file__), ("quick",)),
    "search-vs-random": Experiment(lambda tier, job: search_vs_random(tier, job, randoms=1), ("quick",)),
    "c10-short": Experiment(lambda tier, job: search_vs_random(tier, job, randoms=2, k1=True), ("short",), CIFAR),
    "edge-repeat": Experiment(edge_repeat, ("short",), CIFAR),
    "c10-train": Experiment(train_only(genotype="PC_DARTS_cifar"), ("full",), CIFAR),
    "c10-search": Experiment(search_only("full"), ("full",), CIFAR),
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
