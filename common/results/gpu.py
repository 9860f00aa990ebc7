"""What a CUDA machine should measure first, in the time there is: `python -m common.results.gpu` (make gpu).

papers/gpu.yaml is the plan. Each step is an experiment of a paper and a process of its own, and its record becomes evidence
the moment it ends: a visit cut short loses nothing, and the next one goes on with what is missing.
"""

import argparse
import contextlib
import functools
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, field_validator

from common import datasets
from common.checkpoints import write_json
from common.cli import Parser, exit_codes
from common.errors import UserError
from common.results import claims, record, records, reproduce, tables
from common.results.verdicts import TIER_ORDER, judge
from common.runtime import EXIT_STOPPED

GRACE = 20  # seconds that a step out of time has to save
KEPT = 60  # seconds of the budget kept back: for the start, for GRACE, for the tables


# ------------------------------------------------------------------------------------------------ the plan
class Step(claims.Part):
    """One experiment of a paper. minutes: how long it may take, by estimate."""

    paper: str
    experiment: str
    tier: claims.Tier
    seed: int = Field(0, ge=0)
    minutes: float = Field(gt=0, allow_inf_nan=False)
    why: str

    @property
    def run(self) -> str:
        return records.run_name(self.experiment, self.tier, "cuda", self.seed)

    def __str__(self) -> str:
        return f"{self.paper}/{self.run}"


class Plan(claims.Part):
    steps: list[Step] = Field(min_length=1)

    @field_validator("steps")
    @classmethod
    def unique(cls, steps):
        names = [str(step) for step in steps]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"more than once: {', '.join(twice)}")
        return steps


def load_plan(papers: Path = claims.PAPERS) -> list[Step]:
    """The steps of `papers`/gpu.yaml. UserError, in one line, for a wrong field and for what the papers do not have."""
    path = papers / "gpu.yaml"
    steps = claims.checked(Plan, path).steps
    for step in steps:
        if step.paper not in claims.slugs(papers):
            raise UserError(f"{path}: no paper {step.paper!r} here; there are: {', '.join(claims.slugs(papers))}")
        found = experiments_of(step.paper)
        if step.experiment not in found:
            raise UserError(f"{path}: {step.paper} has no experiment {step.experiment!r}; it has: {', '.join(found)}")
        if step.tier not in (tiers := found[step.experiment].tiers):
            raise UserError(
                f"{path}: {step.paper} {step.experiment} has no tier {step.tier}; it has: {', '.join(tiers)}"
            )
    return steps


def experiments_of(slug: str) -> dict[str, reproduce.Experiment]:
    return importlib.import_module(f"papers.{slug}.reproduce").EXPERIMENTS


def obstacles(steps: list[Step], papers: Path, data: Path) -> list[str]:
    """Why a step is not run, however long there is: recorded at this code, or without its data. Empty: nothing hinders."""
    digest_now = functools.cache(records.code_digest)

    def recorded(step: Step) -> bool:
        path = papers / step.paper / "results" / f"{step.run}.json"
        if not path.exists():
            return False
        there = records.read_record(path)
        return there["status"] == "ok" and there["code_digest"] == digest_now(papers / step.paper, step.tier)

    def obstacle(step: Step) -> str:
        if recorded(step):
            return "recorded"
        names = (experiments_of(step.paper)[step.experiment].data or {}).get(step.tier, ())
        missing = [name for name in names if not datasets.available(name, data)]
        return f"no {', '.join(missing)} at {data}" if missing else ""

    return [obstacle(step) for step in steps]


# ------------------------------------------------------------------------------------------------ a visit
class Time:
    """The time of a visit, from now on. `stop`, a signal handler, ends it: what runs is stopped, what there is stays."""

    def __init__(self, seconds: float):
        self.end, self.stopped = time.monotonic() + seconds, False

    def stop(self, *_) -> None:
        self.stopped = True

    def left(self) -> float:
        """Seconds, never negative."""
        return 0.0 if self.stopped else max(0.0, self.end - time.monotonic())


@dataclass(frozen=True)
class Outcome:
    step: Step
    status: str
    seconds: float | None = None
    verdicts: str = ""
    failed: bool = False


def visit(
    steps: list[Step], hindered: list[str], left: Callable[[], float], run: Callable[[Step], Outcome]
) -> Iterator[Outcome]:
    """The outcome of each step, when it is there. left() -> seconds; `run` is called for those that fit."""
    for step, obstacle in zip(steps, hindered, strict=True):
        seconds = left()
        if obstacle:
            yield Outcome(step, obstacle)
        elif 60 * step.minutes > seconds:
            yield Outcome(step, f"does not fit into {seconds / 60:.0f} min")
        else:
            yield run(step)


def forecast(steps: list[Step], hindered: list[str], seconds: float) -> list[Outcome]:
    """What `visit` would come to if each step took its estimate."""
    spent = 0.0

    def run(step: Step) -> Outcome:
        nonlocal spent
        spent += 60 * step.minutes
        return Outcome(step, "to run")

    return list(visit(steps, hindered, lambda: seconds - spent, run))


def command(step: Step) -> list[str]:
    flags = ("--experiment", step.experiment, "--tier", step.tier, "--device", "cuda", "--seeds", str(step.seed))
    return [sys.executable, "-m", f"papers.{step.paper}.reproduce", *flags]


