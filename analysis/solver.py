"""The search for a law's parameters: thousands of starts and resamples descend together.

Every objective is a sum of Huber losses of residuals r = log(predicted) - log(measured), or of
predicted - measured: least squares is the limit of a wide delta, least absolute deviation that of a
narrow one. A search is a row of a batch: its start, its points' weights and losses, its bounds. The
batch is cut into blocks, which a few threads take through one compiled program, in float64.

Arrays: S searches side by side, P points, K parameters.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from analysis.laws import COUNTS, Law, Params

SEARCHED_STARTS = 64
CERTIFIED = 1e-6  # of the gradient: see Descent
_SAME_OPTIMUM = 1e-6  # relative difference of objectives
_SAME_PLACE = 1e-2  # of coordinates, most of which are logarithms
_EXACT = 1e-20  # squared residual that is rounding alone
_MOST_STEPS = 300
_ROUND = 16  # steps of a compiled call
_BLOCK = 64  # searches of a compiled call: their residuals and Jacobians stay in the cache
_PAD = 16  # points are padded to a multiple, so that tables of nearby sizes share a program


@dataclass(frozen=True)
class Objective:
    """How residuals become one number; `deltas` are the Huber widths, solved in this order."""

    logarithmic: bool
    deltas: tuple[float, ...]
    value: Callable[[np.ndarray], float]


def _huber(r: Any, delta: Any) -> Any:
    size = jnp.abs(r)
    capped = jnp.minimum(size, delta)
    return capped * (size - 0.5 * capped)


HUBER_DELTA = 1e-3  # Hoffmann et al. 2022, eq. 3
_NARROWING = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


def _huber_sum(r: np.ndarray) -> float:
    capped = np.minimum(np.abs(r), HUBER_DELTA)
    return float((capped * (np.abs(r) - 0.5 * capped)).sum())


OBJECTIVES: dict[str, Objective] = {
    "huber": Objective(True, (HUBER_DELTA,), _huber_sum),
    "lad": Objective(True, _NARROWING, lambda r: float(np.abs(r).sum())),
    "log_mse": Objective(True, (math.inf,), lambda r: float(np.mean(r**2))),
    "mse": Objective(False, (math.inf,), lambda r: float(np.mean(r**2))),
}


@dataclass(frozen=True)
class Problem:
    """A law, its points and an objective. Searches know parameters by their coordinates [K]."""

    law: Law
    inputs: Mapping[str, np.ndarray]  # {name: [P]}
    loss: np.ndarray  # [P] nats a token
    objective: Objective
    scales: Mapping[str, float]  # geometric means of the counts

    @classmethod
    def of(
        cls, law: Law, inputs: Mapping[str, np.ndarray], loss: np.ndarray, objective: Objective
    ) -> "Problem":
        """From inputs {name: [P]} and losses [P] in their own units."""
        counts = [name for name in law.inputs if name in COUNTS]
        scales = {name: float(np.exp(np.log(inputs[name]).mean())) for name in counts}
        return cls(
            law, {k: np.asarray(inputs[k], float) for k in law.inputs}, loss, objective, scales
        )

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest coordinates, [K] each."""
        ends = np.array([p.bounds for p in self.law.parameters]) * self._units[:, None]
        return tuple(self.coordinates_of(end) for end in ends.T)  # type: ignore[return-value]

    @property
    def _units(self) -> np.ndarray:
        size = float(np.median(self.loss))
        return np.array([size if p.in_loss_units else 1.0 for p in self.law.parameters])

    def coordinates_of(self, values: np.ndarray) -> np.ndarray:
        """Coordinates [..., K] of values that are not yet logarithms."""
        positive = [p.domain == "positive" for p in self.law.parameters]
        return np.where(positive, np.log(np.where(positive, values, 1.0)), values)

    def starts(self) -> np.ndarray:
        """The law's grid of starts [S, K]."""
        axes = [p.starts for p in self.law.parameters]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
        return self.coordinates_of(grid * self._units)

    def natural(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters {name: [...]} of the paper, from coordinates [..., K]."""
        with jax.enable_x64(True):
            params = _natural(self.law, jnp.asarray(theta), self.scales)
            return {name: np.asarray(value) for name, value in params.items()}

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """Residuals [..., P] at coordinates [..., K]: of log loss, or of loss."""
        params = {name: value[..., None] for name, value in self.natural(theta).items()}
        predicted = self.law(params, self.inputs)
        if self.objective.logarithmic:
            return np.log(predicted) - np.log(self.loss)
        return predicted - self.loss

    def jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals [P] and their derivatives [P, K] at coordinates [K]."""
        with jax.enable_x64(True):
            inputs, scales = dict(self.inputs), dict(self.scales)
            logarithmic = self.objective.logarithmic
            r, j = _residuals_and_jacobian(self.law, logarithmic, inputs, scales, theta, self.loss)
            return np.asarray(r), np.asarray(j)

    def natural_jacobian(self, theta: np.ndarray) -> np.ndarray:
        """Derivatives [K, K] of the paper's parameters by the coordinates."""
        with jax.enable_x64(True):
            rows = jax.jacfwd(lambda t: _natural(self.law, t, self.scales))(jnp.asarray(theta))
            return np.stack([np.asarray(rows[name]) for name in self.law.names])


def _natural(law: Law, theta: Any, scales: Mapping[str, Any]) -> Params:
    coordinates = {
        p.full_name: jnp.exp(theta[..., i]) if p.domain == "positive" else theta[..., i]
        for i, p in enumerate(law.parameters)
    }
    return law.in_units(coordinates, scales)


def _residuals(law: Law, logarithmic: bool, inputs: Any, scales: Any, theta: Any, loss: Any) -> Any:
    """[P] for one search's theta [K]."""
    predicted = law.evaluate(_natural(law, theta, scales), inputs)
    return jnp.log(predicted) - jnp.log(loss) if logarithmic else predicted - loss


@functools.partial(jax.jit, static_argnames=("law", "logarithmic"))
def _residuals_and_jacobian(law, logarithmic, inputs, scales, theta, loss):
    function = functools.partial(_residuals, law, logarithmic, inputs, scales)
    return function(theta, loss), jax.jacfwd(function)(theta, loss)


# ---- The descent ---------------------------------------------------------------------------------


class Descent(NamedTuple):
    """Where searches ended, or are so far.

    gradient: the largest cosine between a derivative of the residuals and the residuals
      themselves, both reweighted as the Huber loss has them, over the parameters that are not at a
      bound. It is 0 at an optimum, whatever the units (MINPACK's criterion; More 1978); where
      residuals are rounding it means nothing.
    idle: steps since the objective last fell.
    """

    theta: Any  # [S, K]
    value: Any  # [S] objective
    gradient: Any  # [S]
    steps: Any  # [S]
    damping: Any  # [S]
    idle: Any  # [S]


class _Stage(NamedTuple):
    """A precision to search in, and when to end there."""

    dtype: type
    progress: float  # relative; less is none
    patience: int  # steps without progress before a search ends
    gradient: float  # below it a search ends at once


# Most of the way goes in single precision, at a fraction of the time; the end decides.
_STAGES = (_Stage(np.float32, 1e-5, 8, 1e-4), _Stage(np.float64, 1e-13, 8, 1e-9))


def _step(stage: _Stage, residuals: Callable, weights: Any, delta: Any, low: Any, high: Any):
    """One step of Levenberg-Marquardt within bounds, of one search."""
    tiny = float(np.finfo(stage.dtype).tiny)

    def value(r: Any) -> Any:
        total = jnp.sum(weights * _huber(r, delta))
        return jnp.where(jnp.isfinite(total), total, jnp.inf)

    def step(s: Descent) -> Descent:
        r, push = jax.linearize(residuals, s.theta)
        j = jax.vmap(push)(jnp.eye(s.theta.size, dtype=s.theta.dtype))  # [K, P]
        clipped = jnp.clip(r, -delta, delta)
        downhill = -(j @ (weights * clipped))
        free = ((s.theta > low) | (downhill > 0)) & ((s.theta < high) | (downhill < 0))
        free &= low < high
        downhill = jnp.where(free, downhill, 0)
        hessians = _curvatures(r, j, free, weights, delta)
        ends = jnp.clip(
            s.theta[None] + _moves(hessians, downhill, s.damping), low[None], high[None]
        )
        values = jax.vmap(lambda end: value(residuals(end)))(ends)
        best = jnp.argmin(values)
        before = value(r)
        gained = values[best] < before
        progressed = values[best] < before * (1 - stage.progress)
        lengths = jnp.sqrt(jnp.sum(weights * clipped * r) * jnp.diagonal(hessians[0]))
        return Descent(
            jnp.where(gained, ends[best], s.theta),
            jnp.where(gained, values[best], before),
            jnp.max(jnp.abs(downhill) / jnp.maximum(lengths, tiny)),
            s.steps + 1,
            jnp.clip(jnp.where(gained, s.damping / 2, s.damping * 8), 1e-15, 1e8),
            jnp.where(progressed, 0, s.idle + 1),
        )

    return step


def _curvatures(r: Any, j: Any, free: Any, weights: Any, delta: Any) -> Any:
    """Two models [2, K, K] of how the weighted Huber loss bends along j [K, P].

    Reweighted least squares is safe far from the optimum. Near it, only points within delta bend
    the Huber loss, and the step that counts them alone converges quadratically.
    """
    size = jnp.abs(r)
    reweighted = weights / jnp.maximum(size / delta, 1)
    bending = weights * (size <= delta) + 1e-3 * reweighted
    weighted = jnp.stack([reweighted, bending])[:, None] * j[None]
    hessians = jnp.einsum("ckp,lp->ckl", weighted, j)
    # A parameter at its bound has an empty row: it stays.
    return jnp.where(free[None, :, None] & free[None, None, :], hessians, 0)


def _moves(hessians: Any, downhill: Any, damping: Any) -> Any:
    """The damped step [2, K] of each curvature."""
    sizes = jnp.diagonal(hessians, axis1=1, axis2=2)
    loads = jnp.where(sizes > 0, damping * sizes, 1)
    damped = hessians + loads[:, :, None] * jnp.eye(downhill.size, dtype=downhill.dtype)[None]
    steps = _eliminate(damped, jnp.broadcast_to(downhill, sizes.shape))
    return jnp.clip(jnp.nan_to_num(steps), -1, 1)


def _eliminate(a: Any, b: Any) -> Any:
    """The solution [C, K] of positive definite systems a [C, K, K] x = b [C, K], by Gauss-Jordan.

    Not jnp.linalg.solve: on a CPU its batched LAPACK calls wait inside the threads that they need,
    and two programs side by side can wait for each other for ever (seen with jax 0.10.2).
    """
    rows = jnp.concatenate([a, b[..., None]], axis=-1)
    for k in range(b.shape[-1]):
        pivot = rows[:, k] / rows[:, k, k][:, None]
        rows = (rows - rows[:, :, k][:, :, None] * pivot[:, None]).at[:, k].set(pivot)
    return rows[..., -1]


@functools.partial(jax.jit, static_argnames=("law", "logarithmic", "stage"))
def _advance(law, logarithmic, stage, inputs, scales, delta, rows, searches):
    """A block of searches, up to _ROUND steps on; rows: their losses, weights and bounds."""

    def one(row: tuple, search: Descent) -> Descent:
        loss, weights, low, high = row

        def residuals(at: Any) -> Any:
            return _residuals(law, logarithmic, inputs, scales, at, loss)

        end = search.steps + _ROUND
        return jax.lax.while_loop(
            lambda s: (s.steps < end) & ~_finished(stage, s),
            _step(stage, residuals, weights, delta, low, high),
            search,
        )

    return jax.vmap(one)(rows, searches)


def _finished(stage: _Stage, s: Descent) -> Any:
    return (s.idle >= stage.patience) | (s.steps >= _MOST_STEPS) | (s.gradient < stage.gradient)


def descend(
    problem: Problem,
    theta: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    loss: np.ndarray | None = None,
    delta: float | None = None,
    bounds: tuple[np.ndarray, np.ndarray] | None = None,
) -> Descent:
    """Optima reached from coordinates [S, K].

    weights: of the points [S, P]; all 1 by default. loss: instead of the problem's [S, P].
    delta: of the Huber loss; the objective's first by default. bounds: of each search, [S, K] each;
    a coordinate whose bounds are equal is fixed there.

    Quasi-Newton searches stop early in the narrow valleys of scaling laws, which moved published
    exponents (Besiroglu et al. 2024, arXiv:2404.10102). A search here ends when its gradient
    vanishes, or when several steps of a Levenberg-Marquardt descent have gained nothing.
    """
    shape = len(theta), problem.loss.size
    low, high = (np.broadcast_to(b, theta.shape) for b in bounds or problem.bounds)
    given = np.ones(shape) if weights is None else weights
    losses = np.broadcast_to(problem.loss if loss is None else loss, shape)
    width = problem.objective.deltas[0] if delta is None else delta
    padding = ((0, 0), (0, -shape[1] % _PAD))
    rows = np.pad(losses, padding, mode="edge"), np.pad(given, padding), low, high
    theta = np.clip(theta, low, high)
    stages = _STAGES if width >= HUBER_DELTA else _STAGES[1:]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for stage in stages:
            searches = _run(problem, stage, width, rows, theta, threads)
            theta = np.clip(searches.theta.astype(float), low, high)
    return searches


def _run(
    problem: Problem,
    stage: _Stage,
    delta: float,
    rows: tuple[np.ndarray, ...],
    theta: np.ndarray,
    threads: ThreadPoolExecutor,
) -> Descent:
    """All searches through one stage. After a round the unfinished ones close their ranks."""
    padding = rows[0].shape[1] - problem.loss.size
    inputs = {k: np.pad(x, (0, padding), mode="edge") for k, x in problem.inputs.items()}
    inputs = {name: x.astype(stage.dtype) for name, x in inputs.items()}
    rows = tuple(row.astype(stage.dtype) for row in rows)
    count = len(theta)
    searches = Descent(
        theta=theta.astype(stage.dtype),
        value=np.full(count, np.inf, stage.dtype),
        gradient=np.full(count, np.inf, stage.dtype),
        steps=np.zeros(count, np.int32),
        damping=np.full(count, 1e-3, stage.dtype),
        idle=np.zeros(count, np.int32),
    )

    def block(own: np.ndarray) -> Descent:
        padded = np.pad(own, (0, _BLOCK - len(own)), mode="edge")
        with jax.enable_x64(True):
            ends = _advance(
                problem.law,
                problem.objective.logarithmic,
                stage,
                inputs,
                dict(problem.scales),
                stage.dtype(delta),
                tuple(row[padded] for row in rows),
                Descent(*(x[padded] for x in searches)),
            )
            return Descent(*(np.asarray(x)[: len(own)] for x in ends))

    left = np.arange(len(theta))
    while left.size:
        parts = [left[begin : begin + _BLOCK] for begin in range(0, left.size, _BLOCK)]
        ends = list(threads.map(block, parts)) if len(parts) > 1 else [block(left)]
        for column, values in zip(searches, zip(*ends, strict=True), strict=True):
            column[left] = np.concatenate(values)
        left = left[~_finished(stage, Descent(*(x[left] for x in searches)))]
    return searches


# ---- Searches ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """Where the search ended."""

    theta: np.ndarray  # [K] coordinates
    gradient: float  # see Descent; 0 where the law is exact
    starts: int
    share_of_starts: float  # of the searched starts, those that ended in the same optimum
    share_elsewhere: float = 0.0  # of them, those that are as good with other parameters


def solve(
    problem: Problem, starts: np.ndarray | None = None, weights: np.ndarray | None = None
) -> Solution:
    """The best optimum of searches from starts [S, K], by default the law's most promising ones.

    weights: of the points [P]; all 1 by default.
    """
    given = np.ones(problem.loss.size) if weights is None else weights
    starts = _promising_starts(problem, SEARCHED_STARTS, given) if starts is None else starts
    reached = descend(problem, starts, np.tile(given, (len(starts), 1)))
    same = _same(problem, reached.value)
    best = int(reached.value.argmin())
    theta, gradient = reached.theta[best], reached.gradient[best]
    for delta in problem.objective.deltas[1:]:
        narrower = descend(problem, theta[None], given[None], delta=delta)
        theta, gradient = narrower.theta[0], narrower.gradient[0]
    exact = reached.value[best] <= _EXACT * problem.loss.size
    near = same & (np.abs(reached.theta - reached.theta[best]).max(axis=1) < _SAME_PLACE)
    shares = float(near.mean()), float((same & ~near).mean())
    return Solution(theta, 0.0 if exact else float(gradient), len(starts), *shares)


def _same(problem: Problem, values: np.ndarray) -> np.ndarray:
    return values <= values.min() * (1 + _SAME_OPTIMUM) + _EXACT * problem.loss.size


def _promising_starts(problem: Problem, count: int, weights: np.ndarray) -> np.ndarray:
    """The `count` best points [count, K] of the law's grid of starts."""
    grid = problem.starts()
    order = np.argsort(np.abs(problem.residuals(grid)) @ weights, kind="stable")
    return grid[order[:count]]


def refit(
    problem: Problem,
    theta: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    loss: np.ndarray | None = None,
) -> np.ndarray:
    """Optima [S, K] for S resamples with point weights [S, P] or losses [S, P], from `theta` [K].

    Stragglers, whose search did not end at an optimum, get a second one from a fresh start.
    """
    size = len(weights) if weights is not None else len(loss) if loss is not None else 1
    best = descend(problem, np.tile(theta, (size, 1)), weights, loss=loss)
    ends, late = best.theta, np.flatnonzero(best.gradient > CERTIFIED)
    if late.size:
        fresh = _promising_starts(problem, 1, np.ones(problem.loss.size))
        own = (None if rows is None else rows[late] for rows in (weights, loss))
        again = descend(problem, np.tile(fresh, (late.size, 1)), next(own), loss=next(own))
        ends[late] = np.where((again.value < best.value[late])[:, None], again.theta, ends[late])
    for delta in problem.objective.deltas[1:]:
        ends = descend(problem, ends, weights, loss=loss, delta=delta).theta
    return ends
