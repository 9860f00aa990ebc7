"""Speed of the three parts that loop in the released code or in the usual evaluation: pooling, heads, ranking.

    python -m papers.hpm.bench [--device auto|cpu|cuda] [--rounds 3]

Pooling: one pass against 15 slices, forward and with gradients (kernels/bench.py). Heads: one grouped product against 15
separate convolutions, norms and classifiers. Ranking: common.metrics.retrieval against a loop over the queries, and the
seconds of Market-1501's 3,368 x 19,732 distances. All are checked for equal results first.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import exit_codes
from common.metrics.compute import latency
from common.metrics.retrieval import evaluate_distances
from common.runtime import select_device

from .kernels.bench import kernel_bench, kernel_table
from .model import PyramidHead, pyramid_loss

MARKET = (3368, 19_732)  # queries and gallery images


class SeparateHeads(nn.Module):
    """The heads as they are told: for each bin a 1x1 convolution, batch norm, ReLU and linear layer of its own."""

    def __init__(self, like: PyramidHead):
        super().__init__()
        bins, channels, dim = like.reduce.shape
        self.reduce = nn.ModuleList([nn.Conv2d(channels, dim, 1, bias=False) for _ in range(bins)])
        self.norm = nn.ModuleList([nn.BatchNorm2d(dim) for _ in range(bins)])
        self.classify = nn.ModuleList([nn.Linear(dim, like.classify.shape[2], bias=False) for _ in range(bins)])
        with torch.no_grad():
            for k in range(bins):
                self.reduce[k].weight.copy_(like.reduce[k].T[..., None, None])
                self.classify[k].weight.copy_(like.classify[k].T)

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """The sum of the cross entropies."""
        loss = 0
        for g, reduce, norm, classify in zip(pooled, self.reduce, self.norm, self.classify, strict=True):
            h = F.relu(norm(reduce(g[..., None, None]))).flatten(1)
            loss = loss + F.cross_entropy(classify(h), labels)
        return loss


def heads_bench(
    batch: int = 64, identities: int = 751, channels: int = 2048, rounds: int = 3, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Loss and all gradients of the 15 heads: "separate_ms", "grouped_ms", "speed_up" (median over rounds)."""
    torch.manual_seed(0)
    grouped = PyramidHead(15, channels, 256, identities).to(device)
    separate = SeparateHeads(grouped).to(device)
    pooled = torch.randn(15, batch, channels, device=device).requires_grad_()
    labels = torch.arange(batch, device=device) % identities

    def run_grouped() -> tuple[Tensor, Tensor]:
        loss = pyramid_loss(grouped.logits(grouped(pooled)), labels)
        return loss, torch.autograd.grad(loss, [pooled, *grouped.parameters()])[0]

    def run_separate() -> tuple[Tensor, Tensor]:
        loss = separate(pooled, labels)
        return loss, torch.autograd.grad(loss, [pooled, *separate.parameters()])[0]

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # or convolutions would be TF32, products float32
        for a, b in zip(run_grouped(), run_separate(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-7), "the grouped heads differ from separate ones"
        measured = latency({"grouped": run_grouped, "separate": run_separate}, 0.3, rounds)
    times = {f"{name}_ms": 1e3 * measured[name].median for name in ("separate", "grouped")}
    return times | {"speed_up": measured["separate"].ratio}


def drawn_market(queries: int, images: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Random distances with the make-up of Market-1501: 750 identities, 6 cameras, a fifth junk, a seventh distractors."""
    g = torch.Generator().manual_seed(0)
    gallery_ids = torch.randint(1, 751, (images,), generator=g)
    junk, distractors = images * 3819 // 19_732, images * 2798 // 19_732
    gallery_ids[:junk], gallery_ids[junk : junk + distractors] = -1, 0
    cameras = [torch.randint(1, 7, (n,), generator=g) for n in (queries, images)]
    labels = (torch.arange(queries) % 750 + 1, cameras[0], gallery_ids, cameras[1])
    return torch.rand(queries, images, generator=g), labels


def loop_over_queries(distances: Tensor, labels: tuple[Tensor, ...]) -> float:
    """mAP (A) as evaluation code is usually written: sort a row, take the junk out, accumulate precisions."""
    query_ids, query_cameras, gallery_ids, gallery_cameras = (t.numpy() for t in labels)
    found = []
    for row, y, c in zip(distances.numpy(), query_ids, query_cameras, strict=True):
        order = np.argsort(row, kind="stable")
        ids, cameras = gallery_ids[order], gallery_cameras[order]
        keep = ~(((ids == y) & (cameras == c)) | (ids == -1))
        hits = (ids == y)[keep]
        if hits.any():
            precision = hits.cumsum() / np.arange(1, len(hits) + 1)
            found.append(precision[hits].mean())
    return 100 * float(np.mean(found))


def ranking_bench(queries: int = MARKET[0], images: int = MARKET[1], sample: int = 200) -> dict[str, float]:
    """ "seconds" of all queries; of the first `sample` of them, "speed_up" over the loop. On the CPU."""
    distances, labels = drawn_market(queries, images)
    started = time.perf_counter()
    evaluate_distances(distances, *labels)
    seconds = time.perf_counter() - started
    few = distances[:sample].clone(), (labels[0][:sample], labels[1][:sample], *labels[2:])
    gap = abs(evaluate_distances(few[0], *few[1]).map_a - loop_over_queries(*few))
    assert gap < 1e-9, f"mAP differs from the loop's by {gap}"
    runs = {"counted": lambda: evaluate_distances(few[0], *few[1]), "loop": lambda: loop_over_queries(*few)}
    return {"seconds": seconds, "speed_up": latency(runs, 0.2, 3)["loop"].ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with exit_codes():
        device = select_device(args.device)
        print(kernel_table(kernel_bench(device.type)), flush=True)
        for title, figures in (
            ("heads", heads_bench(rounds=args.rounds, device=device)),
            ("ranking", ranking_bench()),
        ):
            print(title, ", ".join(f"{name} {value:.3g}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
