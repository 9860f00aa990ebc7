"""The quick tier of every paper, exported and run there as a stranger would (`pytest -m slow`; minutes each)."""

import os
import subprocess
import sys
import time

import pytest

from common.results import claims, export


@pytest.mark.slow
@pytest.mark.parametrize("slug", claims.slugs())
def test_exported_folder_ends_in_its_table_within_five_minutes(slug, tmp_path):
    export.export(slug, tmp_path / "out")
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "REPRO_DATA")}
    command, started = [sys.executable, "-m", f"papers.{slug}.reproduce", "--device", "cpu"], time.perf_counter()
    done = subprocess.run(command, cwd=tmp_path / "out", env=env, capture_output=True, text=True, timeout=1200)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr[-3000:]
    table = done.stdout.split("verdict\n")[1]
    of_quick = [c for c in claims.load_paper(claims.PAPERS / slug).claims if c.run and c.run.tier == "quick"]
    measured = [c.id for c in of_quick if c.run.device in (None, "cpu")]
    assert [claim for claim in measured if f"\n{claim} " not in table] == []
    assert seconds < 300, f"{seconds:.0f} s"
