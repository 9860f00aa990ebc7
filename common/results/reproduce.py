"""Run the experiments behind a paper's claims and end in the table: reported against reproduced.

A folder's reproduce.py holds `EXPERIMENTS: dict[str, Experiment]` and hands it to `main`.
"""

import argparse
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import datasets
from common.cli import Job, Parser, exit_codes, shared_flags
from common.errors import UserError
from common.results import claims, records, tables
from common.runtime import World, select_device, set_up_world


@dataclass(frozen=True)
class Experiment:
    """`measure(tier, job) -> Measured`, the tiers it can run at, and the data sets a tier needs beyond embedded ones."""

    measure: Callable[[str, Job], records.Measured]
    tiers: tuple[str, ...]
    data: dict[str, tuple[str, ...]] | None = None


def chosen(
    paper: claims.Paper,
    experiments: dict[str, Experiment],
    tier: str,
    claim_id: str | None,
    device: str,
    experiment: str | None = None,
) -> list[str]:
    """Names of the experiments that `tier` (and `claim_id`, or `experiment`) ask for on this kind of device, in the order
    of the claims.
    """
    if experiment and experiment not in experiments:
        raise UserError(f"{paper.slug} has no experiment {experiment!r}; it has: {', '.join(experiments)}")
    wanted = [paper.claim(claim_id)] if claim_id else paper.claims
    if experiment:
        wanted = [claim for claim in wanted if claim.run and claim.run.experiment == experiment]
    if claim_id and wanted[0].blocked:
        raise UserError(f"claim {claim_id} cannot be measured: {wanted[0].blocked}")
    asked = f"claim {claim_id}" if claim_id else f"experiment {experiment}" if experiment else ""
    if asked and all(claim.run.device not in (None, device) for claim in wanted):
        raise UserError(f"{asked} is measured on {wanted[0].run.device}, this run is on {device}; set DEVICE")
    runs = [claim.run for claim in wanted if claim.run and claim.run.device in (None, device)]
    names = list(dict.fromkeys(run.experiment for run in runs if tier in experiments[run.experiment].tiers))
    if not names:
        tiers = experiments[wanted[0].run.experiment].tiers if asked else sorted(paper.tiers)
        raise UserError(
            f"nothing to run for {claim_id or experiment or paper.slug} at tier {tier}; try TIER={' or TIER='.join(tiers)}"
        )
    return names


def job_of(name: str, seed: int, root: Path, args: argparse.Namespace, world: World) -> Job:
    """The run of one experiment with one seed; `root` is the paper's folder of runs."""
    run = records.run_name(name, args.tier, world.device.type, seed)
    return Job(seed, world, root / run, args.data, args.resume, args.deterministic)


def reproduce(folder: Path, experiments: dict[str, Experiment], args: argparse.Namespace) -> None:
    paper = claims.load_paper(folder)
    names = chosen(paper, experiments, args.tier, args.claim, select_device(args.device).type, args.experiment)
    world, root = set_up_world(args.device), args.work_dir or Path("runs") / paper.slug
    for name in dict.fromkeys(d for n in names for d in (experiments[n].data or {}).get(args.tier, ())):
        if world.is_main:
            datasets.prepare(name, args.data)
    found, started = [], time.perf_counter()
    for name in names:
        for seed in args.seeds:
            job = job_of(name, seed, root, args, world)
            record = records.reusable(job.work_dir, folder, job) if args.resume == "auto" else None
            if record and world.is_main:
                print(
                    f"== {name}, seed {seed}: done before, in {job.work_dir} (RESUME=never runs it again)", flush=True
                )
            elif not record:
                if world.is_main:
                    print(f"== {name}, seed {seed}, {job.device.type}", flush=True)
                measure = experiments[name].measure
                record = records.execute(lambda m=measure, j=job: m(args.tier, j), folder, name, args.tier, job)
            found.append(record)
    if world.is_main:
        _, rows = tables.judged(folder, found)
        shown = [(c, v) for c, v in rows if v.kind not in ("not run", "blocked") and args.claim in (None, c.id)]
        print(
            f"\n{paper.title}\n{paper.tiers[args.tier].data}; {world.device.type}; seeds {args.seeds}; "
            f"{time.perf_counter() - started:.0f} s\n\n{tables.terminal_table(shown)}\n"
        )
        if args.claim is None:
            print(
                f"{len(rows) - len(shown)} of {len(rows)} claims were not measured here: RESULTS.md lists all, with "
                "committed evidence."
            )
        print(f"Records: {root}/*-{args.tier}-s*/record.json; make record RUN=... makes one evidence.")


def parse(
    argv: list[str] | None = None, prog: str | None = None, paper: bool = False, about: str = __doc__
) -> argparse.Namespace:
    parser = Parser(prog=prog, description=about)
    if paper:
        parser.add_argument("--paper", required=True, help="slug of the paper: a folder of papers/")
    shared_flags(parser)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--claim", help="only what this claim needs")
    part.add_argument("--experiment", help="only this one of the folder's reproduce.py")
    parser.add_argument("--seeds", default="0", help='e.g. "0 1 2" (default: 0)')
    args = parser.parse_args(argv)
    with exit_codes():
        try:
            args.seeds = [int(seed) for seed in args.seeds.replace(",", " ").split()]
        except ValueError:
            raise UserError(f'--seeds {args.seeds!r}: expected whole numbers, such as "0 1 2"') from None
        if not args.seeds:
            raise UserError('--seeds is empty: expected whole numbers, such as "0 1 2"')
    return args


def main(experiments: dict[str, Experiment], script: str, argv: list[str] | None = None) -> None:
    """`python -m papers.<slug>.reproduce`."""
    folder = Path(script).parent
    args = parse(argv, prog=f"python -m papers.{folder.name}.reproduce")
    with exit_codes():
        reproduce(folder, experiments, args)


if __name__ == "__main__":
    arguments = parse(prog="python -m common.results.reproduce", paper=True)
    with exit_codes():
        paper_folder = claims.paper_folder(arguments.paper)
        module = importlib.import_module(f"papers.{arguments.paper}.reproduce")
        reproduce(paper_folder, module.EXPERIMENTS, arguments)
