"""Tests marked `gpu` are skipped where there is no CUDA device, whatever selection was asked for. One built site for all."""

import os
from pathlib import Path

import filelock
import pytest
import torch

from common.results import site as pages


def pytest_collection_modifyitems(items):
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
