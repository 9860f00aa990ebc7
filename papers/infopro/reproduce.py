"""Which experiment measures which claim of paper.yaml.

python -m papers.infopro.reproduce --tier quick
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.cli import Job
from common.metrics.compute import mult_adds, parameters, peak_memory
from common.results.records import Measured, metric
from common.results.reproduce import Experiment, main
from common.results.stages import by_stage, one_record, run_stage, share_of, tier_config
from common.runtime import select_device

from . import evaluate, probe, train
from .auxiliary import Decoder, ImageNetDecoder, head, imagenet_head
from .bench import SEGMENTS, infopro, pipeline_bench, random_batch, recomputed, step_bench
from .checkpointing import checkpointed
from .cost import auxiliary_mult_adds, saved_mib
from .cuts import EQUAL_MEMORY, STL_EQUAL_MEMORY_K3
from .local import InfoPro
from .losses import contrastive_loss, restore
from .model import TORCHVISION, network, resnet_cifar
from .recipes import DGL, END_TO_END, GREEDY, contrast, softmax

IMAGES_SEEN = {"cifar10": 160 * 50_000, "cluttered_digits": 160 * 50_000, "svhn": 160 * 73_257, "stl10": 160 * 5_000,
               "imagenet": 90 * 1_281_167}  # fmt: skip
REPORTED_GB = {1: 9.40, 2: 5.38, 3: 4.22, 4: 3.52}  # of training R-110 at batch 1024, table 3; K = 1: end to end


# ------------------------------------------------------------------------------------------------ costs and properties
def costs(tier: str, job: Job) -> Measured:
    """Everything that needs no training: sizes, memory for backward, overhead, and what must hold exactly."""
    found = {}
    with torch.device("meta"):
        for name in ("r32", "r110"):
            net, image = network(name, 10), torch.empty(1, 3, 32, 32)
            found |= {f"{name}_params": parameters(net), f"{name}_mult_adds": mult_adds(net, image)}
            for K in (2, 4, 8, 16):
                model = infopro(name, K, False)
                found[f"{name}_k{K}_overhead"] = 100 * auxiliary_mult_adds(model, 32) / found[f"{name}_mult_adds"]
        for c in (16, 32, 64):
            found[f"decoder{c}_params"] = parameters(Decoder(c))
            found[f"contrast{c}_params"] = parameters(head("1c2f", c, 128))
            found[f"softmax{c}_params"] = parameters(head("1c2f", c, 10))
            found[f"greedy{c}_params"] = parameters(head("0c1f", c, 10))
        for K in (1, 2, 3, 4):
            model = infopro("r110", K, True)
            found[f"star_k{K}_mib"] = saved_mib(model, 32)
            found[f"star_k{K}_mib_at_1024"] = saved_mib(model, 32, 1024)
            found[f"star_k{K}_overhead"] = 100 * auxiliary_mult_adds(model, 32) / found["r110_mult_adds"]
        rest = [gb - found[f"star_k{K}_mib_at_1024"] for K, gb in REPORTED_GB.items()]
        found["star_rest_spread"] = max(rest) - min(rest)
        for K in (2, 3, 4):
            found[f"star_k{K}_saving"] = 100 * (1 - found[f"star_k{K}_mib"] / found["star_k1_mib"])
        for name in TORCHVISION:
            net = network(name, 1000)
            nets = (ImageNetDecoder, lambda c: imagenet_head(c, 1000))
            whole, local = (InfoPro(net, cuts, *nets, (5, 5)) for cuts in ((), EQUAL_MEMORY[name, 2]))
            found[f"{name}_mib"], found[f"{name}_k2_mib"] = saved_mib(whole, 224, 4), saved_mib(local, 224, 4)
            found[f"{name}_k2_saving"] = 100 * (1 - found[f"{name}_k2_mib"] / found[f"{name}_mib"])
            total = mult_adds(net, torch.empty(1, 3, 224, 224))
            found[f"{name}_k2_overhead"] = 100 * auxiliary_mult_adds(local, 224) / total
    found["checkpointed_overhead"] = 100 * recomputed("r110")
    return Measured.of(found | isolation() | identities())


def small(cuts=((1, 0), (2, 0), (2, 1)), lambdas: float = 1.0) -> InfoPro:
    torch.manual_seed(0)
    net = resnet_cifar(14, 10, (4, 8, 8))
    return InfoPro(net, cuts, Decoder, lambda c: head("1c2f", c, 16, 8), (lambdas,) * 2, (lambdas,) * 2, "contrast")


def gradients(model: InfoPro, k: int, batch) -> torch.Tensor:
    """Of module k after one simultaneous step, flat; zeros where there is none."""
    model.zero_grad()
    model.backward(*batch)
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.module_parameters(k)]
    )


def isolation() -> dict[str, float]:
    """Gradients of a small network in four modules."""
    torch.manual_seed(1)
    batch = (torch.randn(16, 3, 12, 12), torch.rand(16, 3, 12, 12), torch.arange(16) % 10)
    silent, model = small(lambdas=0.0), small()
    found = {
        "no_loss_gradient": gradients(silent, 0, batch).abs().max().item(),
        "no_loss_last_gradient": gradients(silent, 3, batch).abs().max().item(),
    }
    before = gradients(model, 0, batch)
    with torch.no_grad():
        for p in model.module_parameters(1):
            p.add_(torch.randn_like(p))
    found["isolation_difference"] = (gradients(model, 0, batch) - before).abs().max().item()
    outputs = [small(cuts).eval()(batch[0]) for cuts in ((), ((1, 0),), ((1, 0), (2, 0), (2, 1)))]
    found["test_difference"] = max((outputs[0] - other).abs().max().item() for other in outputs[1:])
    return found | trained(batch)


def trained(batch) -> dict[str, float]:
    """After a few steps in four modules: the network's weights alone, in a network that was never cut, against the modules."""
    model, alone = small(), resnet_cifar(14, 10, (4, 8, 8))
    optimiser = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True)
    for _ in range(5):
        optimiser.zero_grad()
        model.backward(*batch)
        optimiser.step()
    alone.load_state_dict(model.network.state_dict())
    model.eval(), alone.eval()
    h = batch[0]
    for k in range(model.K):
        h, _ = model.local_loss(k, h, *batch[1:])
    return {
        "trained_difference": (h - alone(batch[0])).abs().max().item(),
        "trained_extra_params": parameters(model.network) - parameters(alone),
    }


