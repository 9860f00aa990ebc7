"""Draw the paper's figures from the committed records: `make figures PAPER=condensenet`.

loss-<record>.png    training loss of every arm, the prunings of the learned one marked (paper figure 4)
arms.png             test error of learned, static, random and dense 1x1 convolutions, one line a seed
speed.png            time of each form of CondenseNet-86 against its multiply-adds
"""

import argparse
from pathlib import Path

from common.cli import exit_codes
from common.results.figures import plt, save
from common.results.records import load_records

FOLDER = Path(__file__).parent
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
    """Time an image of every form against its multiply-adds, both relative to the better dense layout; ideal: diagonal."""
    batches = [key for key in record["artifacts"] if key.startswith("batch_")]
    figure, axes = plt.subplots(1, len(batches), figsize=(4.2 * len(batches), 3.6), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        for row, r in record["artifacts"][batch].items():
            x, y = 1 / r["theory"], 1 / r["speedup"]
            axis.plot(x, y, "o", color="#4e79a7" if "engine" in row else "#f28e2b")
            axis.annotate(row.replace("_", " "), (x, y), fontsize=6.5, xytext=(4, 2), textcoords="offset points")
        limit = axis.get_ylim()[1]
        axis.plot([0, 2], [0, 2], color="#bbbbbb", lw=0.8, ls=":", zorder=0)
        axis.set(xlim=(0, 2), ylim=(0, limit), xlabel="mult-adds / dense", ylabel="time / better dense layout")
        axis.set_title(f"CondenseNet-86, {batch.replace('_', ' ')}, 2 CPU threads", fontsize=9)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/condensenet/figures"), help="folder for the PNG files")
    args = parser.parse_args(argv)
    with exit_codes():
        records = [record for record in load_records(FOLDER) if record["status"] == "ok"]
        trained = [record for record in records if "learned_test_error" in record["metrics"]]
        for record in trained:
            draw_loss(record, args.out / f"loss-{record['experiment']}-{record['tier']}-s{record['seed']}.png")
        if trained:
            draw_arms(trained, args.out / "arms.png")
        for record in records:
            if record["experiment"] == "speed" and record["seed"] == 0:
                draw_speed(record, args.out / "speed.png")


if __name__ == "__main__":
    main()
