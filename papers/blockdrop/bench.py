"""Does dropping blocks save the time that it saves in multiply-adds? The engine against the whole network.

    python -m papers.blockdrop.bench [--device auto|cpu|cuda] [--network r110 r101] [--batch 256 32 1] [--rounds 5]

Random weights and given policies; the policy network runs all the same, and its time and multiply-adds count. Policies
are random sets of blocks: `own`, each image another; `few`, 10 in all (the paper: 469 for CIFAR-10, 10 for ImageNet).
Both sides have the same folded weights, memory layout and chunks, and take turns; a ratio is the median over rounds.
`saving` is (1 - time) / (1 - multiply-adds): 1 where time falls as multiply-adds do.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.cli import exit_codes
from common.metrics.compute import latency
from common.runtime import select_device

from .cost import costs, mult_adds
from .engine import SkippingEngine, for_inference, in_chunks
from .model import resnet101, resnet_cifar
from .policy import policy_cifar, policy_imagenet

KEEPS = (17, 27, 40)  # of the 54 blocks of R-110; the paper keeps 16.9
FEW = 10


class Network(NamedTuple):
    model: Callable[[], nn.Module]
    policy_net: Callable[[], nn.Module]
    size: int
    keeps: tuple[int, ...]
    images: int  # in a measurement, if a batch has fewer


NETWORKS = {
    "r110": Network(lambda: resnet_cifar(110), lambda: policy_cifar(54), 32, KEEPS, 64),
    "r101": Network(resnet101, lambda: policy_imagenet(33), 224, (25,), 20),  # the paper keeps 24.8
}


def random_policies(images: int, blocks: int, kept: int, kind: str) -> Tensor:
    """(images, blocks) bool with `kept` ones a row; kind: "own" or "few"."""
    rows = images if kind == "own" else FEW
    chosen = torch.rand(rows, blocks).topk(kept).indices
    return torch.zeros(rows, blocks, dtype=torch.bool).scatter_(1, chosen, True)[torch.arange(images) % rows]


def check(engine: SkippingEngine, images: Tensor, policies: Tensor, expected: Tensor) -> None:
    """AssertionError if the engine's logits are not those of the masked form."""
    found, _ = engine(images, policies)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    tolerance = 1e-4 if images.device.type == "cpu" else 1e-2  # there convolutions are in TF32
    assert error <= tolerance, f"the engine differs by {error:.1e} of the largest logit, expected at most {tolerance}"


def skipping_bench(
    batch: int = 256,
    rounds: int = 5,
    min_run_time: float = 1.0,
    device: torch.device | str = "cpu",
    network: str = "r110",
) -> dict[str, float]:
    """Figures of one batch size, the engine checked first.

    "full_s": seconds of the whole network an image; "policy_time", "policy_mult_adds": shares of the policy network;
    then for each case, named kept_kind such as 17_own: "mult_adds_17_own", "time_17_own" (shares of the whole network,
    the policy network in them) and "saving_17_own". ValueError: batch or rounds < 1, or an unknown network.
    """
    if rounds < 1 or batch < 1 or network not in NETWORKS:
        raise ValueError(
            f"rounds={rounds}, batch={batch}, network={network!r}: expected at least 1, one of {[*NETWORKS]}"
        )
    torch.manual_seed(0)
    made, device = NETWORKS[network], torch.device(device)
    model, policy_net = made.model().eval().to(device), made.policy_net().eval().to(device)
    images = torch.randn(max(batch, made.images), 3, made.size, made.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    batches, engine, whole = images.split(batch), SkippingEngine(model, policy_net), for_inference(model)
    cost = costs(model, policy_net, made.size)
    full = cost.fixed + sum(cost.blocks)

    runs = {"full": lambda: [in_chunks(whole, x) for x in batches]}
    runs["policy"] = lambda: [engine.policies(x) for x in batches]
    share = {}
    for kept in made.keeps:
        for kind in ("own", "few"):
            policies = random_policies(len(images), model.num_blocks, kept, kind).to(device)
            with torch.inference_mode():
                check(engine, images, policies, model(images, policies))
            share[f"{kept}_{kind}"] = mult_adds(cost, policies).mean().item() / full
            parts = list(zip(batches, policies.split(batch), strict=True))
            runs[f"{kept}_{kind}"] = lambda parts=parts: [(engine.policies(x), engine(x, u)) for x, u in parts]
    measured = latency(runs, min_run_time, rounds)
    figures = {"full_s": measured["full"].median / len(images)}
    figures |= {"policy_time": measured["policy"].ratio, "policy_mult_adds": cost.policy / full}
    for name in share:
        time = measured[name].ratio
        figures |= {f"mult_adds_{name}": share[name], f"time_{name}": time}
        figures |= {f"saving_{name}": (1 - time) / (1 - share[name])}
    return figures


def forms_bench(batch: int = 256, rounds: int = 5, device: torch.device | str = "cpu") -> dict[str, float]:
    """Milliseconds an image of the whole R-110 in the forms that the baseline was chosen from."""
    torch.manual_seed(0)
    model = resnet_cifar(110).eval().to(device)
    images, folded = torch.randn(batch, 3, 32, 32, device=device), for_inference(model)
    contiguous = for_inference(model).to(memory_format=torch.contiguous_format)

    def plain(network: nn.Module) -> Tensor:
        with torch.inference_mode():
            return network(images)

    runs = {"as trained": lambda: plain(model), "folded": lambda: plain(contiguous)}
    for chunk in (16, 32, 64, 128, batch):
        if chunk <= batch:
            runs[f"folded, channels_last, chunks of {chunk}"] = lambda chunk=chunk: in_chunks(folded, images, chunk)
    return {name: 1e3 * t.median / batch for name, t in latency(runs, 0.5, rounds).items()}


def table(figures: dict[str, float], batch: int, network: str = "r110") -> str:
    """One row a case."""
    lines = [f"{network}, batch {batch}: the whole network {1e3 * figures['full_s']:.2f} ms an image"]
    lines.append(f"{'kept':>10}{'mult-adds':>11}{'time':>8}{'saving':>8}")
    lines.append(f"{'policy':>10}{figures['policy_mult_adds']:11.3f}{figures['policy_time']:8.3f}")
    for key in figures:
        if key.startswith("saving_"):
            case = key.removeprefix("saving_")
            values = [figures[f"{name}_{case}"] for name in ("mult_adds", "time", "saving")]
            lines.append(f"{case.replace('_', ' '):>10}{values[0]:11.3f}{values[1]:8.3f}{values[2]:8.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--network", nargs="+", default=["r110"], choices=NETWORKS)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32, 1])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with exit_codes():
        device = select_device(args.device)
        for name, ms in forms_bench(max(args.batch), args.rounds, device).items():
            print(f"{name:44}{ms:8.2f} ms an image")
        for network in args.network:
            for batch in args.batch:
                print(table(skipping_bench(batch, args.rounds, 1.0, device, network), batch, network), flush=True)


if __name__ == "__main__":
    main()
