"""Records: one JSON a run, the only source of a reproduced number. A failed run leaves one too."""

import ast
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
import tokenize
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from common import runtime
from common.checkpoints import write_json
from common.cli import Job, read_yaml
from common.errors import UserError

STATUSES = ("ok", "oom", "nan", "collapsed", "killed", "error")


@dataclass
class Measured:
    """What a script or an experiment hands back."""

    metrics: dict[str, dict]  # name -> {"last": ..., "best_val": ..., "best_test": ..., "n": test set size}
    config: dict = field(default_factory=dict)  # resolved; of several stages: {stage: config}
    scale: dict = field(default_factory=dict)  # epochs, steps, batch, fraction of the paper's, ...
    data: dict = field(default_factory=dict)  # data set id -> digest
    numerics: dict = field(default_factory=dict)  # amp, tf32, compile, kernel, ...
    curve: list = field(default_factory=list)
    artifacts: dict = field(default_factory=dict)  # small things worth keeping: a genotype, a table
    weights_sha256: str | None = None

    @classmethod
    def of(cls, values: dict[str, float], **more) -> "Measured":
        """Plain numbers, each as the one value of its metric."""
        return cls({name: metric(value) for name, value in values.items()}, **more)


def metric(value: float, n: int | None = None) -> dict:
    """The entry of a metric that has one value; n: how many test samples it is of."""
    return {"last": value if isinstance(value, int) else float(value)} | ({"n": n} if n else {})


def code_digest(folder: Path, tier: str) -> str:
    """Digest of what can move a number: the folder's Python without comments, docstrings, blank lines and figures.py,
    and the content of the tier's configs (`<tier>.yaml`, `<tier>-*.yaml`).
    """
    digest = hashlib.sha256()
    for path in sorted((folder / "configs").glob(f"{tier}*.yaml")):
        digest.update(json.dumps([path.name, read_yaml(path)], sort_keys=True, default=str).encode())
    for path in sorted(folder.rglob("*.py")):
        if path.name != "figures.py":
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(_bare_code(path.read_text()).encode())
    return digest.hexdigest()[:16]


