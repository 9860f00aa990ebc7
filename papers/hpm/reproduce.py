"""Which experiment measures which claim of paper.yaml.

python -m papers.hpm.reproduce --tier quick
"""

import torch
from torch import nn

from common.cli import Job
from common.datasets.person_reid import OFFICIAL
from common.metrics.compute import mult_adds, parameters
from common.metrics.retrieval import evaluate_distances
from common.results.records import Measured, metric
from common.results.reproduce import Experiment, main
from common.results.stages import by_stage, gpu_tests, one_record, run_stage, share_of

from . import train
from .bench import heads_bench, ranking_bench
from .descriptors import match
from .erasing import HorizontalErasing
from .extract import trained_model
from .kernels import pyramid_pool, reference
from .kernels.bench import SHAPES, kernel_bench
from .model import HPM, SCALES, PyramidHead

IMAGES_SEEN = {name: 60 * official.counts["train"][0] for name, official in OFFICIAL.items()}


# ------------------------------------------------------------------------------------------------ costs and properties
class Logits(nn.Module):
    """All that training computes, in eval mode: the counters of multiply-adds switch to it."""

    def __init__(self, model: HPM):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.head.logits(self.model.descriptor(images))


def costs(tier: str, job: Job) -> Measured:
    """Parameters, multiply-adds, shapes and initial deviations of the paper's network."""
    found = {}
    for identities in (751, 702):
        with torch.device("meta"):
            model, image = train.build(train.Config(), identities).eval(), torch.empty(1, 3, 384, 128)
        found |= {f"p{identities}_total": parameters(model), f"p{identities}_head": parameters(model.head)}
    features = model.backbone(image)
    found |= {"backbone": parameters(model.backbone), "descriptor": model(image).shape[1]}
    found |= {"map_channels": features.shape[1], "map_rows": features.shape[2], "map_columns": features.shape[3]}
    found |= {"backbone_gmac": mult_adds(model.backbone, image) / 1e9}
    with torch.device("meta"):
        model = train.build(train.Config(), 751)
    found |= {"gmac": mult_adds(Logits(model), image) / 1e9}
    head = PyramidHead(15, 2048, 256, 751)
    found |= {"reduce_std": head.reduce.std().item(), "classify_std": head.classify.std().item()}
    return Measured.of(found)


def toy_precisions() -> dict[str, float]:
    """Both average precisions of four small rankings."""
    found = {}
    for flags in ("1010", "0101", "001", "110"):
        ids = torch.tensor([1 if flag == "1" else 2 for flag in flags])
        labels = (torch.tensor([1]), torch.tensor([0]), ids, torch.ones(len(flags)))
        result = evaluate_distances(torch.arange(len(flags))[None].float(), *labels)
        found |= {f"ap_{flags}_a": result.map_a / 100, f"ap_{flags}_b": result.map_b / 100}
    return found


def checks(tier: str, job: Job) -> Measured:
    """Identities of pooling, erasing and evaluation, on random numbers of the paper's shapes."""
    x = torch.randn(4, 64, 24, 8).relu_()
    eighths, pooled = pyramid_pool(x, (8,)), {pool: pyramid_pool(x, SCALES, pool) for pool in ("avg", "max")}
    found = toy_precisions()
    for pool, mine in pooled.items():
        stripes = [stripe for scale in SCALES for stripe in x.chunk(scale, 2)]
        told = torch.stack([s.mean((2, 3)) if pool == "avg" else s.amax((2, 3)) for s in stripes])
        found |= {f"slices_{pool}": (mine - told).abs().max().item()}
        found |= {f"adaptive_{pool}": (mine - reference(x, SCALES, pool)).abs().max().item()}
    found["global_is_mean"] = (pooled["avg"][0] - pooled["avg"][7:].mean(0)).abs().max().item()
    found["global_is_max"] = (pooled["max"][0] - pooled["max"][7:].amax(0)).abs().max().item()
    found["shift_by_a_bin"] = (pyramid_pool(x.roll(3, 2), (8,))[1:] - eighths[:-1]).abs().max().item()
    ties, gradients = torch.randint(0, 3, (4, 64, 24, 8)).double().requires_grad_(), []
    for op in (pyramid_pool, reference):
        out = op(ties, SCALES)
        gradients.append(torch.autograd.grad((out * torch.arange(15.0)[:, None, None]).sum(), ties)[0])
    found["tied_gradients"] = (gradients[0] - gradients[1]).abs().max().item()
    found["erasing_in_evaluation"] = (HorizontalErasing(1.0).eval()(x) - x).abs().max().item()
    return Measured.of(found | evaluator_invariants())


def evaluator_invariants() -> dict[str, float]:
    """What junk and the order of the gallery change (nothing), and by how much distractors raise a precision (never)."""
    distances, ids = torch.rand(60, 400, dtype=torch.float64), torch.arange(400) % 20 + 1
    labels = (torch.arange(60) % 20 + 1, torch.arange(60) % 3, ids, torch.arange(400) % 7 % 3)
    order = torch.randperm(400)

    def scores(distances, labels):
        found = evaluate_distances(distances, *labels)
        return torch.stack([-found.first.double(), found.ap_a, found.ap_b])

    def grown(identity: int):
        more = torch.rand(60, 100, dtype=torch.float64)
        extra = torch.cat([ids, torch.full((100,), identity)]), torch.cat([labels[3], torch.arange(100) % 3])
        return scores(torch.cat([distances, more], 1), (*labels[:2], *extra))

    before = scores(distances, labels)
    permuted = scores(distances[:, order], (*labels[:2], labels[2][order], labels[3][order]))
    alone = torch.tensor([5, 6, 6]), torch.tensor([1, 1, 2])  # 5 is in the gallery only on the query's own camera
    skipped = evaluate_distances(torch.rand(2, 3), torch.tensor([5, 6]), torch.tensor([1, 1]), *alone).skipped
    return {
        "junk_changes": (grown(-1) - before).abs().max().item(),
        "permutation_changes": (permuted - before).abs().max().item(),
        "distractors_raise": (grown(0) - before).clamp(min=0).max().item(),
        "same_camera_skipped": skipped,
    }


