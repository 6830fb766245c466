"""Compute-optimal counts as power laws of compute: N*(C) = G C^a, by least squares in logarithms.

What the approaches of Hoffmann et al. 2022 (arXiv:2203.15556, section 3) share: the points that
they start from, and the form of what they find.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.fitting import INTERVAL
from analysis.tables import AnalysisError

LEAST_BUDGETS = 3  # two lie on a line whatever they are
_ROUNDING = 1e-9  # of a compute that is one of the observed


@dataclass(frozen=True)
class Points:
    """Losses (nats a token) of models of n parameters after d tokens and c FLOPs; [P] each."""

    c: np.ndarray
    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray

    def __post_init__(self) -> None:
        for name in ("c", "n", "d", "loss"):
            values = np.asarray(getattr(self, name), float)
            if values.shape != np.shape(self.loss) or not np.all(
                np.isfinite(values) & (values > 0)
            ):
                raise AnalysisError(
                    f"{name}: expected {np.size(self.loss)} positive finite numbers"
                )
            object.__setattr__(self, name, values)

    def __getitem__(self, chosen: np.ndarray) -> Points:
        """The points of a mask [P] or of indices."""
        return Points(self.c[chosen], self.n[chosen], self.d[chosen], self.loss[chosen])


@dataclass(frozen=True)
class PowerLaw:
    """A count of parameters or tokens as coefficient * C^exponent, C in FLOPs.

    samples: coefficients and exponents [2, R] of resamples; R = 0 where there are none.
    observed: the least and the greatest compute that it rests on.
    """

    coefficient: float
    exponent: float
    samples: np.ndarray
    observed: tuple[float, float]

    def at(self, compute: float) -> float:
        """The count at a compute."""
        return self.coefficient * compute**self.exponent

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the exponent; None without samples."""
        return _percentiles(self.samples[1])

    def interval_at(self, compute: float) -> tuple[float, float] | None:
        """95 % interval of the count at a compute; None without samples."""
        coefficients, exponents = self.samples
        return _percentiles(coefficients * compute**exponents)


def _percentiles(values: np.ndarray) -> tuple[float, float] | None:
    if not values.size:
        return None
    low, high = np.percentile(values, INTERVAL)
    return float(low), float(high)


def power_law(
    compute: np.ndarray,
    count: np.ndarray,
    *,
    resampled: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> PowerLaw:
    """Through counts [B] at computes [B].

    Its samples: `resampled` counts [R, B] (NaN where a resample has none) and `weights` [R, B], how
    often each is drawn. A resample with fewer than LEAST_BUDGETS budgets has no line; where that is
    so of more than half, those that are left are no fair sample, and there are none.
    """
    coefficients, exponents = _lines(compute, count[None], np.ones((1, len(compute))))
    samples = np.empty((2, 0))
    if resampled is not None or weights is not None:
        counts = count[None] if resampled is None else resampled
        times = np.ones(counts.shape) if weights is None else weights
        drawn = np.where(np.isfinite(counts), times, 0.0)
        usable = (drawn > 0).sum(axis=1) >= LEAST_BUDGETS
        if 2 * usable.sum() >= len(drawn):
            counts = np.broadcast_to(counts, drawn.shape)[usable]
            samples = np.stack(_lines(compute, counts, drawn[usable]))
    observed = (float(compute.min()), float(compute.max()))
    return PowerLaw(float(coefficients[0]), float(exponents[0]), samples, observed)


def _lines(
    compute: np.ndarray, counts: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and exponents [R] of weighted least squares in logs, for counts [R, B]."""
    x, y = np.log(compute)[None], np.log(np.where(weights > 0, counts, 1.0))
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total  # [R, B]
    exponents = (weights * x * y).sum(axis=1) / (weights * x**2).sum(axis=1)
    # At the centre of x the line passes through the mean of y.
    centre = np.log(compute[0]) - x[:, 0]
    levels = (weights * y).sum(axis=1) / total[:, 0]
    return np.exp(levels - exponents * centre), exponents


@dataclass(frozen=True)
class Allocation:
    """How one approach splits compute, or why it cannot.

    notes: what it left out, a reason each. refused: why it says nothing; empty where it does.
    """

    approach: str
    n: PowerLaw | None = None
    d: PowerLaw | None = None
    notes: tuple[str, ...] = ()
    refused: str = ""

    def to_json(self, at: float) -> dict[str, object]:
        """Exponents, coefficients, and the counts at compute `at`, with their intervals."""
        if self.n is None or self.d is None:
            return {"approach": self.approach, "refused": self.refused, "notes": list(self.notes)}
        low, high = self.n.observed
        return {
            "approach": self.approach,
            "n": _as_json(self.n, at),
            "d": _as_json(self.d, at),
            "observed_compute": [low, high],
            "extrapolated": at < low * (1 - _ROUNDING) or at > high * (1 + _ROUNDING),
            "notes": list(self.notes),
        }


def _as_json(law: PowerLaw, at: float) -> dict[str, object]:
    return {
        "exponent": law.exponent,
        "interval": law.interval,
        "coefficient": law.coefficient,
        "at": law.at(at),
        "at_interval": law.interval_at(at),
    }


def no_intervals(law: PowerLaw, bootstrap: int) -> tuple[str, ...]:
    """A note where resamples were asked for and gave no samples."""
    if not bootstrap or law.samples.size:
        return ()
    return (
        f"no intervals: most resamples have fewer than {LEAST_BUDGETS} budgets with an optimum",
    )


def log_mean(values: np.ndarray) -> float:
    """Geometric mean."""
    return math.exp(float(np.log(values).mean()))
