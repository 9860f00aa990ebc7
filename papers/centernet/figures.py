"""Draw from the committed records: `make figures PAPER=centernet`.

false-discovery-<experiment>.png   false discovery against box size, as pairs, as triplets and with true centres
ablation-<experiment>.png          AP and false discovery of the arms, one marker a seed
loss-<experiment>.png              training loss of the arms

Detections are drawn by detect.py, from a checkpoint.
"""

import statistics
from functools import partial
from pathlib import Path

from common.results import figures
from common.results.figures import plt, save

WAYS = {"pairs": ("pairs", "#e15759"), "triplets": ("triplets", "#4e79a7"), "oracle": ("true centres", "#59a14f")}
ARMS = {
    "full": ("CenterNet", "#4e79a7"),
    "no_center_pooling": ("without center pooling", "#f28e2b"),
    "plain_corners": ("plain corner pools", "#59a14f"),
    "cornernet": ("CornerNet", "#e15759"),
}


def draw_false_discovery(records: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    for way, (name, colour) in WAYS.items():
        found = [record["artifacts"]["full"]["false_discovery_by_area"] for record in records]
        edges = [area**0.5 for area in found[0]["edges"]]
        middle, mean, low, high = [], [], [], []
        for k, values in enumerate(zip(*(one[way] for one in found), strict=True)):
            values = [value for value in values if value is not None]
            if values:
                middle.append((edges[k] + min(edges[k + 1], 1.5 * edges[k])) / 2)
                mean.append(statistics.fmean(values))
                low.append(min(values))
                high.append(max(values))
        axes.plot(middle, mean, marker="o", ms=3, lw=1.2, color=colour, label=name)
        axes.fill_between(middle, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="side of the box [pixels]", ylabel="false discovery rate [%]", ylim=(0, None))
    axes.legend(fontsize=7)
    save(figure, path)


def draw_arms(records: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(4.6, 3.6))
    for arm, (name, colour) in ARMS.items():
        for way, marker in (("triplets", "o"), ("pairs", "x")):
            metrics = [record["metrics"] for record in records if f"{arm}_{way}_ap" in record["metrics"]]
            points = [(m[f"{arm}_{way}_fd"]["last"], m[f"{arm}_{way}_ap"]["last"]) for m in metrics]
            if points:
                axes.scatter(*zip(*points, strict=True), s=18, color=colour, marker=marker, label=f"{name}, {way}")
    axes.set(xlabel="false discovery rate [%]", ylabel="AP [%]")
    axes.legend(fontsize=6, loc="lower left")  # few false boxes and little AP: there is nothing
    save(figure, path)


def draw_losses(records: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(4.6, 3.2))
    for arm, (name, colour) in ARMS.items():
        for i, record in enumerate(records):
            lines = [line for line in record["curve"] if line["stage"] == arm]
            steps, loss = [line["step"] for line in lines], [line["train_loss"] for line in lines]
            axes.plot(steps, loss, lw=0.9, color=colour, label=name if lines and not i else None)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend(fontsize=7)
    save(figure, path)


def draw(records: list[dict], out: Path) -> None:
    trained = [record for record in records if "full_triplets_ap" in record["metrics"]]
    for experiment in sorted({record["experiment"] for record in trained}):
        mine = [record for record in trained if record["experiment"] == experiment]
        draw_false_discovery(mine, out / f"false-discovery-{experiment}.png")
        draw_arms(mine, out / f"ablation-{experiment}.png")
        draw_losses(mine, out / f"loss-{experiment}.png")


main = partial(figures.main, draw, __file__)

if __name__ == "__main__":
    main()
