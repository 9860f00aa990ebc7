"""Claims and evidence as static web pages: `python -m common.results.site --out DIR` (make site OUT=dir).

index.html has every claim of every paper, <slug>.html one paper with its figures; records/ and figures/ hold what they
show. The folder asks nothing of the network: it opens from a disk as from a web server.
"""

import ast
import contextlib
import importlib
import io
import re
import shutil
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2

from common.cli import Parser, exit_codes
from common.errors import UserError
from common.results import claims, records, tables
from common.results.figures import plt, save
from common.results.verdicts import Verdict, number

PAGES = Path(__file__).parent / "pages"
MARKER = ".reproductions-site"  # only a folder that has it is ever replaced
KINDS = [kind for kinds in tables.GROUPS.values() for kind in kinds]


@dataclass(frozen=True)
class Row:
    """One claim as the pages show it. The sort keys are None where there is no number."""

    paper: claims.Paper
    claim: claims.Claim
    verdict: Verdict
    group: str
    reported: str
    reported_key: float | None
    reproduced_key: float | None
    tier: str
    fraction: float | None  # of the paper's training; None: nothing was trained, or nothing measured
    hardware: str
    records: list[tuple[int, str]]  # seed, file in records/<slug>/
    command: str | None

    @property
    def rank(self) -> int:
        return KINDS.index(self.verdict.kind)

    @property
    def suffix(self) -> str:
        """What the verdict's text says beyond its kind."""
        return self.verdict.text.removeprefix(self.verdict.kind).lstrip(",: ")

    @property
    def small(self) -> bool:
        return self.fraction is not None and self.fraction < 1


@dataclass(frozen=True)
class Figure:
    file: str
    alt: str
    label: str  # what sets it apart from others of the same description
    width: int
    height: int


def make_row(paper: claims.Paper, claim: claims.Claim, verdict: Verdict, found: dict[str, dict]) -> Row:
    used = [found[name] for name in verdict.records]
    fractions = [record["scale"]["fraction"] for record in used if "fraction" in record.get("scale", {})]
    first = re.search(r"-?\d[\d,]*\.?\d*(e[+-]\d+)?", verdict.reproduced)
    command = None
    if claim.run:
        seeds = [record["seed"] for record in used] or claim.run.seeds
        tier = verdict.tier or claim.run.tier
        listed = " ".join(map(str, seeds))
        command = f'make reproduce PAPER={paper.slug} CLAIM={claim.id} TIER={tier} SEEDS="{listed}"'
        command += f" DEVICE={claim.run.device}" if claim.run.device else ""
    return Row(
        paper=paper,
        claim=claim,
        verdict=verdict,
        group=next(name for name, kinds in tables.GROUPS.items() if verdict.kind in kinds),
        reported=tables.reported(claim),
        reported_key=claim.at_least if claim.kind == "ratio" else claim.reported and claim.reported.value,
        reproduced_key=float(first[0].replace(",", "")) if first else None,
        tier=verdict.tier,
        fraction=min(fractions, default=None),
        hardware=", ".join(sorted({record["hardware"].get("gpu") or record["hardware"]["cpu"] for record in used})),
        records=[(record["seed"], f"{name}.json") for name, record in zip(verdict.records, used, strict=True)],
        command=command,
    )


