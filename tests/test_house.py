"""Rules that every folder of papers/ keeps, tried on each of them (and on papers/_template, which `make new` copies)."""

import ast
import re
import shutil
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from common import cli
from common.cli import TIERS, build_config, read_yaml
from common.results import claims, export, new, reproduce, tables

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(p.parent for p in (ROOT / "papers").glob("*/__init__.py"))
SLUGS = [folder.name for folder in FOLDERS]
SCRIPTS = [
    f"papers.{p.parent.name}.{p.stem}" for f in FOLDERS for p in sorted(f.glob("*.py")) if "cli.main(" in p.read_text()
]
HEADINGS = (
    "Results",
    "Run it",
    "In your own project",
    "Where the paper is in the code",
    "Deviations and details the paper omits",
    "What was easy, what was hard",
    "Data, licence, citation",
)


def imported(path: Path) -> set[str]:
    """Absolute module names that a file imports; relative ones resolved to `papers.<slug>...`."""
    names, package = set(), list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names} | {".".join(base)}
    return names


@pytest.mark.parametrize("slug", SLUGS)
def test_skeleton_is_complete(slug):
    folder = ROOT / "papers" / slug
    needed = [
        "README.md",
        "paper.yaml",
        "__init__.py",
        "evaluate.py",
        "reproduce.py",
        "bench.py",
        "figures.py",
        "LICENSE",
        *(f"configs/{t}.yaml" for t in TIERS),
    ]
    assert [name for name in needed if not (folder / name).is_file()] == []
    assert (folder / "results").is_dir()
    assert (ROOT / "tests" / "papers" / slug).is_dir(), "tests mirror the tree"
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    found = re.findall(r"^## (.+)$", (folder / "README.md").read_text(), re.M)
    assert [h for h in found if h in HEADINGS] == list(HEADINGS), "README sections, in this order"


@pytest.mark.parametrize("slug", SLUGS)
def test_folder_travels_alone(slug, tmp_path, python):
    """Copied to an empty directory, its README's example (forward and backward) runs without the repository."""
    shutil.copytree(ROOT / "papers" / slug, tmp_path / slug, ignore=shutil.ignore_patterns("__pycache__"))
    section = (tmp_path / slug / "README.md").read_text().split("## In your own project")[1]
    code = re.search(r"```python\n(.+?)```", section, re.S).group(1)
    assert ".backward()" in code
    assert f"from {slug} import" in code
    code += "\nimport sys\nassert not [m for m in sys.modules if m.split('.')[0] in ('common', 'papers')]\nprint('travelled')"
    done = python(["-c", code], tmp_path)
    assert done.stdout.strip().endswith("travelled"), done.stderr[-2000:]


