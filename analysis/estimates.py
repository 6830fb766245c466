"""What a parameter, or another cost, of the treatment is worth in those of the baseline.

Every estimate comes with the 95 % interval of the cluster bootstrap: the laws are fitted again to
draws of whole clusters. Nothing is told beyond what was measured without a flag that says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis import isoloss
from analysis.costs import REACH, Cost
from analysis.fitting import INTERVAL
from analysis.laws import LAWS, Params, effective_multiplier
from analysis.nested import Ladder, Step
from analysis.solver import refit
from analysis.tables import AnalysisError
from analysis.two_arms import TwoArms

_ROUNDING = 1e-9  # of log sizes and tokens
_LOSSES = 5  # at which costs are compared
_TAILS = 1 - (INTERVAL[1] - INTERVAL[0]) / 100  # of the draws, outside an interval


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % interval; inf: beyond any size. NaN: cannot be told."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Any, draws: np.ndarray) -> Estimate:
        """From draws [R]: without an interval where there are none or too many cannot be told."""
        value, told = float(np.asarray(value).reshape(())), draws[~np.isnan(draws)]
        if not told.size or told.size < (1 - _TAILS) * draws.size:
            return cls(value, np.nan, np.nan)
        low, high = np.percentile(told, INTERVAL, method="nearest")
        return cls(value, float(low), float(high))

    def to_json(self) -> dict[str, float | None]:
        ends = {"value": self.value, "low": self.low, "high": self.high}
        return {name: x if np.isfinite(x) else None for name, x in ends.items()}


@dataclass(frozen=True)
class Draws:
    """Parameters of both laws without anything shared, of `rho` and of `epm`: fitted and drawn.

    arms: of each arm, Chinchilla's parameters; the first row the fit, the others draws [1 + R, 1].
    joint: of `rho` and `epm`, as well.
    """

    arms: tuple[Params, Params]
    joint: Mapping[str, Params]

    @classmethod
    def of(cls, arms: TwoArms, ladder: Ladder, weights: np.ndarray) -> Draws:
        """Fit the ladder's laws again to weighted points [R, P]; R = 0 for no intervals."""
        found = {name: _drawn(ladder.steps[name], weights) for name in ("rho", "epm", "separate")}
        both = found.pop("separate")
        one, other = (
            {name: both[f"{name}[{label}]"] for name in LAWS["chinchilla"].names}
            for label in arms.arms
        )
        return cls((one, other), found)


def _drawn(step: Step, weights: np.ndarray) -> Params:
    thetas = step.theta[None]
    if len(weights):
        thetas = np.concatenate([thetas, refit(step.problem, step.theta, weights)])
    return {name: values[:, None] for name, values in step.problem.natural(thetas).items()}


def _estimates(values: np.ndarray) -> list[Estimate]:
    """Of each column of [1 + R, X]."""
    return [Estimate.of(column[0], column[1:]) for column in values.T]


# ---- What a parameter is worth -------------------------------------------------------------------