def speed(tier: str, job: Job) -> Measured:
    """Ratios of times measured in turns: pooling against slices, grouped against separate heads, ranking against a loop."""
    rows, short = kernel_bench(job.device.type, quick=True), {"forward": "fwd", "training": "full"}
    found = {f"{row['impl']}_{short[row['mode']]}_ms": row["ms"] for row in rows if row["dtype"] == "float32"}
    heads, ranking = heads_bench(device=job.device), ranking_bench()
    found |= {f"heads_{name}": value for name, value in heads.items()}
    found |= {f"ranking_{name}": value for name, value in ranking.items()}
    found["ranking_budget_seconds"] = 15.0
    return Measured.of(found, config={"threads": torch.get_num_threads()}, artifacts={"rows": rows})


def kernels(tier: str, job: Job) -> Measured:
    """The Triton kernel on the map of a batch of the paper, on a GPU: milliseconds and GB/s."""
    rows = kernel_bench(job.device.type)
    found = {"copy_gb_per_s": rows[0]["gb_per_s"] / rows[0]["of_copy"]}
    for row in rows:
        if row["shape"] == SHAPES[0]:
            found |= {f"{row['impl']}_{row['mode']}_{row['dtype']}_{unit}": row[unit] for unit in ("ms", "gb_per_s")}
    return Measured.of(found, artifacts={"rows": rows})


# ------------------------------------------------------------------------------------------------ trainings
ARMS = {  # descriptors of 480 numbers (three scales: 476), equal epochs
    "global": {"scales": (1,), "dim": 480},
    "two": {"scales": (1, 2), "dim": 160},
    "three": {"scales": (1, 2, 4), "dim": 68},
    "pyramid": {},
    "stripes": {"scales": (8,), "dim": 60},
    "avg": {"pool": "avg"},
    "max": {"pool": "max"},
    "erasing": {"erasing": 0.5},
}
EXACT = {"occlusion": 0.0, "shift": 0.0}
GALLERIES = {"usual": {}, "exact": EXACT}
KINDS = {  # of queries, and their gallery: the same people in the same pose, light and noise
    "clean": (EXACT, "usual"),
    "occluded": ({"occlusion": 1.0, "shift": 0.0}, "usual"),
    "shifted": ({"occlusion": 0.0}, "usual"),
    "aligned": (EXACT, "exact"),
}


def arms(tier: str, job: Job) -> Measured:
    """All arms on drawn people from the same seed; mAP (A, flip test, L2 norm) and Rank-1 for every kind of query."""
    done = {arm: run_stage(train, tier, job, arm, **changed) for arm, changed in ARMS.items()}
    metrics = by_stage(done)
    for arm in ARMS:
        model, config, _ = trained_model(str(job.work_dir / arm))
        model = model.to(job.device)

        def described(split: str, options: dict, config=config, model=model):
            return train.describe(config, job, model, train.open_split(config, job, split, **options))

        galleries = {name: described("gallery", options) for name, options in GALLERIES.items()}
        for kind, (options, gallery) in KINDS.items():
            query = described("query", options)
            result = match(query, galleries[gallery], flip=True, l2=True)
            metrics |= {f"{arm}_{kind}_map": metric(result.map_a, len(query.ids))}
            metrics |= {f"{arm}_{kind}_rank1": metric(result.cmc(1), len(query.ids))}
    for kind in KINDS:
        metrics[f"{kind}_gap"] = metric(metrics[f"pyramid_{kind}_map"]["last"] - metrics[f"global_{kind}_map"]["last"])
    return one_record(metrics, done, "pyramid", share_of(IMAGES_SEEN["market1501"], done["pyramid"]))


def protocol(suffix: str, name: str, tiers: tuple[str, ...] = ("full",)) -> Experiment:
    """A training by `configs/<tier><suffix>.yaml`, as it is, on the official set `name`."""

    def measure(tier: str, job: Job) -> Measured:
        found = run_stage(train, f"{tier}{suffix}", job, "train")
        found.scale["fraction"] = share_of(IMAGES_SEEN[name], found)
        return found

    return Experiment(measure, tiers, dict.fromkeys(tiers, (name,)))


EXPERIMENTS = {
    "costs": Experiment(costs, ("quick",)),
    "checks": Experiment(checks, ("quick",)),
    "speed": Experiment(speed, ("quick",)),
    "arms": Experiment(arms, ("quick",)),
    "market": protocol("", "market1501", ("short", "full")),
    "market-hre": protocol("-hre", "market1501"),
    "duke": protocol("-duke", "dukemtmc_reid"),
    "duke-hre": protocol("-duke-hre", "dukemtmc_reid"),
    "cuhk03": protocol("-cuhk03", "cuhk03_np_detected"),
    "cuhk03-hre": protocol("-cuhk03-hre", "cuhk03_np_detected"),
    "kernels": Experiment(kernels, ("quick",)),
    "gpu-tests": Experiment(lambda tier, job: gpu_tests(__file__), ("quick",)),
}

if __name__ == "__main__":
    main(EXPERIMENTS, __file__)