@pytest.mark.parametrize("slug", SLUGS)
def test_claims_are_valid_and_each_has_a_runnable_experiment(slug):
    paper = claims.load_paper(ROOT / "papers" / slug)
    experiments = import_module(f"papers.{slug}.reproduce").EXPERIMENTS
    for claim in paper.claims:
        if claim.run:
            assert claim.run.experiment in experiments, claim.id
            assert claim.run.tier in experiments[claim.run.experiment].tiers, claim.id
    used = {claim.run.experiment for claim in paper.claims if claim.run}
    assert set(experiments) == used, "an experiment without a claim"
    for experiment in experiments.values():
        assert set(experiment.tiers) <= set(TIERS)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "papers").glob("*/configs/*.yaml")), ids=lambda p: f"{p.parts[-3]}-{p.stem}"
)
def test_config_keys_are_known_and_the_header_says_what_it_costs(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("Time:", "Metric:", "Command:"):
        assert word in header
    for section, values in read_yaml(path).items():
        build_config(import_module(f"papers.{path.parts[-3]}.{section}").Config, values or {}, f"{path} [{section}]")


@pytest.mark.parametrize("slug", SLUGS)
def test_imports_follow_the_arrows(slug):
    folder = ROOT / "papers" / slug
    for path in folder.rglob("*.py"):
        others = {n for n in imported(path) if n.startswith("papers.") and n.split(".")[1] != slug}
        assert not others, f"{path} imports another paper: {others}"
    reached, todo = set(), [folder / "__init__.py"]  # what a user's `import <slug>` loads: torch and torchvision only
    while todo:
        path = todo.pop()
        reached.add(path)
        for name in imported(path):
            if name.split(".")[0] == "papers":
                file = export.module_file(name, ROOT)
                todo += [file] if file and file not in reached and file.is_relative_to(folder) else []
            else:
                known = {*sys.stdlib_module_names, "torch", "torchvision", "triton", ""}
                assert name.split(".")[0] in known, f"{path.name} imports {name}"


@pytest.mark.parametrize("slug", SLUGS)
def test_no_export_hides_a_script_of_its_folder(slug):
    """`from . import evaluate` would take a function of that name that __init__ exports, not the script."""
    exported = set(getattr(import_module(f"papers.{slug}"), "__all__", ()))
    assert not exported & {name.split(".")[2] for name in SCRIPTS if name.split(".")[1] == slug}


def test_common_imports_no_paper():
    for path in (ROOT / "common").rglob("*.py"):
        assert not {n for n in imported(path) if n.split(".")[0] == "papers"}, path


def test_every_module_compiles_and_imports_without_a_warning_of_what_will_go(python):
    """In a process where nothing of ours is imported yet; what runs, pyproject.toml's filterwarnings watch."""
    files = [p.relative_to(ROOT) for part in ("common", "papers") for p in sorted((ROOT / part).rglob("*.py"))]
    names = [".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in files if p.name != "__main__.py"]
    code = f"""
import importlib, warnings
for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, SyntaxWarning):
    warnings.simplefilter("error", category)
for path in {[str(p) for p in files]}:
    compile(open(path).read(), path, "exec")
for name in {names}:
    importlib.import_module(name)
print("quiet")
"""
    done = python(["-c", code], ROOT)
    assert done.stdout.strip().endswith("quiet"), done.stderr[-2000:]


def run_script(name: str, argv: list[str], capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m name argv`, without the seconds a process takes to import torch."""
    module = import_module(name)
    command = [module.__file__, argv]
    if hasattr(module, "EXPERIMENTS"):
        call = partial(reproduce.main, module.EXPERIMENTS, *command)
    else:
        call = partial(cli.main, module.run, module.Config, *command)
    with pytest.raises(SystemExit) as stopped:
        call()
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


@pytest.mark.parametrize("module", SCRIPTS)
def test_scripts_answer_help_and_refuse_bad_flags(module, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_script(module, ["--help"], capsys)
    assert code == 0
    for flag in ("--tier", "--seed", "--device", "--work-dir", "--set", "--resume", "--deterministic", "class Config"):
        assert flag in out
    bad = {
        ("--tier", "huge"): "invalid choice",
        ("--config", "nowhere"): "no config 'nowhere'",
        ("--set", "nonsense=1"): "unknown config key 'nonsense'",
        ("--set", "nonsense"): "not of the form key=value",
    }
    for argv, message in bad.items():
        code, _, err = run_script(module, list(argv), capsys)
        assert code == 2, argv
        assert message in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


@pytest.mark.parametrize("slug", SLUGS)
def test_reproduce_refuses_bad_flags(slug, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = f"papers.{slug}.reproduce"
    bad = {
        ("--claim", "no-such-claim"): "has no claim 'no-such-claim'; it has:",
        ("--seeds", "one"): "expected whole numbers",
        ("--seeds", " "): "expected whole numbers",
        ("--experiment", "no-such"): "has no experiment 'no-such'; it has:",
        ("--experiment", "a", "--claim", "b"): "not allowed with argument",
    }
    for argv, message in bad.items():
        code, _, err = run_script(module, list(argv), capsys)
        assert (code, message in err) == (2, True), err
    assert run_script(module, ["--help"], capsys)[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_unknown_paper_is_one_line_and_exit_code_2(python):
    done = python(["-m", "common.results.reproduce", "--paper", "nope"], ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no paper 'nope' here; there are: ")
    assert done.stderr.count("\n") == 1


def test_tables_regenerate_to_the_same_bytes():
    for path, text in tables.generated(ROOT).items():
        assert path.read_text() == text, f"{path} is out of step: make results"


@pytest.mark.parametrize("slug", [s for s in SLUGS if s != "_template"])
def test_export_takes_what_is_used_and_nothing_else(slug, tmp_path, python):
    """Everything imports there; whether the quick tier runs there is the slow test's business."""
    files = export.export(slug, tmp_path / "out")
    names = {p.relative_to(tmp_path / "out").as_posix() for p in files}
    assert {f"papers/{slug}/paper.yaml", "common/runtime.py", "common/results/reproduce.py", "LICENSE"} <= names
    assert not [n for n in names if "test" in Path(n).parts[0] or n.startswith("papers/_template")]
    scripts = [m for m in SCRIPTS if m.split(".")[1] == slug]
    code = "; ".join(f"import {m}" for m in [*scripts, f"papers.{slug}.reproduce"])
    code += "; import common, sys; print(common.__file__)"
    done = python(["-c", code], tmp_path / "out")
    assert str(tmp_path) in done.stdout, done.stderr[-2000:]
    with pytest.raises(Exception, match="is not empty; name a new folder"):
        export.export(slug, tmp_path / "out")


def test_new_folder_passes_the_house_tests(tmp_path, python):
    """`make new` in a copy of the house with one paper more, then this very file over the new folder."""
    others = [slug for slug in SLUGS if slug not in ("_template", "hpm")]
    ignore = shutil.ignore_patterns("__pycache__", ".venv", "runs", "data", ".git", ".*cache", *others)
    house = tmp_path / "house"
    shutil.copytree(ROOT, house, ignore=ignore)
    new.new("fresh_paper", house)
    for slug in ("1st", "Fresh", "a-b", ""):
        with pytest.raises(Exception, match="cannot name a folder"):
            new.new(slug, house)
    with pytest.raises(Exception, match="exists already"):
        new.new("fresh_paper", house)
    for command in (
        ["-m", "common.results"],
        [
            "-m",
            "pytest",
            "-x",
            "tests/test_house.py",
            "tests/papers/fresh_paper",
            "-k",
            "fresh_paper or tables or test_model",
        ],
    ):
        done = python(command, house, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "fresh_paper" in (house / "RESULTS.md").read_text()
