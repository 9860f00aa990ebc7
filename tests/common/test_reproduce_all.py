"""make reproduce PAPER=all: goes on past a failing paper, says how long it will take, stops when asked, ends in one table.

The papers have the claims of the template; their processes are a few lines of Python.
"""

import json
import signal
import sys
import textwrap

import pytest

from common.results import claims, records, reproduce_all
from common.results.reproduce import parse
from common.results.reproduce_all import START, Outcome, seconds_left
from common.runtime import World, select_device

METRICS = {
    "costs": {"parameters": {"last": 5466}, "shape_differences": {"last": 0}},  # both match
    "arms": {"norm_test_error": {"last": 95.0}, "plain_test_error": {"last": 90.0}},  # trend fails, and one scaled
}


@pytest.fixture
def papers(tmp_path, monkeypatch):
    """papers(slug=code, ...): folders with paper.yaml and committed records; the code is what their process runs."""
    played = {}

    def make(**codes):
        for slug, code in codes.items():
            folder = tmp_path / "papers" / slug
            (folder / "results").mkdir(parents=True)
            page = (claims.PAPERS / "_template" / "paper.yaml").read_text()
            (folder / "paper.yaml").write_text(page.replace("slug: _template", f"slug: {slug}"))
            for seed, (experiment, seconds) in enumerate((("costs", 10), ("arms", 90), ("arms", 1000))):
                record = made(folder, experiment, seed=max(seed - 1, 0)) | {"seconds": seconds}
                (folder / "results" / f"{records.name_of(record)}.json").write_text(json.dumps(record))
            played[slug] = textwrap.dedent(code)
        return tmp_path / "papers"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce_all, "command", lambda slug: [sys.executable, "-Sc", played[slug]])
    return make


def made(folder, experiment, seed=0):
    record = {"paper": folder.name, "experiment": experiment, "tier": "quick", "seed": seed, "status": "ok"}
    record |= {"code_digest": records.code_digest(folder, "quick"), "hardware": {"device": "cpu"}, "versions": {}}
    return record | {"metrics": METRICS[experiment], "scale": {"world_size": 1}}


def leave(folder, experiment, root):
    """The record of a run that is done."""
    (root / folder.name / f"{experiment}-quick-s0").mkdir(parents=True)
    (root / folder.name / f"{experiment}-quick-s0" / "record.json").write_text(json.dumps(made(folder, experiment)))


def run(folder, *flags) -> int:
    with pytest.raises(SystemExit) as stopped:
        reproduce_all.main(["--device", "cpu", *flags], folder)
    return stopped.value.code


def table(out: str) -> dict[str, list[str]]:
    """slug -> its cells, of the table that `out` ends in."""
    lines = out[out.index("paper  ") :].splitlines()
    assert lines[0].split("  ")[0] == "paper"
    assert set(lines[1]) == {"-"}
    return {line.split()[0]: line.split(maxsplit=6)[1:] for line in lines[2:]}


def test_a_failing_paper_is_named_and_does_not_stop_the_others(papers, tmp_path, capsys):
    bad = """
        import sys
        print("half a table")
        print("error: the disk is full", file=sys.stderr)
        sys.exit(3)
    """
    crash = "import os\nprint('last words', flush=True)\nos.kill(os.getpid(), 9)"
    folder = papers(bad=bad, crash=crash, good="print('fine')")
    for experiment in METRICS:
        leave(folder / "good", experiment, tmp_path / "runs")
    leave(folder / "bad", "costs", tmp_path / "runs")
    assert run(folder) == 1
    out = capsys.readouterr().out
    found = table(out)
    assert {slug: cells[:4] for slug, cells in found.items()} == {
        "bad": ["2", "2", "0", "0"],
        "crash": ["0", "0", "0", "0"],
        "good": ["4", "2", "1", "1"],
    }
    assert found["bad"][5] == "exit 3: error: the disk is full"
    assert found["crash"][5] == "SIGKILL: last words"
    assert found["good"][5] == "ok"
    assert [line for line in out.splitlines() if line.startswith("[3/3] good: 0 s")], "one line a paper"
    assert (tmp_path / "runs/bad/reproduce-quick.log").read_text() == "half a table\nerror: the disk is full\n"
    assert "half a table\nerror: the disk is full\n" in out


