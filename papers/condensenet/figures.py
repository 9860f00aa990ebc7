"""Draw the paper's figures from the committed records: `make figures PAPER=condensenet`.

loss-<record>.png    training loss of every arm, the prunings of the learned one marked (paper figure 4)
arms.png             test error of learned, static, random and dense 1x1 convolutions, one line a seed
speed.png            time of each form of CondenseNet-86 against its multiply-adds
"""

from functools import partial
from pathlib import Path

from common.results import figures
from common.results.figures import plt, save

ARMS = {"learned": "#4e79a7", "static": "#f28e2b", "random": "#b07aa1", "dense": "#888888"}


def draw_loss(record: dict, path: Path) -> None:
    """Mean training loss between the points of the curve, against the step."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for arm, colour in ARMS.items():
        lines = [line for line in record["curve"] if line["stage"] == arm and "train_loss" in line]
        axes.plot(
            [line["step"] for line in lines], [line["train_loss"] for line in lines], color=colour, lw=1.2, label=arm
        )
    for line in record["curve"]:
        if line["stage"] == "learned" and "loss_after" in line:
            axes.axvline(line["step"], color="#bbbbbb", lw=0.8, ls=":", zorder=0)
            axes.plot([line["step"]] * 2, [line["loss_before"], line["loss_after"]], "k_-", lw=0.8, ms=6)
    axes.plot([], [], "k_-", lw=0.8, ms=6, label="learned: one batch before and after a pruning")
    axes.set(xlabel="step", ylabel="training loss [nats]")
    axes.legend(fontsize=7)
    save(figure, path)


def draw_arms(records: list[dict], path: Path) -> None:
    """Test error of the arms of every committed training experiment."""
    experiments = list(dict.fromkeys(record["experiment"] for record in records))
    figure, axes = plt.subplots(1, len(experiments), figsize=(4 * len(experiments), 3.2), squeeze=False)
    for axis, experiment in zip(axes[0], experiments, strict=True):
        for record in (r for r in records if r["experiment"] == experiment):
            errors = [record["metrics"][f"{arm}_test_error"]["last"] for arm in ARMS]
            axis.plot(range(len(ARMS)), errors, marker="o", lw=1, label=f"seed {record['seed']}")
        axis.set_xticks(range(len(ARMS)), ARMS)
        axis.set(title=f"{experiment} ({record['tier']})", ylabel="test error [%]")
        axis.legend(fontsize=7)
    save(figure, path)


def draw_speed(record: dict, path: Path) -> None:
    """Time of every form relative to the better dense layout (bars), and its share of the dense mult-adds (ticks)."""
    batches = [key for key in record["artifacts"] if key.startswith("batch_")]
    figure, axes = plt.subplots(1, len(batches), figsize=(4.4 * len(batches), 3.4), squeeze=False, sharey=True)
    for axis, batch in zip(axes[0], batches, strict=True):
        rows = record["artifacts"][batch]
        for y, (row, r) in enumerate(rows.items()):
            axis.barh(y, 1 / r["speedup"], height=0.7, color="#4e79a7" if "engine" in row else "#f2b47e")
            axis.plot([1 / r["theory"]] * 2, [y - 0.4, y + 0.4], color="black", lw=1.2)
        axis.set_yticks(range(len(rows)), [row.replace("_", " ") for row in rows], fontsize=7)
        axis.set_xlabel("time / better dense layout; black: mult-adds", fontsize=8)
        axis.set_title(f"CondenseNet-86, {batch.replace('_', ' ')}, CPU", fontsize=9)
    axes[0, 0].invert_yaxis()
    save(figure, path)


def draw(records: list[dict], out: Path) -> None:
    trained = [record for record in records if "learned_test_error" in record["metrics"]]
    for record in trained:
        draw_loss(record, out / f"loss-{record['experiment']}-{record['tier']}-s{record['seed']}.png")
    if trained:
        draw_arms(trained, out / "arms.png")
    for record in records:
        if record["experiment"] == "speed" and record["seed"] == 0:
            draw_speed(record, out / "speed.png")


main = partial(figures.main, draw, __file__)

if __name__ == "__main__":
    main()
