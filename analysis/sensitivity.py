"""How far the fitted law's headline numbers rest on choices: one choice changed at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from analysis.identify import doubts, refuse_unidentified
from analysis.laws import get_law
from analysis.optima import Points
from analysis.parametric import SIX, Spending, optimum
from analysis.solver import OBJECTIVES, Objective, Problem, solve
from analysis.tables import AnalysisError, count_text

DELTAS = (1e-2, 1e-4)  # of the Huber loss, about Hoffmann et al.'s 1e-3
MOST_DROPPED = 3  # smallest sizes


@dataclass(frozen=True)
class Headline:
    """What the law says after one choice, or why it says nothing.

    a, b: exponents of N* and D*. e: irreducible loss (nats a token). n, d: N* and D* at a compute,
    in the row's own convention of N.
    """

    choice: str
    a: float | None = None
    b: float | None = None
    e: float | None = None
    n: float | None = None
    d: float | None = None
    warnings: tuple[str, ...] = ()
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Case:
    choice: str
    points: Points
    objective: Objective
    spending: Spending | None = None  # None for that of the points


def sensitivity(points: Points, at: float, *, n_other: np.ndarray | None = None) -> list[Headline]:
    """Headline numbers at compute `at`: as given, then with each choice changed.

    Choices: the objective and Huber's delta, the smallest sizes left out, C = 6 N D in place of
    the points' own FLOPs, and `n_other` [P], the points' parameters by another convention.
    """
    return [_headline(case, at) for case in _cases(points, n_other)]


def _cases(points: Points, n_other: np.ndarray | None) -> Iterator[_Case]:
    huber = OBJECTIVES["huber"]
    yield _Case("as given", points, huber)
    for name, objective in OBJECTIVES.items():
        if objective is not huber:
            yield _Case(f"objective {name}", points, objective)
    for delta in DELTAS:
        yield _Case(f"huber delta {delta:g}", points, replace(huber, deltas=(delta,)))
    sizes = np.unique(points.n)
    for count in range(1, min(MOST_DROPPED, len(sizes) - 1) + 1):
        above = points[points.n >= sizes[count]]
        yield _Case(f"from {count_text(sizes[count])} parameters on", above, huber)
    yield _Case("C = 6 N D", points, huber, SIX)
    if n_other is not None:
        other = replace(points, n=n_other)
        yield _Case("other N", other, huber)
        yield _Case("other N, C = 6 N D", other, huber, SIX)


def _headline(case: _Case, at: float) -> Headline:
    law, points = get_law("chinchilla"), case.points
    inputs = {"n": points.n, "d": points.d}
    try:
        refuse_unidentified(law, inputs, points.loss)
        problem = Problem.of(law, inputs, points.loss, case.objective)
        solution = solve(problem)
        warnings = tuple(doubts(problem, solution))
    except AnalysisError as error:
        return Headline(case.choice, refused=str(error))
    params = {name: float(value) for name, value in problem.natural(solution.theta).items()}
    none = {name: np.empty(0) for name in params}
    spending = case.spending or Spending.of(points)
    n, d = optimum(params, none, spending, (float(points.c.min()), float(points.c.max())))
    return Headline(case.choice, n.exponent, d.exponent, params["E"], n.at(at), d.at(at), warnings)
