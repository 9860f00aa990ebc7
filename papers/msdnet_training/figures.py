"""Draw the paper's figures from the committed records: `make figures PAPER=msdnet_training`.

anytime-<record>.png    accuracy of every exit against its multiply-adds, one line an arm (paper figures 4 and 5)
budgeted-<record>.png   budgeted prediction: accuracy against multiply-adds, and against milliseconds of the engine
exits-that-exit-<record>.png   time saved against multiply-adds saved by leaving early
gradients.png           norm of the first block's gradient against the number of exits (paper figure 3)
"""

from functools import partial
from pathlib import Path

from common.results import figures
from common.results.figures import plt, save
from common.results.records import name_of

ARMS = {
    "sum": ("plain sum", "#888888"),
    "last": ("GE, last scale", "#b07aa1"),
    "ge": ("GE", "#f28e2b"),
    "isc": ("GE + ISC", "#59a14f"),
    "ofa": ("GE + OFA", "#e15759"),
    "imta": ("GE + ISC + OFA", "#4e79a7"),
}


def draw_anytime(record: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.6))
    for arm, (name, colour) in ARMS.items():
        if arm in record["artifacts"]:
            costs = record["artifacts"][arm]["exit_mult_adds"]
            accuracies = [record["metrics"][f"{arm}_exit{i}_accuracy"]["last"] for i in range(1, len(costs) + 1)]
            axes.plot([c / 1e6 for c in costs], accuracies, marker="o", ms=3, lw=1.2, color=colour, label=name)
    axes.set(xlabel="multiply-adds [M]", ylabel="accuracy of the exit [%]")
    axes.legend(fontsize=7)
    save(figure, path)


def draw_budgeted(record: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.6), sharey=True)
    for arm, (name, colour) in ARMS.items():
        found = record["artifacts"].get(arm)
        if found:
            points = sorted((point["mult_adds"] / 1e6, point["accuracy"]) for point in found["budget_curve"])
            axes[0].plot(*zip(*points, strict=True), lw=1.2, color=colour, label=name)
            if "timed_budgets" in found:
                points = sorted((point["ms"], point["accuracy"]) for point in found["timed_budgets"])
                axes[1].plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, color=colour, label=name)
    axes[0].set(xlabel="mean multiply-adds an image [M]", ylabel="accuracy [%]")
    axes[1].set(xlabel="ms an image, batches of 256")
    axes[0].legend(fontsize=7)
    save(figure, path)


def draw_exits(record: dict, path: Path) -> None:
    """Share of the time against share of the multiply-adds that leaving early takes away; the diagonal is all of it."""
    figure, axes = plt.subplots(figsize=(4.4, 3.8))
    batches = sorted({row["batch"] for row in record["artifacts"]["rows"]})
    for batch, colour in zip(batches, ("#888888", "#f28e2b", "#4e79a7"), strict=False):
        rows = [row for row in record["artifacts"]["rows"] if row["batch"] == batch]
        points = sorted((1 - row["mult_adds"], 1 - row["time"]) for row in rows)
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, color=colour, label=f"batch {batch}")
    axes.plot([0, 1], [0, 1], color="#bbbbbb", lw=0.8, ls=":", zorder=0)
    axes.set(xlabel="multiply-adds saved", ylabel="time saved")
    axes.legend(fontsize=7)
    save(figure, path)


def draw_gradients(records: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(4.4, 3.4))
    for mode, arm in (("sum", "sum"), ("last", "last"), ("all", "ge")):
        name, colour = ARMS[arm]
        for record in records:
            metrics, exits = record["metrics"], record["config"]["exits"]
            norms = [metrics[f"{mode}_k{k}_norm"]["last"] / metrics[f"{mode}_k2_norm"]["last"] for k in exits]
            axes.plot(exits, norms, marker="o", ms=3, lw=1, color=colour, label=name if record is records[0] else None)
    axes.set(xlabel="exits", ylabel="gradient norm of block 1, relative to 2 exits")
    axes.legend(fontsize=7)
    save(figure, path)


def draw(records: list[dict], out: Path) -> None:
    for record in records:
        name = f"{name_of(record)}.png"
        if "imta_mean_accuracy" in record["metrics"]:
            draw_anytime(record, out / f"anytime-{name}")
            draw_budgeted(record, out / f"budgeted-{name}")
        if record["experiment"] == "exits-that-exit" and record["seed"] == 0:
            draw_exits(record, out / name)
    if mechanism := [record for record in records if record["experiment"] == "mechanism"]:
        draw_gradients(mechanism, out / "gradients.png")


main = partial(figures.main, draw, __file__)

if __name__ == "__main__":
    main()
