"""Start a paper's folder from papers/_template: `python -m common.results.new SLUG` (make new PAPER=slug)."""

import re
import shutil
from pathlib import Path

from common.cli import Parser, exit_codes
from common.errors import UserError
from common.results import claims


def new(slug: str, root: Path = claims.PAPERS.parent) -> Path:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug):
        raise UserError(
            f"{slug!r} cannot name a folder of Python: expected small letters, digits and _, a letter first"
        )
    folder, tests = root / "papers" / slug, root / "tests" / "papers" / slug
    if folder.exists() or tests.exists():
        raise UserError(f"{folder if folder.exists() else tests} exists already; choose another name")
    for source, target in ((root / "papers" / "_template", folder), (root / "tests" / "papers" / "_template", tests)):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
        for path in target.rglob("*"):
            if path.is_file():
                path.write_text(path.read_text().replace("_template", slug))
    (folder / "results").mkdir(exist_ok=True)
    return folder


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m common.results.new", description=__doc__)
    parser.add_argument("slug")
    with exit_codes():
        folder = new(parser.parse_args(argv).slug)
        print(f"{folder}: fill in paper.yaml first (it says what to build), then make reproduce PAPER={folder.name}")


if __name__ == "__main__":
    main()
