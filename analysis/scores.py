"""How predictions made before training compare with what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.predictions import PREDICTED, fingerprints, records
from analysis.tables import COLUMNS, AnalysisError, finished, numbers, require

if TYPE_CHECKING:
    import pandas as pd

IDENTITY = ("size", "precision", "tokens", "seed")
_ROUNDING = 0.01  # relative: a sweep rounds the tokens of a plan to whole batches
_SAME = 1e-9  # relative: readers of CSV and Parquet differ in a number's last bits


@dataclass(frozen=True)
class Scores:
    """Results beside their predictions.

    rows: a row a result: the planned row's columns, predicted, low, high, measured, relative_error
      (predicted over measured, minus 1) and inside (whether low <= measured <= high; None without
      an interval).
    missing: planned rows without a result.
    """

    rows: pd.DataFrame
    missing: list[dict[str, Any]]
    matched_by: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def coverage(self) -> float | None:
        """Of the results with an interval, those inside it; None where there are none."""
        inside = self.rows["inside"].dropna()
        return float(inside.astype(bool).mean()) if len(inside) else None

    def to_json(self) -> dict[str, Any]:
        errors = self.rows["relative_error"].abs()
        return {
            "results": len(self.rows),
            "mean_relative_error": float(errors.mean()) if len(errors) else None,
            "max_relative_error": float(errors.max()) if len(errors) else None,
            "coverage": self.coverage,
            "matched_by": list(self.matched_by),
            "warnings": list(self.warnings),
            "rows": records(self.rows),
            "missing": self.missing,
        }

    def readable(self) -> str:
        """The document as lines for a person."""
        document = self.to_json()
        lines = [self.rows.to_string(index=False)] if len(self.rows) else []
        if len(self.rows):
            covered = "" if self.coverage is None else f", {self.coverage:.0%} inside the intervals"
            lines.append(
                f"{len(self.rows)} results: off by {document['mean_relative_error']:.2%} on "
                f"average, {document['max_relative_error']:.2%} at worst{covered}"
            )
        for row in self.missing:
            lines.append(f"no result yet: {carried(row)}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def carried(row: Mapping[str, Any]) -> str:
    """What a planned row says of its run, in words."""
    return ", ".join(f"{name} {value}" for name, value in row.items() if name not in PREDICTED)


def read_predictions(path: str | Path) -> dict[str, Any]:
    """What `python -m analysis.predict` wrote; AnalysisError if it did not."""
    try:
        document = json.loads(Path(path).read_text())
    except ValueError as error:
        raise AnalysisError(f"{path}: it is no JSON ({error})") from error
    keys = {"planned", "columns", "loss", "fitted_rows", "sha256"}
    if not isinstance(document, dict) or not keys <= document.keys():
        raise AnalysisError(f"{path}: it is not what `python -m analysis.predict` writes")
    return document


def score(
    document: Mapping[str, Any],
    results: pd.DataFrame,
    *,
    match: Sequence[str] | None = None,
    same_table: bool = False,
) -> Scores:
    """Predictions of a file beside a table of results, of which the finished rows count.

    match: columns that say which run a row is. By default size, precision, tokens and seed, those
      that both have; without any of them, all columns that both have. They are equal, save tokens
      and FLOPs, which whole batches may round by 1 %: a result goes with the nearest planned row.
    same_table: whether the results are the very file that was fitted.
    """
    import pandas as pd

    planned = pd.DataFrame(document["planned"])
    kept = finished(results)
    require(kept, document["loss"])
    by = _identity(planned, kept, match)
    # Plans name tokens or FLOPs; a sweep trains on whole batches.
    rounded = {COLUMNS["d"]} | {v for k, v in document["columns"].items() if k in ("d", "c")}
    distance = _distances(planned, kept, by, rounded)
    nearest = distance.argmin(axis=0)
    matched = np.isfinite(distance.min(axis=0))
    rows = planned.iloc[nearest[matched]].reset_index(drop=True)
    found = kept[matched]
    rows["measured"] = numbers(found, document["loss"])
    rows["relative_error"] = rows["predicted"] / rows["measured"] - 1
    rows["inside"] = _inside(rows)
    missing = records(planned.drop(index=np.unique(nearest[matched])))
    warnings = _warnings(_known(document, found), same_table)
    return Scores(rows, missing, by, warnings)


def _identity(
    planned: pd.DataFrame, results: pd.DataFrame, match: Sequence[str] | None
) -> tuple[str, ...]:
    if match is not None:
        require(planned, *match)
        require(results, *match)
        return tuple(match)
    shared = [name for name in planned if name in results and name not in PREDICTED]
    found = [name for name in IDENTITY if name in shared] or shared
    if not found:
        raise AnalysisError("the planned rows and the results have no column in common")
    return tuple(found)


def _distances(
    planned: pd.DataFrame, results: pd.DataFrame, by: Sequence[str], rounded: Set[str]
) -> np.ndarray:
    """How far apart in `rounded` columns [planned, results]; infinite where they are other runs."""
    from pandas.api.types import is_numeric_dtype

    total = np.zeros((len(planned), len(results)))
    for column in by:
        ours, theirs = planned[column], results[column]
        if column in rounded:
            a, b = numbers(planned, column)[:, None], numbers(results, column)[None]
            apart = np.abs(a / b - 1)
            total += np.where(apart <= _ROUNDING, apart, np.inf)
            continue
        if is_numeric_dtype(ours) and is_numeric_dtype(theirs):
            a, b = ours.to_numpy(float)[:, None], theirs.to_numpy(float)[None]
            same = np.isclose(a, b, rtol=_SAME, atol=0, equal_nan=True)
        else:
            a, b = (values.fillna("").astype(str).to_numpy() for values in (ours, theirs))
            same = a[:, None] == b[None]
        total += np.where(same, 0.0, np.inf)
    return total


def _known(document: Mapping[str, Any], rows: pd.DataFrame) -> int:
    """Of these rows, those that were fitted."""
    columns, loss = document["columns"], document["loss"]
    if not {*columns.values(), loss} <= set(rows):
        return 0
    return sum(row in document["fitted_rows"] for row in fingerprints(rows, columns, loss))


def _inside(rows: pd.DataFrame) -> list[bool | None]:
    intervals = rows[["low", "measured", "high"]].astype(float).itertuples(index=False)
    return [None if np.isnan(low) else low <= x <= high for low, x, high in intervals]


def _warnings(known: int, same_table: bool) -> tuple[str, ...]:
    found = []
    if same_table:
        found.append("the results are the table that was fitted: nothing here was foretold")
    if known:
        found.append(f"{known} of the results were among the rows fitted: these were not foretold")
    return tuple(found)
