"""Descriptors of a split, for the scripts: made, kept in files, compared, and told with everything a number depends on."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common import runtime
from common.checkpoints import write_atomic
from common.datasets.person_reid import People
from common.errors import UserError
from common.metrics import retrieval
from common.metrics.accuracy import evaluating
from common.metrics.retrieval import Retrieval
from common.results.records import metric

SPLITS = ("query", "gallery")
RANKS = (1, 5, 10)
SETTINGS = {  # name in the records: flip test, L2 norm
    "plain": (False, False),
    "l2": (False, True),
    "flip": (True, False),
    "flip_l2": (True, True),
}


@dataclass(frozen=True)
class Descriptors:
    """Of N images: descriptors (N, d) of the image and of its mirror image; identities and cameras (N,)."""

    plain: Tensor
    mirrored: Tensor
    ids: Tensor
    cameras: Tensor

    def combined(self, flip: bool, l2: bool) -> Tensor:
        """(N, d): with flip the mean of both; with l2 then divided by its Euclidean norm."""
        found = (self.plain + self.mirrored) / 2 if flip else self.plain
        return F.normalize(found, dim=1) if l2 else found


def describe(model, people: People, loader, world, amp: bool = False) -> Descriptors:
    """Descriptors of every image of a split, in its order, whatever the order of the loader and the number of ranks."""
    found, numbers = [], []
    with evaluating(model, amp):
        for images, number in loader.epoch(0):
            found.append(torch.stack([model(images), model(images.flip(3))], 1).float())
            numbers.append(number)
    order = runtime.gather_rows(torch.cat(numbers)).argsort()
    both = runtime.gather_rows(torch.cat(found))[order]
    return Descriptors(both[:, 0].contiguous(), both[:, 1].contiguous(), people.ids, people.cameras)


def save(path: Path, descriptors: Descriptors, about: dict) -> None:
    """about: what the descriptors are of (data set, split, the settings that open it again)."""
    write_atomic(path, lambda file: torch.save({"about": about, **vars(descriptors)}, file))


def read(folder: str, split: str) -> tuple[Descriptors, dict]:
    """(descriptors, about) of `<folder>/<split>.pt`, which extract.py wrote; UserError where it is not that."""
    path = Path(folder) / f"{split}.pt"
    if not folder or not path.is_file():
        raise UserError(
            f"no descriptors at {str(path) if folder else '(empty)'!r}; give the work dir of papers.hpm.extract"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        about = content.pop("about")
        return Descriptors(**content), about
    except Exception as error:  # whatever a damaged file raises
        raise UserError(f"{path} does not open ({type(error).__name__}); run papers.hpm.extract again") from None


def match(query: Descriptors, gallery: Descriptors, flip: bool, l2: bool) -> Retrieval:
    """Rank the gallery for every query by Euclidean distance."""
    labels = (query.ids, query.cameras, gallery.ids, gallery.cameras)
    return retrieval.evaluate(query.combined(flip, l2), gallery.combined(flip, l2), *labels)


def told(found: Retrieval, flip: bool, l2: bool) -> str:
    """A line with everything the numbers depend on."""
    ranks = ", ".join(f"Rank-{k} {found.cmc(k):.2f}" for k in RANKS)
    flip, l2 = ("on" if used else "off" for used in (flip, l2))
    return (
        f"mAP {found.map_a:.2f} (A, rectangle) {found.map_b:.2f} (B, trapezoid), {ranks} [%]; flip test {flip}, L2 norm {l2}, "
        f"single query, no re-ranking; {found.skipped} of {len(found.first)} queries skipped"
    )


def all_settings(query: Descriptors, gallery: Descriptors, complete: bool = False) -> tuple[dict[str, dict], list[str]]:
    """(metrics "<setting>_map_a" (A), "_map_b" (B), "_rank1", ... in percent; one line a setting), for all of SETTINGS.

    complete: an official set, where every query has a match; UserError for one without.
    """
    metrics, lines = {}, []
    for name, (flip, l2) in SETTINGS.items():
        found = match(query, gallery, flip, l2)
        if complete and found.skipped:
            first = int((~found.valid).nonzero()[0])
            raise UserError(
                f"{found.skipped} queries have no match: none of the gallery shows identity {int(query.ids[first])} on another "
                f"camera than {int(query.cameras[first])}, which is never so in the official set; check the tree"
            )
        values = {"map_a": found.map_a, "map_b": found.map_b} | {f"rank{k}": found.cmc(k) for k in RANKS}
        metrics |= {f"{name}_{key}": metric(value, int(found.valid.sum())) for key, value in values.items()}
        lines.append(told(found, flip, l2))
    return metrics, lines
