"""Draw the paper's figures from the committed records: `make figures PAPER=infopro`.

memory.png             memory against error: R-110 as reported (table 3), over the bytes counted here; the arms of a tier
time.png               memory against time of a step: end to end, gradient checkpointing, InfoPro*
probes-<tier>.png      what every unit keeps of image and label, one line an arm (paper figure 3)
"""

from functools import partial
from pathlib import Path
from statistics import fmean

from common.results import figures
from common.results.figures import plt, save

ARMS = {
    "end_to_end": ("end to end", "#333333"),
    "greedy_k2": ("greedy, K = 2", "#e8a0a0"),
    "greedy": ("greedy", "#e15759"),
    "dgl": ("DGL", "#f28e2b"),
    "softmax": ("InfoPro, softmax", "#4e79a7"),
    "contrast": ("InfoPro, contrastive", "#59a14f"),
    "contrast_alone": ("contrastive alone", "#b07aa1"),
}
REPORTED_ERROR = {1: 6.50, 2: 6.41, 3: 6.74, 4: 6.93}
RIVALS = {"end_to_end": "end to end", "checkpointed": "checkpointing", "k2": "K = 2", "k3": "K = 3", "k4": "K = 4"}


def mean(records: list[dict], name: str) -> float:
    return fmean(record["metrics"][name]["last"] for record in records)


def draw_memory(costs: dict | None, tiers: dict[str, list[dict]], path: Path) -> None:
    panels = [("R-110, CIFAR-10: reported error, counted memory", None)] if costs else []
    panels += [(f"{name}, {records[0]['config']['greedy']['network']}", records) for name, records in tiers.items()]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), squeeze=False)
    for axis, (title, records) in zip(axes[0], panels, strict=True):
        if records is None:
            points = [(costs["metrics"][f"star_k{K}_mib"]["last"], e, f"K = {K}") for K, e in REPORTED_ERROR.items()]
            axis.plot([x for x, *_ in points], [y for _, y, _ in points], "o-", color="#4e79a7", lw=1)
        else:
            points = []
            for arm, (name, colour) in ARMS.items():
                if f"{arm}_error" in records[0]["metrics"]:
                    x, y = (mean(records, f"{arm}_{what}") for what in ("saved_mib", "error"))
                    errors = [record["metrics"][f"{arm}_error"]["last"] for record in records]
                    axis.errorbar(x, y, [[y - min(errors)], [max(errors) - y]], fmt="o", ms=4, color=colour, capsize=2)
                    points.append((x, y, name))
        for x, y, name in points:
            axis.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.set_title(title, fontsize=8)
        axis.set(xlabel="kept for backward [MiB an image]", ylabel="test error [%]")
        axis.margins(x=0.25)
    save(figure, path)


def draw_time(records: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(4.6, 3.6))
    for rival, name in RIVALS.items():
        x, y = mean(records, f"{rival}_mib"), mean(records, f"{rival}_time")
        axis.plot(x, y, "o", color="#e15759" if rival == "checkpointed" else "#4e79a7")
        axis.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel="peak of a step [MiB an image]", ylabel="time of a step over end to end")
    axis.margins(x=0.2, y=0.15)
    save(figure, path)


def draw_probes(records: list[dict], path: Path) -> None:
    titles = {
        "bce": "image: cross-entropy of a decoder [nats]",
        "head_error": "label: error of a convolutional classifier [%]",
        "linear_error": "label: error of a linear classifier [%]",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, (what, title) in zip(axes, titles.items(), strict=True):
        for arm, found in records[0]["artifacts"]["probes"].items():
            runs = [record["artifacts"]["probes"][arm][what] for record in records]
            values = [fmean(column) for column in zip(*runs, strict=True)]
            name, colour = ARMS[arm]
            axis.plot(found["points"], values, "o-", ms=3, lw=1.2, color=colour, label=name)
        axis.set(xlabel="unit (0: the stem)", ylabel=title)
    axes[0].legend(fontsize=7)
    save(figure, path)


def draw(records: list[dict], out: Path) -> None:
    of = {name: [r for r in records if r["experiment"] == name] for name in ("costs", "step", "arms", "c10-arms")}
    tiers = {name: of[key] for name, key in (("digits", "arms"), ("CIFAR-10 subset", "c10-arms")) if of[key]}
    if of["costs"] or tiers:
        draw_memory(of["costs"][0] if of["costs"] else None, tiers, out / "memory.png")
    if of["step"]:
        draw_time(of["step"], out / "time.png")
    for name, mine in tiers.items():
        draw_probes(mine, out / f"probes-{name.split()[0].lower()}.png")


main = partial(figures.main, draw, __file__)

if __name__ == "__main__":
    main()
