"""Where the crops of a batch go, for the scripts: what is drawn is a pure function of (seed, use, batch, rank).

So nothing has to be saved, and a resumed run draws what the whole run would have. Drawn on the CPU, moved to the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.cli import Job
from common.runtime import keyed_generator

from .model import Locate
from .policy import Locator, Policy, centre, uniform

Places = Callable[[int], Locate]  # number of a batch -> the `locate` of its images


def draws(job: Job, use: str, number: int, draw: Callable[..., Tensor]) -> Callable[[int], Tensor]:
    """A function of B that draws (B, 2) again and again, for one batch; draw is torch.rand or torch.randn."""
    generator = keyed_generator(job.seed, "locations", use, number, job.world.rank)
    return lambda B: draw(B, 2, generator=generator).to(job.device, non_blocking=True)


def guarded(locate: Locate) -> Locate:
    """The same places, but the middle for NaN: a network that diverged is for the loop to report, not for the crop."""
    return lambda t, e: locate(t, e).nan_to_num(0.5)


def places(kind: str, job: Job, use: str, policy: Policy | None = None, sampled: bool = False) -> Places:
    """Crops at random, in the centre, or where the policy says: at its mean, or `sampled` around it as in training."""
    if kind == "random":
        return lambda number: uniform(draws(job, use, number, torch.rand))
    if kind == "centre":
        return lambda number: centre
    return lambda number: guarded(Locator(policy, draws(job, use, number, torch.randn) if sampled else None))


def noted(places: Places, found: list[Tensor]) -> Places:
    """The same places; all of them are also appended to `found`: (B, 2) for each batch and each of its T - 1 crops."""

    def of_batch(number: int) -> Locate:
        locate = places(number)

        def note(t: int, e: Tensor) -> Tensor:
            found.append(locate(t, e))
            return found[-1]

        return note

    return of_batch


def by_image(found: list[Tensor], steps: int) -> Tensor:
    """What `noted` collected with T = steps: (N, T - 1, 2), one row an image."""
    return torch.stack([torch.cat(found[s :: steps - 1]) for s in range(steps - 1)], 1)
