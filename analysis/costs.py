"""What a model of some size costs by other measures than its parameters: bits, energy, bandwidth.

Within an arm such a cost is a function of size, known at the sizes that were trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.tables import AnalysisError

REACH = 100.0  # how many times beyond the trained sizes a cost or a crossover may still be told
_SAME = 1e-6  # relative difference of costs of one size that is rounding


@dataclass(frozen=True)
class Cost:
    """A power law of size between each two trained sizes, and the outermost ones' beyond."""

    sizes: np.ndarray  # [S] parameters, rising
    values: np.ndarray  # [S] rising

    @classmethod
    def of(cls, column: str, arm: str, n: np.ndarray, cost: np.ndarray) -> Cost:
        """From points n [P] and their cost [P].

        AnalysisError unless equal sizes have equal costs, larger ones larger costs, and there are
        two sizes or more.
        """
        sizes, membership = np.unique(n, return_inverse=True)
        low = np.array([cost[membership == i].min() for i in range(len(sizes))])
        high = np.array([cost[membership == i].max() for i in range(len(sizes))])
        if np.any(high > low * (1 + _SAME)):
            size = sizes[int(np.argmax(high / low))]
            raise AnalysisError(
                f"{arm}: {column!r} is no function of size: at {size:g} parameters it lies "
                f"between {low[sizes == size][0]:g} and {high[sizes == size][0]:g}"
            )
        if len(sizes) < 2 or np.any(np.diff(low) <= 0):
            raise AnalysisError(f"{arm}: {column!r} does not rise with size")
        return cls(sizes, low)

    @property
    def observed(self) -> tuple[float, float]:
        """Least and greatest cost of a trained size."""
        return float(self.values[0]), float(self.values[-1])

    @property
    def reach(self) -> tuple[float, float]:
        """Costs of sizes REACH times below the smallest and above the largest."""
        ends = np.array([self.sizes[0] / REACH, self.sizes[-1] * REACH])
        low, high = _power_laws(ends, self.sizes, self.values)
        return float(low), float(high)

    def __call__(self, n: np.ndarray) -> np.ndarray:
        """The cost at sizes; NaN more than REACH times beyond the trained ones."""
        found = _power_laws(n, self.sizes, self.values)
        near = (n >= self.sizes[0] / REACH) & (n <= self.sizes[-1] * REACH)
        return np.where(near, found, np.nan)

    def size(self, cost: np.ndarray) -> np.ndarray:
        """The size of a cost, whatever the reach."""
        return _power_laws(cost, self.values, self.sizes)


def _power_laws(x: np.ndarray, at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Piecewise linear in logarithms, its first and last piece going on."""
    slopes = np.diff(np.log(values)) / np.diff(np.log(at))
    piece = np.clip(np.searchsorted(at, x, side="right") - 1, 0, len(at) - 2)
    with np.errstate(invalid="ignore"):  # an infinite size has no cost
        return values[piece] * np.exp(slopes[piece] * (np.log(x) - np.log(at[piece])))
