"""Run the claims of every paper, one paper after the other, and end in one table.

Each paper is a process of its own; what it prints is shown, and kept in runs/<slug>/reproduce-<tier>.log. One that fails
does not stop the others. Stopped by a signal, the same command goes on where it was.
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.cli import Job, exit_codes
from common.errors import UserError
from common.results import claims, records, tables
from common.results.reproduce import job_of, parse
from common.runtime import EXIT_STOPPED, World, select_device

START = 5  # seconds in which a process imports torch and judges its records, however little it has to run
GRACE = 60  # seconds that a stopped paper has to save; then it is killed, and goes on from the checkpoint before


class Relay:
    """Passes SIGINT, SIGTERM and SIGUSR1 on to the paper that runs; `seen` is the first of them, or 0."""

    def __init__(self):
        self.seen, self.child = 0, None

    @contextlib.contextmanager
    def listening(self):
        handlers = {number: self._stop for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        before = {n: signal.signal(n, f) for n, f in {**handlers, signal.SIGALRM: self._kill}.items()}
        try:
            yield
        finally:
            signal.alarm(0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def attach(self, child: subprocess.Popen) -> None:
        self.child = child
        if self.seen:  # the signal came while the child was being started
            self._stop(self.seen)

    def _stop(self, number: int, *_) -> None:
        self.seen = self.seen or number
        if self.child:
            self.child.send_signal(number)
            signal.alarm(GRACE)

    def _kill(self, *_) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Plan:
    """What one paper may run, where, and the seconds that it is expected to take (None where nothing tells)."""

    folder: Path
    root: Path
    jobs: list[tuple[str, Job]]
    expected: float | None


@dataclass(frozen=True)
class Outcome:
    seconds: float
    status: str


def planned(folder: Path, args: argparse.Namespace, world: World) -> Plan:
    """Expected is what those runs that are not done took when their committed records were made."""
    root = (args.work_dir or Path("runs")) / folder.name
    device = world.device.type
    runs = [claim.run for claim in claims.load_paper(folder).claims if claim.run]
    names = dict.fromkeys(run.experiment for run in runs if run.device in (None, device))
    jobs = [(name, job_of(name, seed, root, args, world)) for name in names for seed in args.seeds]
    first = [r for r in records.load_records(folder) if r["tier"] == args.tier and r["seed"] == 0]
    first = [r for r in first if r["hardware"]["device"] == device] or first
    took = {record["experiment"]: record["seconds"] for record in first}
    todo = [name for name, job in jobs if args.resume == "never" or not records.reusable(job.work_dir, folder, job)]
    return Plan(folder, root, jobs, START + sum(took.get(name, 0) for name in todo) if took else None)


def command(slug: str) -> list[str]:
    return [sys.executable, "-m", f"papers.{slug}.reproduce"]


def run_paper(arguments: list[str], log: Path, relay: Relay) -> Outcome:
    """Run one paper; its output (stdout and stderr together) goes to the terminal and to `log`."""
    started, last = time.perf_counter(), ""
    log.parent.mkdir(parents=True, exist_ok=True)
    # A process group of its own: Ctrl-C reaches it once, through the relay. Unbuffered: a pipe would hold its lines back.
    options = {"text": True, "errors": "replace", "process_group": 0, "env": {**os.environ, "PYTHONUNBUFFERED": "1"}}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with log.open("w") as file, subprocess.Popen(arguments, **streams, **options) as child:
        relay.attach(child)
        for line in child.stdout:
            tqdm.write(line, end="")
            sys.stdout.flush()
            file.write(line)
            last = line.strip() or last
    ended = signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit {child.returncode}"
    status = "stopped" if relay.seen else "ok" if child.returncode == 0 else f"{ended}: {last}"
    return Outcome(time.perf_counter() - started, status)


def seconds_left(expected: dict[str, float | None], done: dict[str, Outcome]) -> float | None:
    """What the papers not done are expected to take, at the pace of those that ended well; None while nothing is known.

    A paper without an expectation counts as the mean of the others.
    """
    known = [seconds for seconds in expected.values() if seconds is not None]
    usual = statistics.fmean(known) if known else 1.0
    weight = {slug: usual if seconds is None else seconds for slug, seconds in expected.items()}
    well = {slug: outcome.seconds for slug, outcome in done.items() if outcome.status == "ok"}
    if not known and not well:
        return None
    pace = sum(well.values()) / sum(weight[slug] for slug in well) if well else 1.0
    return pace * sum(seconds for slug, seconds in weight.items() if slug not in done)


def row(plan: Plan, outcome: Outcome | None) -> tuple[str, ...]:
    if outcome is None:
        return (plan.folder.name, *"-----", "not run")
    found = [record for _, job in plan.jobs if (record := records.reusable(job.work_dir, plan.folder, job))]
    held, fell, scaled, _ = (len(group) for group in tables.grouped(tables.judged(plan.folder, found)[1]).values())
    counts = map(str, (held + fell + scaled, held, fell, scaled))
    return (plan.folder.name, *counts, f"{outcome.seconds:.0f}", outcome.status)


def reproduce_all(folders: list[Path], args: argparse.Namespace, flags: list[str]) -> int:
    """Run the paper of every folder with `flags`, and print the table; returns the exit code."""
    if args.claim or args.experiment:
        raise UserError(
            "--claim and --experiment are of one paper: leave them out, or name that paper instead of all (PAPER=)"
        )
    world = World(0, 1, select_device(args.device))
    plans = {folder.name: planned(folder, args, world) for folder in folders}
    expected = {slug: plan.expected for slug, plan in plans.items()}
    relay, done, started = Relay(), {}, time.perf_counter()

    def told(text: str) -> str:
        left = seconds_left(expected, done)
        return f"[{len(done)}/{len(plans)}] {text}" + (f", about {max(1, round(left / 60))} min left" if left else "")

    bar = tqdm(total=len(plans), bar_format="{desc} |{bar}| {elapsed}", disable=None, leave=False)
    with relay.listening(), bar:
        for slug, plan in plans.items():
            bar.set_description_str(told(slug))
            if bar.disable and not done:
                print(told(f"{len(plans)} papers, tier {args.tier}"), flush=True)
            flags_ = [*flags, "--work-dir", str(plan.root)] if args.work_dir else flags
            outcome = run_paper([*command(slug), *flags_], plan.root / f"reproduce-{args.tier}.log", relay)
            done[slug] = outcome
            bar.update()
            if bar.disable:
                print(told(f"{slug}: {outcome.seconds:.0f} s{'' if outcome.status == 'ok' else ', ' + outcome.status}"))
            if relay.seen:
                break
    head = ("paper", "measured", "held", "did not", "scaled or open", "seconds", "status")
    print(f"\nTier {args.tier}; {world.device.type}; seeds {args.seeds}; {time.perf_counter() - started:.0f} s\n")
    print(tables.aligned([head, *(row(plan, done.get(slug)) for slug, plan in plans.items())]), flush=True)
    if relay.seen:
        return 130 if relay.seen == signal.SIGINT else EXIT_STOPPED
    return int(any(outcome.status != "ok" for outcome in done.values()))


def main(argv: list[str] | None = None, papers: Path = claims.PAPERS) -> None:
    flags = sys.argv[1:] if argv is None else argv
    args = parse(flags, prog="python -m common.results.reproduce_all", about=__doc__)
    with exit_codes():
        sys.exit(reproduce_all([papers / slug for slug in claims.slugs(papers)], args, flags))


if __name__ == "__main__":
    main()