def identities() -> dict[str, float]:
    """K = 1 and checkpointing against plain end-to-end training; the contrastive loss against its formula; restored pixels."""
    torch.manual_seed(1)
    x, pixels, y = torch.randn(16, 3, 12, 12), torch.rand(16, 3, 12, 12), torch.arange(16) % 10
    plain, one, rival = (small(()) for _ in range(3))
    F.cross_entropy(plain.network(x), y).backward()
    one.backward(x, pixels, y)
    F.cross_entropy(checkpointed(rival.network, x, 3), y).backward()

    def difference(model: InfoPro) -> float:
        pairs = [(p.grad, q.grad) for p, q in zip(plain.parameters(), model.parameters(), strict=True)]
        pairs += zip(plain.buffers(), model.buffers(), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)

    features, labels = torch.randn(32, 128, dtype=torch.double), torch.arange(32) % 9
    f, formula = F.normalize(features, dim=1), 0.0
    for i in range(32):
        others = [k for k in range(32) if k != i]
        total = sum((f[i] @ f[k] / 0.07).exp() for k in others)
        positives = [j for j in others if labels[j] == labels[i]]
        formula -= sum(((f[i] @ f[j] / 0.07).exp() / total).log() for j in positives).item() / len(positives) / 32
    levels = (torch.arange(256) / 255).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    pixels = restore((levels - mean) / std, mean, std)
    return {
        "k1_difference": difference(one),
        "checkpointed_difference": difference(rival),
        "contrastive_error": abs(contrastive_loss(features, labels).item() - formula),
        "restored_outside": max(-pixels.min().item(), pixels.max().item() - 1, 0.0),
        "restored_error": (pixels - levels).abs().max().item(),
    }


