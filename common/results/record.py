"""Promote a finished run's record to evidence: `python -m common.results.record RUN` (make record RUN=runs/...)."""

from pathlib import Path

from common.checkpoints import write_json
from common.cli import Parser, exit_codes
from common.errors import UserError
from common.results import claims, records


def promote(run: Path, papers: Path = claims.PAPERS) -> Path:
    """Copy `run/record.json` (or the file itself) to its paper's results/. Refuses what no claim refers to."""
    record = records.read_record(run / "record.json" if run.is_dir() else run)
    folder = claims.paper_folder(record["paper"], papers)
    experiments = {claim.run.experiment for claim in claims.load_paper(folder).claims if claim.run}
    if record["experiment"] not in experiments:
        raise UserError(
            f"no claim of {record['paper']} is measured by experiment {record['experiment']!r}; "
            f"experiments: {', '.join(sorted(experiments))}"
        )
    target = folder / "results" / f"{records.name_of(record)}.json"
    if target.exists() and (repeats := records.repeated(records.read_record(target), record)):
        record["repeats"] = repeats
    write_json(target, record)
    return target


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m common.results.record", description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="a work dir with a record.json")
    with exit_codes():
        for run in parser.parse_args(argv).run:
            print(f"{promote(run)} (now: make results)")


if __name__ == "__main__":
    main()
