"""Do two arms follow the same law? Tests, estimates, and the rule that makes them one sentence.

The verdict, from laws nested in one another (analysis/nested.py) and p adjusted by Holm over them:
  different    `shared_offset` against `rho`, or `separate` against `shared_offset`, is significant
               (p < .05): the laws differ by more than a multiplier of N.
  multiplier   only `rho` against `same` is.
  same         none is, and at every size and budget within what both arms span the 95 % interval
               of the relative difference of loss stays within the relevant size.
  unknown      none is, but a relevant difference is not excluded somewhere; or the design cannot
               identify each arm's law; or the law of the verdict has a shared parameter at a bound
               of its range, so that it does not describe the losses; or there is no bootstrap.
`epm` against `rho` says whether the multiplier moves with N and D; the verdict's words mention it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from analysis import estimates
from analysis.estimates import CostRatio, Crossover, Difference, Draws, Estimate
from analysis.fitting import refuse_samples
from analysis.multiplicity import SIGNIFICANT
from analysis.nested import TESTS, Ladder, ladder, least_draws
from analysis.tables import AnalysisError, count_text
from analysis.two_arms import TwoArms

RELEVANT = 0.01  # of the loss


class Verdict(StrEnum):
    SAME = "same law"
    MULTIPLIER = "same law up to a multiplier of N"
    DIFFERENT = "different laws"
    UNKNOWN = "cannot be told"


@dataclass(frozen=True)
class Estimates:
    """rho_at, iso_loss_rho: (N, D, estimate) and, of both, whether each arm has points about it on
    all sides; iso_loss_costs and crossovers by cost."""

    rho: Estimate
    rho_at: list[tuple[float, float, Estimate]]
    iso_loss_rho: list[tuple[float, float, Estimate]]
    measured: list[bool]
    iso_loss_costs: dict[str, list[CostRatio]]
    crossovers: dict[str, Crossover]
    differences: list[Difference]

    @property
    def largest(self) -> Difference:
        """Of the differences of loss, the one that may be farthest from 0."""
        return max(self.differences, key=_farthest)

    def to_json(self) -> dict[str, Any]:
        return {
            "rho": self.rho.to_json(),
            "rho_at": self._places(self.rho_at),
            "iso_loss_rho": self._places(self.iso_loss_rho),
            "iso_loss_costs": {
                name: [
                    {"loss": row.loss, **row.ratio.to_json(), "measured": row.measured}
                    for row in rows
                ]
                for name, rows in self.iso_loss_costs.items()
            },
            "crossovers": {name: found.to_json() for name, found in self.crossovers.items()},
            "largest_difference": {
                "n": self.largest.n,
                "d": self.largest.d,
                **self.largest.relative.to_json(),
            },
        }

    def _places(self, rows: list[tuple[float, float, Estimate]]) -> list[dict[str, Any]]:
        return [
            {"n": n, "d": d, **x.to_json(), "measured": measured}
            for (n, d, x), measured in zip(rows, self.measured, strict=True)
        ]


@dataclass(frozen=True)
class Comparison:
    """refused: why there are no estimates, or no intervals and tests."""

    arms: TwoArms
    objective: str
    bootstrap: int
    ladder: Ladder
    estimates: Estimates | None
    relevant: float
    refused: tuple[str, ...]
    warnings: tuple[str, ...]

    def significant(self, smaller: str, larger: str) -> bool:
        """Whether one law of the ladder is rejected against another."""
        test = self.ladder.test(smaller, larger)
        return test is not None and test.p_holm is not None and test.p_holm < SIGNIFICANT

    @property
    def chosen(self) -> str | None:
        """The smallest law of the ladder that no test rejects; None where nothing is tested."""
        if self.refused or self.estimates is None or not self.bootstrap:
            return None
        for smaller, larger in (("shared_offset", "separate"), ("rho", "shared_offset")):
            if self.significant(smaller, larger):
                return larger
        return "rho" if self.significant("same", "rho") else "same"

    @property
    def misfit(self) -> str:
        """Why the chosen law does not describe the losses; empty where it does."""
        bound = self.ladder.steps[self.chosen].shared_at_bound if self.chosen else []
        if not bound:
            return ""
        ends = "is at a bound of its range" if len(bound) == 1 else "are at bounds of their ranges"
        return f"the law {self.chosen!r} does not describe these losses: {', '.join(bound)} {ends}"

    @property
    def verdict(self) -> Verdict:
        if self.chosen is None or self.estimates is None or self.misfit:
            return Verdict.UNKNOWN
        if self.chosen in ("shared_offset", "separate"):
            return Verdict.DIFFERENT
        if self.chosen == "rho":
            return Verdict.MULTIPLIER
        within = self.estimates.largest.reach < self.relevant
        return Verdict.SAME if within else Verdict.UNKNOWN

    @property
    def sentence(self) -> str:
        """The verdict with its numbers and the range that it holds for."""
        baseline, treatment = self.arms.arms
        return f"{treatment} against {baseline}: {self.verdict}{self._words}. {self._extent}"

    @property
    def _words(self) -> str:
        if self.estimates is None:
            return f" ({'; '.join(self.refused)})"
        if self.misfit:
            return f" ({self.misfit}; {self._tested})"
        different = self.verdict is Verdict.DIFFERENT  # then no one multiplier holds
        words = "" if different else f", at a multiplier rho of {_shown(self.estimates.rho)}"
        if self.refused:
            return f"{words} ({'; '.join(self.refused)})"
        if not self.bootstrap:
            return f"{words} (no bootstrap: neither tests nor intervals)"
        if self.significant("rho", "epm"):
            words += f", {'whose multiplier of N' if different else 'which'} moves with N and D"
        words += f" ({self._tested})"
        largest = self.estimates.largest
        return (
            f"{words}; the losses differ most, relatively, by {_shown(largest.relative, '+.2%')} "
            f"at N {count_text(largest.n)}, D {count_text(largest.d)}, where {self.relevant:.1%} "
            "is relevant"
        )

    @property
    def _tested(self) -> str:
        shown = [f"{t.larger} against {t.smaller} {t.p_holm:.2g}" for t in self.ladder.tests]
        return "p after Holm: " + ", ".join(shown)

    @property
    def _extent(self) -> str:
        counts = []
        for name in ("n", "d"):
            values = getattr(self.arms, name)
            ends = count_text(values.min()), count_text(values.max())
            counts.append(f"{name.upper()} {ends[0]} to {ends[1]}")
        runs = [f"{self.arms.runs_in(i)} runs of {label}" for i, label in enumerate(self.arms.arms)]
        return f"{', '.join(counts)}; {' and '.join(runs)}, {self.arms.loss.size} endpoints."

    def to_json(self) -> dict[str, Any]:
        """What `python -m analysis.compare --json` prints; what cannot be told is null."""
        arms = self.arms
        return {
            "baseline": arms.arms[0],
            "treatment": arms.arms[1],
            "objective": self.objective,
            "bootstrap": self.bootstrap,
            "n_points": arms.loss.size,
            "runs": [arms.runs_in(i) for i in (0, 1)],
            "clusters": int(arms.clusters.max()) + 1,
            "paired": arms.pairs is not None,
            "ranges": {name: [list(arms.range_of(i, name)) for i in (0, 1)] for name in ("n", "d")},
            "flops_per_parameter_token": list(arms.flops_per_parameter_token),
            "ladder": [step.to_json() for step in self.ladder.steps.values()],
            "tests": [vars(test) for test in self.ladder.tests],
            "estimates": None if self.estimates is None else self.estimates.to_json(),
            "relevant": self.relevant,
            "refused": list(self.refused),
            "warnings": list(self.warnings),
            "verdict": str(self.verdict),
            "sentence": self.sentence,
        }


def _shown(estimate: Estimate, form: str = ".3g") -> str:
    """A number with its interval, for a person."""
    value, low, high = (
        format(x, form) if math.isfinite(x) else "beyond any"
        for x in (estimate.value, estimate.low, estimate.high)
    )
    if math.isnan(estimate.low):
        return value
    return f"{value} (95 % interval {low} to {high})"


def compare(
    arms: TwoArms,
    *,
    objective: str = "log_mse",
    bootstrap: int = 1000,
    relevant: float = RELEVANT,
    seed: int = 0,
) -> Comparison:
    """Fit the ladder of laws to both arms, test it, and estimate what the treatment is worth.

    bootstrap: draws for each test and for the intervals; 0 for neither. relevant: the relative
    difference of loss that matters. AnalysisError for a request that cannot be honoured; what the
    design cannot identify is refused within the comparison, which says why.
    """
    least = least_draws(SIGNIFICANT)
    if 0 < bootstrap < least:
        raise AnalysisError(
            f"bootstrap={bootstrap}: {len(TESTS)} tests at p < {SIGNIFICANT:g} after Holm take "
            f"{least} or more; with fewer nothing can be significant"
        )
    refuse_samples(bootstrap)
    if not 0 < relevant < math.inf:
        raise AnalysisError(f"relevant={relevant:g}: expected a positive share of the loss")
    ratios, few = arms.fixed_ratios(), arms.few_clusters() if bootstrap else []
    few += arms.few_budgets()
    if ratios:
        # What shares everything but rho may still be fitted, not what an arm has of its own.
        only: tuple[str, ...] | None = ("same", "rho") if len(ratios) == 1 else ()
        found = ladder(arms, objective=objective, bootstrap=0, only=only)
        refused = tuple(ratios)
        return Comparison(arms, objective, bootstrap, found, None, relevant, refused, ())
    count = 0 if few else bootstrap
    found = ladder(arms, objective=objective, bootstrap=count, seed=seed)
    untold = tuple(f"{step.name}: {step.refused}" for step in found.steps.values() if step.refused)
    if untold:
        return Comparison(arms, objective, bootstrap, found, None, relevant, untold, ())
    weights = arms.drawn(count, seed)
    warnings = [f"{name}: {text}" for name, step in found.steps.items() for text in step.warnings]
    if 2 * len(weights) < count:
        few = [*few, "most draws of clusters cannot identify a law of each arm"]
        weights = weights[:0]
    if arms.pairs is not None and arms.unpaired:
        warnings.append(f"{arms.unpaired} pairs have one arm only")
    # A law at the bounds of its range has no finite optimum: infinity and NaN are told as such.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        estimated = _estimate(arms, Draws.of(arms, found, weights))
    return Comparison(
        arms, objective, bootstrap, found, estimated, relevant, tuple(few), tuple(warnings)
    )


def _estimate(arms: TwoArms, draws: Draws) -> Estimates:
    n, d = estimates.probes(arms)
    places = list(zip(map(float, n), map(float, d), strict=True))
    moving = estimates.moving_rho(arms, draws, n, d)
    iso_loss = estimates.iso_loss_rho(draws, n, d)
    curves = estimates.cost_curves(arms)
    return Estimates(
        rho=estimates.rho(arms, draws),
        rho_at=[(*place, x) for place, x in zip(places, moving, strict=True)],
        iso_loss_rho=[(*place, x) for place, x in zip(places, iso_loss, strict=True)],
        measured=estimates.surrounded(arms, n, d),
        iso_loss_costs=estimates.iso_loss_costs(arms, draws, curves),
        crossovers=estimates.crossovers(arms, draws, curves),
        differences=estimates.differences(arms, draws),
    )


def _farthest(difference: Difference) -> float:
    """How far from 0 its interval reaches, or it itself where it has none."""
    reach = difference.reach
    return abs(difference.relative.value) if math.isnan(reach) else reach
