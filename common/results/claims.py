"""paper.yaml: what a paper claims, as data. `load_paper` reads one and names every wrong field."""

import contextlib
from decimal import Decimal
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from common.cli import read_yaml
from common.errors import UserError

Tier = Literal["quick", "short", "full"]
PAPERS = Path(__file__).resolve().parents[2] / "papers"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Code(Part):
    url: str
    commit: str
    license: str  # "none" where the authors gave none


class DatasetTerms(Part):
    terms: str
    get: str
    splits: str


class TierNote(Part):
    time: str
    device: str
    data: str


class DatasetSplit(Part):
    id: str
    split: str


class Metric(Part):
    name: str
    unit: str
    better: Literal["lower", "higher", "equal"]
    select: Literal["last", "best_val", "best_test"] = "last"


class Reported(Part):
    value: float
    spread: float | None = None
    n: int | None = None
    digits: int = 0  # printed digits after the point, read off the YAML text

    @model_validator(mode="before")
    @classmethod
    def count_digits(cls, given):
        if isinstance(given, dict) and "digits" not in given and "value" in given:
            with contextlib.suppress(ArithmeticError):  # not a number: the field check says so
                given = {**given, "digits": max(0, -Decimal(str(given["value"])).as_tuple().exponent)}
        return given


class Tolerance(Part):
    abs: float = Field(ge=0)
    why: str


class RunSpec(Part):
    experiment: str
    tier: Tier
    seeds: list[int] = Field(min_length=1)
    device: Literal["cpu", "cuda"] | None = None  # None: quick counts runs on a CPU, the others those on a GPU, if any


class Claim(Part):
    """One claim.

    `against` (order, ratio): the baseline's metric in the same record, so that seeds are paired. An order claim holds
    when the metric beats the baseline's by more than `-margin`; a ratio claim when metric / baseline >= `at_least`.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    what: str
    kind: Literal["cost", "property", "value", "order", "ratio"]
    source: str
    dataset: DatasetSplit
    metric: Metric
    reported: Reported | None
    provenance: Literal["checked", "memory", "ours"]  # ours: a check of the method that the paper does not print
    protocol: str
    tolerance: Tolerance | None = None
    against: str | None = None
    margin: float = 0.0
    at_least: float | None = None
    run: RunSpec | None = None
    blocked: str | None = None
    deviates: list[str] = []

    @model_validator(mode="after")
    def consistent(self):
        if (self.run is None) == (self.blocked is None):
            raise ValueError("needs either run (how it is measured) or blocked (why it is not)")
        if self.kind in ("order", "ratio") and self.run and self.against is None:
            raise ValueError(f"kind {self.kind} needs against: the baseline's metric")
        if self.kind == "ratio" and self.run and self.at_least is None:
            raise ValueError("kind ratio needs at_least: the ratio from which the claim holds")
        if self.kind in ("value", "cost", "property") and self.run and self.reported is None:
            raise ValueError(f"kind {self.kind} needs reported.value")
        return self


class Deviation(Part):
    id: str
    what: str
    why: str


class NotCovered(Part):
    what: str
    why: str


class Paper(Part):
    slug: str
    name: str  # what people call it, for tables
    title: str
    authors: str
    venue: str
    links: dict[str, str]
    official_code: Code | None
    datasets: dict[str, DatasetTerms]
    tiers: dict[Tier, TierNote]
    claims: list[Claim] = Field(min_length=1)
    headline: dict[str, str] = Field(
        min_length=1, max_length=3
    )  # claim id -> what the paper stands for, in plain words
    deviations: list[Deviation] = []
    not_covered: list[NotCovered] = []

    @field_validator("claims")
    @classmethod
    def unique(cls, claims):
        ids = [claim.id for claim in claims]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"claim ids must be unique; more than once: {', '.join(twice)}")
        return claims

    @model_validator(mode="after")
    def references(self):
        deviations = {deviation.id for deviation in self.deviations}
        for claim_id in self.headline:
            if claim_id not in {claim.id for claim in self.claims}:
                raise ValueError(f"headline: no claim {claim_id!r}")
        for claim in self.claims:
            if claim.dataset.id not in self.datasets:
                raise ValueError(f"claim {claim.id}: dataset {claim.dataset.id!r} is not under datasets")
            if claim.run and claim.run.tier not in self.tiers:
                raise ValueError(f"claim {claim.id}: tier {claim.run.tier!r} is not under tiers")
            for missing in sorted(set(claim.deviates) - deviations):
                raise ValueError(f"claim {claim.id}: deviates {missing!r} is not under deviations")
        return self

    def claim(self, claim_id: str) -> Claim:
        for claim in self.claims:
            if claim.id == claim_id:
                return claim
        raise UserError(f"{self.slug} has no claim {claim_id!r}; it has: {', '.join(c.id for c in self.claims)}")


def slugs(papers: Path = PAPERS) -> list[str]:
    return sorted(p.parent.name for p in papers.glob("*/paper.yaml") if not p.parent.name.startswith("_"))


def paper_folder(slug: str, papers: Path = PAPERS) -> Path:
    if not (papers / slug / "paper.yaml").exists():
        raise UserError(
            f"no paper {slug!r} here; there are: {', '.join(slugs(papers))} (make new PAPER=... starts one)"
        )
    return papers / slug


def load_paper(folder: Path) -> Paper:
    """Read and check `folder/paper.yaml`."""
    path = folder / "paper.yaml"
    paper = checked(Paper, path)
    if paper.slug != folder.name:
        raise UserError(f"{path}: slug: is {paper.slug!r}, but the folder is {folder.name!r}")
    return paper


def checked(model: type[Part], path: Path) -> Part:
    """A YAML file as a `model`. A wrong field gives one UserError that names it and what was expected."""
    content = read_yaml(path)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first, more = error.errors()[0], error.error_count() - 1
        raise UserError(
            f"{path}: {_place(first['loc'], content)}: {first['msg'].removeprefix('Value error, ')}"
            + (f" (and {more} more)" if more else "")
        ) from None


def _place(location: tuple, content) -> str:
    """('claims', 3, 'metric') -> 'claims[3] (c10-error).metric'."""
    text = ""
    for key in location:
        if isinstance(key, int):
            text += f"[{key}]"
            content = content[key] if isinstance(content, list) and key < len(content) else None
            if isinstance(content, dict) and "id" in content:
                text += f" ({content['id']})"
        else:
            text += f".{key}" if text else key
            content = content.get(key) if isinstance(content, dict) else None
    return text or "paper"
