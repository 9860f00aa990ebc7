"""Which experiment measures which claim of paper.yaml.

python -m papers.centernet.reproduce --tier quick
"""

import statistics
from collections import defaultdict
from collections.abc import Callable

import torch

from common.cli import Job
from common.metrics.compute import mult_adds, parameters
from common.results.records import Measured
from common.results.reproduce import Experiment, main
from common.results.stages import by_stage, gpu_tests, one_record, run_stage, share_of, tier_config

from . import evaluate, train
from .bench import loading_bench, memory_bench, step_bench
from .decode import central_region, pair, peaks, require_center
from .kernels import center_pool, corner_pool
from .kernels.bench import SHAPES, kernel_bench
from .losses import offset_loss, pull_push
from .model import CenterNet, Output, centernet
from .targets import gaussian_radius, render_targets

IMAGES_SEEN = 480_000 * 48


# ------------------------------------------------------------------------------------------------ costs and properties
def costs(tier: str, job: Job) -> Measured:
    """Everything that needs no training: sizes, costs, targets, losses, decoding, equal forms."""
    found = {}
    with torch.device("meta"):
        image = torch.empty(1, 3, 511, 511)
        for depth in (52, 104):
            model = centernet(depth).eval()
            found[f"hg{depth}_params"] = parameters(model)
            found[f"hg{depth}_gmacs"] = mult_adds(model, image) / 1e9
            few = torch.zeros(3, 1, 70, dtype=torch.int64)
            found[f"hg{depth}_gmacs_at_peaks"] = mult_adds(model, image, few) / 1e9
        model = centernet(52)
        corner, _, center = model.stacks[0].keypoints
        parts = {"stem": model.stem, "hourglass": model.stacks[0].hourglass, "cascade": corner.pooling,
                 "center": center.pooling, "heat": corner.heat, "tag": corner.tag, "offset": corner.offset}  # fmt: skip
        found |= {f"{name}_params": parameters(part) for name, part in parts.items()}
        found["cornernet_pooling_params"] = parameters(centernet(52, corner="plain").stacks[0].keypoints[0].pooling)
    return Measured.of(found | toys() | forms())


def toys() -> dict[str, float]:
    """Small examples worked out by hand."""
    side = torch.tensor(32.0, dtype=torch.double)
    found = {
        "radius_32": gaussian_radius(side, side),
        "radius_32_proper": gaussian_radius(side, side, 0.3, proper=True),
    }
    box = torch.tensor([[[100.0, 100.0, 203.0, 203.0]]])  # 26 x 26 cells: radius 7 by the formula of the paper
    heats = render_targets(box, torch.zeros(1, 1).long(), torch.tensor([1]), 1, 3, (128, 128)).heats.flatten(1).sum(1)
    found |= {"corner_heat": heats[0], "center_heat": heats[2]}
    tags = torch.tensor([[0, 1, 3], [0.5, 0, 0]]), torch.tensor([[0.2, 1.4, 3], [0.1, 0, 0]])
    found["pull"], found["push"] = pull_push(*tags, torch.tensor([[1.0, 1, 1], [1, 0, 0]]))
    offsets = torch.tensor([[[0.2, 0.9], [2, 0]]]), torch.tensor([[[0.5, 0.4], [0, 0]]])
    found["offset"] = offset_loss(*offsets, torch.ones(1, 2))
    regions = central_region(torch.tensor([[0.0, 0, 90, 90], [0, 0, 200, 200]]))
    found["region_error"] = (regions[:, 0::2] - torch.tensor([[30.0, 60], [80, 120]])).abs().max()
    heats = [torch.full((1, 2, 32, 32), -9.0) for _ in range(3)]
    heats[0][0, 1, 4, 5], heats[1][0, 1, 20, 21], heats[2][0, 1, 12, 13] = 3, 2, 1
    tags = torch.full((1, 70), 2.0), torch.full((1, 70), 2.3)
    pairs = pair(Output(tuple(heats), tags, (torch.zeros(1, 70, 2),) * 3), [peaks(heat) for heat in heats], 32)
    return found | {"pair_score": pairs.scores[0, 0], "triplet_score": require_center(pairs)[0][0, 0]}


