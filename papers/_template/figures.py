"""Draw the paper's figures from the committed records: `make figures PAPER=_template`.

learning-<experiment>-<tier>.png   training loss of every arm, one line a seed
"""

from functools import partial
from pathlib import Path

from common.results import figures
from common.results.figures import plt, save

COLOURS = {"norm": "#4e79a7", "plain": "#e15759"}


def draw_learning(records: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5, 3.4))
    for record in records:
        for arm, colour in COLOURS.items():
            losses = [line["train_loss"] for line in record["curve"] if line["stage"] == arm]
            label = arm if record is records[0] else None
            axis.plot(range(1, len(losses) + 1), losses, color=colour, lw=1, label=label)
    axis.set(xlabel="epoch", ylabel="training loss")
    axis.legend(fontsize=8)
    save(figure, path)


def draw(records: list[dict], out: Path) -> None:
    for tier in sorted({record["tier"] for record in records if record["experiment"] == "arms"}):
        arms = [record for record in records if (record["experiment"], record["tier"]) == ("arms", tier)]
        draw_learning(arms, out / f"learning-arms-{tier}.png")


main = partial(figures.main, draw, __file__)

if __name__ == "__main__":
    main()
