"""The search for a grid of runs that tells most about chosen parameters within a budget.

Greedy by what is gained per FLOP, then exchanges: an end or a run is left out and what it frees is
spent anew, as long as that helps (Fedorov 1972, Theory of Optimal Experiments, with costs). Such a
search ends in a local optimum, so it starts from two grids.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from analysis.information import Grid, Knowledge, Run
from analysis.tables import AnalysisError

_GAIN = 1e-9  # of a log criterion; less is none

Worth = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of gains [C] and their costs [C]


@dataclass(frozen=True)
class Criterion:
    """What is made small: the summed variances of some (log) parameters, or of all the volume.

    kind: "A" sums the variances of the parameters at `indices` (one of them: c-optimality); "D"
      takes the determinant of their covariance, to the power of one over their number.
    """

    kind: str
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in ("A", "D"):
            raise AnalysisError(f"criterion {self.kind!r}: choose A or D")

    def log_value(self, information: np.ndarray) -> np.ndarray:
        """Of information matrices [..., K, K]: [...], a variance's logarithm."""
        chosen = list(self.indices)
        covariance = np.linalg.inv(information)[..., chosen, :][..., chosen]
        if self.kind == "A":
            return np.log(np.trace(covariance, axis1=-2, axis2=-1))
        return np.linalg.slogdet(covariance)[1] / len(chosen)


class Step(NamedTuple):
    """A change of a grid: one run goes and another comes in its place, or either alone."""

    gone: Run | None
    come: Run | None

    def of(self, grid: Grid) -> Grid:
        kept = list(grid)
        if self.gone is not None:
            kept.remove(self.gone)
        return (*kept, self.come) if self.come is not None else tuple(kept)


@dataclass(frozen=True)
class Candidates:
    """What may be trained: each size with any of its ends, at up to `seeds` seeds."""

    tokens: Mapping[str, tuple[float, ...]]  # ends of each size
    n: Mapping[str, float]  # parameters of each size
    seeds: int

    @property
    def points(self) -> list[tuple[float, float]]:
        return [(self.n[size], d) for size, ends in self.tokens.items() for d in ends]

    def additions(self, grid: Grid) -> list[Step]:
        """One end more: on a run, or as a run of its own."""
        found = []
        for run in dict.fromkeys(grid):
            for d in self.tokens[run.size]:
                if d not in run.tokens:
                    longer = replace(run, tokens=tuple(sorted((*run.tokens, d))))
                    found.append(Step(run, longer))
        for size, ends in self.tokens.items():
            if sum(run.size == size for run in grid) < self.seeds:
                found.extend(Step(None, Run(size, self.n[size], (d,))) for d in ends)
        return found


def removals(grid: Grid) -> list[Step]:
    """One end less, or one run."""
    found = []
    for run in dict.fromkeys(grid):
        found.append(Step(run, None))
        for d in run.tokens if len(run.tokens) > 1 else ():
            found.append(Step(run, replace(run, tokens=tuple(x for x in run.tokens if x != d))))
    return found


@dataclass(frozen=True)
class Search:
    """Candidates, what they tell, and a budget in FLOPs."""

    knowledge: Knowledge
    candidates: Candidates
    criterion: Criterion
    budget: float

    def cost(self, grid: Grid) -> float:
        """FLOPs."""
        return sum(map(self.knowledge.setting.cost, grid))

    def log_value(self, grid: Grid) -> float:
        return float(self.criterion.log_value(self.knowledge.of_grid(grid)))

    def _change(self, step: Step) -> tuple[np.ndarray, float]:
        """What a step changes of the information [K, K] and of the cost."""
        information, cost = np.zeros(()), 0.0
        for run, sign in ((step.gone, -1), (step.come, 1)):
            if run is not None:
                information = information + sign * self.knowledge.of_run(run)
                cost += sign * self.knowledge.setting.cost(run)
        return information, cost

    def fill(self, grid: Grid, worth: Worth) -> Grid:
        """Add what is worth most, until nothing is affordable or helps."""
        while True:
            left = self.budget - self.cost(grid)
            changes = [(step, *self._change(step)) for step in self.candidates.additions(grid)]
            changes = [change for change in changes if change[2] <= left]
            if not changes:
                return grid
            steps, information, costs = zip(*changes, strict=True)
            values = self.criterion.log_value(self.knowledge.of_grid(grid) + np.stack(information))
            gains = self.log_value(grid) - values
            if gains.max() <= _GAIN:
                return grid
            grid = steps[int(np.argmax(worth(gains, np.array(costs))))].of(grid)

    def exchange(self, grid: Grid) -> Grid:
        """Leave something out and fill again, as long as that helps."""
        value = self.log_value(grid)
        while True:
            for step, worth in itertools.product(removals(grid), (_per_flop, _in_all)):
                other = self.fill(step.of(grid), worth)
                if self.log_value(other) < value - _GAIN:
                    grid, value = other, self.log_value(other)
                    break
            else:
                return grid


def _per_flop(gains: np.ndarray, costs: np.ndarray) -> np.ndarray:
    return gains / costs


def _in_all(gains: np.ndarray, costs: np.ndarray) -> np.ndarray:
    return gains


def best_grid(search: Search) -> Grid:
    """The best grid found; () where not one run is affordable."""
    ends = [search.exchange(search.fill((), worth)) for worth in (_per_flop, _in_all)]
    return min(ends, key=search.log_value)