def run_step(step: Step, left: Callable[[], float], papers: Path, data: Path, out: Path | None) -> Outcome:
    """Run a step and promote its record, with a copy to `out`/<paper>/. Whatever is wrong with a step is its outcome."""
    print(f"== {step}: {step.why}, about {step.minutes:g} min", flush=True)
    started, verdicts = time.monotonic(), ""
    log = Path("runs") / "gpu" / f"{step.paper}-{step.run}.log"
    patience = started + 120 + 300 * step.minutes  # a step that hangs must not take the whole visit
    failure = failure_of(command(step), lambda: max(0.0, min(left(), patience - time.monotonic())), log, data)
    if not failure:
        try:
            target = record.promote(Path("runs") / step.paper / step.run, papers)
            found = records.read_record(target)
            verdicts = verdicts_of(found, papers)
            if out:
                write_json(out / step.paper / target.name, found)
        except UserError as error:
            failure = str(error)
    took = time.monotonic() - started
    print(f"== {step}: {failure or 'recorded'}, {took:.0f} s\n", flush=True)
    return Outcome(step, failure or "ok", took, verdicts, bool(failure))


def failure_of(arguments: list[str], left: Callable[[], float], log: Path, data: Path) -> str:
    """Run a command as long as there is time left; its output is shown and kept in `log`. Returns what went wrong, if
    anything.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # The data root goes by the environment: a record holds the arguments, and must not tell where a machine keeps things.
    environment = {**os.environ, "REPRO_DATA": str(data), "PYTHONUNBUFFERED": "1"}
    late = False
    with log.open("wb") as written, log.open(errors="replace") as shown:
        # A process group of its own: Ctrl-C does not reach it but by way of this process, and no part of it stays behind.
        child = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=written, stderr=written, env=environment, process_group=0
        )
        try:
            while child.poll() is None and not late:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.2)
                print(shown.read(), end="", flush=True)
                late = child.poll() is None and not left()
        finally:
            stop(child)
            print(shown.read(), end="", flush=True)
    if child.returncode == 0:
        return ""
    if late:
        return "out of time, " + ("saved for a later visit" if child.returncode == EXIT_STOPPED else "nothing saved")
    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    return f"exit {child.returncode}: {last} (see {log})"


def stop(child: subprocess.Popen) -> None:
    """SIGTERM, on which a script saves and exits 75; then SIGKILL for what is left of it and of what it started."""
    try:
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def verdicts_of(found: dict, papers: Path) -> str:
    """What this record alone, made by the code of now, says of the claims that its experiment measures."""
    digests = dict.fromkeys(TIER_ORDER, found["code_digest"])
    measured = [c for c in claims.load_paper(papers / found["paper"]).claims if c.run]
    measured = [claim for claim in measured if claim.run.experiment == found["experiment"]]
    return tables.counts([(claim, judge(claim, [found], digests)) for claim in measured])


# ------------------------------------------------------------------------------------------------ the command
def plan_table(expected: list[Outcome]) -> str:
    rows = [(str(n), str(o.step), f"{o.step.minutes:g}", o.status, o.step.why) for n, o in enumerate(expected, 1)]
    return tables.aligned([("", "step", "minutes", "status", "what"), *rows])


def final_table(outcomes: list[Outcome]) -> str:
    rows = [(str(o.step), "-" if o.seconds is None else f"{o.seconds:.0f}", o.status, o.verdicts) for o in outcomes]
    return tables.aligned([("step", "seconds", "status", "verdicts"), *rows])


def write_tables() -> bool:
    """`make results`, in a process of its own: whatever is wrong there, the records are safe."""
    return subprocess.run([sys.executable, "-m", "common.results"]).returncode == 0


def gpu(args: argparse.Namespace, papers: Path) -> int:
    """Print the plan, go through it, print what came of it; returns the exit code."""
    if not args.plan and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device; expected a machine with one; --plan prints the plan anywhere")
    clock = Time(60 * args.budget - KEPT)
    steps = load_plan(papers)
    hindered = obstacles(steps, papers, args.data)
    print(f"{args.budget:g} minutes, {KEPT / 60:g} of them kept back to save and to write the tables\n")
    print(plan_table(forecast(steps, hindered, clock.left())) + "\n", flush=True)
    if args.plan:
        return 0

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, clock.stop)
    run = functools.partial(run_step, left=clock.left, papers=papers, data=args.data, out=args.out)
    outcomes = list(visit(steps, hindered, clock.left, run))
    print(final_table(outcomes), flush=True)
    well = write_tables() and not any(outcome.failed for outcome in outcomes)
    return EXIT_STOPPED if clock.stopped else int(not well)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m common.results.gpu", description=__doc__)
    parser.add_argument("--budget", default="25", help="minutes, everything included (default: 25)")
    parser.add_argument("--data", type=Path, default=datasets.data_root(), help="data root")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of each record the moment it is there")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    args = parser.parse_args(argv)
    with exit_codes():
        try:
            minutes = float(args.budget)
        except ValueError:
            minutes = math.nan
        if not 0 < minutes < math.inf:
            raise UserError(f"the budget is {args.budget!r}; expected a positive number of minutes, such as BUDGET=25")
        args.budget = minutes
    return args


def main(argv: list[str] | None = None, papers: Path = claims.PAPERS) -> None:
    args = parse(argv)
    with exit_codes():
        sys.exit(gpu(args, papers))


if __name__ == "__main__":
    main()