@functools.cache  # every table asks for every tier's digest
def _bare_code(source: str) -> str:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            for number in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[number] = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def config_digest(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def git_state(folder: Path) -> dict:
    def git(*args):
        done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except OSError:  # no git here: a copied folder
        return {"commit": None, "dirty": None}


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware(device: torch.device) -> dict:
    found = {"device": device.type, "cpu": cpu_name(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict:
    found = {"python": platform.python_version(), "torch": torch.__version__, "platform": sys.platform}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def peak_memory_mib(device: torch.device) -> float:
    """CUDA: the most the allocator held. CPU: the process's largest resident set so far."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def execute(measure, folder: Path, experiment: str, tier: str, job: Job) -> dict:
    """Call `measure() -> Measured`, and leave `record.json` in the work dir whatever happens.

    Failures are recorded with their status and raised again. Only rank 0 writes.
    """
    runtime.seed_everything(job.seed, job.deterministic)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    started, clock = datetime.now(UTC), time.perf_counter()
    record = {
        "paper": folder.name,
        "experiment": experiment,
        "tier": tier,
        "seed": job.seed,
        "status": "ok",
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": started.isoformat(timespec="seconds"),
        **git_state(folder),
        "code_digest": code_digest(folder, tier),
        "hardware": hardware(job.device),
        "versions": versions(),
    }
    measured, failure = None, None
    try:
        measured = measure()
    except BaseException as error:
        failure = error
        record["status"], record["error"] = _status(error), f"{type(error).__name__}: {error}"[:500]
    if measured:
        record |= {"config_digest": config_digest(measured.config), **dataclasses.asdict(measured)}
        record["numerics"] = {"deterministic": job.deterministic, **measured.numerics}
        record["scale"] = {"world_size": job.world.size, **measured.scale}
    record |= {"seconds": round(time.perf_counter() - clock, 2), "peak_memory_mib": peak_memory_mib(job.device)}
    # A refused input measured nothing: leave no record, and do not touch one that is there.
    if job.world.is_main and not isinstance(failure, UserError):
        write_json(job.work_dir / "record.json", record)
    if failure:
        raise failure
    return record


def _status(error: BaseException) -> str:
    if isinstance(error, runtime.NotFinite):
        return "nan"
    if isinstance(error, runtime.Collapsed):
        return "collapsed"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "oom"
    if isinstance(error, runtime.Stopped | KeyboardInterrupt):
        return "killed"
    return "error"


def read_record(path: Path) -> dict:
    """One record file, checked for what verdicts need."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a run writes it into its work dir when it ends") from None
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{path} is not valid JSON; run its experiment again") from None
    needed = ("paper", "experiment", "tier", "seed", "status", "code_digest", "hardware", "versions")
    missing = [key for key in needed if key not in record] if isinstance(record, dict) else list(needed)
    if not missing and record["status"] == "ok" and "metrics" not in record:
        missing = ["metrics"]
    if missing:
        raise UserError(f"{path} is not a record of a run; missing: {', '.join(missing)}")
    if record["status"] not in STATUSES:
        raise UserError(f"{path}: status is {record['status']!r}, expected one of {', '.join(STATUSES)}")
    return record


def load_records(folder: Path) -> list[dict]:
    """The committed evidence of a folder: `results/*.json`, sorted by name."""
    return [read_record(path) for path in sorted((folder / "results").glob("*.json"))]


def run_name(experiment: str, tier: str, device: str, seed: int) -> str:
    """`arms-quick-s0`; on a GPU `arms-quick-cuda-s0`: the two are different evidence and never replace each other."""
    return f"{experiment}-{tier}{'' if device == 'cpu' else f'-{device}'}-s{seed}"


def name_of(record: dict) -> str:
    return run_name(record["experiment"], record["tier"], record["hardware"]["device"], record["seed"])


def repeated(before: dict, record: dict) -> dict[str, list[str]]:
    """{code digest: metrics} that `record` measured again, for the digest of `before`, its predecessor of other code.

    Where the weights came out to the last bit, and curve and metric as printed (float32 or float64 arithmetic may end
    them), the change of code in between moved nothing: records of other seeds by the older code stand for the code of now.
    What `before` repeated of its own predecessors counts on.
    """
    if before["code_digest"] == record["code_digest"]:
        return before.get("repeats", {})
    if not before["status"] == record["status"] == "ok" or before["weights_sha256"] != record["weights_sha256"]:
        return {}
    if not _same(before["curve"], record["curve"]):
        return {}
    same = sorted(name for name, values in record["metrics"].items() if _same(before["metrics"].get(name), values))
    chain = {digest: sorted({*names} & {*same}) for digest, names in before.get("repeats", {}).items()}
    return chain | {before["code_digest"]: same}


def _same(one, other) -> bool:
    """Equal, numbers to six digits, through lists and mappings."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-5)
    return one == other


def reusable(work_dir: Path, folder: Path, job: Job) -> dict | None:
    """The finished record of exactly this run (same code, config, seed, kind of device and world size), or None."""
    try:
        record = read_record(work_dir / "record.json")
    except UserError:
        return None
    same = (
        record["status"] == "ok"
        and record["code_digest"] == code_digest(folder, record["tier"])
        and record["seed"] == job.seed
        and record["hardware"]["device"] == job.device.type
        and record["scale"].get("world_size") == job.world.size
    )
    return record if same else None


def summary(record: dict) -> str:
    """The end of a script's output: its metrics, one a line."""
    lines = [
        f"{record['paper']} {record['experiment']} ({record['tier']}, seed {record['seed']}): {record['status']}, "
        f"{record['seconds']:.1f} s, peak {record['peak_memory_mib']:.0f} MiB"
    ]
    for name, values in record.get("metrics", {}).items():
        shown = ", ".join(f"{key} {value:,.6g}" for key, value in values.items() if isinstance(value, int | float))
        lines.append(f"  {name}: {shown}")
    return "\n".join(lines)
