"""Draw the paper's figures from the published cells and the committed records: `make figures PAPER=pc_darts`.

    cells-<name>.png   a genotype as a graph (paper figures 4 and 5); every published one and every searched one on record
    search.png         test error of searched against random cells, one line a seed
    memory.png         bytes kept for backward and weights of the supernet against K

One genotype of your own: python -m papers.pc_darts.figures --genotype runs/pc_darts/search-quick-s0/genotype.json
"""

from functools import partial
from pathlib import Path

from common.errors import UserError
from common.results import figures
from common.results.figures import plt, save

from .genotypes import PUBLISHED, Genotype

COLOURS = {
    "max_pool": "#b07aa1",
    "avg_pool": "#9c755f",
    "skip_con": "#888888",
    "sep_conv": "#4e79a7",
    "dil_conv": "#f28e2b",
}
PLACES = {0: (0, 3.2), 1: (0, 0.9), 2: (2, 4.3), 3: (3.9, -0.1), 4: (5.8, 4.3), 5: (7.7, -0.1), "out": (9.3, 2)}
NAMES = {0: "c_{k-2}", 1: "c_{k-1}", 2: "0", 3: "1", 4: "2", 5: "3", "out": "c_k"}


def draw_cell(axes, edges, concat, title: str) -> None:
    """One cell: states as circles, operations as labelled arrows, the concatenation dotted."""
    arrows = [(source, 2 + i // 2, op) for i, (op, source) in enumerate(edges)] + [(n, "out", "") for n in concat]
    for source, target, op in arrows:
        (x0, y0), (x1, y1) = PLACES[source], PLACES[target]
        bend = 0.12 if op else 0.0
        style = {"color": COLOURS.get(op[:8], "#bbbbbb"), "linestyle": "-" if op else ":", "shrinkA": 13, "shrinkB": 13}
        axes.annotate(
            "", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "connectionstyle": f"arc3,rad={bend}", **style}
        )
        if op:
            x, y = x0 + 0.68 * (x1 - x0), y0 + 0.68 * (y1 - y0)
            x, y = x + bend * 0.44 * (y1 - y0), y - bend * 0.44 * (x1 - x0)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axes.text(x, y, op.replace("_connect", "").replace("_", " "), fontsize=6.5, ha="center", va="center",
                      color=style["color"], bbox=box)  # fmt: skip
    for state, (x, y) in PLACES.items():
        axes.text(x, y, f"${NAMES[state]}$", fontsize=9, ha="center", va="center",
                  bbox={"boxstyle": "circle,pad=0.35", "facecolor": "#eef3ea", "edgecolor": "#59744f"})  # fmt: skip
    axes.set(xlim=(-0.7, 10), ylim=(-0.8, 5), title=title)
    axes.axis("off")


def draw_genotype(genotype: Genotype, name: str, path: Path) -> None:
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 6.4))
    draw_cell(axes[0], genotype.normal, genotype.normal_concat, f"{name}: normal cell")
    draw_cell(axes[1], genotype.reduce, genotype.reduce_concat, f"{name}: reduction cell")
    save(figure, path)


def draw_search(records: list[dict], path: Path) -> None:
    """Searched against random cells: every committed record of an experiment that trains both."""
    figure, axes = plt.subplots(figsize=(5, 3.4))
    for record in records:
        metrics = record.get("metrics", {})
        if "searched_test_error" in metrics:
            label = f"{record['experiment']} {record['tier']}, seed {record['seed']}"
            errors = [metrics[f"{arm}_test_error"]["last"] for arm in ("random", "searched")]
            axes.plot([0, 1], errors, marker="o", label=label)
    axes.set_xticks([0, 1], ["random cells (mean)", "searched cell"])
    axes.set_ylabel("test error [%]")
    axes.set_xlim(-0.3, 1.3)
    axes.legend(fontsize=7)
    save(figure, path)


def draw_memory(records: list[dict], path: Path) -> None:
    """What partial channels save: the supernet against K."""
    costs = next((r["metrics"] for r in records if r["experiment"] == "costs" and r["status"] == "ok"), None)
    if costs is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8))
    rows = (("saved_plain_k", "kept for backward [MiB/image]", 1), ("supernet_weights_k", "weights [M]", 1e6))
    for axis, (key, label, unit) in zip(axes, rows, strict=True):
        axis.bar(["1", "2", "4"], [costs[f"{key}{K}"]["last"] / unit for K in (1, 2, 4)], color="#4e79a7")
        axis.set(xlabel="K", ylabel=label)
    save(figure, path)


def searched_genotypes(records: list[dict]) -> dict[str, Genotype]:
    found = {}
    for record in records:
        for stage, artifacts in record.get("artifacts", {}).items():
            if (
                stage.startswith("search")
                and stage != "searched"
                and isinstance(artifacts, dict)
                and "genotype" in artifacts
            ):
                parts = artifacts["genotype"]
                cells = [tuple((op, source) for op, source in parts[part]) for part in ("normal", "reduce")]
                genotype = Genotype(cells[0], tuple(parts["normal_concat"]), cells[1], tuple(parts["reduce_concat"]))
                found[f"{record['experiment']}-{record['tier']}-s{record['seed']}-{stage}"] = genotype.validate()
    return found


def draw(records: list[dict], out: Path, genotype: Path | None = None) -> None:
    if genotype:
        try:
            found = Genotype.from_json(genotype.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{genotype}: {error}") from None
        draw_genotype(found, genotype.parent.name, out / f"cells-{genotype.parent.name}.png")
        return
    for name, found in (PUBLISHED | searched_genotypes(records)).items():
        draw_genotype(found, name, out / f"cells-{name}.png")
    draw_search(records, out / "search.png")
    draw_memory(records, out / "memory.png")


main = partial(figures.main, draw, __file__, genotype="draw only this genotype.json")

if __name__ == "__main__":
    main()
