"""Losses of runs that are not yet trained, with intervals that a new run should fall into.

An interval holds two kinds of doubt: where the law lies, by the bootstrap, and how a run scatters
about it, by the residuals of the runs that were fitted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.fitting import INTERVAL, Fit, fit
from analysis.intervals import memberships
from analysis.solver import OBJECTIVES, Problem
from analysis.tables import (
    AnalysisError,
    clusters_of,
    fitted_rows,
    labels,
    plausible_inputs,
    points,
    require,
)

if TYPE_CHECKING:
    import pandas as pd

PREDICTED = ("predicted", "low", "high")  # columns that a prediction adds

_DRAWS = 20  # of residuals, for each refit of the bootstrap
_TO_ONE = 1e-9  # a leverage of 1: a run that the fit follows wherever it lies
_DIGITS = 12  # of a number in a fingerprint: CSV and Parquet readers differ in the last bits


@dataclass(frozen=True)
class Request:
    """How a table is fitted: the law, its columns, and the options of `analysis.fitting.fit`.

    columns: of the law's inputs. cluster: whose values are drawn whole; run_id, if there, by
    default. by: a column each of whose values has a fit of its own.
    """

    law: str
    columns: Mapping[str, str]
    loss: str
    objective: str = "huber"
    bootstrap: int = 1000
    baseline: str | None = None
    cluster: str | None = None
    by: str | None = None


def scatter(found: Fit) -> np.ndarray:
    """Log residuals [P], measured less fitted, as large as those of runs outside the fit.

    A fit follows its points, so its residuals are too small. Those e of a cluster are multiplied
    by (I - H)^(-1/2), H the cluster's block of the hat matrix of log loss: the correction CR2 of
    Bell and McCaffrey (2002, Survey Methodology 28), unbiased for points of equal scatter.
    """
    objective = OBJECTIVES["log_mse"]
    problem = Problem.of(found.law, found.inputs, found.loss, objective)
    r, jacobian = problem.jacobian(found.solution.theta)
    basis, _ = np.linalg.qr(jacobian / np.linalg.norm(jacobian, axis=0))
    count, membership = memberships(r.size, found.clusters)
    corrected = np.empty(r.size)
    for cluster in range(count):
        own = membership == cluster
        kept, directions = np.linalg.eigh(np.eye(own.sum()) - basis[own] @ basis[own].T)
        scale = np.where(kept > _TO_ONE, np.maximum(kept, _TO_ONE) ** -0.5, 0.0)
        corrected[own] = directions @ (scale * (directions.T @ -r[own]))
    return corrected


def predict(
    found: Fit, inputs: Mapping[str, np.ndarray], seed: int = 0
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """Losses [Q] at inputs {name: [Q]}, and the ends of their 95 % prediction intervals [Q] each.

    Every refit of the bootstrap predicts, and residuals of clusters drawn at random are added to
    its log losses. Without bootstrap there are no intervals: None.
    """
    losses = found.predict(inputs)
    if not found.sampled:
        return losses, None
    columns = {name: values[:, None] for name, values in found.samples.items()}
    law = np.log(found.law(columns, inputs))  # [R, Q]
    drawn = _draw(found, (_DRAWS, *law.shape), np.random.default_rng(seed))
    low, high = np.percentile(np.exp(law + drawn), INTERVAL, axis=(0, 1))
    return losses, (low, high)


def _draw(found: Fit, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Residuals of `shape`: a cluster, then one of its points, so that long runs count no more."""
    count, membership = memberships(found.n_points, found.clusters)
    sizes = np.bincount(membership)
    weights = 1 / (count * sizes[membership])
    return rng.choice(scatter(found), size=shape, p=weights)


def fit_table(frame: pd.DataFrame, request: Request) -> dict[str, Fit]:
    """A fit of all finished rows, named "", or of those of each value of column `by`."""
    kept = fitted_rows(frame)
    if request.by is None:
        return {"": _fit_rows(kept, request)}
    groups = kept.groupby(labels(kept, request.by), sort=False)
    return {str(label): _fit_rows(rows, request) for label, rows in groups}


def _fit_rows(rows: pd.DataFrame, request: Request) -> Fit:
    inputs, loss = points(rows, request.columns, request.loss, request.cluster)
    clusters, warnings = clusters_of(rows, request.cluster)
    found = fit(
        request.law,
        inputs,
        loss,
        objective=request.objective,
        bootstrap=request.bootstrap,
        baseline=request.baseline,
        clusters=clusters,
    )
    return replace(found, warnings=(*found.warnings, *warnings))


def predict_table(
    fits: Mapping[str, Fit], planned: pd.DataFrame, request: Request
) -> tuple[list[dict[str, Any]], list[str]]:
    """The planned rows with what they are predicted: their columns, `predicted`, `low`, `high`.

    A column of losses is left behind: what is known is not planned. Beside them, warnings of rows
    beyond what was fitted. AnalysisError for counts in millions or billions, as of a table.
    """
    carried = planned.drop(columns=request.loss, errors="ignore").reset_index(drop=True)
    for taken in PREDICTED:
        if taken in carried:
            raise AnalysisError(f"the planned rows have a column {taken!r}: give it another name")
    names = _labels(carried, fits, request.by)
    results = carried.assign(predicted=np.nan, low=np.nan, high=np.nan)
    warnings = []
    for label in dict.fromkeys(names):
        own = names == label
        inputs = fits[label].encoded(plausible_inputs(carried[own], request.columns))
        beyond = fits[label].beyond(inputs)
        warnings += [f"{label}: {warning}" if label else warning for warning in beyond]
        losses, interval = predict(fits[label], inputs)
        results.loc[own, "predicted"] = losses
        if interval is not None:
            results.loc[own, "low"], results.loc[own, "high"] = interval
    return records(results), warnings


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON: Python's own numbers, to the last bit, and None for what is missing."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _labels(planned: pd.DataFrame, fits: Mapping[str, Fit], by: str | None) -> np.ndarray:
    """The fit of each planned row."""
    if by is None:
        return np.full(len(planned), "", object)
    found = labels(planned, by)
    for label in found:
        if label not in fits:
            raise AnalysisError(f"{by} {label!r}: the table has {', '.join(fits)}")
    return found


def fingerprints(rows: pd.DataFrame, columns: Mapping[str, str], loss: str) -> list[str]:
    """A short hash of each row's inputs and loss, by which it is known again."""
    names = [*columns.values(), loss]
    require(rows, *names)
    return [_digest(row) for row in rows[names].itertuples(index=False)]


def _digest(values: tuple) -> str:
    texts = [x if isinstance(x, str) else f"{x:.{_DIGITS}g}" for x in values]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def sha256(path: str | Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