def step(tier: str, job: Job) -> Measured:
    """Time and memory of a step of R-110, in turns; modules on two processes."""
    batch, rounds = 8, 3
    found = step_bench(batch, rounds, 0.5, job.device)
    if job.device.type == "cpu":
        found |= pipeline_bench(batch, steps=6, rounds=rounds)
        found["one_process_ms"] = min(found["one_thread_ms"], found["two_threads_ms"])
    settings = {"batch": batch, "rounds": rounds, "segments": SEGMENTS, "threads": torch.get_num_threads()}
    return Measured.of(found, config=settings)


def gpu_memory(tier: str, job: Job) -> Measured:
    """The paper's memory table: R-110, batch 1024, most gigabytes allocated on the GPU in a step."""
    device = select_device("cuda")

    def one(K: int, segments: int = 0) -> float:
        def whole() -> None:
            model, (x, pixels, y) = infopro("r110", K, True).to(device), random_batch(1024, device)
            optimiser = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True)
            for _ in range(2):
                optimiser.zero_grad()
                if segments:
                    F.cross_entropy(checkpointed(model.network, x, segments), y).backward()
                else:
                    model.backward(x, pixels, y)
                optimiser.step()

        return peak_memory(whole, device) / 2**30

    found = {f"gpu_k{K}_gb": one(K) for K in (1, 2, 3, 4)} | {"gpu_checkpointed_gb": one(1, SEGMENTS)}
    for name in ("k2", "k3", "k4", "checkpointed"):
        found[f"gpu_{name}_saving"] = 100 * (1 - found[f"gpu_{name}_gb"] / found["gpu_k1_gb"])
    return Measured.of(found, config={"batch": 1024, "segments": SEGMENTS})


# ------------------------------------------------------------------------------------------------ trainings
def trainings(arms: dict[str, dict], config: str | None = None, probed: tuple[str, ...] = (), **overrides) -> Callable:
    """An experiment: one training an arm (its changed settings), all with the same start and data; those `probed` too."""

    def measure(tier: str, job: Job) -> Measured:
        name, probes = config or tier_config(tier, job), {}
        done = {arm: run_stage(train, name, job, arm, **overrides, **changed) for arm, changed in arms.items()}
        metrics = by_stage(done)
        if job.world.size == 1:  # evaluate.py and probe.py run in one process
            for arm in arms:
                seen = evaluate.run(evaluate.Config(str(job.work_dir / arm)), job.sub(f"{arm}-evaluated")).metrics
                metrics |= {f"{arm}_{key}": seen[key] for key in ("difference", "params", "end_to_end_params")}
            for arm in probed:
                probes[arm] = run_stage(probe, name, job, f"{arm}-probed", checkpoint=str(job.work_dir / arm))
            metrics |= by_stage(probes)
        if "greedy" in arms and len(arms) > 1:  # how much of what greedy training loses do the others win back?
            for arm in arms:
                gain = metrics["greedy_error"]["last"] - metrics[f"{arm}_error"]["last"]
                metrics[f"{arm}_gain_on_greedy"] = metric(gain)
        first = next(iter(done))
        papers = IMAGES_SEEN[done[first].config["dataset"]]
        fraction = min(share_of(papers, found) for found in done.values())
        artifacts = {"probes": {arm: found.artifacts for arm, found in probes.items()}} if probes else {}
        return one_record(metrics, done, first, fraction, artifacts)

    return measure


