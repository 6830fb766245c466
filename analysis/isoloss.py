"""Two laws of the Chinchilla form at equal loss, or at equal cost.

No parameter of them need be shared. Parameters may be arrays of resamples [R, 1], for results
[R, X]. inf where no size is enough.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from analysis.laws import LAWS, Frontier, Params, frontier

_BISECTIONS = 60  # of an interval in log cost: to the last bits


def multiplier(baseline: Params, treatment: Params, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The baseline's parameters that have the treatment's loss at (N, D), over N.

    inf where the treatment's loss is below that of any baseline with D tokens.
    """
    loss = LAWS["chinchilla"](treatment, {"n": n, "d": d})
    left = loss - baseline["E"] - baseline["B"] * d ** -baseline["beta"]
    return _inverse_power(left, baseline["A"], baseline["alpha"]) / n


def _inverse_power(loss: np.ndarray, amplitude: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """x of amplitude x^-exponent = loss; inf where the loss is not positive."""
    some = np.where(loss > 0, loss, 1.0)
    with np.errstate(over="ignore"):
        return np.where(loss > 0, (amplitude / some) ** (1 / exponent), np.inf)


def optimal(params: Params, loss: np.ndarray, k: float) -> Frontier:
    """The compute-optimal models of given losses [X], under C = k N D; inf below E.

    On the frontier both terms fall as C^-gamma, gamma = alpha beta / (alpha + beta), so its loss at
    one compute gives the compute of any loss.
    """
    alpha, beta = params["alpha"], params["beta"]
    reference = frontier(params, np.array([1.0]), flops_per_parameter_token=k)
    gamma = alpha * beta / (alpha + beta)
    compute = _inverse_power(loss - params["E"], reference.loss - params["E"], gamma)
    with np.errstate(invalid="ignore"):  # an infinite compute has no split
        return frontier(params, compute, flops_per_parameter_token=k)


def crossover(gap: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> np.ndarray:
    """The least cost [R] in [low, high] from which on gap <= 0; inf where none is.

    `gap` is the treatment's loss minus the baseline's [R, X] at costs [X] or [R, X]. The lowest
    cost where the treatment is as good from there on.
    """
    grid = np.geomspace(low, high, 400)
    above = gap(grid) > 0
    last = np.where(above.any(axis=1), above.shape[1] - 1 - above[:, ::-1].argmax(axis=1), -1)
    left = np.log(grid[np.clip(last, 0, len(grid) - 2)])
    right = np.log(grid[np.clip(last, 0, len(grid) - 2) + 1])
    for _ in range(_BISECTIONS):
        middle = 0.5 * (left + right)
        still = gap(np.exp(middle)[:, None])[:, 0] > 0
        left, right = np.where(still, middle, left), np.where(still, right, middle)
    found = np.where(last < 0, low, np.exp(right))
    return np.where(last == len(grid) - 1, np.inf, found)
