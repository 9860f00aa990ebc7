"""Regenerate every table from paper.yaml and the records: `python -m common.results` (make results)."""

import sys

from common.checkpoints import write_atomic
from common.cli import Parser, exit_codes
from common.results import tables


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m common.results", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a table is out of step")
    args = parser.parse_args(argv)
    with exit_codes():
        stale = []
        for path, text in tables.generated().items():
            if not path.exists() or path.read_text() != text:
                stale.append(path.relative_to(tables.ROOT).as_posix())
                if not args.check:
                    write_atomic(path, lambda file, text=text: file.write(text.encode()))
        if args.check and stale:
            print(f"out of step: {', '.join(stale)}; run make results", file=sys.stderr)
            sys.exit(1)
        print(f"{'updated: ' + ', '.join(stale) if stale else 'all tables are in step'}")


if __name__ == "__main__":
    main()
