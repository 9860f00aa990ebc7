"""Draw the paper's figures from the committed records: `make figures PAPER=gfnet`.

anytime-<record>.png    accuracy after every step against multiply-adds, and under a budget (paper figure 4)
patches-<record>.png    the first test images with the crops that the policy chose (paper figure 6)
speed-<record>.png      budgeted prediction: accuracy against images a second of the engine (paper figure 5, on a CPU)
exits.png               time saved against multiply-adds saved by stopping early
"""

from functools import partial
from pathlib import Path

from common import datasets
from common.results import figures
from common.results.figures import plt, save
from common.results.records import name_of

ARMS = {
    "policy": ("crops of the policy", "#4e79a7"),
    "random": ("random crops", "#b07aa1"),
    "centre": ("centre crops", "#59a14f"),
    "stage2": ("policy, before stage III", "#a0cbe8"),
    "stage1": ("random, before stage III", "#d4a6c8"),
    "bigger": ("bigger single glance", "#e15759"),
}
COLOURS = ("#ff7f0e", "#17becf", "#d62728", "#9467bd")  # of the crops, in their order


def draw_anytime(record: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5.4, 3.8))
    for arm, (name, colour) in ARMS.items():
        costs = [v["last"] / 1e6 for k, v in sorted(record["metrics"].items()) if _is_step(k, arm, "mult_adds")]
        accuracies = [v["last"] for k, v in sorted(record["metrics"].items()) if _is_step(k, arm, "accuracy")]
        axes.plot(costs, accuracies, marker="o", ms=4, lw=1.2, color=colour, label=name)
    curve = record["artifacts"]["policy"]["by_budget"]
    points = sorted((point["mult_adds"] / 1e6, point["accuracy"]) for point in curve)
    axes.plot(*zip(*points, strict=True), lw=1.2, ls="--", color=ARMS["policy"][1], label="policy, stopping early")
    axes.set(xlabel="multiply-adds an image, on average [M]", ylabel="accuracy [%]")
    axes.legend(fontsize=7)
    save(figure, path)


def _is_step(key: str, arm: str, what: str) -> bool:
    step = key.removeprefix(f"{arm}_step").removesuffix(f"_{what}")
    return key == f"{arm}_step{step}_{what}" and step.isdigit()


def draw_patches(record: dict, data: Path, path: Path) -> None:
    settings = record["config"]["stage1"]
    size, patch = settings["image_size"], settings["patch"]
    places = record["artifacts"]["policy"]["places"]
    images = datasets.load(settings["dataset"], "test", data, n=len(places), size=size).images
    figure, axes = plt.subplots(2, -(-len(places) // 2), figsize=(12, 3.4))
    for axis, image, where in zip(axes.flat, images, places, strict=True):
        axis.imshow(image.numpy())
        for (row, column), colour in zip(where, COLOURS, strict=False):
            corner = int(column * (size - patch)), int(row * (size - patch))
            axis.add_patch(plt.Rectangle(corner, patch, patch, fill=False, lw=1.4, edgecolor=colour))
        axis.axis("off")
    save(figure, path)


def draw_speed(record: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(4.4, 3.4))
    points = [(p["images_s"], p["accuracy"]) for p in record["artifacts"]["policy"]["timed_budgets"]]
    axes.plot(*zip(*points[1:], strict=True), marker="o", ms=4, lw=1.2, color="#4e79a7", label="stopping early")
    axes.plot(*points[0], marker="s", ms=5, lw=0, color="#e15759", label="all steps")
    axes.set(xlabel="images a second", ylabel="accuracy [%]")
    axes.legend(fontsize=7)
    save(figure, path)


def draw_exits(records: list[dict], path: Path) -> None:
    """Share of the time against share of the multiply-adds that stopping early saves; the diagonal is all of it."""
    figure, axes = plt.subplots(figsize=(4.2, 3.8))
    for batch, colour in ((256, "#4e79a7"), (32, "#f28e2b"), (1, "#e15759")):
        rows = [row for r in records for row in r["artifacts"]["rows"] if row["batch"] == batch]
        points = [(1 - row["mult_adds"], 1 - row["time"]) for row in rows]
        axes.scatter(*zip(*points, strict=True), s=16, color=colour, label=f"batch {batch}")
    axes.plot([0, 1], [0, 1], color="#bbbbbb", lw=0.8, ls=":", zorder=0)
    axes.set(xlabel="multiply-adds saved", ylabel="time saved")
    axes.legend(fontsize=7)
    save(figure, path)


def draw(records: list[dict], out: Path) -> None:
    if exits := [record for record in records if record["experiment"] == "exits"]:
        draw_exits(exits, out / "exits.png")
    trained = [record for record in records if "bigger_step1_accuracy" in record["metrics"]]
    for record in trained:
        draw_anytime(record, out / f"anytime-{name_of(record)}.png")
        draw_speed(record, out / f"speed-{name_of(record)}.png")
    for record in trained:  # last: these need the images, which may not be there
        if record["seed"] == 0:
            draw_patches(record, datasets.data_root(), out / f"patches-{name_of(record)}.png")


main = partial(figures.main, draw, __file__)

if __name__ == "__main__":
    main()
