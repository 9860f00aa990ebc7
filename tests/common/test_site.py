"""The static pages: they show what tables.py computes, all of it, once; they need nothing but their own folder."""

import html
import importlib
import json
import re
import shlex
import shutil
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from common.errors import UserError
from common.results import claims, reproduce, tables
from common.results import site as site_module

SLUGS = claims.slugs()
HOSTILE = "<script>alert('x')</script> & \"><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """`tags`: all start tags with attributes; `rows`: of the claims table, {class of the cell: its text, "tr": attributes}."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.rows, self.cell, self.table, self.text = [], [], None, None, ""
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "table":
            self.table = attributes["class"]
        if self.table and tag == "tr":
            self.rows.append({"tr": attributes, "table": self.table})
        if self.table and tag in ("td", "th"):
            self.cell = attributes["class"].split()[-1 if self.table == "papers" else 0]
            self.rows[-1][self.cell] = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None
        if tag == "table":
            self.table = None

    def handle_data(self, data):
        self.text += data
        if self.cell:
            self.rows[-1][self.cell] += data

    def claims(self) -> list[dict]:
        return [row for row in self.rows if row["table"] == "claims" and "data-verdict" in row["tr"]]


read, judged = cache(Page), cache(tables.judged)  # of the shared site and this repository: nobody changes them


def words(text: str) -> str:
    return " ".join(text.split())


def small_house(tmp_path: Path, slug: str = "hpm", change=lambda paper: None, with_records: bool = True) -> Path:
    """A folder of papers with one paper: paper.yaml of `slug`, changed, and its records; no figures.py."""
    source, folder = claims.PAPERS / slug, tmp_path / "papers" / slug
    (folder / "configs").mkdir(parents=True)
    paper = yaml.safe_load((source / "paper.yaml").read_text())
    change(paper)
    (folder / "paper.yaml").write_text(yaml.safe_dump(paper))
    if with_records:
        shutil.copytree(source / "results", folder / "results")
    return tmp_path / "papers"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------ what is shown
@pytest.mark.parametrize("slug", SLUGS)
def test_every_claim_is_shown_once_as_the_tables_have_it(site, slug):
    _, expected = judged(claims.PAPERS / slug)
    index = [row for row in read(site / "index.html").claims() if row["tr"]["data-paper"] == slug]
    for rows in (index, read(site / f"{slug}.html").claims()):
        assert len(rows) == len(expected)
        for row, (claim, verdict) in zip(rows, expected, strict=True):
            text, unit = words(row["claim"]), f"[{claim.metric.unit}]" if claim.metric.unit else ""
            assert text.startswith(words(f"{claim.id} {claim.what} {unit}"))
            kind, suffix = row["tr"]["data-verdict"], words(row["verdict"]).split(" ", 1)[1]
            assert kind == verdict.kind
            assert re.sub("[,:]", "", suffix) == re.sub("[,:]", "", words(verdict.text))
            assert row["kind"] == claim.kind
            assert row["data"] == claim.dataset.id
            assert row["reported"] == tables.reported(claim)
            assert row["reproduced"] == verdict.reproduced
            assert row["scale"].split()[:1] == [verdict.tier][: bool(verdict.tier)]
            assert bool(row["hardware"]) == bool(verdict.records)
            seeds = [str(json.loads(record_file(slug, name).read_text())["seed"]) for name in verdict.records]
            assert words(row["evidence"]).split("command")[0].split()[1:] == seeds


def record_file(slug: str, name: str) -> Path:
    return claims.PAPERS / slug / "results" / f"{name}.json"


def test_index_shows_all_papers_and_the_counts_of_the_summary(site):
    page = read(site / "index.html")
    assert len(page.claims()) == sum(len(claims.load_paper(claims.PAPERS / slug).claims) for slug in SLUGS)
    shown = [row for row in page.rows if row["table"] == "papers"][1:]
    for row, slug in zip(shown, SLUGS, strict=True):
        paper, rows = judged(claims.PAPERS / slug)
        assert row["title"] == f"{paper.name} {paper.venue}"
        groups = {name.replace(" ", "-"): str(len(mine)) for name, mine in tables.grouped(rows).items()}
        assert {name: row[name] for name in ("count", *groups)} == {"count": str(len(rows)), **groups}


