"""Draw the paper's figures from the committed records: `make figures PAPER=blockdrop`.

accuracy-<experiment>.png   accuracy against multiply-adds of all arms, one marker a seed (paper figure 3)
usage-<record>.png          share of the test images that keeps each block; mean blocks of each class (paper figures 5 and 6)
skipping.png                time saved against multiply-adds saved by the engine
"""

from functools import partial
from pathlib import Path

from common.results import figures
from common.results.figures import plt, save
from common.results.records import name_of

ARMS = {
    "full": ("full network", "#888888"),
    "curriculum": ("after the curriculum", "#bab0ac"),
    "learned": ("BlockDrop", "#4e79a7"),
    "gamma_small": ("BlockDrop, smaller gamma", "#a0cbe8"),
    "gamma_large": ("BlockDrop, larger gamma", "#1f3d5c"),
    "static": ("best static subset", "#e15759"),
    "spread": ("equal distances", "#f28e2b"),
    "first": ("first blocks", "#59a14f"),
    "random": ("random blocks", "#b07aa1"),
}


def draw_accuracy(records: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5.6, 3.8))
    for arm, (name, colour) in ARMS.items():
        found = [r["metrics"] for r in records if f"{arm}_mult_adds" in r["metrics"]]
        points = [(m[f"{arm}_mult_adds"]["last"] / 1e6, m[f"{arm}_accuracy"]["last"]) for m in found]
        if points:
            marker = "x" if arm == "static" else "o"  # often the same subset as another baseline
            axes.scatter(
                *zip(*points, strict=True), s=18, color=colour, marker=marker, label=name, zorder=2 + (marker == "x")
            )
    axes.set(xlabel="multiply-adds an image, policy network included [M]", ylabel="accuracy [%]")
    axes.legend(fontsize=7)
    save(figure, path)


def draw_usage(record: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for arm in ("gamma_small", "learned", "gamma_large"):
        name, colour = ARMS[arm]
        found = record["artifacts"].get(arm)
        if found:
            use = found["block_use"]
            axes[0].plot(range(1, len(use) + 1), use, marker="o", ms=3, lw=1.2, color=colour, label=name)
            axes[1].plot(found["class_blocks"], marker="o", ms=3, lw=0, color=colour)
    axes[0].set(xlabel="block", ylabel="share of images that keep it", ylim=(-0.03, 1.03))
    axes[1].set(xlabel="class", ylabel="mean blocks kept")
    axes[0].legend(fontsize=7)
    save(figure, path)


def draw_skipping(records: list[dict], path: Path) -> None:
    """Share of the time against share of the multiply-adds that dropping blocks saves; the diagonal is all of it."""
    figure, axes = plt.subplots(figsize=(4.2, 3.8))
    for batch, colour in ((256, "#4e79a7"), (32, "#f28e2b"), (1, "#e15759")):
        rows = [row for r in records for row in r["artifacts"]["rows"] if row["batch"] == batch]
        cases = [name.removeprefix("mult_adds_") for name in rows[0] if name.startswith("mult_adds_")] if rows else []
        points = [(1 - row[f"mult_adds_{case}"], 1 - row[f"time_{case}"]) for row in rows for case in cases]
        if points:
            axes.scatter(*zip(*points, strict=True), s=16, color=colour, label=f"batch {batch}")
    axes.plot([0, 1], [0, 1], color="#bbbbbb", lw=0.8, ls=":", zorder=0)
    axes.set(xlabel="multiply-adds saved", ylabel="time saved", xlim=(0, 1), ylim=(-0.2, 1))
    axes.legend(fontsize=7)
    save(figure, path)


def draw(records: list[dict], out: Path) -> None:
    trained = [record for record in records if "learned_accuracy" in record["metrics"]]
    for experiment in sorted({record["experiment"] for record in trained}):
        mine = [record for record in trained if record["experiment"] == experiment]
        draw_accuracy(mine, out / f"accuracy-{experiment}.png")
        for record in mine:
            draw_usage(record, out / f"usage-{name_of(record)}.png")
    if skipping := [record for record in records if record["experiment"] == "skipping"]:
        draw_skipping(skipping, out / "skipping.png")


main = partial(figures.main, draw, __file__)

if __name__ == "__main__":
    main()