QUICK = {
    "end_to_end": END_TO_END,
    "greedy_k2": {"modules": 2, **GREEDY},
    "greedy": {"modules": 4, **GREEDY},
    "dgl": {"modules": 4, **DGL},
    "softmax": {"modules": 4, "loss": "softmax"},
    "contrast": {"modules": 4},
}
SHORT = QUICK | {"contrast_alone": {"modules": 4, "lambda1": (0, 0)}}
PROBED = ("end_to_end", "greedy", "softmax")


def full(arms: dict[str, dict], dataset: str, config: str = "full", **overrides) -> Experiment:
    return Experiment(trainings(arms, config, **overrides), ("full",), {"full": (dataset,)})


def local(method: str, dataset: str, name: str, K: int) -> dict[str, dict]:
    """One of the four ways to train K modules, as in the paper's tables 1 and 2."""
    of = {"greedy": GREEDY, "dgl": DGL, "softmax": softmax(dataset, name, K), "contrast": contrast(dataset, name, K)}
    return {method: {"modules": K, **of[method]}}


def star(dataset: str, K: int) -> dict[str, dict]:
    cuts = STL_EQUAL_MEMORY_K3 if (dataset, K) == ("stl10", 3) else EQUAL_MEMORY["r110", K]
    return {"star": {"modules": K, "cuts": cuts, **contrast(dataset, "r110*", K)}}


def asynchronous(K: int) -> dict[str, dict]:
    return {"asynchronous": {"modules": K, "training": "asynchronous", **contrast("cifar10", "r110", K)}}


def imagenet(name: str) -> dict[str, dict]:
    weight = 1.0 if name == "resnet152" else 0.75
    return {"infopro": {"lambda2": (weight, weight)}}


WHOLE, KS, LAYERS = {"end_to_end": END_TO_END}, (2, 4, 8, 16), {"equal_memory": False}
UNTRAINED = {
    "costs": Experiment(costs, ("quick",)),
    "step": Experiment(step, ("quick",)),
    "gpu-memory": Experiment(gpu_memory, ("full",)),
}
TRAINED = {  # at the paper's protocol an experiment is one training
    "arms": Experiment(trainings(QUICK, probed=PROBED), ("quick",)),
    "c10-arms": Experiment(trainings(SHORT, probed=PROBED), ("short",), {"short": ("cifar10",)}),
    **{f"c10-{net}-end-to-end": full(WHOLE, "cifar10", network=net) for net in ("r32", "r110")},
    **{
        f"c10-{net}-k{K}-{method}": full(local(method, "cifar10", net, K), "cifar10", network=net, **LAYERS)
        for net in ("r32", "r110")
        for method in ("greedy", "dgl", "softmax", "contrast")
        for K in KS
    },
    **{f"c10-r110-asy-k{K}": full(asynchronous(K), "cifar10", **LAYERS) for K in (2, 4)},
    **{f"c10-r110-star-k{K}": full(star("cifar10", K), "cifar10") for K in (2, 3, 4)},
    "svhn-r110-end-to-end": full(WHOLE, "svhn", "full-svhn"),
    **{f"svhn-r110-k{K}-contrast": full(local("contrast", "svhn", "r110", K), "svhn", "full-svhn") for K in KS},
    "stl10-r110-end-to-end": full(WHOLE, "stl10", "full-stl10"),
    **{
        f"stl10-r110-k{K}-{method}": full(local(method, "stl10", "r110", K), "stl10", "full-stl10")
        for method in ("softmax", "contrast")
        for K in KS
    },
    **{f"stl10-r110-star-k{K}": full(star("stl10", K), "stl10", "full-stl10") for K in (2, 3, 4)},
    **{f"imagenet-{net}-end-to-end": full(WHOLE, "imagenet", "full-imagenet", network=net) for net in TORCHVISION},
    **{f"imagenet-{net}-infopro": full(imagenet(net), "imagenet", "full-imagenet", network=net) for net in TORCHVISION},
}
EXPERIMENTS = UNTRAINED | TRAINED

if __name__ == "__main__":
    main(EXPERIMENTS, __file__)
