"""Keyed randomness, checkpoints that survive, ranks that agree."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from common import runtime
from common.errors import UserError
from common.runtime import World

ONE = World(0, 1, torch.device("cpu"))
IDENTITY = {"script": "test", "seed": 0, "lr": 0.1}


# ---------------------------------------------------------------------------------------------- keyed randomness
def test_keyed_seed_is_a_pure_function_of_its_key():
    assert runtime.keyed_seed(0, "order", 3) == runtime.keyed_seed(0, "order", 3)
    keys = [(s, w, e) for s in range(5) for w in ("order", "flip") for e in range(20)]
    seeds = {runtime.keyed_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_keyed_seed_has_not_changed():
    """Golden: another value would silently change the data order of every record."""
    assert runtime.keyed_seed(0, "order", 0) == 822864071684415769
    assert runtime.keyed_order(8, 0, 0).tolist() == [0, 7, 4, 3, 5, 1, 2, 6]


def test_keyed_order_is_a_permutation_and_ignores_the_global_generator():
    torch.manual_seed(1)
    first = runtime.keyed_order(100, 7, 2)
    torch.manual_seed(2)
    assert torch.equal(first, runtime.keyed_order(100, 7, 2))
    assert sorted(first.tolist()) == list(range(100))
    assert not torch.equal(first, runtime.keyed_order(100, 7, 3))
    assert not torch.equal(first, runtime.keyed_order(100, 8, 2))


def test_seed_everything_fixes_all_three_generators():
    def draw():
        runtime.seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()
    runtime.seed_everything(4)
    assert torch.rand(1).item() != draw()[2]


def test_rng_state_round_trip_through_a_safe_load(tmp_path):
    runtime.seed_everything(0)
    np.random.randn()  # noqa: NPY002 - an odd number of normals leaves one cached
    torch.save(runtime.rng_state(), tmp_path / "rng.pt")

    def draw():
        return random.random(), np.random.randn(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002

    drawn = draw()
    runtime.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == drawn


# ---------------------------------------------------------------------------------------------- devices
def test_unknown_device_and_missing_cuda():
    with pytest.raises(UserError, match="unknown device 'tpu'; expected auto, cpu or cuda"):
        runtime.select_device("tpu")
    assert runtime.select_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no CUDA device; use --device cpu"):
            runtime.select_device("cuda")
        assert runtime.select_device("auto").type == "cpu"


# ---------------------------------------------------------------------------------------------- checkpoints
def save(folder, position, value=1.0, identity=IDENTITY, **options):
    runtime.save_checkpoint(folder, position, {"w": torch.full((3,), value)}, identity, ONE, **options)


def test_newest_checkpoint_wins_and_older_ones_go(tmp_path):
    for position in (1, 2, 3):
        save(tmp_path, position, float(position))
    assert [p.name for p in runtime.checkpoints(tmp_path)] == ["checkpoint-000000003.pt", "checkpoint-000000002.pt"]
    assert runtime.load_checkpoint(tmp_path, IDENTITY, ONE)["w"].tolist() == [3.0] * 3
    assert not list(tmp_path.glob(".*.tmp"))


def test_no_checkpoint_is_none(tmp_path):
    assert runtime.load_checkpoint(tmp_path, IDENTITY, ONE) is None
    assert runtime.load_checkpoint(tmp_path / "absent", IDENTITY, ONE) is None


@pytest.mark.parametrize("keep_bytes", [0, 1, 100, 0.5, 0.99])
def test_truncated_newest_is_passed_over_with_a_message(tmp_path, capsys, keep_bytes):
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    newest = runtime.checkpoints(tmp_path)[0]
    whole = newest.read_bytes()
    newest.write_bytes(whole[: int(keep_bytes * len(whole)) if isinstance(keep_bytes, float) else keep_bytes])
    assert runtime.load_checkpoint(tmp_path, IDENTITY, ONE)["w"].tolist() == [1.0] * 3
    assert "does not open" in capsys.readouterr().out


def test_checkpoint_of_another_config_is_refused_naming_the_keys(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"\(lr: 0\.1 there, 0\.2 here; |\(lr: 0\.1 there, 0\.2 here\)") as error:
        runtime.load_checkpoint(tmp_path, {**IDENTITY, "lr": 0.2}, ONE)
    assert "--resume never" in str(error.value)
    assert "seed" not in str(error.value).split("(")[1].split(")")[0]
    with pytest.raises(UserError, match="momentum: None there, 0.9 here"):
        runtime.load_checkpoint(tmp_path, {**IDENTITY, "momentum": 0.9}, ONE)
    assert runtime.checkpoints(tmp_path), "a refusal destroys nothing"
    assert runtime.load_checkpoint(tmp_path, {**IDENTITY, "lr": 0.2}, ONE, "never") is None
    assert not runtime.checkpoints(tmp_path)


def test_checkpoint_of_another_world_size_is_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError, match="written by 1 processes, this run has 2"):
        runtime.load_checkpoint(tmp_path, IDENTITY, World(0, 2, torch.device("cpu")))


def test_checkpoint_restores_the_generators(tmp_path):
    runtime.seed_everything(0)
    save(tmp_path, 1)
    drawn = torch.rand(2), random.random()
    runtime.load_checkpoint(tmp_path, IDENTITY, ONE)
    assert torch.equal(drawn[0], torch.rand(2))
    assert drawn[1] == random.random()


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*No space left on device; free some space"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000000001.pt"]
    assert runtime.load_checkpoint(tmp_path, IDENTITY, ONE)["w"].tolist() == [1.0] * 3


def test_unwritable_work_dir_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*choose another --work-dir"):
        save(tmp_path / "file" / "work", 1)


def test_write_atomic_leaves_the_old_content_when_it_fails(tmp_path):
    runtime.write_json(tmp_path / "a.json", {"v": 1})

    def half(file):
        file.write(b"{")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        runtime.write_atomic(tmp_path / "a.json", half)
    assert json.loads((tmp_path / "a.json").read_text()) == {"v": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


# ---------------------------------------------------------------------------------------------- stopping
def test_stop_flag_sees_sigterm():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    stop = runtime.StopFlag(ONE)
    assert not stop.at(1)
    signal.raise_signal(signal.SIGTERM)
    assert stop.at(2)
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGUSR1, before[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_require_finite_says_step_loss_and_learning_rate(bad):
    with pytest.raises(runtime.NotFinite, match=rf"loss is {bad} at step 12, learning rate 0.1; "):
        runtime.require_finite(torch.tensor(bad), 12, 0.1)
    assert runtime.require_finite(torch.tensor(2.5), 1, 0.1) == 2.5


def test_require_finite_weights():
    model = torch.nn.Linear(2, 2)
    runtime.require_finite_weights(model, 1, 0.1)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(runtime.NotFinite, match="sum of the weights is nan at step 1"):
        runtime.require_finite_weights(model, 1, 0.1)


def test_weights_sha256_tells_one_bit():
    model = torch.nn.BatchNorm1d(2)
    before = runtime.weights_sha256(model)
    assert runtime.weights_sha256(model) == before
    model.running_mean[0] = 1e-30
    assert runtime.weights_sha256(model) != before


# ---------------------------------------------------------------------------------------------- ranks
def test_two_ranks_agree(tmp_path):
    """average_gradients over None, two dtypes and odd shapes; sums; broadcast; a stop; a checkpoint; on 2 gloo ranks."""
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent("""
        import signal, torch
        from common import runtime
        world = runtime.set_up_world("cpu")
        rank = world.rank
        grads = [torch.full((2, 3), float(rank)), None, torch.arange(3.).double() * (rank + 1), torch.tensor(4. * rank)]
        runtime.average_gradients(grads)
        assert torch.equal(grads[0], torch.full((2, 3), 0.5)), grads
        assert torch.equal(grads[2], torch.arange(3.).double() * 1.5)
        assert grads[3].item() == 2.0
        assert runtime.sum_over_ranks(torch.tensor([rank + 1, 10])).tolist() == [3, 20]
        weight = torch.nn.Parameter(torch.full((2,), float(rank + 5)))
        runtime.broadcast_from_main([weight])
        assert weight.tolist() == [5.0, 5.0]
        runtime.seed_everything(rank)
        runtime.save_checkpoint("work", 1, {"x": torch.tensor(rank)}, {"a": 1}, world)
        drawn = torch.rand(1)
        assert runtime.load_checkpoint("work", {"a": 1}, world)["x"] == 0  # rank 0's state ...
        assert torch.equal(drawn, torch.rand(1))  # ... and everyone's own generator
        stop = runtime.StopFlag(world)
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
        assert [stop.at(step) for step in (1, 15, 16)] == [False, False, True]
        print(f"rank {rank} fine", flush=True)
        torch.distributed.destroy_process_group()
    """)
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--standalone",
        str(script),
    ]
    env = {"PYTHONPATH": str(runtime.Path(runtime.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert sorted(re.findall(r"rank \d fine", done.stdout)) == ["rank 0 fine", "rank 1 fine"], done.stderr[-3000:]
