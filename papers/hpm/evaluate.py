"""mAP and CMC from the descriptors of extract.py, with everything the numbers depend on.

    python -m papers.hpm.evaluate --set descriptors=runs/hpm/descriptors

Both conventions of mAP, with and without flip test and L2 norm. Names in the record: flip_l2_map_a is convention A with both.
"""

import dataclasses
from dataclasses import dataclass

from common import cli
from common.cli import Job
from common.datasets.person_reid import OFFICIAL
from common.results.records import Measured

from .descriptors import SPLITS, all_settings, read


@dataclass
class Config:
    descriptors: str = ""  # the work dir of extract.py


def run(config: Config, job: Job) -> Measured:
    """Prints a line for each setting. A query without a match is skipped and counted; in an official set it is an error."""
    (query, about), (gallery, also) = (read(config.descriptors, split) for split in SPLITS)
    trained = about["trained"]
    metrics, lines = all_settings(query, gallery, trained["dataset"] in OFFICIAL and not trained["partial"])
    print("\n".join(lines), flush=True)
    return Measured(
        metrics=metrics,
        config=dataclasses.asdict(config) | {"trained": trained},
        scale={"steps": about["steps"]},
        data={f"{trained['dataset']}/{part['split']}": part["data"] for part in (about, also)},
    )


if __name__ == "__main__":
    cli.main(run, Config, __file__)
