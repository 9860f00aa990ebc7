"""Crash-safe files and checkpoints; `Progress` itself is killed and resumed in tests/papers/*/test_scripts.py."""

import json
import random

import numpy as np
import pytest
import torch

from common import checkpoints, runtime
from common.cli import Job
from common.errors import UserError
from common.runtime import World

ONE = World(0, 1, torch.device("cpu"))
IDENTITY = {"script": "test", "seed": 0, "lr": 0.1}


def test_rng_state_round_trip_through_a_safe_load(tmp_path):
    runtime.seed_everything(0)
    np.random.randn()  # noqa: NPY002 - an odd number of normals leaves one cached
    torch.save(checkpoints.rng_state(), tmp_path / "rng.pt")

    def draw():
        return random.random(), np.random.randn(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002

    drawn = draw()
    checkpoints.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == drawn


def save(folder, position, value=1.0, identity=IDENTITY, **options):
    checkpoints.save_checkpoint(folder, position, {"w": torch.full((3,), value)}, identity, ONE, **options)


def test_newest_checkpoint_wins_and_older_ones_go(tmp_path):
    for position in (1, 2, 3):
        save(tmp_path, position, float(position))
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-000000003.pt", "checkpoint-000000002.pt"]
    assert checkpoints.load_checkpoint(tmp_path, IDENTITY, ONE)["w"].tolist() == [3.0] * 3
    assert not list(tmp_path.glob(".*.tmp"))


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoints.load_checkpoint(tmp_path, IDENTITY, ONE) is None
    assert checkpoints.load_checkpoint(tmp_path / "absent", IDENTITY, ONE) is None


@pytest.mark.parametrize("keep_bytes", [0, 1, 100, 0.5, 0.99])
def test_truncated_newest_is_passed_over_with_a_message(tmp_path, capsys, keep_bytes):
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    newest = checkpoints.checkpoints(tmp_path)[0]
    whole = newest.read_bytes()
    newest.write_bytes(whole[: int(keep_bytes * len(whole)) if isinstance(keep_bytes, float) else keep_bytes])
    assert checkpoints.load_checkpoint(tmp_path, IDENTITY, ONE)["w"].tolist() == [1.0] * 3
    assert "does not open" in capsys.readouterr().out


def test_checkpoint_of_another_config_is_refused_naming_the_keys(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"\(lr: 0\.1 there, 0\.2 here; |\(lr: 0\.1 there, 0\.2 here\)") as error:
        checkpoints.load_checkpoint(tmp_path, {**IDENTITY, "lr": 0.2}, ONE)
    assert "--resume never" in str(error.value)
    assert "seed" not in str(error.value).split("(")[1].split(")")[0]
    with pytest.raises(UserError, match="momentum: None there, 0.9 here"):
        checkpoints.load_checkpoint(tmp_path, {**IDENTITY, "momentum": 0.9}, ONE)
    assert checkpoints.checkpoints(tmp_path), "a refusal destroys nothing"
    assert checkpoints.load_checkpoint(tmp_path, {**IDENTITY, "lr": 0.2}, ONE, "never") is None
    assert not checkpoints.checkpoints(tmp_path)


def test_checkpoint_of_another_world_size_is_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError, match="written by 1 processes, this run has 2"):
        checkpoints.load_checkpoint(tmp_path, IDENTITY, World(0, 2, torch.device("cpu")))


def test_checkpoint_restores_the_generators(tmp_path):
    runtime.seed_everything(0)
    save(tmp_path, 1)
    drawn = torch.rand(2), random.random()
    checkpoints.load_checkpoint(tmp_path, IDENTITY, ONE)
    assert torch.equal(drawn[0], torch.rand(2))
    assert drawn[1] == random.random()


def test_another_script_reads_the_newest_checkpoint_of_a_work_dir(tmp_path):
    for position in (1, 2):
        save(tmp_path, position, float(position))
    for name in (tmp_path, tmp_path / "checkpoint-000000002.pt"):
        payload = checkpoints.read_checkpoint(str(name), "other", "test")
        assert (payload["position"], payload["state"]["w"].tolist()) == (2, [2.0] * 3)
    (tmp_path / "bad.pt").write_bytes(b"PK not a checkpoint")
    torch.save([1], tmp_path / "list.pt")
    for name, message in {
        "": r"no checkpoint at '\(empty\)'; give a work dir of papers.other",
        str(tmp_path / "none"): "no checkpoint at",
        str(tmp_path / "bad.pt"): "bad.pt does not open",
        str(tmp_path / "list.pt"): "list.pt was not written by papers.other",
        str(tmp_path): "was not written by papers.other or papers.more",
    }.items():
        with pytest.raises(UserError, match=message):
            checkpoints.read_checkpoint(name, "other", *(["more"] if name == str(tmp_path) else []))


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*No space left on device; free some space"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000000001.pt"]
    assert checkpoints.load_checkpoint(tmp_path, IDENTITY, ONE)["w"].tolist() == [1.0] * 3


def test_unwritable_work_dir_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*choose another --work-dir"):
        save(tmp_path / "file" / "work", 1)


def test_json_is_compact_and_reads_back(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"c": [[1, 2], [3, 4]], "d": "x, [y]\n {z}", "e": {}}, "f": [], "g": {"h": True}}
    checkpoints.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == value
    assert '"a": [1, 2.5, null]' in text
    assert text.count("\n") < 14


def test_write_atomic_leaves_the_old_content_when_it_fails(tmp_path):
    checkpoints.write_json(tmp_path / "a.json", {"v": 1})

    def half(file):
        file.write(b"{")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        checkpoints.write_atomic(tmp_path / "a.json", half)
    assert json.loads((tmp_path / "a.json").read_text()) == {"v": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


# ---------------------------------------------------------------------------------------------- progress
def test_progress_restores_everything_and_logs_each_epoch_once(tmp_path):
    job = Job(0, ONE, tmp_path, tmp_path)
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def step(progress):
        model(torch.ones(1, 2)).sum().backward()
        optimiser.step()
        progress.step += 1
        progress.loss_sum += 2.0

    first = checkpoints.Progress(job, IDENTITY, model=model, optimiser=optimiser)
    step(first)
    first.log("epoch 1", epoch=0, train_loss=2.0)
    step(first)
    first.save(0.1)
    weights = model.weight.detach().clone()
    step(first)  # lost: after the checkpoint
    first.log("epoch 2", epoch=1, train_loss=9.0)
    again = checkpoints.Progress(job, IDENTITY, model=model, optimiser=optimiser)
    assert (again.step, again.loss_sum.item(), len(again.curve)) == (2, 2.0, 1)
    assert torch.equal(model.weight, weights)
    assert again.seconds >= first.spent
    again.log("epoch 2", epoch=1, train_loss=2.0)
    assert [json.loads(line)["train_loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        2.0,
        2.0,
    ]


def test_progress_never_saves_a_nan(tmp_path):
    model = torch.nn.Linear(2, 2)
    progress = checkpoints.Progress(Job(0, ONE, tmp_path, tmp_path), IDENTITY, model=model)
    progress.save(0.1)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    progress.step = 7
    with pytest.raises(runtime.NotFinite, match="at step 7, learning rate 0.1"):
        progress.save(0.1)
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-000000000.pt"]