def probes(arms: TwoArms) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and tokens [9]: least, geometric middle and greatest of what both arms span."""
    ends = [arms.common_range(name) for name in ("n", "d")]
    axes = [np.array([low, np.sqrt(low * high), high]) for low, high in ends]
    n, d = np.meshgrid(*axes, indexing="ij")
    return n.ravel(), d.ravel()


def surrounded(arms: TwoArms, n: np.ndarray, d: np.ndarray) -> list[bool]:
    """Whether each arm has points in all four quadrants about sizes and tokens [X]: else what is
    told there is extrapolated, as at the corners of a range that runs trained along its diagonal.
    """
    inside = np.ones(n.size, bool)
    for own in map(arms.inputs_of, (0, 1)):
        side_n, side_d = (np.log(own[k])[:, None] - np.log(x) for k, x in (("n", n), ("d", d)))
        for sign_n, sign_d in itertools.product((1, -1), repeat=2):
            there = (sign_n * side_n >= -_ROUNDING) & (sign_d * side_d >= -_ROUNDING)
            inside &= there.any(axis=0)
    return inside.tolist()


def rho(arms: TwoArms, draws: Draws) -> Estimate:
    """Of the law in which the arms share all but a multiplier of N."""
    return _estimates(draws.joint["rho"][f"rho[{arms.arms[1]}]"])[0]


def moving_rho(arms: TwoArms, draws: Draws, n: np.ndarray, d: np.ndarray) -> list[Estimate]:
    """Of the law `epm`, at sizes and tokens [X]."""
    return _estimates(effective_multiplier(draws.joint["epm"], {"n": n, "d": d}, arms.arms[1]))


def iso_loss_rho(draws: Draws, n: np.ndarray, d: np.ndarray) -> list[Estimate]:
    """Of two laws that share nothing, at sizes and tokens [X]: see isoloss.multiplier."""
    return _estimates(isoloss.multiplier(*draws.arms, n, d))


# ---- Equal loss: what it costs -------------------------------------------------------------------


@dataclass(frozen=True)
class CostRatio:
    """Cost of the treatment over the baseline's at a loss, each model compute-optimal.

    measured: whether both models lie within the sizes and tokens of their arms.
    """

    loss: float
    ratio: Estimate
    measured: bool


def cost_curves(arms: TwoArms) -> dict[str, tuple[Cost, Cost]]:
    """Each cost column as a function of size, for each arm."""
    return {
        column: tuple(
            Cost.of(column, label, arms.n[arms.group == i], values[arms.group == i])
            for i, label in enumerate(arms.arms)
        )  # type: ignore[misc]
        for column, values in arms.costs.items()
    }


def _common_losses(arms: TwoArms) -> np.ndarray:
    """Losses that both arms reached; AnalysisError if there are none."""
    ends = [(own.min(), own.max()) for own in (arms.loss[arms.group == i] for i in (0, 1))]
    low, high = max(least for least, _ in ends), min(greatest for _, greatest in ends)
    if low >= high:
        raise AnalysisError("the arms reached no common loss: costs of equal loss are not compared")
    return np.geomspace(low, high, _LOSSES)


def iso_loss_costs(
    arms: TwoArms, draws: Draws, curves: Mapping[str, tuple[Cost, Cost]]
) -> dict[str, list[CostRatio]]:
    """By cost, training compute (`flops`) first, at losses that both arms reached."""
    losses = _common_losses(arms)
    k = arms.flops_per_parameter_token
    best = [isoloss.optimal(p, losses, own) for p, own in zip(draws.arms, k, strict=True)]
    measured = np.ones(len(losses), bool)
    for i, own in enumerate(best):
        for name, values in (("n", own.n[0]), ("d", own.d[0])):
            low, high = arms.range_of(i, name)
            measured &= (values >= low) & (values <= high)
    ratios = {"flops": _ratio(best[1].compute, best[0].compute)}
    for column, (one, other) in curves.items():
        ratios[column] = _ratio(other(best[1].n), one(best[0].n))
    return {
        name: [
            CostRatio(float(loss), estimate, bool(inside))
            for loss, estimate, inside in zip(losses, _estimates(values), measured, strict=True)
        ]
        for name, values in ratios.items()
    }


def _ratio(treatment: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # neither arm has that loss at any cost
        return treatment / baseline


# ---- Equal cost: who is better -------------------------------------------------------------------


@dataclass(frozen=True)
class Crossover:
    """The least cost from which on the treatment is at least as good at equal cost.

    searched: the costs between which it was looked for; at their lower end the treatment is as good
      everywhere. observed: costs that both arms' models had; none where low > high.
    none_observed, none: share of draws (of the fit itself without draws) without one up to the end
      of what is observed, and of what is searched.
    """

    cost: Estimate
    searched: tuple[float, float]
    observed: tuple[float, float]
    none_observed: float
    none: float

    def to_json(self) -> dict[str, Any]:
        return {
            **self.cost.to_json(),
            "searched": list(self.searched),
            "observed": list(self.observed) if self.observed[0] <= self.observed[1] else None,
            "none_observed": self.none_observed,
            "none_within_reach": self.none,
        }


def crossovers(
    arms: TwoArms, draws: Draws, curves: Mapping[str, tuple[Cost, Cost]]
) -> dict[str, Crossover]:
    """By cost: of size itself (`n`) and the cost columns at the middle of the common tokens, and of
    training compute (`flops`) on each arm's own compute-optimal frontier.

    They are looked for up to REACH times beyond the trained sizes, or computes.
    """
    tokens = float(np.sqrt(np.prod(arms.common_range("d"))))
    law = LAWS["chinchilla"]
    one, other = draws.arms

    def of_size(x: np.ndarray) -> np.ndarray:
        return law(other, {"n": x, "d": tokens}) - law(one, {"n": x, "d": tokens})

    k = arms.flops_per_parameter_token

    def of_compute(x: np.ndarray) -> np.ndarray:
        best = [
            isoloss.frontier(p, x, flops_per_parameter_token=own)
            for p, own in zip(draws.arms, k, strict=True)
        ]
        return best[1].loss - best[0].loss

    compute = [arms.c[arms.group == i] for i in (0, 1)]
    seen = [(float(own.min()), float(own.max())) for own in compute]
    sizes = [arms.range_of(i, "n") for i in (0, 1)]
    found = {
        "n": _crossover(of_size, sizes, [_widened(*ends) for ends in sizes]),
        "flops": _crossover(of_compute, seen, [_widened(*ends) for ends in seen]),
    }
    for column, (cost, other_cost) in curves.items():

        def of_cost(x: np.ndarray, cost: Cost = cost, other_cost: Cost = other_cost) -> np.ndarray:
            treatment = law(other, {"n": other_cost.size(x), "d": tokens})
            return treatment - law(one, {"n": cost.size(x), "d": tokens})

        both = cost, other_cost
        found[column] = _crossover(of_cost, [c.observed for c in both], [c.reach for c in both])
    return found


def _widened(low: float, high: float) -> tuple[float, float]:
    return low / REACH, high * REACH


def _crossover(
    gap: Callable[[np.ndarray], np.ndarray],
    observed: list[tuple[float, float]],
    reach: list[tuple[float, float]],
) -> Crossover:
    """Of what both arms have observed, and of what both can be told for."""
    seen, told = (
        (max(low for low, _ in ends), min(high for _, high in ends)) for ends in (observed, reach)
    )
    if told[0] >= told[1]:
        raise AnalysisError(
            f"the arms' costs lie more than a factor of {REACH:g} apart: no crossover is told"
        )
    values = isoloss.crossover(gap, *told)
    drawn = values[1:] if values.size > 1 else values
    return Crossover(
        cost=Estimate.of(values[0], values[1:]),
        searched=told,
        observed=seen,
        none_observed=float(np.mean(drawn > seen[1])) if seen[0] <= seen[1] else 1.0,
        none=float(np.mean(np.isinf(drawn))),
    )


# ---- How far the losses are apart ----------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Relative difference of loss, treatment over baseline minus 1, at a size and tokens."""

    n: float
    d: float
    relative: Estimate

    @property
    def reach(self) -> float:
        """How far from 0 it may be."""
        return max(abs(self.relative.low), abs(self.relative.high))


def differences(arms: TwoArms, draws: Draws) -> list[Difference]:
    """At each size and budget of either arm that lies within what both span, by separate laws."""
    inside = np.ones(arms.n.size, bool)
    for name, values in (("n", arms.n), ("d", arms.d)):
        low, high = arms.common_range(name)
        inside &= (values >= low) & (values <= high)
    if not inside.any():
        raise AnalysisError("no endpoint lies within the sizes and tokens that both arms span")
    n, d = np.unique(np.stack([arms.n[inside], arms.d[inside]]), axis=1)
    losses = [LAWS["chinchilla"](p, {"n": n, "d": d}) for p in draws.arms]
    relative = _estimates(losses[1] / losses[0] - 1)
    return [Difference(float(a), float(b), x) for a, b, x in zip(n, d, relative, strict=True)]
