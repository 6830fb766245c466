"""A grid of sizes and tokens for a budget, what it would tell, and what simpler grids would.

A grid is chosen for a law and its parameters as they are known so far: it is the best for finding
them more exactly, not for finding out that the law is wrong. Sizes that the law may not describe
should not be among the candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from analysis.exchange import Candidates, Criterion, Search, best_grid
from analysis.identify import unidentified
from analysis.information import Grid, Knowledge, Run, Setting, points
from analysis.tables import AnalysisError, count_text

RATIOS = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)  # tokens a parameter
SEEDS = 5
MOST_SEEDS = 100  # of a size: the search tries every number of them
SAME_RATIO = 20.0  # Hoffmann et al. 2022, table 3
ISOFLOP_STEPS = (0.5, 0.8, 1.25, 2.0)  # budgets of an isoFLOP grid, as sweeps/isoflop.py has them


@dataclass(frozen=True)
class Design:
    """A grid in a setting."""

    setting: Setting
    grid: Grid
    criterion: Criterion

    @cached_property
    def _knowledge(self) -> Knowledge:
        return Knowledge(self.setting, points(self.grid))

    @property
    def cost(self) -> float:
        """FLOPs of all runs in all arms."""
        return sum(map(self.setting.cost, self.grid))

    @cached_property
    def refused(self) -> str | None:
        """Why its points cannot identify the law; None if they may."""
        at = np.array(points(self.grid) * self.setting.arms, float).reshape(-1, 2)
        arms = np.repeat(np.arange(self.setting.arms), len(points(self.grid)))
        inputs = {"n": at[:, 0], "d": at[:, 1], "group": arms.astype(float)}
        return unidentified(
            self.setting.law, {name: inputs[name] for name in self.setting.law.inputs}
        )

    @cached_property
    def log_value(self) -> float:
        """Logarithm of the criterion."""
        return float(self.criterion.log_value(self._knowledge.of_grid(self.grid)))

    def _errors(self, covariance: np.ndarray) -> dict[str, float]:
        return dict(zip(self.setting.law.names, np.sqrt(np.diag(covariance)).tolist(), strict=True))

    @property
    def least_errors(self) -> dict[str, float]:
        """Standard errors that no unbiased fit can undercut; relative, of positive parameters."""
        return self._errors(self._knowledge.bound(self.grid))

    @property
    def errors(self) -> dict[str, float]:
        """Standard errors of `python -m analysis.fit --objective=log_mse`."""
        return self._errors(self._knowledge.least_squares(self.grid))

    def efficiency(self, other: Design) -> float:
        """What `other` tells for its cost, as a share of what this does: a ratio of variances."""
        return float(np.exp(self.log_value - other.log_value))

    def to_json(self) -> dict[str, Any]:
        if self.refused is not None:
            return {"refused": self.refused}
        return {
            "cost": self.cost,
            "endpoints": len(points(self.grid)) * self.setting.arms,
            "standard_errors": self.errors,
            "least_standard_errors": self.least_errors,
        }


def choose(
    setting: Setting,
    sizes: Mapping[str, float],
    budget: float,
    criterion: Criterion,
    *,
    ratios: Sequence[float] = RATIOS,
    seeds: int = SEEDS,
) -> Design:
    """The best design that the search finds for `budget` FLOPs.

    sizes: parameters of each. ratios: tokens a parameter, of any size. seeds: at most, of a size.
    AnalysisError if the budget does not identify the law.
    """
    tokens = {size: tuple(float(round(n * r)) for r in ratios) for size, n in sizes.items()}
    candidates = Candidates(tokens, sizes, seeds)
    knowledge = Knowledge(setting, candidates.points)
    grid = best_grid(Search(knowledge, candidates, criterion, budget))
    found = Design(setting, tuple(sorted(grid, key=lambda run: (run.n, run.tokens))), criterion)
    if (reason := found.refused) is not None:
        raise AnalysisError(
            f"{count_text(budget)} FLOPs of these candidates cannot identify the law: {reason}"
        )
    return found


def isoflop(
    design: Design,
    sizes: Mapping[str, float],
    *,
    ratios: Sequence[float] = RATIOS,
    seeds: int = SEEDS,
) -> Design | None:
    """The best isoFLOP grid that costs what `design` does, with ends among its candidates' ratios.

    That is: several neighbouring sizes, each at the same four budgets, and as many seeds as serve
    best. None where there is none.
    """
    names = sorted(sizes, key=lambda size: sizes[size])
    setting = design.setting
    spans = itertools.combinations(range(len(names) + 1), 2)
    found = []
    for (first, last), count in itertools.product(spans, range(1, seeds + 1)):
        chosen = {name: sizes[name] for name in names[first:last]}
        unit = design.cost / sum(map(setting.cost, _isoflop(setting, chosen, 1.0) * count))
        grid = _isoflop(setting, chosen, unit) * count
        reached = [d / n for n, d in points(grid)]
        if min(ratios) <= min(reached) and max(reached) <= max(ratios):
            found.append(replace(design, grid=grid))
    found = [other for other in found if other.refused is None]
    return min(found, key=lambda other: other.log_value, default=None)


def _isoflop(setting: Setting, sizes: Mapping[str, float], unit: float) -> Grid:
    """Each size once, at unit times ISOFLOP_STEPS FLOPs."""
    return tuple(
        Run(s, n, tuple(step * unit / setting.token_cost(s, n) for step in ISOFLOP_STEPS))
        for s, n in sizes.items()
    )


def same_ratio(design: Design, sizes: Mapping[str, float]) -> Design:
    """Each size at 20 tokens a parameter, so often that their number is not what is refused."""
    once = tuple(Run(size, n, (SAME_RATIO * n,)) for size, n in sizes.items())
    return replace(design, grid=once * (1 + len(design.setting.law.names)))


def rows(grid: Grid) -> list[dict[str, Any]]:
    """A row an end: size, params_non_embedding, tokens and seed, as sweeps/isoflop.py reads it."""
    count: dict[str, int] = {}
    found = []
    for run in grid:
        seed = count[run.size] = count.get(run.size, -1) + 1
        for tokens in run.tokens:
            row = {"size": run.size, "params_non_embedding": int(run.n), "tokens": int(tokens)}
            found.append(row | {"seed": seed})
    return found
