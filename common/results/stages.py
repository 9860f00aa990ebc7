"""Experiments of several stages (a search, then a training; one training an arm) and the one record they leave."""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from common.cli import Job, load_config
from common.errors import UserError
from common.results.records import Measured


def tier_config(tier: str, job: Job) -> str:
    """The file of configs/ that a tier runs by: of the short one a CPU takes `short-cpu`, on part of the data."""
    return "short-cpu" if tier == "short" and job.device.type == "cpu" else tier


def run_stage(script, config: str, job: Job, stage: str, **changed) -> Measured:
    """`run` of a script (a module), by its part of configs/<config>.yaml and `changed`, in the folder `stage` of the job's."""
    path = Path(script.__file__)
    return script.run(load_config(script.Config, path.parent, config, path.stem, **changed), job.sub(stage))


def by_stage(stages: dict[str, Measured]) -> dict[str, dict]:
    """All metrics, each with its stage before its name."""
    return {f"{stage}_{name}": values for stage, found in stages.items() for name, values in found.metrics.items()}


def share_of(papers: int, *stages: Measured) -> float:
    """Training images that the stages saw, over those that the paper's own run saw; at most 1.

    A run of the paper's length counts as whole although it drops incomplete batches: up to 3 % of an epoch.
    """
    seen = sum(stage.scale["steps"] * stage.scale["batch"] for stage in stages)
    return min(1.0, seen / (0.97 * papers))


def one_record(
    metrics: dict, stages: dict[str, Measured], main: str, fraction: float, artifacts: dict | None = None
) -> Measured:
    """What an experiment of these stages measured. Scale, numerics and weights are those of stage `main`.

    fraction: of the paper's training, see `share_of`; artifacts: each stage's own, by its name, unless given.
    """
    whole = stages[main]
    if artifacts is None:
        artifacts = {name: stage.artifacts for name, stage in stages.items() if stage.artifacts}
    return Measured(
        metrics,
        config={name: stage.config for name, stage in stages.items()},
        scale={**whole.scale, "fraction": fraction},
        data={key: digest for stage in stages.values() for key, digest in stage.data.items()},
        numerics=whole.numerics,
        curve=[{"stage": name, **line} for name, stage in stages.items() for line in stage.curve],
        artifacts=artifacts,
        weights_sha256=whole.weights_sha256,
    )


def gpu_tests(script: str) -> Measured:
    """The tests marked `gpu` of the folder that `script` stands in: how many failed (errors too), how many passed."""
    slug, root = Path(script).parent.name, Path(script).parents[2]
    tests = root / "tests" / "papers" / slug
    if not tests.is_dir():
        raise UserError(f"no tests at {tests}; an exported folder leaves them behind: run this in the repository")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # The suite turns deprecations into errors; here those of another version of torch are none of the kernels' business.
        command = [sys.executable, "-m", "pytest", str(tests), "-m", "gpu", "-W", "default", f"--junitxml={report}"]
        done = subprocess.run(command, cwd=root)
        if not report.exists():
            raise RuntimeError(f"pytest left no report and exit code {done.returncode}")
        suite = ElementTree.parse(report).find("testsuite").attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    if not passed + failed:
        raise RuntimeError(f"no test of {slug} ran: {skipped} skipped")
    return Measured.of({"failed": failed, "passed": passed, "skipped": skipped})
