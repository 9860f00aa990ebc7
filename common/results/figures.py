"""What every folder's figures.py shares: matplotlib without a display, and where a figure goes."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["plt", "save"]


def save(figure, path: Path) -> None:
    """Write the figure as PNG, close it, and print where it is."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(path)
