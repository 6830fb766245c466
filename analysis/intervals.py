"""How far a fit's parameters may be off: bootstrap, sandwich covariance, profile likelihood.

Endpoints of one run share a trunk and its luck, so they are no independent points. Everything here
treats a cluster, a run, as what was drawn.
"""

from __future__ import annotations

import numpy as np

from analysis.identify import unidentified
from analysis.solver import Problem, descend, refit

PROFILE_POINTS = 24
_CHI2_95 = 3.841458820694124  # of one degree of freedom


def memberships(count: int, clusters: np.ndarray | None) -> tuple[int, np.ndarray]:
    """The number of clusters and each point's [P]; every point is one of its own without labels."""
    labels = np.arange(count) if clusters is None else np.asarray(clusters)
    names, membership = np.unique(labels, return_inverse=True)
    return len(names), membership


def bootstrap(
    problem: Problem,
    theta: np.ndarray,
    count: int,
    clusters: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Optima [R, K] of `count` resamples of whole clusters, or none where they would mislead.

    That is with fewer clusters than parameters and three, or when most resamples cannot identify
    the law.
    """
    strata = problem.inputs["group"] if problem.law.groups else None
    weights = resamples(problem.loss.size, count, clusters, seed, strata)
    if memberships(problem.loss.size, clusters)[0] < theta.size + 3:
        return np.empty((0, theta.size))
    kept = [w for w in weights if unidentified(problem.law, _chosen(problem, w)) is None]
    if 2 * len(kept) < max(count, 1):
        return np.empty((0, theta.size))
    return refit(problem, theta, np.stack(kept))


def resamples(
    points: int,
    count: int,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    strata: np.ndarray | None = None,
) -> np.ndarray:
    """How often each point is drawn [R, P], when whole clusters are.

    strata: labels [P]; clusters are drawn within each, so that no arm vanishes from a resample.
    Where a cluster lies in several strata, as a pair of runs does, all are drawn together.
    """
    size, membership = memberships(points, clusters)
    rng, times = np.random.default_rng(seed), np.zeros((count, size))
    for members in _strata(size, membership, strata):
        drawn = members[rng.integers(len(members), size=(count, len(members)))]
        np.add.at(times, (np.arange(count)[:, None], drawn), 1)
    return times[:, membership]


def _strata(size: int, membership: np.ndarray, strata: np.ndarray | None) -> list[np.ndarray]:
    """The clusters of each stratum."""
    if strata is not None:
        found = [np.unique(membership[strata == label]) for label in np.unique(strata)]
        if sum(map(len, found)) == size:
            return found
    return [np.arange(size)]


def _chosen(problem: Problem, weights: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[weights > 0] for name, values in problem.inputs.items()}


def covariance(
    problem: Problem, theta: np.ndarray, clusters: np.ndarray | None = None
) -> np.ndarray | None:
    """Of the paper's parameters [K, K]: the sandwich of M-estimation, clustered (Liang and Zeger
    1986), with the factors G/(G-1) and (P-1)/(P-K) for G clusters and P points.

    None where the objective has no curvature (`lad`), or too few points lie within its delta.
    """
    delta = problem.objective.deltas[-1]
    r, jacobian = problem.jacobian(theta)
    bends = np.abs(r) <= delta
    if len(problem.objective.deltas) > 1 or bends.sum() <= theta.size:
        return None
    bread = jacobian[bends].T @ jacobian[bends]
    scores = np.clip(r, -delta, delta)[:, None] * jacobian
    size, membership = memberships(r.size, clusters)
    sums = np.zeros((size, theta.size))
    np.add.at(sums, membership, scores)
    meat = sums.T @ sums * size / max(size - 1, 1) * (r.size - 1) / (r.size - theta.size)
    inverse = np.linalg.pinv(bread, hermitian=True)
    outer = problem.natural_jacobian(theta)
    return outer @ inverse @ meat @ inverse @ outer.T


def profile(problem: Problem, theta: np.ndarray, index: int) -> tuple[float, float]:
    """The 95 % profile-likelihood interval of coordinate `index`, as the paper's parameter.

    The values at which the best objective of all other parameters is worse than the optimum by
    chi2(1)'s 95 % point, where an objective of M-estimation is scaled by E[psi^2] / E[psi'] so
    that its differences are half chi2 (Ronchetti 1982). For independent points of equal scatter.
    """
    low, high = problem.bounds
    delta = problem.objective.deltas[-1]
    best = descend(problem, theta[None], delta=delta)
    r = problem.residuals(theta)
    degrees = r.size - theta.size
    slope = max(float(np.mean(np.abs(r) <= delta)), 1.0 / r.size)
    scale = float(np.sum(np.clip(r, -delta, delta) ** 2)) / degrees / slope
    allowed = best.value[0] + 0.5 * scale * _CHI2_95
    ends = [_crossing(problem, theta, index, bound[index], allowed) for bound in (low, high)]
    values = problem.natural(np.stack(ends))[problem.law.names[index]]
    return float(min(values)), float(max(values))


def _crossing(
    problem: Problem, theta: np.ndarray, index: int, bound: float, allowed: float
) -> np.ndarray:
    """Towards `bound`, the coordinates [K] where the profile first passes `allowed`."""
    inside, outside = theta[index], bound
    near = theta
    for _ in range(4):  # each time the bracket narrows by PROFILE_POINTS
        values = np.linspace(inside, outside, PROFILE_POINTS + 1)[1:]
        starts = np.tile(near, (len(values), 1))
        starts[:, index] = values
        low, high = (np.tile(b, (len(values), 1)) for b in problem.bounds)
        low[:, index] = high[:, index] = values
        reached = descend(problem, starts, delta=problem.objective.deltas[-1], bounds=(low, high))
        beyond = np.flatnonzero(reached.value > allowed)
        if not beyond.size:
            return reached.theta[-1]
        first = int(beyond[0])
        outside = values[first]
        if first:
            inside, near = values[first - 1], reached.theta[first - 1]
    return near
