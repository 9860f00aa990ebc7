"""What all tests share: which of them a machine without CUDA skips, processes that start at once, one built site."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest
import torch

from common.results import site as pages

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
ENV.pop("PYTHONPATH", None)
# What starts processes, or has the site built, takes seconds, in some tests half a minute.
LONG = {"python", "passes_under_the_interpreter", "site"}


def pytest_collection_modifyitems(items):
    """Long tests come first: two workers that share what is left then end together.

    Tests marked `gpu` are skipped where there is no CUDA device, whatever selection was asked for.
    """
    items.sort(key=lambda item: LONG.isdisjoint(item.fixturenames))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The site of this repository; the workers of pytest-xdist share one."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with filelock.FileLock(f"{out}.lock"):
        if not out.exists():
            pages.build(out)
    return out


class Python:
    """python(argv, cwd) is `python argv` in a process of its own, without the seconds that importing torch takes.

    Returns as subprocess.run does, with output as text; of `together`, several such that run at the same time (the
    first that fails ends the others), a list. The environment is that of the tests without PYTHONPATH, and `env` over it.
    """

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        command = [sys.executable, str(Path(__file__).with_name("fresh.py"))]
        self.server = subprocess.Popen(command, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, argv: list[str], cwd: Path, env: dict | None = None, timeout: int = 120):
        return self.together(argv, cwd, [env or {}], timeout)[0]

    def together(self, argv: list[str], cwd: Path, envs: list[dict], timeout: int = 120) -> list:
        processes = []
        for env in envs:
            self.count += 1
            where = {name: str(self.folder / f"{self.count}.{name}") for name in ("out", "err")}
            processes.append({"argv": argv, "cwd": str(cwd), "env": {**ENV, **env}, "timeout": timeout, **where})
        self.server.stdin.write(json.dumps(processes) + "\n")
        self.server.stdin.flush()
        codes = json.loads(self.server.stdout.readline())
        texts = [[Path(p[name]).read_text() for name in ("out", "err")] for p in processes]
        return [subprocess.CompletedProcess(argv, code, *text) for code, text in zip(codes, texts, strict=True)]


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> Iterator[Python]:
    fresh = Python(tmp_path_factory.mktemp("fresh"))
    yield fresh
    fresh.server.kill()  # it holds nothing, and would take seconds to leave
    fresh.server.wait()