def test_index_begins_with_what_the_papers_stand_for(site):
    """Words of paper.yaml, verdict and numbers of the claim, and a link to it."""
    top = (site / "index.html").read_text().split('<dl class="headlines">')[1].split("</dl>")[0]
    items = re.findall(r"<dd>(.+?)</dd>", top, re.S)
    expected = []
    for slug in SLUGS:
        paper, rows = judged(claims.PAPERS / slug)
        of = {claim.id: verdict for claim, verdict in rows}
        expected += [(slug, claim_id, says, of[claim_id]) for claim_id, says in paper.headline.items()]
    for item, (slug, claim_id, says, verdict) in zip(items, expected, strict=True):
        assert f'href="{slug}.html#{claim_id}"' in item
        assert html.escape(says) in item
        assert f"</span> {verdict.kind}</span>" in item
        assert verdict.reproduced in item


@pytest.mark.parametrize("slug", SLUGS)
def test_records_are_copied_whole(site, slug):
    committed = contents(claims.PAPERS / slug / "results")
    assert contents(site / "records" / slug) == {name: text for name, text in committed.items() if name != ".gitkeep"}


@pytest.mark.parametrize("slug", SLUGS)
def test_commands_name_what_reproduce_runs(site, slug):
    """Each command, given to reproduce's own parser, chooses exactly the experiment of its claim; blocked ones have none."""
    paper = claims.load_paper(claims.PAPERS / slug)
    experiments = importlib.import_module(f"papers.{slug}.reproduce").EXPERIMENTS
    commands = re.findall(
        r"<code class=\"command\">(make reproduce [^<]* CLAIM=[^<]*)</code>", (site / "index.html").read_text()
    )
    mine = [dict(word.split("=", 1) for word in shlex.split(line.replace("&#34;", '"'))[2:]) for line in commands]
    mine = [command for command in mine if command["PAPER"] == slug]
    assert [command["CLAIM"] for command in mine] == [claim.id for claim in paper.claims if claim.run]
    for command in mine:
        args = reproduce.parse(["--tier", command["TIER"], "--claim", command["CLAIM"], "--seeds", command["SEEDS"]])
        claim = paper.claim(command["CLAIM"])
        device = command.get("DEVICE", "cpu")
        assert reproduce.chosen(paper, experiments, args.tier, args.claim, device) == [claim.run.experiment]


@pytest.mark.parametrize("slug", SLUGS)
def test_every_figure_is_shown_and_said_in_words(site, slug):
    images = [attributes for tag, attributes in read(site / f"{slug}.html").tags if tag == "img"]
    files = sorted(p.relative_to(site).as_posix() for p in (site / "figures" / slug).iterdir())
    assert sorted(image["src"] for image in images) == files != []
    said = site_module.described(claims.PAPERS / slug).values()
    for image in images:
        assert any(what in image["alt"] for what in said), (
            f"{image['src']}: figures.py's docstring does not say what it is"
        )
    assert len({image["alt"] for image in images}) == len(images)


# ------------------------------------------------------------------------------------------------ alone, anywhere
def test_links_stay_inside_and_lead_somewhere(site):
    outside = {url for slug in SLUGS for url in claims.load_paper(claims.PAPERS / slug).links.values()}
    for path in site.glob("*.html"):
        page = Page(path)
        ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
        assert len(ids) == len(set(ids)), path.name
        for tag, attributes in page.tags:
            assert not [name for name in attributes if name.startswith("on") or name in ("srcset", "action")]
            for target in (attributes.get("href"), attributes.get("src")):
                if target in (None, "data:,") or (tag == "a" and target in outside):
                    continue
                assert not re.match(r"[a-z]+:|/", target), f"{path.name}: {tag} {target}"
                file, _, anchor = target.partition("#")
                assert (site / (file or path.name)).is_file(), f"{path.name}: {target}"
                if anchor:
                    assert f'id="{anchor}"' in (site / (file or path.name)).read_text(), f"{path.name}: {target}"
        scripts = [attributes for tag, attributes in page.tags if tag == "script"]
        assert scripts == [{"src": "table.js", "defer": None}]
    for name in ("style.css", "table.js"):
        assert not re.search(r"https?:|//\w|url\(|@import|fetch|XMLHttp|import\(", (site / name).read_text())


def test_texts_are_escaped(tmp_path):
    def poison(paper):
        for key in ("title", "authors", "venue"):
            paper[key] = HOSTILE
        paper["claims"][0] |= {"what": HOSTILE, "protocol": HOSTILE, "source": HOSTILE}
        paper["claims"][0]["metric"]["unit"] = HOSTILE
        paper["deviations"].append({"id": "bad", "what": HOSTILE, "why": HOSTILE})
        paper["links"]["trap"] = "javascript:alert(1)"

    site_module.build(tmp_path / "out", small_house(tmp_path, change=poison))
    for name in ("index.html", "hpm.html"):
        page = Page(tmp_path / "out" / name)
        assert [attributes for tag, attributes in page.tags if tag == "script"] == [{"src": "table.js", "defer": None}]
        assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
        assert not [attributes for _, attributes in page.tags if attributes.get("href", "").startswith("javascript")]
        assert words(page.claims()[0]["claim"]).startswith(words(f"backbone-params {HOSTILE} [{HOSTILE}]"))


