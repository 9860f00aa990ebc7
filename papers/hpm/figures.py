"""Draw figures from the committed records: `make figures PAPER=hpm`.

arms.png      mAP of every arm on clean, shifted and occluded queries, mean and deviation over the seeds
pooling.png   time of horizontal pyramid pooling in slices, by adaptive pools, and in one pass
"""

import statistics
from functools import partial
from pathlib import Path

from common.results import figures
from common.results.figures import plt, save

ARMS = {
    "global": "1",
    "two": "1, 2",
    "three": "1, 2, 4",
    "pyramid": "1, 2, 4, 8",
    "stripes": "8 alone",
    "avg": "average\nalone",
    "max": "maximum\nalone",
    "erasing": "erasing",
}
KINDS = {"clean": "#4e79a7", "shifted": "#f28e2b", "occluded": "#e15759"}


def draw_arms(records: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.6, 3.4))
    for k, (kind, colour) in enumerate(KINDS.items()):
        values = [[r["metrics"][f"{arm}_{kind}_map"]["last"] for r in records] for arm in ARMS]
        means = [statistics.fmean(v) for v in values]
        spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
        at = [position + 0.27 * (k - 1) for position in range(len(ARMS))]
        axes.bar(at, means, 0.25, yerr=spread, color=colour, label=kind, error_kw={"lw": 0.8})
    axes.set_xticks(range(len(ARMS)), ARMS.values(), fontsize=8)
    axes.set(
        ylabel="mAP [%]", xlabel=f"scales (all: 480 numbers, {len(records)} seeds); the last three have all scales"
    )
    axes.legend(fontsize=8)
    save(figure, path)


def draw_pooling(records: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(4.6, 3.2))
    names = {"slices": "15 slices", "adaptive": "8 adaptive pools", "torch": "one pass"}
    for k, (mode, colour) in enumerate((("fwd", "#4e79a7"), ("full", "#a0cbe8"))):
        values = [statistics.median(r["metrics"][f"{impl}_{mode}_ms"]["last"] for r in records) for impl in names]
        label = "forward" if mode == "fwd" else "with gradients"
        axes.bar(
            [position + 0.36 * (k - 0.5) for position in range(len(names))], values, 0.34, color=colour, label=label
        )
    axes.set_xticks(range(len(names)), names.values())
    axes.set(ylabel="ms, map (16, 2048, 24, 8)")
    axes.legend(fontsize=8)
    save(figure, path)


def draw(records: list[dict], out: Path) -> None:
    of = {name: [record for record in records if record["experiment"] == name] for name in ("arms", "speed")}
    if of["arms"]:
        draw_arms(of["arms"], out / "arms.png")
    if of["speed"]:
        draw_pooling(of["speed"], out / "pooling.png")


main = partial(figures.main, draw, __file__)

if __name__ == "__main__":
    main()
