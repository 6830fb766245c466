"""Approach 2 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.2): isoFLOP profiles.

Points of one compute budget are a profile: loss against size. Its lowest point is the optimum of
that budget, and a power law goes through the optima. Where the lowest point lies depends on what
is drawn through the points, so three interpolants stand side by side: a parabola (Hoffmann), a
cubic, and an Akima spline in log-log (Porian et al. 2024, arXiv:2406.19146).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from analysis.fitting import refuse_samples
from analysis.intervals import resamples
from analysis.optima import (
    LEAST_BUDGETS,
    Allocation,
    Points,
    log_mean,
    no_intervals,
    power_law,
)
from analysis.tables import AnalysisError

SAME_BUDGET = 0.01  # budgets closer than this share of a budget are one: steps are whole numbers
_GRID = 25  # points of the search a size, as in Porian et al.

# Of sizes [S], losses [S, R] and sizes to tell [G], all but losses in logs, for losses [G, R].
Interpolate = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _polynomial(degree: int) -> Interpolate:
    def interpolate(x: np.ndarray, loss: np.ndarray, at: np.ndarray) -> np.ndarray:
        centre = x.mean()
        coefficients = np.linalg.lstsq(np.vander(x - centre, degree + 1), loss)[0]
        return np.vander(at - centre, degree + 1) @ coefficients

    return interpolate


def _akima(x: np.ndarray, loss: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.exp(Akima1DInterpolator(x, np.log(loss))(at))


# With the fewest sizes that determine each; through two an Akima spline is a line.
INTERPOLANTS: dict[str, tuple[Interpolate, int]] = {
    "parabola": (_polynomial(2), 3),
    "cubic": (_polynomial(3), 4),
    "akima": (_akima, 3),
}


@dataclass(frozen=True)
class Method:
    """How an optimum is found.

    interpolant: a name in INTERPOLANTS.
    window: only sizes within this factor of the one of the least loss are used.
    noise: standard deviation of a loss (nats a token), as of seeds, for `copies` perturbed copies
      of each profile. A budget then counts only if half the copies have an optimum.
    observation: `optimum` of the losses as they are, or the `median` of those of the copies
      (Porian et al.), which a spline's small wiggles move less.
    """

    interpolant: str = "akima"
    window: float = math.inf
    noise: float = 0.0
    copies: int = 0
    observation: Literal["optimum", "median"] = "optimum"

    def __post_init__(self) -> None:
        if self.interpolant not in INTERPOLANTS:
            known = ", ".join(INTERPOLANTS)
            raise AnalysisError(f"unknown interpolant {self.interpolant!r}: choose one of {known}")
        if not self.window > 1:
            raise AnalysisError(f"window={self.window:g}: expected a factor above 1")
        if not (self.noise > 0 if self.copies else self.noise == 0):
            raise AnalysisError(f"noise={self.noise:g} and {self.copies} copies: both or neither")
        if self.observation == "median" and not self.copies:
            raise AnalysisError("the median of noisy copies takes noise and copies")
        refuse_samples(self.copies)

    @property
    def name(self) -> str:
        """Of the interpolant and, where there is one, its window."""
        window = "" if math.isinf(self.window) else f", within {self.window:g}x"
        return f"{self.interpolant}{window}"


@dataclass(frozen=True)
class Profile:
    """One budget: the sizes used [S], in rising order, and their optimum or why there is none.

    n, d, loss: parameters, tokens and loss (nats a token) of the optimum; NaN where refused.
    """

    compute: float
    points: Points
    n: float
    d: float
    loss: float
    copies: np.ndarray  # [R] optimal n of noisy copies, NaN where at an end
    refused: str = ""


def budgets(compute: np.ndarray) -> np.ndarray:
    """Which budget each point [P] belongs to: 0, 1 ... in rising order.

    A budget holds what lies within SAME_BUDGET of its least.
    """
    order = np.argsort(compute, kind="stable")
    index, first, found = -1, 0.0, np.empty(len(compute), int)
    for i in order:
        if index < 0 or compute[i] > first * (1 + SAME_BUDGET):
            index, first = index + 1, compute[i]
        found[i] = index
    return found


def best_of_each_size(points: Points) -> Points:
    """The least loss of each size, sizes rising."""
    order = np.lexsort((points.loss, points.n))
    _, first = np.unique(points.n[order], return_index=True)
    return points[order[first]]


def profile(points: Points, method: Method, seed: int = 0) -> Profile:
    """The optimum of points of one budget."""
    own = best_of_each_size(points)
    lowest = own.n[own.loss.argmin()]
    own = own[np.abs(np.log(own.n / lowest)) <= math.log(method.window) * (1 + 1e-12)]
    refused = partial(Profile, log_mean(points.c), own, math.nan, math.nan, math.nan)
    none = np.empty(0)
    interpolate, least = INTERPOLANTS[method.interpolant]
    if len(own.n) < least:
        return refused(none, f"{method.interpolant} takes {least} sizes, here are {len(own.n)}")
    x = np.log(own.n)
    log_n, loss = (float(value[0]) for value in _minima(interpolate, x, own.loss[:, None]))
    if math.isinf(log_n):
        side = "smallest" if log_n < 0 else "largest"
        return refused(none, f"the loss is least at the {side} of {len(own.n)} sizes")
    copies = none
    if method.copies:
        logs, losses = _minima(interpolate, x, _perturbed(own.loss, method, seed))
        inside = np.isfinite(logs)
        copies = np.where(inside, np.exp(logs), np.nan)
        if 2 * inside.sum() < method.copies:
            share = 1 - inside.mean()
            return refused(copies, f"noise moves the optimum to an end in {share:.0%} of copies")
        if method.observation == "median":
            log_n, loss = float(np.median(logs[inside])), float(np.median(losses[inside]))
    n = math.exp(log_n)
    return Profile(log_mean(points.c), own, n, float(_tokens_at(own, np.array(n))), loss, copies)


def _perturbed(loss: np.ndarray, method: Method, seed: int) -> np.ndarray:
    """Noisy losses [S, R]; lognormal, so that none is negative."""
    noise = np.random.default_rng(seed).normal(size=(len(loss), method.copies))
    return loss[:, None] * np.exp(method.noise / loss[:, None] * noise)


def _minima(
    interpolate: Interpolate, x: np.ndarray, loss: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where the interpolants of losses [S, R] at log sizes x [S] are least, and their least [R].

    -inf and inf where that is at the first or last size. Between points of the grid a parabola
    through three leads on.
    """
    grid = np.linspace(x[0], x[-1], (len(x) - 1) * _GRID)
    values = interpolate(x, loss, grid)
    least = values.argmin(axis=0)
    at, column = np.clip(least, 1, len(grid) - 2), np.arange(loss.shape[1])
    left, middle, right = (values[at + offset, column] for offset in (-1, 0, 1))
    inside = least == at
    # The first of equal values is the least, so that inside left > middle.
    shift = (left - right) / (2 * np.where(inside, left - 2 * middle + right, 1.0))
    log_n = grid[at] + shift * (grid[1] - grid[0])
    lowest = middle - (left - right) * shift / 4
    return np.where(inside, log_n, np.where(least < at, -np.inf, np.inf)), lowest


