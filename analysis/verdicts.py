"""Verdicts: what was found of a claim, and the rules that judge differences of loss.

An excess is the paired difference of `analysis.ingredients.compare`, turned so that it is positive
where the claim says so, with its 95 % interval and its Holm-adjusted p.

The rules; a claim that has its own says so in its `how`. MARGIN is .02 nats, about 1 % of the loss.
  needed: "holds" if the excess is significant (p < .05); "does not hold" if the interval excludes
    an excess as large as MARGIN, which goes first: what surely costs less than 1 % is not needed.
  helps: the same, but significance goes first: a small gain is a gain.
  clearly: as `needed`, but "holds" only if the whole interval lies above MARGIN.
  In all three what is neither "cannot be told at this scale", and so is a variant of which some
  runs diverged; one of which most did counts as infinitely worse than its base.
  every, some: several excesses joined as by `and` and `or`, the undecided ones undecided.
"Does not hold" is said of the size, text and budget of the runs, never of larger models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.multiplicity import SIGNIFICANT

if TYPE_CHECKING:
    import pandas as pd

Effects = Mapping[tuple[str, str, str], Mapping[str, Any]]  # rows by base, kind and change

MARGIN = 0.02  # nats a token: an effect below it is no reason to call an ingredient needed


class Verdict(StrEnum):
    HOLDS = "holds"
    FAILS = "does not hold"
    UNKNOWN = "cannot be told at this scale"
    MISSING = "not measured yet"


@dataclass(frozen=True)
class Finding:
    """What was found about a claim or a part of one.

    number: for a person. values: the numbers in it by name, for a program.
    """

    verdict: Verdict
    number: str = ""
    note: str = ""
    values: dict[str, float] = field(default_factory=dict)


def by_name(effects: pd.DataFrame | None) -> Effects:
    """The rows of a comparison; none of no comparison."""
    rows = [] if effects is None else effects.to_dict("records")
    return {(row["base"], row["kind"], row["change"]): row for row in rows}


class Excess(NamedTuple):
    """A difference turned the way the claim goes; infinite where most runs of one side diverged."""

    label: str
    shown: str  # the difference itself, variant minus base
    difference: float
    mid: float
    low: float
    high: float
    p: float

    def turned(self) -> Excess:
        return self._replace(mid=-self.mid, low=-self.high, high=-self.low)


Rule = Callable[[Excess], Verdict]


def cost(effects: Effects, base: str, kind: str, change: str) -> Excess | str:
    """What a variant loses against its base; its label where the table does not have it."""
    words = {"without": "without ", "with": "with ", "instead": ""}
    label = f"{base}, {words[kind]}{change}"
    if (base, kind, change) not in effects:
        return label
    row = effects[base, kind, change]
    if row["diverged"]:
        least = math.inf if 2 * row["diverged"] > row["ended"] else math.nan
        text = f"diverged {row['diverged']} of {row['ended']}"
        return Excess(label, text, least, least, least, least, 0.0)
    if math.isnan(row["p_holm"]):
        return Excess(label, "fewer than 2 pairs", *([math.nan] * 5))
    star = "*" if row["p_holm"] < SIGNIFICANT else ""
    shown = f"{row['difference']:+.4f} ± {row['half_width']:.4f}{star}"
    three = (row["difference"], row["low"], row["high"])
    return Excess(label, shown, row["difference"], *three, row["p_holm"])


def gain(effects: Effects, base: str, kind: str, change: str) -> Excess | str:
    """What a variant gains over its base."""
    found = cost(effects, base, kind, change)
    return found if isinstance(found, str) else found.turned()


def needed(excess: Excess) -> Verdict:
    if excess.high < MARGIN:
        return Verdict.FAILS
    return Verdict.HOLDS if _significant(excess) else Verdict.UNKNOWN


def helps(excess: Excess) -> Verdict:
    if _significant(excess):
        return Verdict.HOLDS
    return Verdict.FAILS if excess.high < MARGIN else Verdict.UNKNOWN


def clearly(excess: Excess) -> Verdict:
    if excess.high < MARGIN:
        return Verdict.FAILS
    sure = _significant(excess) and excess.low > MARGIN
    return Verdict.HOLDS if sure else Verdict.UNKNOWN


def _significant(excess: Excess) -> bool:
    return excess.mid > 0 and excess.p < SIGNIFICANT


def judged(rule: Rule, excess: Excess | str) -> Finding:
    """A rule's verdict on an excess that may not be in the table."""
    if isinstance(excess, str):
        return Finding(Verdict.MISSING, f"{excess}: not measured")
    values = {excess.label: excess.difference}
    return Finding(rule(excess), f"{excess.label}: {excess.shown}", values=values)


def every(*parts: Finding) -> Finding:
    """`and`: one part that does not hold decides."""
    return _joined(parts, (Verdict.FAILS, Verdict.MISSING, Verdict.UNKNOWN, Verdict.HOLDS))


def some(*parts: Finding) -> Finding:
    """`or`: one part that holds decides."""
    return _joined(parts, (Verdict.HOLDS, Verdict.MISSING, Verdict.UNKNOWN, Verdict.FAILS))


def opposite(part: Finding) -> Finding:
    turned = {Verdict.HOLDS: Verdict.FAILS, Verdict.FAILS: Verdict.HOLDS}
    return replace(part, verdict=turned.get(part.verdict, part.verdict))


def beside(part: Finding, *others: Finding) -> Finding:
    """Numbers that are shown and decide nothing; those not measured are left out."""
    measured = [other for other in others if other.verdict != Verdict.MISSING]
    return replace(_joined((part, *measured), (part.verdict,)), verdict=part.verdict)


def _joined(parts: Sequence[Finding], order: Sequence[Verdict]) -> Finding:
    """The first verdict of `order` that a part has, with all parts' numbers and notes."""
    verdict = next(v for v in order if any(part.verdict == v for part in parts))
    return Finding(
        verdict,
        "; ".join(part.number for part in parts if part.number),
        "; ".join(part.note for part in parts if part.note),
        {name: value for part in parts for name, value in part.values.items()},
    )


def all_or_none(conditions: Sequence[bool]) -> Verdict:
    """Undecided if only some conditions are met."""
    if all(conditions):
        return Verdict.HOLDS
    return Verdict.UNKNOWN if any(conditions) else Verdict.FAILS