def test_same_records_same_bytes(tmp_path):
    papers = small_house(tmp_path)
    for name in ("one", "two"):
        site_module.build(tmp_path / name, papers)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    assert "figures/hpm/curve-arms-quick.png" in one
    assert not re.search(rb"\d\d:\d\d:\d\d|" + re.escape(str(tmp_path).encode()), one["hpm.html"] + one["index.html"])


def test_a_paper_without_records_has_a_page(tmp_path):
    site_module.build(tmp_path / "out", small_house(tmp_path, with_records=False))
    page = Page(tmp_path / "out" / "hpm.html")
    assert {row["tr"]["data-verdict"] for row in page.claims()} <= {"not run", "blocked"}
    assert "no record has anything to draw yet" in page.text
    assert not list((tmp_path / "out" / "records" / "hpm").iterdir())


def test_figures_that_lack_data_are_named(tmp_path, monkeypatch, capsys):
    """figures.py draws one figure, then ends as the scripts do on bad input; the page has the one and says so."""

    def main(argv):
        (Path(argv[1]) / "one.png").write_bytes((claims.PAPERS / "centernet" / "detections.png").read_bytes())
        print("error: data/none is missing", file=sys.stderr)
        sys.exit(2)

    papers = small_house(tmp_path)
    (papers / "hpm" / "figures.py").write_text('"""Draws.\n\none.png   the one (of its kind)\n"""\n')
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(main=main))
    site_module.build(tmp_path / "out", papers)
    page = Page(tmp_path / "out" / "hpm.html")
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert "HPM: the one (of its kind)" in alts
    assert "make figures PAPER=hpm" in page.text
    assert "data/none is missing" in capsys.readouterr().out


def test_a_failed_run_does_not_stop_the_page(tmp_path):
    papers = small_house(tmp_path)
    path = papers / "hpm" / "results" / "arms-quick-s0.json"
    record = json.loads(path.read_text())
    failed = {key: record[key] for key in record if key not in ("metrics", "curve", "scale", "artifacts", "config")}
    path.write_text(json.dumps(failed | {"status": "oom"}))
    site_module.build(tmp_path / "out", papers)
    assert "1 failed" in Page(tmp_path / "out" / "hpm.html").text


def test_curves_are_those_of_the_records(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(site_module, "save", lambda figure, path: drawn.append(figure))
    curve = [{"stage": s, "epoch": e, "train_loss": 1 / (e + len(s))} for s in ("warm", "late_one") for e in (1, 2, 3)]
    found = [{"seed": seed, "curve": [*curve, {"stage": "warm", "epoch": 4, "reward": 1.0}]} for seed in (0, 1)]
    site_module.draw_curves(found, tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "epoch"
    assert [line.get_xydata().tolist() for line in axes.lines] == 2 * [
        [[e, 1 / (e + n)] for e in (1, 2, 3)] for n in (4, 8)
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["warm", "late one"]
    assert axes.lines[0].get_color() == axes.lines[2].get_color() != axes.lines[1].get_color()


# ------------------------------------------------------------------------------------------------ where it is written
@pytest.mark.parametrize("what", ["foreign", "file", "under a file"])
def test_a_folder_that_is_not_ours_is_refused(tmp_path, capsys, what):
    out = tmp_path / "out"
    if what == "foreign":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        out.write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        site_module.main(["--out", str(out / "deeper" if what == "under a file" else out)])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "OUT=" in captured.err
    assert not captured.out
    assert contents(tmp_path) == before


def test_an_earlier_site_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    papers, out = small_house(tmp_path, with_records=False), tmp_path / "new" / "out"
    out.mkdir(parents=True)  # an empty folder is taken
    site_module.build(out, papers)
    (out / "left.html").write_text("of a paper that is no more")
    site_module.build(out, papers)
    assert not (out / "left.html").exists()
    before = contents(out)

    def fail(folder, _):
        (folder / "index.html").write_text("half")
        raise UserError("broken")

    monkeypatch.setattr(site_module, "write_site", fail)
    with pytest.raises(UserError, match="broken"):
        site_module.build(out, papers)
    assert contents(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["out"], "nothing is left beside it"
