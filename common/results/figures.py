"""What every folder's figures.py shares: matplotlib without a display, its command line, and where a figure goes."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

from common.cli import Parser, exit_codes
from common.results.records import load_records

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without a display

__all__ = ["main", "plt", "save"]


def save(figure, path: Path) -> None:
    """Write the figure as PNG, close it, and print where it is."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(path)


def main(draw: Callable[..., None], script: str, argv: list[str] | None = None, **files: str) -> None:
    """`python -m papers.<slug>.figures [--out DIR]`: `draw(sound records, DIR)`, those of a GPU for themselves in DIR/cuda.

    files: further flags that name a file, with their help; draw gets them as keywords, None where not given.
    """
    folder = Path(script).parent
    parser = Parser(
        prog=f"python -m papers.{folder.name}.figures",
        description=sys.modules[draw.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs") / folder.name / "figures", help="for the PNG files")
    for flag, text in files.items():
        parser.add_argument(f"--{flag}", type=Path, help=text)
    args = parser.parse_args(argv)
    with exit_codes():
        records = [record for record in load_records(folder) if record["status"] == "ok"]
        for device, out in (("cpu", args.out), ("cuda", args.out / "cuda")):
            mine = [record for record in records if record["hardware"]["device"] == device]
            if mine or device == "cpu":
                draw(mine, out, **{flag: getattr(args, flag) for flag in files})
