"""Keyed randomness, stopping, ranks that agree."""

import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from common import runtime
from common.errors import UserError
from common.runtime import World

ONE = World(0, 1, torch.device("cpu"))


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


# ---------------------------------------------------------------------------------------------- devices
def test_unknown_device_and_missing_cuda():
    with pytest.raises(UserError, match="unknown device 'tpu'; expected auto, cpu or cuda"):
        runtime.select_device("tpu")
    assert runtime.select_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no CUDA device; use --device cpu"):
            runtime.select_device("cuda")
        assert runtime.select_device("auto").type == "cpu"


def test_deterministic_kernels_are_asked_for(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "before")  # and put back as it was
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    benchmark = torch.backends.cudnn.benchmark
    try:
        runtime.seed_everything(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark


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
        from common import checkpoints, runtime
        world = runtime.set_up_world("cpu")
        rank = world.rank
        grads = [torch.full((2, 3), float(rank)), None, torch.arange(3.).double() * (rank + 1), torch.tensor(4. * rank)]
        runtime.average_gradients(grads)
        assert torch.equal(grads[0], torch.full((2, 3), 0.5)), grads
        assert torch.equal(grads[2], torch.arange(3.).double() * 1.5)
        assert grads[3].item() == 2.0
        assert runtime.sum_over_ranks(torch.tensor([rank + 1, 10])).tolist() == [3, 20]
        rows = runtime.gather_rows(torch.full((2 - rank, 3), float(rank)))  # two rows, and one
        assert rows[:, 0].tolist() == [0.0, 0.0, 1.0]
        weight = torch.nn.Parameter(torch.full((2,), float(rank + 5)))
        runtime.broadcast_from_main([weight])
        assert weight.tolist() == [5.0, 5.0]
        runtime.seed_everything(rank)
        checkpoints.save_checkpoint("work", 1, {"x": torch.tensor(rank)}, {"a": 1}, world)
        drawn = torch.rand(1)
        assert checkpoints.load_checkpoint("work", {"a": 1}, world)["x"] == 0  # rank 0's state ...
        assert torch.equal(drawn, torch.rand(1))  # ... and everyone's own generator
        stop = runtime.StopFlag(world)
        if rank == 1:
            signal.raise_signal(signal.SIGTERM)
        assert [stop.at(step) for step in (1, 15, 16)] == [False, False, True]
        print(f"rank {rank} fine", flush=True)
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
    env = {"PYTHONPATH": str(Path(runtime.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert sorted(re.findall(r"rank \d fine", done.stdout)) == ["rank 0 fine", "rank 1 fine"], done.stderr[-3000:]