def _tokens_at(points: Points, n: np.ndarray) -> np.ndarray:
    """Tokens that the budget buys a model of n parameters; under C = k N D exactly."""
    return np.exp(np.interp(np.log(n), np.log(points.n), np.log(points.d)))


def profiles(points: Points, method: Method, seed: int = 0) -> list[Profile]:
    """Of every budget, compute rising."""
    member = budgets(points.c)
    return [profile(points[member == i], method, seed + i) for i in range(member.max() + 1)]


def isoflop(
    points: Points,
    method: Method | None = None,
    *,
    clusters: np.ndarray | None = None,
    bootstrap: int = 0,
    seed: int = 0,
) -> Allocation:
    """Power laws through the optima of all budgets.

    Intervals come from the noisy copies where the method has them, else from `bootstrap` resamples
    of whole `clusters` [P], whose profiles are drawn anew, or without clusters of budgets. Refused
    with fewer than LEAST_BUDGETS budgets that have an optimum; the notes say why the others do not.
    """
    method = method or Method()
    refuse_samples(bootstrap)
    found = profiles(points, method, seed)
    kept = {i: p for i, p in enumerate(found) if not p.refused}
    notes = tuple(f"budget {p.compute:.3g} FLOPs: {p.refused}" for p in found if p.refused)
    name = f"isoflop {method.name}"
    if len(kept) < LEAST_BUDGETS:
        few = f"{len(kept)} of {len(found)} budgets have an optimum: a line takes {LEAST_BUDGETS}"
        return Allocation(name, notes=notes, refused=few)
    compute = np.array([p.compute for p in kept.values()])
    n, d = np.array([p.n for p in kept.values()]), np.array([p.d for p in kept.values()])
    options = _resampled(points, method, kept, clusters, bootstrap, seed)
    n_law, d_law = (power_law(compute, x, **own) for x, own in zip((n, d), options, strict=True))
    return Allocation(name, n_law, d_law, (*notes, *no_intervals(n_law, bootstrap)))


def _resampled(
    points: Points,
    method: Method,
    kept: Mapping[int, Profile],
    clusters: np.ndarray | None,
    bootstrap: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What `power_law` takes of N* and of D* for their samples."""
    if method.copies:
        sizes = np.stack([p.copies for p in kept.values()], axis=1)
    elif clusters is not None:
        sizes = _of_clusters(points, method, list(kept), clusters, bootstrap, seed)
    else:
        weights = {"weights": resamples(len(kept), bootstrap, seed=seed)}
        return weights, weights
    pairs = zip(kept.values(), sizes.T, strict=True)
    tokens = np.stack([_tokens_at(p.points, n) for p, n in pairs], axis=1)
    return {"resampled": sizes}, {"resampled": tokens}


def _of_clusters(
    points: Points,
    method: Method,
    numbers: list[int],
    clusters: np.ndarray,
    count: int,
    seed: int,
) -> np.ndarray:
    """Optimal sizes [R, B] of budgets `numbers` where whole clusters are drawn; NaN for none."""
    member = budgets(points.c)
    drawn = resamples(len(points.c), count, clusters, seed) > 0
    found = np.full((count, len(numbers)), np.nan)
    for row, chosen in enumerate(drawn):
        for column, number in enumerate(numbers):
            own = chosen & (member == number)
            if own.any():
                found[row, column] = profile(points[own], method).n
    return found
