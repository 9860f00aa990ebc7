"""`make gpu`: the plan, what fits, and a visit whose steps are shell commands. No GPU."""

import copy
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from common.errors import UserError
from common.results import claims, gpu, records, reproduce
from common.results.reproduce import Experiment

PAPER = yaml.safe_load((claims.PAPERS / "_template" / "paper.yaml").read_text())
NAMES = ("one", "two", "three", "four")
STEPS = claims.checked(gpu.Plan, claims.PAPERS / "gpu.yaml").steps


def step(experiment: str = "one", minutes: float = 1, **more) -> dict:
    return {"paper": "toy", "experiment": experiment, "tier": "quick", "minutes": minutes, "why": "test", **more}


def steps(*given: dict) -> list[gpu.Step]:
    return [gpu.Step(**values) for values in given]


@pytest.fixture
def papers(tmp_path, monkeypatch):
    """A folder of papers with one, whose four experiments are `commands` (name -> sh), tried from an empty directory."""
    paper, claim = copy.deepcopy(PAPER) | {"slug": "toy"}, PAPER["claims"][0]
    run = {"tier": "quick", "seeds": [0], "device": "cuda"}
    paper["claims"] = [claim | {"id": name, "run": {**run, "experiment": name}} for name in NAMES]
    paper["headline"] = {NAMES[0]: "It is so"}
    folder = tmp_path / "papers" / "toy"
    (folder / "configs").mkdir(parents=True)
    (folder / "paper.yaml").write_text(yaml.safe_dump(paper))
    (folder / "configs" / "quick.yaml").write_text("train: {lr: 0.1}\n")
    experiments = {
        name: Experiment(None, ("quick",), {"quick": ("mnist",) if name == "four" else ()}) for name in NAMES
    }
    monkeypatch.setattr(gpu, "experiments_of", lambda slug: experiments)
    monkeypatch.chdir(tmp_path)
    return folder.parent


def record_of(papers: Path, experiment: str, **more) -> dict:
    """A record that a claim of the toy calls a match."""
    claim = PAPER["claims"][0]
    return {
        "paper": "toy", "experiment": experiment, "tier": "quick", "seed": 0, "status": "ok", "scale": {}, "curve": [],
        "code_digest": records.code_digest(papers / "toy", "quick"), "hardware": {"device": "cuda"}, "versions": {},
        "weights_sha256": None, "metrics": {claim["metric"]["name"]: {"last": claim["reported"]["value"]}},
    } | more  # fmt: skip


def measuring(papers: Path, experiment: str, **more) -> str:
    """A command that does what an experiment does in the end: leave its record in its work dir."""
    Path(f"{experiment}.json").write_text(json.dumps(record_of(papers, experiment, **more)))
    work = f"runs/toy/{experiment}-quick-cuda-s0"
    return f"mkdir -p {work} && cp {experiment}.json {work}/record.json"


def table(out: str, header: str) -> list[str]:
    """The rows of the table under `header`, with single spaces; what took no time to speak of took 0 seconds."""
    lines = [" ".join(line.split()) for line in out.splitlines()]
    if "seconds" in header:
        lines = [re.sub(r"^(toy/\S+) [0-5] ", r"\1 0 ", line) for line in lines]
    rows = lines[lines.index(header) + 2 :]
    return rows[: rows.index("")] if "" in rows else rows


def promoted(papers: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in (papers / "toy" / "results").glob("*.json"))


def commands(monkeypatch, **scripts: str) -> None:
    monkeypatch.setattr(gpu, "command", lambda step: ["sh", "-c", scripts[step.experiment]])