# ------------------------------------------------------------------------------------------------ figures
def draw(folder: Path, out: Path) -> str:
    """Have the folder's figures.py draw into `out`; returns its complaint where it lacked something, such as data."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            importlib.import_module(f"papers.{folder.name}.figures").main(["--out", str(out)])
    except SystemExit:
        return said.getvalue().strip()
    return ""


def draw_curves(found: list[dict], path: Path) -> None:
    """Training loss of one experiment: a colour a stage, a line a seed."""
    points = {}  # (stage, seed) -> lines of the curve
    for record in found:
        for line in record["curve"]:
            if "train_loss" in line:
                points.setdefault((line.get("stage") or line.get("arm") or "", record["seed"]), []).append(line)
    stages = list(dict.fromkeys(stage for stage, _ in points))
    unit = "step" if all("step" in line for lines in points.values() for line in lines) else "epoch"
    figure, axes = plt.subplots(figsize=(6.2, 3.4))
    for (stage, seed), lines in points.items():
        label = stage.replace("_", " ") if seed == found[0]["seed"] else None
        x, y = [line[unit] for line in lines], [line["train_loss"] for line in lines]
        axes.plot(x, y, marker=".", ms=3, lw=0.9, color=f"C{stages.index(stage) % 10}", label=label)
    axes.set(xlabel=unit, ylabel="training loss")
    if stages != [""]:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    with contextlib.redirect_stdout(io.StringIO()):
        save(figure, path)


def described(folder: Path) -> dict[str, str]:
    """Pattern of a figure's name -> what it shows, as the docstring of figures.py and the README's images say."""
    found = {}
    if (folder / "figures.py").exists():
        text = ast.get_docstring(ast.parse((folder / "figures.py").read_text())) or ""
        for name, what in re.findall(r"^\s*(\S+\.png)\s+(.+)$", text, re.M):
            found["(.+)".join(re.escape(part) for part in re.split(r"<\w+>", name))] = what
    if (folder / "README.md").exists():
        for what, name in re.findall(r"!\[(.+?)\]\((\S+\.png)\)", (folder / "README.md").read_text()):
            found[re.escape(name)] = what
    return found | {"curve-(.+).png": "training loss of every stage, one line a seed"}


def make_figures(
    folder: Path, paper: claims.Paper, found: dict[str, dict], out: Path
) -> tuple[dict[str, list[Figure]], bool]:
    """Draw and copy all figures of a paper into `out`: (what they show -> those that show it, whether that is all)."""
    out.mkdir(parents=True)
    complaint = draw(folder, out) if (folder / "figures.py").exists() else ""
    if complaint:
        print(f"{paper.slug}: not every figure was drawn; {complaint}")
    for path in folder.glob("*.png"):
        shutil.copy(path, out)
    trained = [record for record in found.values() if any("train_loss" in line for line in record.get("curve", []))]
    for experiment, tier in dict.fromkeys((record["experiment"], record["tier"]) for record in trained):
        if not any(path.name.startswith(f"loss-{experiment}") for path in out.iterdir()):
            mine = [record for record in trained if (record["experiment"], record["tier"]) == (experiment, tier)]
            draw_curves(mine, out / f"curve-{experiment}-{tier}.png")
    descriptions, figures = described(folder), {}
    for path in sorted(out.rglob("*.png")):
        matches = ((re.fullmatch(pattern, path.name), what) for pattern, what in descriptions.items())
        match, what = next((pair for pair in matches if pair[0]), (None, path.stem.replace("-", " ")))
        label = " ".join(match.groups()) if match else ""
        width, height = struct.unpack(">II", path.read_bytes()[16:24])  # of the PNG's header
        if path.parent != out:
            label = f"{label}, on a GPU".lstrip(", ")
        alt = f"{paper.name}: {what}" + (f"; {label}" if label else "")
        file = f"figures/{paper.slug}/{path.relative_to(out).as_posix()}"
        figures.setdefault(what, []).append(Figure(file, alt, label, width, height))
    return figures, not complaint


# ------------------------------------------------------------------------------------------------ pages
def counts(rows: list[Row]) -> str:
    return tables.counts([(row.claim, row.verdict) for row in rows])


def write_site(out: Path, papers: Path) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"groups": tables.GROUPS, "counts": counts}
    environment.filters["number"] = number

    def page(name: str, template: str, **content) -> None:
        (out / name).write_text(environment.get_template(template).render(**content), encoding="utf-8")

    by_paper = {}
    for slug in claims.slugs(papers):
        started, folder = time.perf_counter(), papers / slug
        found = {path.stem: records.read_record(path) for path in sorted((folder / "results").glob("*.json"))}
        paper, judged = tables.judged(folder, list(found.values()))
        rows = [make_row(paper, claim, verdict, found) for claim, verdict in judged]
        (out / "records" / slug).mkdir(parents=True)
        for name in found:
            shutil.copy(folder / "results" / f"{name}.json", out / "records" / slug)
        figures, complete = make_figures(folder, paper, found, out / "figures" / slug)
        page(f"{slug}.html", "paper.html", paper=paper, rows=rows, figures=figures, complete=complete)
        by_paper[slug] = rows
        print(
            f"{slug}: {len(rows)} claims, {len(found)} records, {sum(map(len, figures.values()))} figures, "
            f"{time.perf_counter() - started:.1f} s"
        )
    page("index.html", "index.html", by_paper=by_paper, rows=[row for rows in by_paper.values() for row in rows])
    for name in ("style.css", "table.js"):
        shutil.copy(PAGES / name, out)
    (out / MARKER).write_text("written by make site; the next make site replaces this folder\n")


def build(out: Path, papers: Path = claims.PAPERS) -> None:
    """Write the site beside `out` and then rename it: `out` is the old site or the new one, never half of one.

    UserError when `out` holds anything but an earlier site.
    """
    out = out.resolve()
    if out.exists() and not (out / MARKER).is_file() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} is neither empty nor an earlier site; name another folder with OUT=")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; name another folder with OUT=") from None
    with temporary as name:
        new, old = Path(name) / "new", Path(name) / "old"
        new.mkdir()
        write_site(new, papers)
        if out.exists():
            out.rename(old)
        new.rename(out)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m common.results.site", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the site: new, empty or an earlier site")
    out = parser.parse_args(argv).out
    with exit_codes():
        build(out)
        print(f"{out}: open {out / 'index.html'}")


if __name__ == "__main__":
    main()
