"""Approach 1 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.1): the envelope of curves.

At each compute of a fine grid, the run whose interpolated loss is least says which size and how
many tokens are best there. The points of a run must be comparable endpoints, each at the end of
its own decay or under one constant rate: a loss in the middle of a schedule is too high.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from analysis.fitting import refuse_samples
from analysis.intervals import resamples
from analysis.optima import Allocation, Points, no_intervals, power_law
from analysis.tables import AnalysisError

BUDGETS = 1500  # of the grid, as in Hoffmann et al.
LEAST_POINTS = 4  # of a run: with fewer the interpolant, not the run, says where it is least
LEAST_SIZES = 3  # that are best somewhere: two steps of a staircase give it no slope


@dataclass(frozen=True)
class Curves:
    """Runs as functions of compute [K]; NaN before a run's first point and after its last."""

    compute: np.ndarray  # [K] FLOPs
    n: np.ndarray  # [R] parameters
    d: np.ndarray  # [R, K] tokens
    loss: np.ndarray  # [R, K] nats a token
    runs: np.ndarray  # [R] labels

    def points(self) -> tuple[Points, np.ndarray]:
        """Every run at every compute that it passes, and its label [P]: isoFLOP profiles."""
        run, at = np.nonzero(np.isfinite(self.loss))
        here = Points(self.compute[at], self.n[run], self.d[run, at], self.loss[run, at])
        return here, self.runs[run]


def curves(points: Points, run: np.ndarray, count: int = BUDGETS) -> Curves:
    """Each run's points (labels [P]), interpolated to `count` computes evenly spaced in logs.

    Monotone cubics (Fritsch and Carlson 1980) of log loss and log tokens in log compute.
    AnalysisError for runs with too few points, with several sizes, or with repeated computes.
    """
    labels = np.unique(run)
    grid = np.linspace(np.log(points.c.min()), np.log(points.c.max()), count)
    n: list[float] = []
    d: list[np.ndarray] = []
    loss: list[np.ndarray] = []
    for label in labels:
        own = points[run == label]
        own = own[np.argsort(own.c)]
        _refuse_no_curve(label, own)
        n.append(own.n[0])
        for rows, values in ((d, own.d), (loss, own.loss)):
            curve = PchipInterpolator(np.log(own.c), np.log(values), extrapolate=False)
            rows.append(np.exp(curve(grid)))
    return Curves(np.exp(grid), np.array(n), np.stack(d), np.stack(loss), labels)


def _refuse_no_curve(label: object, own: Points) -> None:
    if len(own.c) < LEAST_POINTS:
        raise AnalysisError(
            f"run {label}: {len(own.c)} points are no curve, an envelope takes {LEAST_POINTS} or "
            "more a run"
        )
    if own.n.min() < own.n.max():
        raise AnalysisError(f"run {label}: several sizes, from {own.n.min():g} to {own.n.max():g}")
    if np.any(np.diff(own.c) <= 0):
        repeated = own.c[1:][np.diff(own.c) <= 0][0]
        raise AnalysisError(f"run {label}: several points at {repeated:g} FLOPs")


@dataclass(frozen=True)
class Best:
    """Along computes [K], the run of the least loss, as an index.

    bracketed: whether smaller and larger models that also pass this compute do worse.
    """

    run: np.ndarray
    bracketed: np.ndarray


def best(of: Curves, chosen: np.ndarray) -> Best:
    """Among the runs of a mask [R]."""
    loss = np.where(chosen[:, None] & np.isfinite(of.loss), of.loss, np.inf)
    run = loss.argmin(axis=0)
    present = np.isfinite(loss)
    smallest = np.where(present, of.n[:, None], np.inf).min(axis=0)
    largest = np.where(present, of.n[:, None], 0.0).max(axis=0)
    return Best(run, (of.n[run] > smallest) & (of.n[run] < largest))


def envelope(
    points: Points,
    run: np.ndarray,
    *,
    count: int = BUDGETS,
    bootstrap: int = 0,
    clusters: np.ndarray | None = None,
    seed: int = 0,
) -> Allocation:
    """Power laws through the best run's size and tokens at every compute where it is bracketed.

    Sizes are few, so N*(C) is a staircase; m equal steps are shallower than the line through them
    by a share 1 / m^2. Intervals come from `bootstrap` resamples of runs, or of `clusters` [P] of
    them. AnalysisError where runs are no curves, or fewer than LEAST_SIZES are best somewhere.
    """
    refuse_samples(bootstrap)
    of = curves(points, run, count)
    found = best(of, np.ones(len(of.n), bool))
    inside = np.flatnonzero(found.bracketed)
    sizes = len(np.unique(of.n[found.run[inside]]))
    if sizes < LEAST_SIZES:
        raise AnalysisError(
            f"{sizes} sizes are best at some compute with smaller and larger ones beside them: an "
            f"envelope takes {LEAST_SIZES}"
        )
    first = np.array([int(np.flatnonzero(run == label)[0]) for label in of.runs])
    owner = None if clusters is None else np.asarray(clusters)[first]
    n, d = _of_runs(of, resamples(len(of.n), bootstrap, owner, seed) > 0, inside)
    at, here = found.run[inside], of.compute[inside]
    n_law = power_law(here, of.n[at], resampled=n)
    d_law = power_law(here, of.d[at, inside], resampled=d)
    share = 1 - len(inside) / count
    outside = f"{share:.0%} of computes: an outermost of the sizes there is best"
    notes = (*((outside,) if share else ()), *no_intervals(n_law, bootstrap))
    return Allocation("envelope", n_law, d_law, notes)


def _of_runs(of: Curves, drawn: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best sizes and tokens [S, B] at computes `inside` for masks of runs [S, R]; NaN for none."""
    n, d = np.full((2, len(drawn), len(inside)), np.nan)
    for row, chosen in enumerate(drawn):
        found = best(of, chosen)
        kept = found.bracketed[inside]
        at, runs = inside[kept], found.run[inside[kept]]
        if len(np.unique(of.n[runs])) >= LEAST_SIZES:
            n[row, kept], d[row, kept] = of.n[runs], of.d[runs, at]
    return n, d
