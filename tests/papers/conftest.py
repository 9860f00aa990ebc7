"""What the tests of all papers' scripts share: jobs, killed runs, two ranks, a tiny ImageNet, refused input."""

import json
import os
import random
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from common import cli
from common.checkpoints import checkpoints
from common.cli import Job
from common.runtime import NotFinite, World

ROOT = Path(__file__).resolve().parents[2]
HOUSE = {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def job():
    """job(folder, seed) in one process on the CPU; the data root is given, or a folder that is not there."""

    def make(folder: Path, seed: int = 0, data: Path | None = None, **more) -> Job:
        return Job(seed, World(0, 1, torch.device("cpu")), folder, data or folder / "data", **more)

    return make


@pytest.fixture
def survives_kills(tmp_path, python):
    """A script run whole (2 epochs); killed at three random steps; asked to stop at the end of the first epoch and at a random
    step after; killed with its newest checkpoint cut short.

    All must end with the same weights, curve and metrics (but those named in `timeless`: seconds).
    """

    def check(script: str, settings: str, steps: int, every: int, timeless=(), extra: dict | None = None) -> dict:
        draw = random.Random()
        first, second, third = sorted(draw.sample(range(1, steps), 3))
        kills, extra = [first, second - first, third - second], extra or {}  # a resumed run is never ahead of the kill
        plans = [
            {"name": "whole", "set": extra},
            {"name": "killed", "kills": kills, "set": extra},
            {"name": "asked", "kills": [steps // 2, draw.randint(1, steps // 2 - 1)], "how": "SIGTERM", "set": extra},
            {"name": "cut", "kills": [2 * every + 1], "truncate": True, "set": extra},
        ]
        argv = [str(Path(__file__).with_name("killing.py")), script, str(tmp_path), settings, json.dumps(plans)]
        done = python(argv, tmp_path, HOUSE, timeout=300)
        assert "RESULT" in done.stdout, done.stderr[-3000:]
        found = json.loads(done.stdout.split("RESULT")[1])
        assert found["killed"]["codes"] == [-9, -9, -9, 0], kills
        assert found["asked"]["codes"] == [75, 75, 0]
        assert found["cut"]["codes"] == [-9, 0]
        assert "does not open" in done.stdout
        whole = found["whole"]["record"]
        assert whole["scale"]["steps"] == steps
        compared = [k for k in whole["metrics"] if k not in timeless]
        for name in ("killed", "asked", "cut"):
            record = found[name]["record"]
            assert record["weights_sha256"] == whole["weights_sha256"], (name, plans)
            assert record["curve"] == whole["curve"]
            assert found[name]["metrics.jsonl"] == found["whole"]["metrics.jsonl"], "no step logged twice"
            assert {k: record["metrics"][k] for k in compared} == {k: whole["metrics"][k] for k in compared}
        return whole

    return check


@pytest.fixture
def torchrun(tmp_path, python):
    """torchrun(code): runs it on two CPU ranks in tmp_path, as torchrun starts them; returns what they print, fails with
    their errors. (That torchrun itself does, tests/common/test_runtime.py tries.)

    The code becomes the body of a function: a DDP module that outlived it would keep the process group at exit.
    """

    def run(code: str) -> str:
        body = textwrap.indent(textwrap.dedent(code), "    ")
        (tmp_path / "ranks.py").write_text(f"def main():\n{body}\nmain()\n")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            shared = {**HOUSE, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
        done = python.together([str(tmp_path / "ranks.py")], tmp_path, ranks, timeout=200)
        assert [rank.returncode for rank in done] == [0, 0], "".join(rank.stderr[-3000:] for rank in done)
        return "".join(rank.stdout for rank in done)

    return run


@pytest.fixture
def stops_at_nan(tmp_path, monkeypatch):
    """stops_at_nan(owner, "loss", run): the loss function owner.loss gives NaN from its 7th call on; run(tmp_path) says so,
    and the checkpoints left open, are finite, and are from before.
    """

    def check(owner, name: str, run) -> None:
        loss_of, calls = getattr(owner, name), []

        def poisoned(*args, **kwargs):
            calls.append(1)
            return loss_of(*args, **kwargs) * (float("nan") if len(calls) >= 7 else 1)

        monkeypatch.setattr(owner, name, poisoned)
        with pytest.raises(NotFinite, match=r"is nan at step \d+, learning rate 0\.\d+"):
            run(tmp_path)
        left = checkpoints(tmp_path)
        assert left
        for path in left:
            weights = torch.load(path, weights_only=True)["state"]["parts"]["model"].values()
            assert all(torch.isfinite(v).all() for v in weights if isinstance(v, torch.Tensor))

    return check


@pytest.fixture
def passes_under_the_interpreter():
    """passes_under_the_interpreter(file): its tests, in a process of their own with TRITON_INTERPRET=1; none is skipped."""

    def run(path: Path) -> None:
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "pytest", str(path), "-m", "interpret", "-p", "no:cacheprovider"]
        env = {**os.environ, **HOUSE, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "passed" in done.stdout
        assert "skipped" not in done.stdout

    return run


@pytest.fixture(scope="session")
def imagenet_tree(tmp_path_factory) -> Path:
    """A data root with a tiny ImageNet: 3 classes, 12 + 4 JPEGs each, of different sizes."""
    from PIL import Image

    root = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("n01", "n02", "n03"):
            folder = root / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                size = (draw.randint(40, 90), draw.randint(40, 90))
                Image.new("RGB", size, tuple(draw.randrange(256) for _ in range(3))).save(folder / f"{i}.JPEG")
    return root


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(script, *argv): its one line on stderr; exit code 2, and nothing left behind."""

    def run(script, *argv: str) -> str:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            cli.main(script.run, script.Config, script.__file__, ["--device", "cpu", *argv])
        assert stopped.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert told.count("\n") == 1
        assert not Path("runs").exists()
        return told

    return run
