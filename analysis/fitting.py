"""Fitting a law to losses: the search, its doubts, intervals, and how well it extrapolates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.identify import (
    doubts,
    few_levels,
    fixed_ratio,
    refuse_unidentified,
    undetermined,
    unidentified,
)
from analysis.intervals import bootstrap as resampled
from analysis.intervals import covariance, profile
from analysis.laws import COUNTS, Law, get_law
from analysis.solver import OBJECTIVES, Problem, Solution, solve
from analysis.tables import AnalysisError, count_text

INTERVAL = (2.5, 97.5)  # percentiles of the bootstrap: 95 % intervals
LEAST_SAMPLES = 20
_ROUNDING = 1e-9  # of an input that is the least or the greatest fitted
MOST_SAMPLES = 100_000  # whose weights still fit into memory


@dataclass(frozen=True)
class HeldOut:
    """How a fit without the largest models foretells them; or why it could not be tried."""

    predicted: np.ndarray  # [H] nats a token
    measured: np.ndarray  # [H]
    of: str  # the input by which they are the largest
    refused: str = ""

    @property
    def relative_errors(self) -> np.ndarray:
        """Predicted over measured, minus 1 [H]."""
        return self.predicted / self.measured - 1

    def to_json(self) -> dict[str, Any]:
        if self.refused:
            return {"of": self.of, "refused": self.refused}
        errors = self.relative_errors
        return {
            "of": self.of,
            "points": len(errors),
            "mean_relative_error": float(np.abs(errors).mean()),
            "max_relative_error": float(np.abs(errors).max()),
        }


@dataclass(frozen=True)
class Fit:
    """A fitted law. Losses are in nats a token; parameters are named as in the law's paper."""

    law: Law
    objective: str
    objective_value: float
    params: dict[str, float]
    inputs: dict[str, np.ndarray]  # {name: [P]} as fitted; groups as indices into law.groups
    loss: np.ndarray  # [P]
    clusters: np.ndarray | None  # [P] labels
    solution: Solution
    problem: Problem
    covariance: np.ndarray | None  # of the parameters [K, K], by clusters; None under lad
    warnings: tuple[str, ...]
    undetermined: tuple[str, ...]  # parameters along which the objective is flat
    samples: dict[str, np.ndarray]  # {parameter: [R]} of the bootstrap refits, R = 0 without
    held_out: HeldOut | None

    @property
    def n_points(self) -> int:
        return self.loss.size

    @property
    def starts(self) -> int:
        return self.solution.starts

    @property
    def share_of_starts(self) -> float:
        """Of the starts, those that reached the optimum."""
        return self.solution.share_of_starts

    @property
    def log_residuals(self) -> np.ndarray:
        """Log of fitted over measured loss [P]."""
        return np.log(self.predict(self.inputs) / self.loss)

    @property
    def rms_log_residual(self) -> float:
        return float(np.sqrt(np.mean(self.log_residuals**2)))

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Least and greatest value of each count."""
        counts = {name: x for name, x in self.inputs.items() if name in COUNTS}
        return {name: (float(x.min()), float(x.max())) for name, x in counts.items()}

    @property
    def standard_errors(self) -> dict[str, float]:
        """Of the parameters, from the covariance; empty where there is none."""
        if self.covariance is None:
            return {}
        errors = np.sqrt(np.maximum(np.diag(self.covariance), 0))
        return dict(zip(self.law.names, map(float, errors), strict=True))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap interval of each parameter; empty without bootstrap."""
        if not self.sampled:
            return {}
        ends = {name: np.percentile(values, INTERVAL) for name, values in self.samples.items()}
        return {name: (float(low), float(high)) for name, (low, high) in ends.items()}

    @property
    def sampled(self) -> bool:
        """Whether there are bootstrap refits, and so intervals."""
        return next(iter(self.samples.values())).size > 0

    def encoded(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Inputs of the law as numbers, groups as indices; AnalysisError names a strange one."""
        x = {name: np.asarray(inputs[name]) for name in self.law.inputs}
        if self.law.groups:
            for label in sorted(set(x["group"]) - set(self.law.groups)):
                raise AnalysisError(f"group {label!r}: the fit knows {', '.join(self.law.groups)}")
            x["group"] = np.array([self.law.groups.index(label) for label in x["group"]])
        return {name: values.astype(float) for name, values in x.items()}

    def beyond(self, inputs: Mapping[str, np.ndarray]) -> list[str]:
        """Warnings of inputs {name: [P]} outside what was fitted, and by what factor."""
        found = []
        for name, (low, high) in self.ranges.items():
            factor = np.maximum(low / inputs[name], inputs[name] / high)
            count = int((factor > 1 + _ROUNDING).sum())
            if count:
                found.append(
                    f"{name} of {count} of {factor.size} rows lies beyond the fitted range, "
                    f"{count_text(low)} to {count_text(high)}, by a factor of up to "
                    f"{factor.max():.3g}"
                )
        return found

    def predict(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Loss at the inputs."""
        return self.law(self.params, inputs)

    def predict_interval(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
        """95 % bootstrap interval of the law's loss at inputs [P]; None without bootstrap."""
        if not self.sampled:
            return None
        columns = {name: values[:, None] for name, values in self.samples.items()}
        low, high = np.percentile(self.law(columns, inputs), INTERVAL, axis=0)
        return low, high

    def profile(self, name: str) -> tuple[float, float]:
        """95 % profile-likelihood interval of a parameter."""
        return profile(self.problem, self.solution.theta, self.law.names.index(name))

    def to_json(self) -> dict[str, Any]:
        """What `python -m analysis.fit --json` prints, but for the predictions."""
        return {
            "law": self.law.name,
            "objective": self.objective,
            "objective_value": self.objective_value,
            "n_points": self.n_points,
            "params": self.params,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "standard_errors": self.standard_errors,
            "covariance": None if self.covariance is None else self.covariance.tolist(),
            "warnings": list(self.warnings),
            "rms_log_residual": self.rms_log_residual,
            "max_log_residual": float(np.abs(self.log_residuals).max()),
            "starts": self.starts,
            "share_of_starts": self.share_of_starts,
            "gradient": self.solution.gradient,
            "held_out": None if self.held_out is None else self.held_out.to_json(),
            "ranges": {name: list(pair) for name, pair in self.ranges.items()},
            "groups": list(self.law.groups),
            "equation": self.law.write(self.params),
            "source": self.law.source,
        }


def fit(
    law: str,
    inputs: Mapping[str, Any],
    loss: np.ndarray,
    *,
    objective: str = "huber",
    bootstrap: int = 0,
    clusters: np.ndarray | None = None,
    baseline: str | None = None,
    hold_out: bool = True,
    seed: int = 0,
) -> Fit:
    """Fit `law` to losses [P] (nats a token) at inputs {n, d, c ...: [P]}.

    Objectives: `huber` sums Huber losses (delta 1e-3) of log residuals (Hoffmann et al. 2022, eq.
    3), `lad` sums absolute log residuals, `log_mse` and `mse` average squares of log residuals and
    of residuals. `bootstrap` resamples whole `clusters` [P] (labels; endpoints of one run are not
    independent), or points without them. `baseline` is the group (inputs["group"], labels [P])
    whose parameters count as one where a law has parameters for each group; `hold_out` fits again
    without the largest models. AnalysisError if the points cannot identify the law.
    """
    chosen, x = bound(get_law(law), inputs, baseline)
    if objective not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise AnalysisError(f"unknown objective {objective!r}: choose one of {known}")
    refuse_samples(bootstrap)
    y = np.asarray(loss, float)
    refuse_unidentified(chosen, x, y)
    problem = Problem.of(chosen, x, y, OBJECTIVES[objective])
    solution = solve(problem)
    flat = undetermined(problem, solution.theta)
    warnings = [*doubts(problem, solution), *_doubts_of_groups(chosen, x), *_doubts_of_budgets(x)]
    errors = covariance(problem, solution.theta, clusters)
    if flat:
        warnings.append(flat_text(objective, flat))
    elif errors is None:
        warnings.append(f"no standard errors: {objective} bends at too few of these points")
    thetas = resampled(problem, solution.theta, bootstrap, clusters, seed)
    if bootstrap and not len(thetas):
        warnings.append("no intervals: too few independent runs to resample")
    params = {name: float(value) for name, value in problem.natural(solution.theta).items()}
    return Fit(
        law=chosen,
        objective=objective,
        objective_value=OBJECTIVES[objective].value(problem.residuals(solution.theta)),
        params=params,
        inputs=x,
        loss=y,
        clusters=None if clusters is None else np.asarray(clusters),
        solution=solution,
        problem=problem,
        covariance=None if flat else errors,
        warnings=tuple(warnings),
        undetermined=tuple(flat),
        samples=problem.natural(thetas),
        held_out=_hold_out(problem) if hold_out else None,
    )


def refuse_samples(count: int, least: int = LEAST_SAMPLES) -> None:
    """AnalysisError for a number of resamples that gives no interval, or fits no memory.

    0 asks for none.
    """
    if count != 0 and count < least:
        raise AnalysisError(f"bootstrap={count}: an interval takes {least} or more")
    if count > MOST_SAMPLES:
        raise AnalysisError(f"bootstrap={count}: {MOST_SAMPLES} are the most")


def flat_text(objective: str, flat: Sequence[str]) -> str:
    """Which parameters are arbitrary, in a sentence."""
    return (
        f"{objective} has no curvature at this optimum: {', '.join(flat)} are not determined and "
        "have no standard errors; other values fit as well"
    )


def _doubts_of_budgets(x: Mapping[str, np.ndarray]) -> Sequence[str]:
    """Two budgets, ratios or isoFLOP profiles: nothing tests the form of the law."""
    if (few := few_levels(x)) is None:
        return ()
    return (
        f"{few}: the exponents rest on the form of the law alone; train three or more "
        "budgets of each size",
    )


def bound(
    law: Law, inputs: Mapping[str, Any], baseline: str | None
) -> tuple[Law, dict[str, np.ndarray]]:
    """The law for the groups that the inputs name, and its inputs as arrays of numbers."""
    x = {name: np.asarray(inputs[name]) for name in law.inputs}
    if law.is_grouped:
        labels = x["group"].astype(str)
        names = list(dict.fromkeys(labels))
        if baseline is None:
            raise AnalysisError(f"{law.name!r} needs a baseline: one of {', '.join(names)}")
        if baseline not in names:
            raise AnalysisError(f"baseline={baseline!r}: the groups are {', '.join(names)}")
        groups = [baseline, *(name for name in names if name != baseline)]
        law = law.bind(groups)
        x["group"] = np.array([groups.index(label) for label in labels])
    elif baseline is not None:
        raise AnalysisError(f"baseline={baseline!r}: {law.name!r} has no groups")
    return law, {name: values.astype(float) for name, values in x.items()}


def _doubts_of_groups(law: Law, x: Mapping[str, np.ndarray]) -> Sequence[str]:
    """Groups whose own points could not tell n from d: what they say rests on the others."""
    if not {"n", "d"} <= set(x):
        return ()
    found = []
    for index, label in enumerate(law.groups):
        own = {name: x[name][x["group"] == index] for name in ("n", "d")}
        if own["n"].size > 2 and fixed_ratio(own) is not None:
            found.append(
                f"{label} has one ratio of d to n: its parameters hold only if those that it "
                "shares with the others are really shared"
            )
    return found


def _hold_out(problem: Problem) -> HeldOut | None:
    """Fit without the points of the largest n (or only count), and predict them."""
    of = next((name for name in ("n", "c", "d") if name in problem.inputs), None)
    if of is None:
        return None
    left_out = problem.inputs[of] == problem.inputs[of].max()
    inputs = {name: x[~left_out] for name, x in problem.inputs.items()}
    if (reason := unidentified(problem.law, inputs)) is not None:
        return HeldOut(np.empty(0), np.empty(0), of, reason)
    # Weights of zero, rather than fewer points, share the compiled search.
    params = problem.natural(solve(problem, weights=1.0 - left_out).theta)
    targets = {name: x[left_out] for name, x in problem.inputs.items()}
    return HeldOut(problem.law(params, targets), problem.loss[left_out], of)
