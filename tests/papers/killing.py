"""Not a test: runs a paper's script again and again in forked children that kill themselves at given steps.

    python killing.py papers.pc_darts.search FOLDER "key=value ..." 'JSON list of plans'

A plan is {"name": ..., "kills": [steps after which to die], "how": "SIGKILL"|"SIGTERM", "truncate": bool, "set": {...}}.
Prints one JSON object: per plan the exit codes of its children and the final record.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # like scikit-learn, imported at first use: once here, not in every fork
from torch.optim.optimizer import register_optimizer_step_post_hook

from common import cli, datasets
from common.results import records


def child(script, settings: list[str], work_dir: Path, changed: dict, die_after: int | None, how: str) -> None:
    """In a fork: the script's own command line, with a signal to itself after `die_after` optimiser steps."""
    if die_after:
        steps = 0

        def count(optimiser, args, kwargs):
            nonlocal steps
            steps += 1
            if steps == die_after:
                os.kill(os.getpid(), getattr(signal, how))

        register_optimizer_step_post_hook(count)
    changed = [f"{key}={value}" for key, value in changed.items()]
    argv = ["--device", "cpu", "--work-dir", str(work_dir), "--set", *settings, *changed]
    cli.main(script.run, script.Config, script.__file__, argv)


def fork(*args) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(*args)
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    script, folder = importlib.import_module(sys.argv[1]), Path(sys.argv[2])
    settings, plans = sys.argv[3].split(), json.loads(sys.argv[4])
    torch.set_num_threads(1)  # a fork must not inherit a pool of threads
    datasets.load("cluttered_digits", "train", n=1)  # imports, and digests below: once here, not in every fork
    records.code_digest(Path(script.__file__).parent, "quick")
    found = {}
    for plan in plans:
        work_dir, codes = folder / plan["name"], []
        for kill in [*plan.get("kills", []), None]:
            codes.append(fork(script, settings, work_dir, plan.get("set", {}), kill, plan.get("how", "SIGKILL")))
            if plan.get("truncate") and kill:
                newest = max(work_dir.glob("checkpoint-*.pt"))
                newest.write_bytes(newest.read_bytes()[:1000])
        record = work_dir / "record.json"
        found[plan["name"]] = {"codes": codes, "record": json.loads(record.read_text()) if record.exists() else None}
        found[plan["name"]]["metrics.jsonl"] = (work_dir / "metrics.jsonl").read_text()
    print("RESULT" + json.dumps(found))


if __name__ == "__main__":
    main()
