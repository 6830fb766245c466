"""The loss that a fit gives each training compute: its frontier, or its law where that is in C."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.fitting import INTERVAL, Fit
from analysis.laws import frontier
from analysis.tables import COLUMNS

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Curve:
    """Loss (nats a token) against compute (FLOPs), [K] each."""

    compute: np.ndarray
    loss: np.ndarray
    measured: np.ndarray  # False where the optimum leaves the observed parameters or tokens
    band: tuple[np.ndarray, np.ndarray] | None  # 95 %, of a bootstrapped fit


def loss_against_compute(found: Fit, rows: pd.DataFrame, compute: np.ndarray) -> Curve:
    """A fit of the finished endpoints `rows` of one arm, along `compute` [K].

    A `chinchilla` fit gives the best loss among the observed sizes. It takes C = k N D with k the
    endpoints' mean of exact FLOPs over parameters times tokens, so attention is counted.
    """
    if found.law.inputs == ("c",):
        band = found.predict_interval({"c": compute})
        return Curve(compute, found.predict({"c": compute}), np.ones(compute.size, bool), band)
    per_product = rows[COLUMNS["c"]] / (rows[COLUMNS["n"]] * rows[COLUMNS["d"]])
    k = float(np.exp(np.log(per_product.to_numpy(float)).mean()))
    n_range, d_range = found.ranges["n"], found.ranges["d"]
    best = frontier(
        found.params, compute, flops_per_parameter_token=k, n_range=n_range, d_range=d_range
    )
    band = None
    if found.sampled:
        samples = {name: values[:, None] for name, values in found.samples.items()}
        losses = frontier(samples, compute, flops_per_parameter_token=k, n_range=n_range).loss
        low, high = np.percentile(losses, INTERVAL, axis=0)
        band = (low, high)
    return Curve(compute, best.loss, best.measured, band)