@pytest.fixture
def run(papers, monkeypatch):
    """Go through a plan of `given` steps on a machine that says it has a GPU; returns the exit code."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "write_tables", lambda: True)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def go(*given: dict, argv=()) -> int:
        (papers / "gpu.yaml").write_text(yaml.safe_dump({"steps": list(given)}))
        with pytest.raises(SystemExit) as ended:
            gpu.main(list(argv), papers)
        return ended.value.code

    yield go
    for number, handler in before.items():
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ the plan
@pytest.mark.parametrize("entry", STEPS, ids=str)
def test_every_step_of_the_plan_can_be_run_and_recorded(entry):
    experiments = gpu.experiments_of(entry.paper)
    assert entry.experiment in experiments
    assert entry.tier in experiments[entry.experiment].tiers
    found = [claim.run for claim in claims.load_paper(claims.PAPERS / entry.paper).claims if claim.run]
    assert any(run.experiment == entry.experiment and run.device in (None, "cuda") for run in found)


def test_the_plan_is_read_as_a_whole():
    assert gpu.load_plan() == STEPS


def test_the_plan_begins_with_what_one_visit_is_for():
    """Every folder with kernels is tested, then timed, before anything else; and all of that fits into 25 minutes."""
    slugs = {path.parent.parent.name for path in claims.PAPERS.glob("*/kernels/__init__.py")}
    n = len(slugs)
    assert [{s.paper for s in STEPS[:n]}, {s.experiment for s in STEPS[:n]}] == [slugs, {"gpu-tests"}]
    assert [{s.paper for s in STEPS[n : 2 * n]}, {s.experiment for s in STEPS[n : 2 * n]}] == [slugs, {"kernels"}]
    expected = gpu.forecast(STEPS, [""] * len(STEPS), 25 * 60 - gpu.KEPT)
    assert {o.status for o in expected if o.step.tier == "quick"} == {"to run"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"steps": []}, "steps: List should have at least 1 item"),
        ({}, "steps: Field required"),
        ({"steps": [step(minutes=0)]}, r"steps\[0\].minutes: Input should be greater than 0"),
        ({"steps": [step(minutes=float("inf"))]}, r"steps\[0\].minutes: Input should be a finite number"),
        ({"steps": [step(), step("two", tier="huge")]}, r"steps\[1\].tier: Input should be 'quick', 'short' or 'full'"),
        ({"steps": [step(seed=-1)]}, r"steps\[0\].seed: Input should be greater than or equal to 0"),
        ({"steps": [step(typo=1)]}, r"steps\[0\].typo: Extra inputs are not permitted"),
        ({"steps": [{**step(), "why": ...}]}, r"steps\[0\].why: Field required"),
        ({"steps": [step(), step(minutes=2)]}, "steps: more than once: toy/one-quick-cuda-s0"),
        ({"steps": [step(paper="nope")]}, "no paper 'nope' here; there are: toy"),
        ({"steps": [step("nope")]}, "toy has no experiment 'nope'; it has: one, two, three, four"),
        ({"steps": [step(tier="full")]}, "toy one has no tier full; it has: quick"),
    ],
)
def test_what_is_wrong_with_a_plan_is_one_line(papers, content, message):
    for entry in content.get("steps", []):
        for key in [key for key, value in entry.items() if value is ...]:
            del entry[key]
    (papers / "gpu.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message) as error:
        gpu.load_plan(papers)
    assert str(error.value).startswith(f"{papers / 'gpu.yaml'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("budget", ["0", "-5", "soon", "", "nan", "inf"])
def test_a_budget_that_is_no_time_is_refused(budget, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--budget", budget])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: the budget is {budget!r}; expected a positive number of minutes")


def test_without_a_gpu_there_is_the_plan_alone(run, papers, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(step(), argv=["--plan"]) == 0
    assert table(capsys.readouterr().out, "step minutes status what") == ["1 toy/one-quick-cuda-s0 1 to run test"]
    assert run(step()) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert "torch sees no CUDA device" in captured.err
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------------------ what fits
def test_what_does_not_fit_is_passed_over_and_smaller_steps_still_run():
    plan = steps(step("one", 5), step("two", 20), step("three", 3), step("four", 2.5))
    status = [o.status for o in gpu.forecast(plan, [""] * 4, 10 * 60)]
    assert status == ["to run", "does not fit into 5 min", "to run", "does not fit into 2 min"]
    status = [o.status for o in gpu.forecast(plan, ["recorded", "", "", ""], 10 * 60)]
    assert status == ["recorded", "does not fit into 10 min", "to run", "to run"]
    assert gpu.forecast(steps(step(minutes=10)), [""], 10 * 60)[0].status == "to run"  # the edge fits


def test_a_visit_goes_by_the_time_that_is_really_left():
    """The first step takes 8 minutes instead of 1, so that the second does not fit and the third just does."""
    plan, clock, given = steps(step("one", 1), step("two", 3), step("three", 2)), [0.0], []

    def ran(entry):
        given.append((entry.experiment, clock[0]))
        clock[0] += 480
        return gpu.Outcome(entry, "ok")

    outcomes = list(gpu.visit(plan, [""] * 3, lambda: 600 - clock[0], ran))
    assert given == [("one", 0), ("three", 480)]
    assert [o.status for o in outcomes] == ["ok", "does not fit into 2 min", "ok"]


def test_recorded_steps_are_passed_over_until_the_code_changes(papers, tmp_path):
    plan, results = steps(*map(step, NAMES)), papers / "toy" / "results"
    results.mkdir()
    needs = f"no mnist at {tmp_path}"
    assert gpu.obstacles(plan, papers, tmp_path) == ["", "", "", needs]
    made = {
        "one": record_of(papers, "one"),
        "two": record_of(papers, "two", status="oom"),
        "three": record_of(papers, "three", code_digest="older"),
    }
    for name, content in made.items():
        (results / f"{name}-quick-cuda-s0.json").write_text(json.dumps(content))
    shutil.copy(results / "one-quick-cuda-s0.json", results / "two-quick-s0.json")  # of a CPU: other evidence
    assert gpu.obstacles(plan, papers, tmp_path) == ["recorded", "", "", needs]
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    assert gpu.obstacles(plan, papers, tmp_path)[3] == ""
    (papers / "toy" / "configs" / "quick.yaml").write_text("train: {lr: 0.2}\n")
    assert gpu.obstacles(plan, papers, tmp_path)[0] == ""


# ------------------------------------------------------------------------------------------------ a visit
def test_each_record_is_evidence_the_moment_its_step_ends(run, papers, monkeypatch, capsys):
    seen = f"ls {papers}/toy/results out/toy >seen.txt; echo $REPRO_DATA >>seen.txt; "
    commands(monkeypatch, one=measuring(papers, "one"), two=seen + measuring(papers, "two"))
    argv = ["--out", "out", "--data", "where", "--budget", "5"]
    assert run(step("one"), step("two"), step("three", 9), step("four"), argv=argv) == 0
    assert Path("seen.txt").read_text().count("one-quick-cuda-s0.json") == 2
    assert Path("seen.txt").read_text().splitlines()[-1] == "where"
    assert promoted(papers) == ["one", "two"]
    assert sorted(path.name for path in Path("out/toy").iterdir()) == [
        "one-quick-cuda-s0.json",
        "two-quick-cuda-s0.json",
    ]
    out = capsys.readouterr().out
    plan, end = table(out, "step minutes status what"), table(out, "step seconds status verdicts")
    assert plan == [
        "1 toy/one-quick-cuda-s0 1 to run test",
        "2 toy/two-quick-cuda-s0 1 to run test",
        "3 toy/three-quick-cuda-s0 9 does not fit into 2 min test",
        "4 toy/four-quick-cuda-s0 1 no mnist at where test",
    ]
    assert end == [
        "toy/one-quick-cuda-s0 0 ok 1 matches",
        "toy/two-quick-cuda-s0 0 ok 1 matches",
        "toy/three-quick-cuda-s0 - does not fit into 4 min",
        "toy/four-quick-cuda-s0 - no mnist at where",
    ]
    commands(monkeypatch, one="exit 9", two="exit 9")
    assert run(step("one"), step("two"), argv=argv) == 0  # a second visit finds nothing to do


def test_a_failing_step_does_not_stop_the_rest(run, papers, monkeypatch, capsys):
    failing = "echo begun; echo 'stopped: loss is nan' >&2; exit 3"
    commands(monkeypatch, one=measuring(papers, "one"), two=failing, three=measuring(papers, "three"))
    assert run(step("one"), step("two"), step("three")) == 1
    assert promoted(papers) == ["one", "three"]
    out = capsys.readouterr().out
    log = Path("runs/gpu/toy-two-quick-cuda-s0.log")
    assert out.count(f"exit 3: stopped: loss is nan (see {log})") == 2  # as it happens, and in the last table
    assert "\nbegun\n" in out
    assert log.read_text() == "begun\nstopped: loss is nan\n"


def test_a_step_without_a_record_failed(run, papers, monkeypatch, capsys):
    unknown = measuring(papers, "other").replace("other-quick", "two-quick")
    commands(monkeypatch, one="mkdir -p runs/toy/one-quick-cuda-s0", two=unknown, three="")
    assert run(step("one"), step("two"), step("three")) == 1
    out = capsys.readouterr().out
    assert "runs/toy/one-quick-cuda-s0/record.json does not exist" in out
    assert "no claim of toy is measured by experiment 'other'" in out
    assert promoted(papers) == []


def test_tables_that_cannot_be_written_are_a_failure_and_lose_nothing(run, papers, monkeypatch):
    monkeypatch.setattr(gpu, "write_tables", lambda: False)
    commands(monkeypatch, one=measuring(papers, "one"))
    assert run(step("one")) == 1
    assert promoted(papers) == ["one"]


def test_out_of_time_a_step_may_save(papers, monkeypatch):
    one, two = steps(step("one"), step("two"))
    waiting = "trap 'echo saved >saved.txt; exit 75' TERM; while :; do sleep 0.02; done"
    commands(monkeypatch, one=measuring(papers, "one"), two=waiting)
    assert gpu.run_step(one, gpu.Time(60).left, papers, Path("data"), None).status == "ok"
    outcome = gpu.run_step(two, gpu.Time(1).left, papers, Path("data"), None)
    assert (outcome.status, outcome.failed) == ("out of time, saved for a later visit", True)
    assert Path("saved.txt").read_text() == "saved\n"
    assert promoted(papers) == ["one"]


def test_a_step_that_will_not_end_is_killed_with_all_that_it_started(papers, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    deaf = "trap '' TERM; while :; do echo beat >>beats.txt; sleep 0.02; done"
    commands(monkeypatch, one=f"({deaf}) & {deaf}")
    outcome = gpu.run_step(*steps(step("one")), gpu.Time(0.5).left, papers, Path("data"), None)
    assert outcome.status == "out of time, nothing saved"
    assert outcome.seconds < 5
    beats = Path("beats.txt").stat().st_size
    time.sleep(0.2)
    assert Path("beats.txt").stat().st_size == beats > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_visit_that_is_stopped_stops_its_step_and_keeps_what_there_is(run, papers, monkeypatch, capsys, number):
    tables = []
    monkeypatch.setattr(gpu, "write_tables", lambda: tables.append(promoted(papers)) or True)
    stopping = (
        f"trap 'echo saved >saved.txt; exit 75' TERM; kill -{int(number)} {os.getpid()}; while :; do sleep 0.02; done"
    )
    commands(monkeypatch, one=measuring(papers, "one"), two=stopping, three="touch ran.txt")
    assert run(step("one"), step("two"), step("three")) == 75
    assert tables == [["one"]]
    assert Path("saved.txt").exists()
    assert not Path("ran.txt").exists()
    assert table(capsys.readouterr().out, "step seconds status verdicts") == [
        "toy/one-quick-cuda-s0 0 ok 1 matches",
        "toy/two-quick-cuda-s0 0 out of time, saved for a later visit",
        "toy/three-quick-cuda-s0 - does not fit into 0 min",
    ]


def test_the_command_names_one_experiment_and_no_place():
    """Where the data lies goes by the environment: the arguments end up in the record."""
    flags = gpu.command(*steps(step("one", seed=2)))[1:]
    assert " ".join(flags) == "-m papers.toy.reproduce --experiment one --tier quick --device cuda --seeds 2"
    args = reproduce.parse(flags[2:])
    assert (args.experiment, args.tier, args.device, args.seeds) == ("one", "quick", "cuda", [2])