def test_all_well_is_exit_code_0_and_flags_reach_every_paper(papers, tmp_path, capsys):
    folder = papers(one="import sys; print(*sys.argv[1:])", two="import sys; print(*sys.argv[1:])")
    assert run(folder, "--seeds", "0 1", "--work-dir", "elsewhere", "--deterministic") == 0
    assert table(capsys.readouterr().out)["two"][5] == "ok"
    for slug in ("one", "two"):
        told = (tmp_path / "elsewhere" / slug / "reproduce-quick.log").read_text().split("--device cpu ")[1]
        assert told == f"--seeds 0 1 --work-dir elsewhere --deterministic --work-dir elsewhere/{slug}\n"
    assert not (tmp_path / "runs").exists()


def test_each_paper_is_its_own_module():
    assert reproduce_all.command("gfnet") == [sys.executable, "-m", "papers.gfnet.reproduce"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--claim", "idea-helps"], "--claim and --experiment are of one paper"),
        (["--seeds", "one"], "expected whole numbers"),
    ],
)
def test_bad_flags_are_one_line_and_nothing_runs(papers, tmp_path, capsys, flags, message):
    assert run(papers(one="print('ran')"), *flags) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not told.out
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------- time left
def test_time_left_in_closed_form():
    expected = {"a": 100, "b": 200, "c": 300, "d": None}  # d: as the mean, 200
    assert seconds_left(expected, {}) == 800
    assert seconds_left(expected, {"a": Outcome(50, "ok")}) == (200 + 300 + 200) / 2
    assert seconds_left(expected, {"a": Outcome(50, "ok"), "b": Outcome(3, "exit 1: broken")}) == (300 + 200) / 2
    assert seconds_left(expected, {"a": Outcome(300, "ok"), "d": Outcome(300, "ok")}) == 2 * (200 + 300)
    assert seconds_left(expected, dict.fromkeys(expected, Outcome(7, "ok"))) == 0
    unknown = {"a": None, "b": None, "c": None}
    assert seconds_left(unknown, {}) is None
    assert seconds_left(unknown, {"a": Outcome(40, "ok")}) == 80


def test_expectation_counts_seed_0_of_what_is_not_done(papers, tmp_path):
    folder, cpu = papers(one=""), World(0, 1, select_device("cpu"))

    def expected(*flags):
        return reproduce_all.planned(folder / "one", parse(["--device", "cpu", *flags]), cpu).expected

    assert expected() == START + 10 + 90
    assert expected("--seeds", "0 5") == START + 2 * (10 + 90)
    leave(folder / "one", "arms", tmp_path / "runs")
    assert expected() == START + 10
    assert expected("--seeds", "0 5") == START + 10 + 10 + 90
    assert expected("--resume", "never") == START + 10 + 90
    assert expected("--tier", "full") is None


# ---------------------------------------------------------------------------------------------- stopping
STOPPED = """
    import os, signal, sys, time
    def save(number, _):
        print("saved after", signal.Signals(number).name, flush=True)
        sys.exit(75)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, save)
    os.kill(os.getppid(), signal.{})
    time.sleep(60)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 75), ("SIGUSR1", 75)])
def test_signal_stops_the_paper_and_ends_in_the_table(papers, tmp_path, capsys, name, code):
    before = {number: signal.getsignal(number) for number in signal.Signals}
    assert run(papers(one="print('done')", two=STOPPED.format(name), zero="print('never')")) == code
    out = capsys.readouterr().out
    found = table(out)
    assert {slug: cells[5] for slug, cells in found.items()} == {"one": "ok", "two": "stopped", "zero": "not run"}
    assert found["zero"][:5] == ["-"] * 5
    assert "never" not in out
    assert (tmp_path / "runs/two/reproduce-quick.log").read_text() == f"saved after {name}\n"
    assert {number: signal.getsignal(number) for number in signal.Signals} == before


def test_a_paper_that_does_not_stop_is_killed(papers, capsys, monkeypatch):
    monkeypatch.setattr(reproduce_all, "GRACE", 1)
    assert run(papers(one=STOPPED.replace("sys.exit(75)", "").format("SIGTERM"))) == 75
    assert table(capsys.readouterr().out)["one"][5] == "stopped"
