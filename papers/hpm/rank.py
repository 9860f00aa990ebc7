"""Draw a query and the first of the gallery for it, hits framed green and misses red, from the descriptors of extract.py.

python -m papers.hpm.rank --set descriptors=runs/hpm/descriptors query=12

Writes rank-<query>.png into the work dir. Junk (the same person on the same camera, bad boxes) is left out, as in the metrics.
"""

import dataclasses
from dataclasses import dataclass

from common import cli
from common.cli import Job
from common.errors import UserError
from common.metrics import retrieval
from common.results.figures import plt, save
from common.results.records import Measured, metric

from . import train
from .descriptors import SPLITS, read

HIT, MISS = "#2ca02c", "#d62728"


@dataclass
class Config:
    descriptors: str = ""  # the work dir of extract.py
    query: int = 0  # number of the query, from 0
    top: int = 10  # gallery images to draw
    flip: bool = True  # flip test: the mean of the descriptors of an image and its mirror image
    l2: bool = True  # descriptors divided by their norm

    def __post_init__(self):
        if self.top < 1 or self.query < 0:
            raise ValueError(f"query is {self.query} and top {self.top}; expected query >= 0 and top >= 1")


def run(config: Config, job: Job) -> Measured:
    """Returns the hits among the images drawn; the artifacts hold which they are."""
    (query, about), (gallery, also) = (read(config.descriptors, split) for split in SPLITS)
    if config.query >= len(query.ids):
        raise UserError(f"query {config.query} does not exist; expected 0 to {len(query.ids) - 1}")
    trained = cli.build_config(train.Config, about["trained"], config.descriptors)
    queries, images = (train.open_split(trained, job, part["split"]) for part in (about, also))
    for people, part in ((queries, about), (images, also)):
        if people.digest != part["data"]:
            raise UserError(
                f"{people.name} {people.split} is not what {config.descriptors} was extracted from; run papers.hpm.extract again"
            )
    q = slice(config.query, config.query + 1)
    order, hits = retrieval.top(
        query.combined(config.flip, config.l2)[q],
        gallery.combined(config.flip, config.l2),
        *(query.ids[q], query.cameras[q], gallery.ids, gallery.cameras),
        config.top,
    )
    order, hits = order[0][order[0] >= 0].tolist(), hits[0][order[0] >= 0].tolist()
    figure, axes = plt.subplots(1, 1 + len(order), figsize=(0.9 * (1 + len(order)), 2.4), squeeze=False)
    shown = [
        (queries, config.query, "black"),
        *((images, k, HIT if hit else MISS) for k, hit in zip(order, hits, strict=True)),
    ]
    for axis, (people, k, colour) in zip(axes[0], shown, strict=True):
        axis.imshow(people.picture(k).numpy())
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{int(people.ids[k])} c{int(people.cameras[k])}", fontsize=7)
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=3)
    axes[0, 0].set_xlabel(
        f"query\nflip {'on' if config.flip else 'off'}\nL2 {'on' if config.l2 else 'off'}", fontsize=6
    )
    save(figure, job.work_dir / f"rank-{config.query}.png")
    return Measured(
        metrics={"hits": metric(sum(hits), len(hits))},
        config=dataclasses.asdict(config) | {"trained": about["trained"]},
        scale={"steps": about["steps"]},
        data={f"{people.name}/{people.split}": people.digest for people in (queries, images)},
        artifacts={"gallery": order, "hits": hits},
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
