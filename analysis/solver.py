"""The search for a law's parameters: many starts and resamples descend together, in float64.

Every objective is a sum of Huber losses of residuals r = log(predicted) - log(measured), or of
predicted - measured: least squares is the limit of a wide delta, least absolute deviation that of a
narrow one. Parameters are searched as logarithms, for inputs divided by their geometric means.

Arrays: S searches side by side, P points, K parameters.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from analysis.laws import Law

SEARCHED_STARTS = 64
_SAME_OPTIMUM = 1e-6  # relative difference of objectives
_EXACT = 1e-20  # squared residual that is rounding alone
_COMPLEX_STEP = 1e-30
_MOST_STEPS = 200
_PATIENCE = 8  # steps without progress before a descent ends
_PROGRESS = 1e-13


@dataclass(frozen=True)
class Objective:
    """How residuals become one number; `deltas` are the Huber widths, solved in this order."""

    logarithmic: bool
    deltas: tuple[float, ...]
    value: Callable[[np.ndarray], float]


def _huber(r: np.ndarray, delta: float) -> np.ndarray:
    if math.isinf(delta):
        return 0.5 * r**2
    size = np.abs(r)
    return np.where(size <= delta, 0.5 * r**2, delta * (size - 0.5 * delta))


HUBER_DELTA = 1e-3  # Hoffmann et al. 2022, eq. 3
_NARROWING = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
OBJECTIVES: dict[str, Objective] = {
    "huber": Objective(True, (HUBER_DELTA,), lambda r: float(_huber(r, HUBER_DELTA).sum())),
    "lad": Objective(True, _NARROWING, lambda r: float(np.abs(r).sum())),
    "log_mse": Objective(True, (math.inf,), lambda r: float(np.mean(r**2))),
    "mse": Objective(False, (math.inf,), lambda r: float(np.mean(r**2))),
}


@dataclass(frozen=True)
class Problem:
    """A law and its points in scaled units, where inputs and losses have a typical size of 1."""

    law: Law
    inputs: Mapping[str, np.ndarray]  # {name: [P]} over their geometric means
    loss: np.ndarray  # [P] over its median
    objective: Objective
    scales: Mapping[str, float]
    loss_scale: float

    @classmethod
    def of(
        cls, law: Law, inputs: Mapping[str, np.ndarray], loss: np.ndarray, objective: Objective
    ) -> "Problem":
        """From inputs {name: [P]} and losses [P] in their own units."""
        scales = {name: float(np.exp(np.log(values).mean())) for name, values in inputs.items()}
        scaled = {name: values / scales[name] for name, values in inputs.items()}
        size = float(np.median(loss))
        return cls(law, scaled, loss / size, objective, scales, size)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest logarithms of the parameters, [K] each."""
        low, high = np.log([p.bounds for p in self.law.parameters]).T
        return low, high

    def natural(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters {name: [...]} in the inputs' own units, from logarithms `theta` [..., K]."""
        values = {name: np.exp(theta[..., i]) for i, name in enumerate(self.law.names)}
        return self.law.in_units(values, self.scales, self.loss_scale)

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """Residuals [..., P] at logarithms `theta` [..., K]: of log loss, or of loss."""
        values = np.exp(theta)
        params = {name: values[..., i, None] for i, name in enumerate(self.law.names)}
        predicted = self.law.function(params, self.inputs)
        if self.objective.logarithmic:
            return np.log(predicted) - np.log(self.loss)
        return predicted - self.loss

    def jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals [S, P] and their derivatives [S, K, P] at `theta` [S, K].

        Complex steps (Squire and Trapp 1998): exact to rounding, without a formula for each law.
        """
        r = self.residuals(theta[:, None, :] + 1j * _COMPLEX_STEP * np.eye(theta.shape[-1]))
        return r[:, 0].real, r.imag / _COMPLEX_STEP


def _proposals(
    r: np.ndarray, jacobian: np.ndarray, weights: np.ndarray, delta: float, damping: np.ndarray
) -> list[np.ndarray]:
    """Damped steps [S, K] downhill on the weighted Huber loss, by two models of its curvature.

    Reweighted least squares is safe far from the optimum. Near it, only points within delta bend
    the Huber loss, and the step that counts them alone converges quadratically.
    """
    gradient = np.einsum("skp,sp->sk", jacobian, weights * np.clip(r, -delta, delta))
    reweighted = weights / np.maximum(np.abs(r) / delta, 1.0)
    curvatures = [reweighted]
    if math.isfinite(delta):
        curvatures.append(weights * (np.abs(r) <= delta) + 1e-3 * reweighted)
    steps = []
    for curvature in curvatures:
        hessian = np.einsum("skp,sp,slp->skl", jacobian, curvature, jacobian)
        size = np.einsum("skk->sk", hessian)  # a writable view of the diagonals
        size += damping[:, None] * size + 1e-300
        step = np.linalg.solve(hessian, -gradient[..., None])[..., 0]
        steps.append(np.clip(step, -1.0, 1.0))
    return steps


def descend(
    problem: Problem, theta: np.ndarray, weights: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Optima [S, K] and objectives [S] reached from `theta` [S, K] with point weights [S, P].

    Levenberg-Marquardt, within the law's bounds. Quasi-Newton searches stop early in the narrow
    valleys of scaling laws, which moved published exponents (Besiroglu et al. 2024,
    arXiv:2404.10102); this one ends when no search has gained anything for several steps.
    """
    low, high = problem.bounds

    def value(at: np.ndarray) -> np.ndarray:
        return (weights * _huber(problem.residuals(at), delta)).sum(axis=-1)

    damping = np.full(len(theta), 1e-3)
    best = value(theta)
    idle = 0
    for _ in range(_MOST_STEPS):
        r, jacobian = problem.jacobian(theta)
        before, nearest = best, theta
        for step in _proposals(r, jacobian, weights, delta, damping):
            moved = np.clip(theta + step, low, high)
            reached = value(moved)
            better = reached < best
            best = np.where(better, reached, best)
            nearest = np.where(better[:, None], moved, nearest)
        theta = nearest
        gained = best < before
        damping = np.clip(np.where(gained, damping / 5, damping * 5), 1e-15, 1e8)
        idle = 0 if np.any(best < before * (1 - _PROGRESS)) else idle + 1
        if idle == _PATIENCE:
            break
    return theta, best


@dataclass(frozen=True)
class Solution:
    """Where the search ended: logarithms of the scaled parameters [K]."""

    theta: np.ndarray
    starts: int
    share_of_starts: float  # of the searched starts, those that ended in the same optimum


def _promising_starts(problem: Problem, count: int) -> np.ndarray:
    """The `count` best points [count, K] of the law's grid of starts."""
    axes = [np.log(parameter.starts) for parameter in problem.law.parameters]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    order = np.argsort(np.abs(problem.residuals(grid)).sum(axis=-1), kind="stable")
    return grid[order[:count]]


def solve(problem: Problem, count: int = SEARCHED_STARTS) -> Solution:
    """The best optimum of searches from the `count` most promising starts of the law's grid."""
    starts = _promising_starts(problem, count)
    first, *narrower = problem.objective.deltas
    ends, values = descend(problem, starts, np.ones((len(starts), problem.loss.size)), first)
    same = values <= values.min() * (1 + _SAME_OPTIMUM) + _EXACT * problem.loss.size
    theta = ends[[int(values.argmin())]]
    for delta in narrower:
        theta, _ = descend(problem, theta, np.ones((1, problem.loss.size)), delta)
    return Solution(theta[0], len(starts), float(same.mean()))


def refit(problem: Problem, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Optima [S, K] for S resamples with point weights [S, P], near the optimum `theta` [K].

    One fresh start stands beside it, in case another valley has become the deeper one.
    """
    first, *narrower = problem.objective.deltas
    fresh = _promising_starts(problem, 1)[0]
    (near, near_value), (far, far_value) = (
        descend(problem, np.tile(start, (len(weights), 1)), weights, first)
        for start in (theta, fresh)
    )
    best = np.where((near_value <= far_value)[:, None], near, far)
    for delta in narrower:
        best, _ = descend(problem, best, weights, delta)
    return best
