"""What runs would tell of a law's parameters, before they are trained: Fisher information.

The log loss of an endpoint is taken as normal about the log of the law, with a deviation that the
endpoints of one run share and one of its own. Parameters are measured by their logarithms, those
that may be negative as they are, so that a standard error is a relative one.

Arrays: A arms, P points, K parameters.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from analysis.laws import Law
from analysis.tables import AnalysisError

INFORMATION_FLOOR = 1e-6  # a prior with a standard deviation of 1000: a matrix that can be inverted


@dataclass(frozen=True)
class Noise:
    """Standard deviations of log loss: that of a run, and that of an endpoint within its run."""

    run: float
    endpoint: float

    def __post_init__(self) -> None:
        if not (0 <= self.run < np.inf and 0 < self.endpoint < np.inf):
            raise AnalysisError(
                f"noise {self.run:g},{self.endpoint:g}: that of a run is not negative, and that "
                "of an endpoint positive"
            )


@dataclass(frozen=True)
class Run:
    """A size trained once in every arm: one trunk each, with a decayed end at each of `tokens`."""

    size: str
    n: float  # parameters
    tokens: tuple[float, ...]  # ascending


Grid = tuple[Run, ...]  # equal runs differ in their seeds


@dataclass(frozen=True)
class Setting:
    """The law as it is known so far, and what runs cost and how they scatter.

    law: of n, d and group, bound to its groups if it has any. Every run is made in each of them:
      a grid is there to compare arms, which is best done at one size, budget and seed.
    flops_per_parameter_token: k of C = k N D, of sizes whose FLOPs a token are not known.
    flops_per_token: of each size, where they are known.
    decay_fraction: of an endpoint's tokens, those of its decay, which only it pays for.
    """

    law: Law
    params: Mapping[str, float]
    noise: Noise
    flops_per_parameter_token: float = 6.0
    decay_fraction: float = 0.2
    flops_per_token: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not {"n", "d"} <= set(self.law.inputs) <= {"n", "d", "group"}:
            needed = ", ".join(self.law.inputs)
            raise AnalysisError(f"{self.law.name!r} is a law of {needed}: a grid is of n and d")
        if "group" in self.law.inputs and len(self.law.groups) < 2:
            raise AnalysisError(f"{self.law.name!r} needs the parameters of two arms or more")
        for p in self.law.parameters:
            name, least = p.full_name, 0.0 if p.domain == "positive" else -np.inf
            if name not in self.params:
                raise AnalysisError(f"{self.law.name!r} needs a value of {name}")
            if not least < self.params[name] < np.inf:
                kind = "positive and finite" if p.domain == "positive" else "finite"
                raise AnalysisError(f"{name}={self.params[name]:g}: it must be {kind}")

    @property
    def arms(self) -> int:
        return max(1, len(self.law.groups))

    def cost(self, run: Run) -> float:
        """FLOPs in all arms: the trunk up to its last decay, and the decay of every endpoint."""
        f = self.decay_fraction
        tokens = (1 - f) * run.tokens[-1] + f * sum(run.tokens)
        return self.arms * self.token_cost(run.size, run.n) * tokens

    def token_cost(self, size: str, n: float) -> float:
        """FLOPs of training on one token."""
        return self.flops_per_token.get(size, self.flops_per_parameter_token * n)

    def jacobian(self, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Derivatives [A, P, K] of log loss at n, d [P] by the (log) parameters, arm by arm."""
        positive = np.array([p.domain == "positive" for p in self.law.parameters])
        values = np.array([self.params[name] for name in self.law.names], float)

        def log_loss(moves: jax.Array, group: int) -> jax.Array:
            moved = jnp.where(positive, values * jnp.exp(moves), values + moves)
            params = dict(zip(self.law.names, moved, strict=True))
            inputs = {"n": n, "d": d, "group": np.full(n.shape, group)}
            return jnp.log(self.law.evaluate(params, inputs))

        with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
            nowhere = jnp.zeros(len(values))
            return np.stack([jax.jacfwd(log_loss)(nowhere, g) for g in range(self.arms)])


class Knowledge:
    """The information of runs with ends at given points (n, d), each derived once."""

    def __init__(self, setting: Setting, points: Sequence[tuple[float, float]]):
        self.setting = setting
        distinct = sorted(set(points))
        n, d = np.array(distinct, float).T
        jacobian = setting.jacobian(n, d)
        self._rows = {point: jacobian[:, i] for i, point in enumerate(distinct)}  # [A, K] each
        self.of_run = functools.cache(self._of_run)

    def _jacobian(self, run: Run) -> np.ndarray:
        """[A, ends, K]"""
        return np.stack([self._rows[run.n, d] for d in run.tokens], axis=1)

    def _of_run(self, run: Run) -> np.ndarray:
        """Information [K, K]: J' V^-1 J summed over arms, with V = endpoint^2 I + run^2 1 1'."""
        j, noise = self._jacobian(run), self.setting.noise
        shared = noise.run**2 / (noise.endpoint**2 + len(run.tokens) * noise.run**2)
        total = j.sum(axis=1)
        own = np.einsum("aek,ael->kl", j, j) - shared * np.einsum("ak,al->kl", total, total)
        return own / noise.endpoint**2

    def of_grid(self, grid: Grid) -> np.ndarray:
        """Information [K, K] of all runs and, so that it can be inverted, INFORMATION_FLOOR."""
        floor = INFORMATION_FLOOR * np.eye(len(self.setting.law.names))
        return floor + sum(map(self.of_run, grid), np.zeros_like(floor))

    def bound(self, grid: Grid) -> np.ndarray:
        """The least covariance [K, K] of any unbiased fit (Cramer and Rao)."""
        return np.linalg.inv(self.of_grid(grid))

    def least_squares(self, grid: Grid) -> np.ndarray:
        """Covariance [K, K] of a fit that counts every endpoint alike, as analysis.fit does."""
        size, noise = len(self.setting.law.names), self.setting.noise
        floor = INFORMATION_FLOOR * noise.endpoint**2
        bread, meat = floor * np.eye(size), np.zeros((size, size))
        for run in grid:
            j = self._jacobian(run)
            total = j.sum(axis=1)
            products = np.einsum("aek,ael->kl", j, j)
            bread += products
            meat += noise.endpoint**2 * products
            meat += noise.run**2 * np.einsum("ak,al->kl", total, total)
        inverse = np.linalg.inv(bread)
        return inverse @ meat @ inverse


def points(grid: Grid) -> list[tuple[float, float]]:
    """(n, d) of every end, as often as there are seeds."""
    return [(run.n, d) for run in grid for d in run.tokens]
