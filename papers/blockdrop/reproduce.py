"""Which experiment measures which claim of paper.yaml.

python -m papers.blockdrop.reproduce --tier quick
"""

from collections.abc import Callable
from functools import partial

import torch

from common.cli import Job
from common.metrics.compute import parameters
from common.results.records import Measured, metric
from common.results.reproduce import Experiment, main
from common.results.stages import by_stage, gpu_tests, one_record, run_stage, share_of, tier_config

from . import curriculum, evaluate, finetune, train
from .bench import KEEPS, skipping_bench
from .cost import costs as costs_of
from .cost import mult_adds
from .model import resnet101, resnet_cifar
from .policy import policy_cifar, policy_imagenet
from .reinforce import bounded, curriculum_loss, greedy
from .subsets import all_policies

# in the paper's curriculum and fine-tuning, by the data set of ours
IMAGES_SEEN = {"cifar10": 7000 * 50_000, "cifar100": 7000 * 50_000, "cluttered_digits": 7000 * 50_000,
               "imagenet": 55 * 1_281_167}  # fmt: skip


# ------------------------------------------------------------------------------------------------ costs and properties
def costs(tier: str, job: Job) -> Measured:
    """All claims that need no training: sizes, costs, equal forms of the network, the gradient estimator."""
    found = {}
    with torch.device("meta"):
        networks = {
            "r32": (resnet_cifar(32), policy_cifar(15), 32),
            "r110": (resnet_cifar(110), policy_cifar(54), 32),
            "r101": (resnet101(), policy_imagenet(33), 224),
        }
    for name, (model, policy_net, size) in networks.items():
        cost = costs_of(model, policy_net, size)
        full = cost.fixed + sum(cost.blocks)
        found |= {
            f"{name}_params": parameters(model),
            # The official count has a value head in it, one linear unit that nothing uses; this code does not build it.
            f"{name}_policy_params": parameters(policy_net) + policy_net.net.head[-1].in_features + 1,
            f"{name}_flops": 2 * full,
            f"{name}_policy_flops": 2 * cost.policy,
            f"{name}_fixed_flops": 2 * cost.fixed,
            f"{name}_policy_share": 100 * cost.policy / full,
        }
        for k in (0, 1, model.num_blocks - 1):
            found[f"{name}_block{k + 1}_flops"] = 2 * cost.blocks[k]
        kept = torch.ones(model.num_blocks, dtype=torch.bool)
        kept[len(kept) // 2] = False
        found[f"{name}_affine_error"] = (
            mult_adds(cost, kept) + cost.blocks[len(kept) // 2] - full - cost.policy
        ).item()
    r110, r101 = (costs_of(*networks[name]) for name in ("r110", "r101"))
    # Of the blocks that the README's runs keep, only their mean number is known; R-110: both strided ones among them.
    found["r110_readme_flops"] = 2 * (r110.fixed + r110.policy + 14.93 * r110.blocks[0] + 2 * r110.blocks[18])
    found["r101_readme_flops"] = 2 * (r101.fixed + r101.policy + 24.77 * r101.blocks[1])
    return Measured.of(found | forms() | estimator())


def forms() -> dict[str, float]:
    """Masked batch against one image at a time, and the two ends, R-32 with random weights in eval mode."""
    torch.manual_seed(0)
    model = resnet_cifar(32).eval()
    x, u = torch.randn(16, 3, 32, 32), torch.rand(16, 15) < 0.5
    with torch.inference_mode():
        masked = model(x, u)
        alone = torch.cat([model(x[i : i + 1], u[i : i + 1]) for i in range(16)])
        nothing = model.features(x)
        for block in model.blocks:
            nothing = block.skip(nothing)
        return {
            "masked_difference": ((masked - alone).abs().max() / alone.abs().max()).item(),
            "all_kept_difference": (model(x, torch.ones_like(u)) - model(x)).abs().max().item(),
            "all_dropped_difference": (model(x, torch.zeros_like(u)) - model.head(nothing)).abs().max().item(),
        }


def estimator(K: int = 6) -> dict[str, float]:
    """Mean of the estimator over all 2^K policies against the gradient of the expected reward, float64."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, K, dtype=torch.double, generator=generator).requires_grad_()
    R, u = torch.rand(2**K, dtype=torch.double, generator=generator), all_policies(K)
    s = bounded(z.sigmoid(), 0.8)
    pi = torch.where(u, s, 1 - s).prod(1)
    exact = torch.autograd.grad((pi * R).sum(), z, retain_graph=True)[0]
    advantage = R - R[(u == greedy(z.sigmoid())).all(1)]
    loss = curriculum_loss(z.sigmoid().expand_as(u), u, 2**K * pi.detach() * advantage, K, 0.8, beta=0.0)
    found = -torch.autograd.grad(loss, z)[0]
    return {"reinforce_error": ((found - exact).norm() / exact.norm()).item()}


CASES = [f"{kept}_{kind}" for kept in KEEPS for kind in ("own", "few")]


def skipping(tier: str, job: Job) -> Measured:
    """Share of the time, and of the multiply-adds, that dropping blocks saves: R-110 with its policy network."""
    found, rows = {}, []
    for batch in (256, 32, 1):
        figures = skipping_bench(batch, rounds=3, min_run_time=0.5, device=job.device)
        found[f"b{batch}_full_ms"] = 1e3 * figures["full_s"]
        for case in CASES:
            found |= {f"b{batch}_{case}_{what}_saved": 1 - figures[f"{what}_{case}"] for what in ("mult_adds", "time")}
        rows.append({"batch": batch, **figures})
    settings = {"network": "R-110 CIFAR", "keeps": list(KEEPS), "threads": torch.get_num_threads()}
    return Measured.of(found, config=settings, artifacts={"rows": rows})


# ------------------------------------------------------------------------------------------------ trainings
def stages(arms: dict[str, dict], config: str | None = None, baselines: tuple[str, ...] = (), **overrides) -> Callable:
    """An experiment: ResNet, curriculum, then a joint fine-tuning for each of `arms` (its changed settings); for each of
    `baselines` the same fine-tuning of the ResNet under policies with as many blocks as the first arm keeps in the mean.
    """

    def measure(tier: str, job: Job) -> Measured:
        name, first = config or tier_config(tier, job), next(iter(arms))
        done = {"full": run_stage(train, name, job, "full", **overrides)}
        done["curriculum"] = run_stage(curriculum, name, job, "curriculum", checkpoint=str(job.work_dir / "full"))
        tuned = partial(run_stage, finetune, name, job, checkpoint=str(job.work_dir / "curriculum"))
        done |= {arm: tuned(arm, **changed) for arm, changed in arms.items()}
        blocks = done[first].metrics["blocks"]["last"]
        done |= {policy: tuned(policy, policy=policy, blocks=blocks, **arms[first]) for policy in baselines}
        metrics = by_stage(done)
        metrics["accuracy_loss"] = metric(metrics["full_accuracy"]["last"] - metrics[f"{first}_accuracy"]["last"])
        artifacts = {stage: found.artifacts for stage, found in done.items() if found.artifacts}
        if job.world.size == 1:  # what the policies are like: evaluate.py runs in one process
            for stage in ("curriculum", *arms):
                seen = evaluate.run(evaluate.Config(str(job.work_dir / stage)), job.sub(f"{stage}-evaluated"))
                artifacts[stage] = seen.artifacts
        share = share_of(IMAGES_SEEN[done["full"].config["dataset"]], done["curriculum"], done[first])
        return one_record(metrics, done, first, share, artifacts)

    return measure


BASELINES = ("random", "first", "spread", "static")
C10, C100, IMAGENET = ({"full": (name,)} for name in ("cifar10", "cifar100", "imagenet"))
SWEEP = {"learned": {}, "gamma_small": {"gamma": 0.3}, "gamma_large": {"gamma": 3.0}}
EXPERIMENTS = {
    "costs": Experiment(costs, ("quick",)),
    "skipping": Experiment(skipping, ("quick",)),
    "gpu-tests": Experiment(lambda tier, job: gpu_tests(__file__), ("quick",)),
    "arms": Experiment(stages(SWEEP, baselines=BASELINES), ("quick",)),
    "c10-arms": Experiment(stages(SWEEP, baselines=BASELINES), ("short",), {"short": ("cifar10",)}),
    "c10-r110": Experiment(stages({"learned": {}}), ("full",), C10),
    "c10-r32": Experiment(stages({"learned": {}}, depth=32), ("full",), C10),
    "c100-r110": Experiment(stages({"learned": {}}, dataset="cifar100"), ("full",), C100),
    "c100-r32": Experiment(stages({"learned": {}}, dataset="cifar100", depth=32), ("full",), C100),
    "imagenet-r101": Experiment(stages({"learned": {}}, config="full-imagenet"), ("full",), IMAGENET),
}

if __name__ == "__main__":
    main(EXPERIMENTS, __file__)
