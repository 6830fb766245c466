"""Laws of two arms, each nested in the next, and tests of each against the next.

    same           one law for both arms
    rho            the treatment's parameters count rho times
    shared_offset  the arms share E alone
    separate       nothing is shared

`rho` is the case A -> A rho^-alpha of `shared_offset`. Beside these, `rho` is the case mu = nu = 0
of `epm`, a multiplier that moves with N and D.

Arrays: P points, K parameters, R resamples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.identify import at_bounds, doubts
from analysis.laws import get_law
from analysis.multiplicity import holm
from analysis.solver import OBJECTIVES, Problem, descend, refit, solve
from analysis.tables import AnalysisError
from analysis.two_arms import TwoArms

ALLOWED = ("log_mse", "huber")  # one descent each; `lad` takes several
_EXACT = 1e-20  # mean squared log residual that is rounding alone

_LAWS = {
    "same": "chinchilla",
    "rho": "rho",
    "epm": "epm",
    "shared_offset": "shared_offset",
    "separate": "separate",
}

Coordinates = dict[str, Any]  # of a search {parameter: [...]}; logarithms, but of mu and nu


def _rho_of_same(at: Coordinates, baseline: str, treatment: str) -> Coordinates:
    return at | {f"rho[{treatment}]": np.zeros_like(at["E"])}


def _epm_of_rho(at: Coordinates, baseline: str, treatment: str) -> Coordinates:
    zero = np.zeros_like(at["E"])
    return at | {f"mu[{treatment}]": zero, f"nu[{treatment}]": zero}


def _shared_offset_of_rho(at: Coordinates, baseline: str, treatment: str) -> Coordinates:
    own = {
        f"{k}[{arm}]": at[k] for k in ("A", "B", "alpha", "beta") for arm in (baseline, treatment)
    }
    own[f"A[{treatment}]"] = at["A"] - np.exp(at["alpha"]) * at[f"rho[{treatment}]"]
    return own | {"E": at["E"]}


def _separate_of_shared_offset(at: Coordinates, baseline: str, treatment: str) -> Coordinates:
    return at | {f"E[{baseline}]": at["E"], f"E[{treatment}]": at["E"]}


# What a test is of: the smaller law, the larger one, and the smaller as a case of the larger.
TESTS: tuple[tuple[str, str, Callable[..., Coordinates]], ...] = (
    ("same", "rho", _rho_of_same),
    ("rho", "epm", _epm_of_rho),
    ("rho", "shared_offset", _shared_offset_of_rho),
    ("shared_offset", "separate", _separate_of_shared_offset),
)


def least_draws(level: float) -> int:
    """The draws from which on every test can be significant at `level` after Holm, all at once.

    A p of B draws is at least 1 / (1 + B), and Holm multiplies the least by the number of tests.
    """
    return next(b for b in itertools.count(1) if len(TESTS) / (1 + b) < level)


@dataclass(frozen=True)
class Step:
    """A law fitted to both arms.

    refused: why the points do not determine its parameters; its objective counts nevertheless.
    """

    name: str
    problem: Problem
    theta: np.ndarray  # [K] coordinates
    objective_value: float
    warnings: tuple[str, ...]
    refused: str

    @property
    def params(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.problem.natural(self.theta).items()}

    @property
    def shared_at_bound(self) -> list[str]:
        """Parameters of both arms that ended at a bound of their range: the law fits neither."""
        found = at_bounds(self.problem, self.theta)
        return [p.name for p, _ in found if not p.group]

    @property
    def criteria(self) -> dict[str, float | None]:
        """Gaussian log-likelihood of log residuals, AIC, AICc (Hurvich and Tsai 1989) and BIC.

        The residuals' scatter counts as a parameter. Points count as independent, which endpoints
        of one run are not: the bootstrapped tests decide. None where the objective is no
        likelihood, where the law is exact, and of AICc where there are too few points for it.
        """
        points, count = self.problem.loss.size, self.theta.size + 1
        logarithmic_squares = self.problem.objective is OBJECTIVES["log_mse"]
        if not logarithmic_squares or self.objective_value <= _EXACT:
            return {"log_likelihood": None, "aic": None, "aicc": None, "bic": None}
        likelihood = -0.5 * points * (math.log(2 * math.pi * self.objective_value) + 1)
        aic = 2 * count - 2 * likelihood
        spare = points - count - 1
        return {
            "log_likelihood": likelihood,
            "aic": aic,
            "aicc": aic + 2 * count * (count + 1) / spare if spare > 0 else None,
            "bic": count * math.log(points) - 2 * likelihood,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.name,
            "equation": self.problem.law.write(),
            "n_parameters": self.theta.size,
            "params": self.params,
            "objective_value": self.objective_value,
            **self.criteria,
            "warnings": [*self.warnings, *([self.refused] if self.refused else [])],
        }


@dataclass(frozen=True)
class Test:
    """A step against a larger one. statistic: P log(objective / larger's objective).

    Under log_mse it is the likelihood ratio. p, p_holm: None without a bootstrap; p_holm is
    adjusted over all tests of the ladder (Holm 1979).
    """

    smaller: str
    larger: str
    statistic: float
    p: float | None
    p_holm: float | None


@dataclass(frozen=True)
class Ladder:
    steps: Mapping[str, Step]
    tests: tuple[Test, ...]

    def test(self, smaller: str, larger: str) -> Test | None:
        """The test of one law against another; None where it was not made."""
        found = (t for t in self.tests if (t.smaller, t.larger) == (smaller, larger))
        return next(found, None)


def ladder(
    arms: TwoArms,
    *,
    objective: str,
    bootstrap: int,
    only: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Ladder:
    """Fit the laws, or `only` some of them, and test each against the next by `bootstrap` draws.

    0 draws give statistics without p. AnalysisError for an objective that is not in ALLOWED.
    """
    if objective not in ALLOWED:
        raise AnalysisError(f"objective {objective!r}: a comparison takes {' or '.join(ALLOWED)}")
    steps: dict[str, Step] = {}
    for name, law in _LAWS.items():
        if only is None or name in only:
            steps[name] = _fitted(arms, name, law, OBJECTIVES[objective], steps)
    tested = [t for t in TESTS if t[0] in steps and t[1] in steps]
    statistics = [_statistic(steps[small], steps[large]) for small, large, _ in tested]
    if not bootstrap:
        pairs = zip(tested, statistics, strict=True)
        return Ladder(steps, tuple(Test(t[0], t[1], value, None, None) for t, value in pairs))
    p = np.array(
        [
            _p_value(arms, steps[small], steps[large], case, observed, bootstrap, seed + i)
            for i, ((small, large, case), observed) in enumerate(
                zip(tested, statistics, strict=True)
            )
        ]
    )
    rows = zip(tested, statistics, p, holm(p), strict=True)
    tests = tuple(Test(t[0], t[1], value, float(a), float(b)) for t, value, a, b in rows)
    return Ladder(steps, tests)


def _fitted(
    arms: TwoArms, name: str, law_name: str, objective: Any, smaller: Mapping[str, Step]
) -> Step:
    """The best of the law's own starts and of the fitted laws that are cases of it."""
    law = get_law(law_name)
    law = law.bind(arms.arms) if law.is_grouped else law
    problem = Problem.of(law, arms.inputs, arms.loss, objective)
    solution = solve(problem)
    cases = [
        as_case_of(smaller[small], problem, case, arms)(smaller[small].theta[None])
        for small, large, case in TESTS
        if large == name and small in smaller
    ]
    if cases:
        ends = descend(problem, np.concatenate([solution.theta[None], *cases]))
        best = int(ends.value.argmin())
        if best > 0 and ends.value[best] < ends.value[0]:
            theta, gradient = ends.theta[best], float(ends.gradient[best])
            solution = replace(solution, theta=theta, gradient=gradient)
    value = objective.value(problem.residuals(solution.theta))
    try:
        found, refused = tuple(doubts(problem, solution)), ""
    except AnalysisError as error:
        found, refused = (), str(error)
    return Step(name, problem, solution.theta, value, found, refused)


def as_case_of(
    step: Step, larger: Problem, case: Callable[..., Coordinates], arms: TwoArms
) -> Callable[[np.ndarray], np.ndarray]:
    """From coordinates of a step's law [..., K] to the same law's as a case of the larger one."""

    def embed(theta: np.ndarray) -> np.ndarray:
        at = {name: theta[..., i] for i, name in enumerate(step.problem.law.names)}
        inside = case(at, *arms.arms)
        return np.stack([inside[name] for name in larger.law.names], axis=-1)

    return embed


def _statistic(smaller: Step, larger: Step) -> float:
    values = np.array([smaller.objective_value]), np.array([larger.objective_value])
    return float(_statistics(*values, smaller.problem.loss.size)[0])


def _statistics(smaller: np.ndarray, larger: np.ndarray, points: int) -> np.ndarray:
    """P log of the objectives' ratio [R]; a law that is exact leaves nothing to explain."""
    ratio = np.maximum(smaller, _EXACT) / np.maximum(larger, _EXACT)
    return points * np.log(np.maximum(ratio, 1.0))


def _p_value(
    arms: TwoArms,
    smaller: Step,
    larger: Step,
    case: Callable[..., Coordinates],
    observed: float,
    count: int,
    seed: int,
) -> float:
    """Share of draws under the smaller law whose statistic is at least as large.

    The wild cluster bootstrap, with the null imposed (Cameron, Gelbach and Miller 2008): the
    fitted smaller law, with each cluster's residuals as they are times one random factor. What is
    observed counts as a draw.
    """
    r = smaller.problem.residuals(smaller.theta)
    logs = np.log(arms.loss) + r - arms.wild_weights(count, seed) * r
    small = refit(smaller.problem, smaller.theta, loss=np.exp(logs))
    # The larger law starts from its own optimum and from the smaller one's: it is never worse.
    inside = as_case_of(smaller, larger.problem, case, arms)(small)
    starts = np.concatenate([np.tile(larger.theta, (count, 1)), inside])
    ends = descend(larger.problem, starts, loss=np.tile(np.exp(logs), (2, 1)))
    first, second = ends.value[:count], ends.value[count:]
    large = np.where((first <= second)[:, None], ends.theta[:count], ends.theta[count:])
    drawn = _statistics(
        _objective_values(smaller.problem, small, logs),
        _objective_values(larger.problem, large, logs),
        arms.loss.size,
    )
    return float((1 + (drawn >= observed).sum()) / (1 + count))


def _objective_values(problem: Problem, theta: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Of each draw [R], at its own optimum [R, K], for its own log losses [R, P]."""
    r = problem.residuals(theta) + np.log(problem.loss) - logs
    return np.array([problem.objective.value(row) for row in r])
