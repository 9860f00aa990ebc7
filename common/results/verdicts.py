"""Verdicts: computed from a claim and its records, never typed.

matches        full protocol, |reproduced - reported| within the tolerance
better         full protocol, better by more than the tolerance (look for a leak)
within x       full protocol, worse by x: more than the tolerance, at most three times it
below          full protocol, worse by more than that
trend holds    order: the mean paired difference points the claimed way by more than two of its standard errors
               ratio: the mean ratio reaches the claim's `at_least`
trend fails    the opposite, by the same measure
inconclusive   order only: the difference is inside two standard errors
scaled         a value measured at reduced scale: shown, never compared
not run, blocked: why

Suffixes: (n=1), `code changed since` (unless a run of the code of now repeated the older numbers, records.repeated),
`deviates d1`, `k failed`.
"""

import math
import statistics
from dataclasses import dataclass

from common.results.claims import Claim
from common.results.records import name_of

TIER_ORDER = ("quick", "short", "full")


@dataclass(frozen=True)
class Verdict:
    """`kind` is the bare verdict; `text` has the suffixes; `reproduced` is `mean ± std (n)` or ``."""

    kind: str
    text: str
    reproduced: str = ""
    tier: str = ""
    records: tuple[str, ...] = ()


def number(value: float, digits: int | None = None) -> str:
    """For reading: whole numbers with thousands separators, others at `digits` or four significant ones."""
    if value != value or math.isinf(value):
        return str(value)
    if float(value).is_integer() and (digits is None or abs(value) >= 1000):
        return f"{int(value):,}"
    if digits is None:
        if abs(value) < 1e-3:
            return f"{value:.1e}"
        digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def spread(values: list[float], digits: int | None = None) -> str:
    """`mean ± std (n)`; one value has no std."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{number(mean, digits)} (n=1)"
    std = statistics.stdev(values)
    if digits is None and not all(float(v).is_integer() for v in values) and mean:
        digits = max(0, 3 - math.floor(math.log10(abs(mean))))
    if std == 0:
        return f"{number(mean, digits)} ± 0 (n={len(values)})"
    return f"{number(mean, digits)} ± {number(std, digits)} (n={len(values)})"


def tolerance(claim: Claim, values: list[float], test_size: int | None) -> float:
    """The claim's own; else max(half a unit of the last printed digit, spread or 2 std, binomial standard error)."""
    if claim.tolerance is not None:
        return claim.tolerance.abs
    parts = [0.5 * 10.0**-claim.reported.digits, claim.reported.spread or 0.0]
    if len(values) > 1:
        parts.append(2 * statistics.stdev(values))
    if test_size and claim.metric.unit == "%":
        p = min(max(claim.reported.value / 100, 0.0), 1.0)
        parts.append(100 * math.sqrt(p * (1 - p) / test_size))
    return max(parts)


def judge(claim: Claim, records: list[dict], digests: dict[str, str]) -> Verdict:
    """The verdict of `claim` on `records` (all of its folder); `digests` are the folder's code digests now, by tier."""
    if claim.blocked is not None:
        return Verdict("blocked", f"blocked: {claim.blocked}")
    mine = [r for r in records if r["experiment"] == claim.run.experiment]
    if claim.run.device:
        mine = [r for r in mine if r["hardware"]["device"] == claim.run.device]
    good = [r for r in mine if r["status"] == "ok" and claim.metric.name in r["metrics"]]
    failed = len([r for r in mine if r["status"] != "ok"])
    suffix = f", {failed} failed" if failed else ""
    if not good:
        return Verdict("not run", "not run" + suffix)
    own = [r for r in good if r["tier"] == claim.run.tier]
    tier = claim.run.tier if own else max((r["tier"] for r in good), key=TIER_ORDER.index)
    used = sorted((r for r in good if r["tier"] == tier), key=lambda r: r["seed"])
    used = _of_one_device([r for r in used if _value(claim, r) is not None], tier)
    if not used:
        return Verdict("not run", "not run" + suffix)

    fraction = min(r.get("scale", {}).get("fraction", 1.0) for r in used)
    values = [_value(claim, r) for r in used]
    kind, text, shown = _compare(claim, values, used, at_scale=bool(own) and fraction >= 1)
    if claim.kind in ("order", "ratio") and fraction < 1:
        text += f" at {number(100 * fraction)} % of the paper's scale"
    if len(values) == 1 and claim.kind in ("value", "order"):
        text += " (n=1)"
    if not all(_current(claim, r, used, digests[tier]) for r in used):
        text += ", code changed since"
    if claim.deviates:
        text += ", deviates " + " ".join(claim.deviates)
    names = tuple(name_of(r) for r in used)
    return Verdict(kind, text + suffix, shown, tier, names)


def _of_one_device(records: list[dict], tier: str) -> list[dict]:
    """Runs on a CPU at the quick tier, on a GPU at the others; the other kind where there is none of these."""
    wanted = "cpu" if tier == "quick" else "cuda"
    return [r for r in records if r["hardware"]["device"] == wanted] or records


def _current(claim: Claim, record: dict, used: list[dict], digest: str) -> bool:
    """Measured by the code of now, or by code whose numbers a run of the code of now repeated (records.repeated)."""
    names = {claim.metric.name, claim.against} - {None}
    found = [r["repeats"].get(record["code_digest"], ()) for r in used if r["code_digest"] == digest and "repeats" in r]
    return record["code_digest"] == digest or any(names <= {*repeats} for repeats in found)


def _value(claim: Claim, record: dict) -> float | None:
    """What the claim compares: the metric itself, the paired gain (order: > 0 is as claimed), or the ratio."""
    value = record["metrics"][claim.metric.name].get(claim.metric.select)
    if claim.against is None or value is None:
        return value
    base = record["metrics"].get(claim.against, {}).get(claim.metric.select)
    if base is None:
        return None
    if claim.kind == "ratio":
        return value / base if base else None
    return value - base if claim.metric.better == "higher" else base - value


def _compare(claim: Claim, values: list[float], used: list[dict], at_scale: bool) -> tuple[str, str, str]:
    mean = statistics.fmean(values)
    if claim.kind == "ratio":
        kind = "trend holds" if mean >= claim.at_least else "trend fails"
        return kind, kind, f"{spread(values, 2)} x"
    if claim.kind == "order":
        doubt = 2 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        gain = mean + claim.margin
        kind = "trend holds" if gain > doubt else "trend fails" if gain < -doubt else "inconclusive"
        both = [
            statistics.fmean(r["metrics"][name][claim.metric.select] for r in used)
            for name in (claim.metric.name, claim.against)
        ]
        return kind, kind, f"{number(both[0])} vs {number(both[1])}, gain {spread(values)}"
    shown = spread(values, None if claim.kind == "cost" else claim.reported.digits + 1)
    if claim.kind in ("cost", "property") and len(values) == 1:
        shown = number(values[0])
    if not at_scale:
        return "scaled", "scaled", shown
    allowed = tolerance(claim, values, used[0]["metrics"][claim.metric.name].get("n")) * (1 + 1e-9)  # edges count
    off = mean - claim.reported.value
    if abs(off) <= allowed:
        return "matches", "matches", shown
    worse = abs(off) if claim.metric.better == "equal" else off if claim.metric.better == "lower" else -off
    if worse < 0:
        return "better", "better", shown
    if worse <= 3 * allowed:
        return "within", f"within {number(worse, claim.reported.digits)}", shown
    return "below", "below", shown
