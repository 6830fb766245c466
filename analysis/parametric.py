"""Approach 3 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.3): a fitted law's optimum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.fitting import fit
from analysis.laws import Params, frontier
from analysis.optima import Allocation, Points, PowerLaw


@dataclass(frozen=True)
class Spending:
    """Training compute as k N^power D.

    Under C = 6 N D that is exact. Where attention or the embedding count in C and not in N, FLOPs
    a token are no multiple of N, and `power` is their exponent (Pearce and Song 2024,
    arXiv:2406.12907, on why conventions move the exponents).
    """

    k: float
    power: float

    @classmethod
    def of(cls, points: Points) -> Spending:
        """From points of at least two sizes, by least squares of log FLOPs a token in log n."""
        log_n, log_cost = np.log(points.n), np.log(points.c / points.d)
        power, level = np.polyfit(log_n - log_n.mean(), log_cost, 1)
        return cls(float(np.exp(level - power * log_n.mean())), float(power))


SIX = Spending(6.0, 1.0)  # C = 6 N D


def optimum(
    params: Params, samples: Params, spending: Spending, observed: tuple[float, float]
) -> tuple[PowerLaw, PowerLaw]:
    """N*(C) and D*(C) of a `chinchilla` law, for its params and its samples {name: [R]}.

    With N' = N^power the law has an exponent alpha / power in N', and C = k N' D, so that Hoffmann
    et al.'s eq. 4 holds: a = beta / (alpha + beta power) for N, b = alpha / (alpha + beta power).
    """
    whole = {name: np.append(value, samples[name]) for name, value in params.items()}
    turned = whole | {"alpha": whole["alpha"] / spending.power}
    at_one = frontier(turned, np.array(1.0), flops_per_parameter_token=spending.k)
    total = whole["alpha"] + whole["beta"] * spending.power
    return (
        _power_law(at_one.n ** (1 / spending.power), whole["beta"] / total, observed),
        _power_law(at_one.d, whole["alpha"] / total, observed),
    )


def _power_law(
    coefficients: np.ndarray, exponents: np.ndarray, observed: tuple[float, float]
) -> PowerLaw:
    """Of the first of [1 + R], the others being samples."""
    samples = np.stack([coefficients[1:], exponents[1:]])
    return PowerLaw(float(coefficients[0]), float(exponents[0]), samples, observed)


def parametric(
    points: Points,
    *,
    clusters: np.ndarray | None = None,
    bootstrap: int = 0,
    seed: int = 0,
) -> Allocation:
    """The optimum of the Chinchilla law fitted to all points, with the fit's warnings.

    Intervals come from `bootstrap` refits to resampled `clusters` [P]. AnalysisError if the points
    cannot identify the law.
    """
    inputs = {"n": points.n, "d": points.d}
    found = fit(
        "chinchilla",
        inputs,
        points.loss,
        bootstrap=bootstrap,
        clusters=clusters,
        hold_out=False,
        seed=seed,
    )
    observed = (float(points.c.min()), float(points.c.max()))
    n, d = optimum(found.params, found.samples, Spending.of(points), observed)
    return Allocation("parametric", n, d, found.warnings)