@torch.inference_mode()
def forms() -> dict[str, float]:
    """Center pooling as two scans against row and column maxima; heads at cells against heads everywhere."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 8, 32, 32), torch.randn(2, 8, 32, 32)
    scans = corner_pool(corner_pool(x, "top"), "bottom") + corner_pool(corner_pool(y, "left"), "right")
    model, images, cells = CenterNet(4, (8, 12, 16), (1, 1, 1)).eval(), torch.randn(2, 3, 63, 63), torch.arange(256)
    dense, few = model(images)[0], model(images, cells.expand(3, 2, -1))[0]
    off = max((a.flatten(2).mT - b).abs().max() for a, b in zip(dense.offsets, few.offsets, strict=True))
    return {"center_pool_difference": (center_pool(x, y) - scans).abs().max(), "head_difference": off}


# ------------------------------------------------------------------------------------------------ speed and memory
def by_pool(rows: list[dict], shape: tuple[int, ...]) -> dict[tuple[str, ...], list[dict]]:
    """Rows of one shape by (corners or center, impl, mode, dtype); those of corners are the four directions."""
    found = defaultdict(list)
    for row in rows:
        if row["shape"] == shape:
            pool = "center" if row["op"] == "center" else "corners"
            found[pool, row["impl"], row["mode"], row["dtype"]].append(row)
    return found


def pools(tier: str, job: Job) -> Measured:
    """The pools at one image's size against torch.cummax and the official loop over rows: milliseconds, corners added up."""
    rows, found = kernel_bench(job.device.type, quick=True), {}
    for (pool, impl, mode, dtype), mine in by_pool(rows, SHAPES[0]).items():
        if dtype == "float32":
            impl = "ours" if impl in ("torch", "triton") else impl
            found[f"{pool}_{impl}_{mode}_ms"] = sum(row["ms"] for row in mine)
    return Measured.of(found, config={"threads": torch.get_num_threads()}, artifacts={"rows": rows})


def kernels(tier: str, job: Job) -> Measured:
    """The Triton pools at the size of a rank's batch, on a GPU: milliseconds, corners added up, and GB/s over all of them."""
    rows = kernel_bench(job.device.type)
    found = {"copy_gb_per_s": rows[0]["gb_per_s"] / rows[0]["of_copy"]}
    for key, mine in by_pool(rows, SHAPES[-1]).items():
        name = "_".join(key)
        found[f"{name}_ms"] = sum(row["ms"] for row in mine)
        found[f"{name}_gb_per_s"] = statistics.harmonic_mean(row["gb_per_s"] for row in mine)
    return Measured.of(found, artifacts={"rows": rows})


def step(tier: str, job: Job) -> Measured:
    """A training step of Hourglass-52 with the official code's pools and dense heads, and with ours; what it keeps."""
    found = step_bench(job.device.type, rounds=2) | memory_bench() | loading_bench()
    return Measured.of(found, config={"threads": torch.get_num_threads()})


# ------------------------------------------------------------------------------------------------ trainings
def arms(
    which: dict[str, dict], config: str | None = None, multi_scale: bool = False
) -> Callable[[str, Job], Measured]:
    """An experiment: one training for each arm (its changed settings), same schedule and data order.

    Metrics are those of `train`, named after the arm. multi_scale: also tested at the paper's five scales.
    """

    def measure(tier: str, job: Job) -> Measured:
        done, tested = {}, {}
        for arm, changed in which.items():
            done[arm] = run_stage(train, config or tier_config(tier, job), job, arm, **changed)
            if multi_scale:
                settings = evaluate.Config(str(job.work_dir / arm), scales=(0.6, 1.0, 1.2, 1.5, 1.8), batch=1)
                tested[f"{arm}_multi_scale"] = evaluate.run(settings, job.sub(f"{arm}-multi-scale"))
        first = next(iter(which))
        return one_record(by_stage(done | tested), done, first, share_of(IMAGES_SEEN, done[first]))

    return measure


FULL, PLAIN_CENTER = {}, {"center": "plain"}
CORNERNET, CORNERNET_CASCADE = {"corner": "plain", "center": "none"}, {"center": "none"}
CENTER_CHECK = {"corner": "plain", "center": "plain"}
ABLATION = {
    "full": FULL,
    "no_center_pooling": PLAIN_CENTER,
    "plain_corners": {"corner": "plain"},
    "cornernet": CORNERNET,
}
COCO = {"full": ("coco",)}
EXPERIMENTS = {
    "costs": Experiment(costs, ("quick",)),
    "pools": Experiment(pools, ("quick",)),
    "step": Experiment(step, ("quick",)),
    "kernels": Experiment(kernels, ("quick",)),
    "gpu-tests": Experiment(lambda tier, job: gpu_tests(__file__), ("quick",)),
    "digits": Experiment(arms({"full": FULL, "no_center_pooling": PLAIN_CENTER}), ("quick",)),
    "bccd": Experiment(arms(ABLATION), ("short",), {"short": ("bccd",)}),
    "coco-52": Experiment(arms({"full": FULL}, multi_scale=True), ("full",), COCO),
    "coco-104": Experiment(arms({"full": FULL}, "full-104", multi_scale=True), ("full",), COCO),
    "coco-52-cornernet": Experiment(arms({"cornernet": CORNERNET}), ("full",), COCO),
    "coco-104-cornernet": Experiment(arms({"cornernet": CORNERNET}, "full-104"), ("full",), COCO),
    "coco-52-ablation": Experiment(
        arms({"center_check": CENTER_CHECK, "plain_corners": {"corner": "plain"}, "cascade": CORNERNET_CASCADE}),
        ("full",),
        COCO,
    ),
}

if __name__ == "__main__":
    main(EXPERIMENTS, __file__)
