"""The commands behind make: what they print, leave behind, and refuse in one line with exit code 2."""

import shutil
from functools import partial

import pytest

from common import cli
from common.results import __main__ as results
from common.results import claims, export, figures, new, record, records, reproduce, tables
from common.results.records import Measured
from papers._template import train

ROOT = claims.PAPERS.parent


def refused(capsys, call, *argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        call([str(part) for part in argv])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    return told


def test_results_writes_what_is_out_of_step_and_check_only_says_so(tmp_path, monkeypatch, capsys):
    stale, fresh, absent = (tmp_path / name for name in ("README.md", "RESULTS.md", "NEW.md"))
    stale.write_text("old")
    fresh.write_text("new")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "generated", lambda: dict.fromkeys((stale, fresh, absent), "new"))
    with pytest.raises(SystemExit) as stopped:
        results.main(["--check"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "out of step: README.md, NEW.md; run make results\n"
    assert (stale.read_text(), absent.exists()) == ("old", False)
    results.main([])
    assert capsys.readouterr().out == "updated: README.md, NEW.md\n"
    assert {path.read_text() for path in (stale, fresh, absent)} == {"new"}
    results.main(["--check"])
    assert capsys.readouterr().out == "all tables are in step\n"


def test_record_names_its_evidence_and_refuses_what_is_none(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "_template"
    folder.mkdir()
    shutil.copy(claims.PAPERS / "_template" / "paper.yaml", folder)
    monkeypatch.setattr(record, "promote", partial(record.promote, papers=tmp_path))
    job = cli.Job(4, cli.runtime.set_up_world("cpu"), tmp_path / "run", tmp_path)
    records.execute(lambda: Measured({"parameters": {"last": 1}}), folder, "costs", "quick", job)
    record.main([str(tmp_path / "run")])
    assert capsys.readouterr().out == f"{folder}/results/costs-quick-s4.json (now: make results)\n"
    assert "does not exist; a run writes it" in refused(capsys, record.main, tmp_path / "nowhere")


def test_new_and_export_say_what_to_do_next(tmp_path, monkeypatch, capsys):
    for part in ("papers/_template", "tests/papers/_template"):
        shutil.copytree(ROOT / part, tmp_path / part)
    monkeypatch.setattr(new, "new", partial(new.new, root=tmp_path))
    new.main(["mine"])
    assert "then make reproduce PAPER=mine" in capsys.readouterr().out
    assert claims.load_paper(tmp_path / "papers" / "mine").slug == "mine"
    assert "exists already" in refused(capsys, new.main, "mine")

    export.main(["--paper", "_template", "--dest", str(tmp_path / "out")])
    assert "python -m papers._template.reproduce --tier quick" in capsys.readouterr().out
    assert "is not empty" in refused(capsys, export.main, "--paper", "_template", "--dest", tmp_path / "out")
    assert "no paper 'nope'" in refused(capsys, export.main, "--paper", "nope", "--dest", tmp_path / "other")


def test_script_ends_in_its_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(train.run, train.Config, train.__file__, ["--device", "cpu", "--seed", "3", "--set", "epochs=1"])
    made = records.read_record(tmp_path / "runs/_template/train-quick-s3/record.json")
    assert made["weights_sha256"]
    shown = capsys.readouterr().out
    assert f"_template train (quick, seed 3): ok, {made['seconds']:.1f} s, peak " in shown
    assert f"  test_error: last {made['metrics']['test_error']['last']:.6g}, n " in shown


def test_reproduce_refuses_a_blocked_claim_and_missing_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "toy"
    folder.mkdir()
    page = (claims.PAPERS / "_template" / "paper.yaml").read_text().replace("slug: _template", "slug: toy")
    last = "    run: {experiment: arms, tier: quick, seeds: [0, 1, 2]}\n"
    (folder / "paper.yaml").write_text(page.replace(last, "    blocked: no licence\n"))
    data = {"quick": ("no_such_set",)}
    experiments = dict.fromkeys(("costs", "step", "arms"), reproduce.Experiment(None, ("quick",), data))
    main = partial(reproduce.main, experiments, str(folder / "reproduce.py"))
    assert "claim idea-helps cannot be measured: no licence" in refused(capsys, main, "--claim", "idea-helps")
    assert "no_such_set" in refused(capsys, main, "--device", "cpu"), "before anything runs"
    assert not (tmp_path / "runs").exists()


def test_git_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records.git_state(tmp_path) == {"commit": None, "dirty": None}


def test_figures_are_written_and_closed(tmp_path, capsys):
    figure, axes = figures.plt.subplots()
    axes.plot([0, 1])
    figures.save(figure, tmp_path / "new" / "line.png")
    assert capsys.readouterr().out == f"{tmp_path}/new/line.png\n"
    assert (tmp_path / "new" / "line.png").read_bytes().startswith(b"\x89PNG")
    assert not figures.plt.fignum_exists(figure.number)
