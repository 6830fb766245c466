"""How predictions made before training compare with what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.predictions import PREDICTED, fingerprints, records
from analysis.tables import COLUMNS, RUN, AnalysisError, finished, numbers, require

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
        lines = [_short(self.rows).to_string(index=False)] if len(self.rows) else []
        if len(self.rows):
            covered = "" if self.coverage is None else f", {self.coverage:.0%} inside the intervals"
            lines.append(
                f"{len(self.rows)} results: off by {document['mean_relative_error']:.2%} on "
                f"average, {document['max_relative_error']:.2%} at worst{covered}"
            )
        for row in self.missing:
            lines.append(f"no result yet: {carried(row)}")
        lines.append(f"matched by {', '.join(self.matched_by)}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


NAMED = ("run_id", "tokens")  # enough to name an endpoint of this project


def carried(row: Mapping[str, Any]) -> str:
    """What a planned row says of its run, in words; of this project's its name and tokens."""
    names = NAMED if set(NAMED) <= row.keys() else row
    return ", ".join(f"{name} {row[name]}" for name in names if name not in PREDICTED)


def _short(rows: pd.DataFrame) -> pd.DataFrame:
    """Likewise of a table: what names a run, and the score."""
    if not set(NAMED) <= set(rows.columns):
        return rows
    return rows[[*NAMED, *rows.columns[list(rows.columns).index(PREDICTED[0]) :]]]


def read_predictions(path: str | Path) -> dict[str, Any]:
    """What `python -m analysis.predict` wrote; AnalysisError if it did not."""
    document = read_json(path)
    keys = {"planned", "columns", "loss", "fitted_rows", "sha256"}
    if not isinstance(document, dict) or not keys <= document.keys():
        raise AnalysisError(f"{path}: it is not what `python -m analysis.predict` writes")
    if (wrong := _wrong(document)) is not None:
        raise AnalysisError(f"{path}: {wrong}; it is not as `python -m analysis.predict` wrote it")
    return document


def read_json(path: str | Path) -> Any:
    """AnalysisError for what is no JSON."""
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise AnalysisError(f"{path}: it is no JSON ({reason})") from error


def _wrong(document: Mapping[str, Any]) -> str | None:
    """What a prediction file has that was never written; None if nothing."""
    columns, rows = document["columns"], document["planned"]
    texts = {name: document[name] for name in ("loss", "sha256")}
    if not isinstance(columns, dict) or not columns:
        return "'columns' is not a column for each input"
    texts |= {f"columns.{name}": column for name, column in columns.items()}
    for name, value in texts.items():
        if not isinstance(value, str):
            return f"{name!r} is not text"
    if not isinstance(document.get("by"), str | None):
        return "'by' is not text"
    fitted = document["fitted_rows"]
    if not isinstance(fitted, list) or not all(isinstance(row, str) for row in fitted):
        return "'fitted_rows' is not a list of texts"
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return "'planned' is not a list of rows"
    found = (_wrong_row(row) for row in rows)
    return next((f"planned row {i}: {text}" for i, text in enumerate(found) if text), None)


def _wrong_row(row: Mapping[str, Any]) -> str:
    for name in PREDICTED:
        value, optional = row.get(name), name != "predicted"
        if name not in row or not (value is None and optional or _is_loss(value)):
            return f"{name!r} is {value!r:.40}, not a positive number"
    if (row["low"] is None) != (row["high"] is None):
        return "it has one end of an interval"
    if row["low"] is not None and row["low"] > row["high"]:
        return f"low {row['low']:g} lies above high {row['high']:g}"
    strange = (name for name, value in row.items() if isinstance(value, dict | list))
    return next((f"{name!r} is no single value" for name in strange), "")


def _is_loss(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < np.inf


def score(
    document: Mapping[str, Any],
    results: pd.DataFrame,
    *,
    match: Sequence[str] | None = None,
    same_table: bool = False,
) -> Scores:
    """Predictions of a file beside a table of results, of which the finished rows count.

    match: columns that say which run a row is, besides the law's inputs and the column of arms,
      by which rows are always matched. By default size, precision, tokens and seed, those that
      both have. They are equal, save tokens and FLOPs, which whole batches may round by 1 %: a
      result goes with the nearest planned row. A result without one is left out, with a warning.
    same_table: whether the results are the very file that was fitted.

    AnalysisError where planned rows are the same in all of these columns, or where several results
    go with one and are not told apart by their seeds.
    """
    import pandas as pd

    planned = pd.DataFrame(document["planned"])
    kept = finished(results)
    require(kept, document["loss"])
    by = _identity(document, planned, kept, match)
    # Plans name tokens or FLOPs; a sweep trains on whole batches.
    rounded = {COLUMNS["d"]} | {v for k, v in document["columns"].items() if k in ("d", "c")}
    _refuse_ambiguous(planned, by)
    distance = _distances(planned, kept, by, rounded)
    nearest = distance.argmin(axis=0)
    matched = np.isfinite(distance.min(axis=0))
    rows = planned.iloc[nearest[matched]].reset_index(drop=True)
    found = kept[matched]
    _refuse_shared(found, nearest[matched], by)
    rows["measured"] = numbers(found, document["loss"])
    rows["relative_error"] = rows["predicted"] / rows["measured"] - 1
    rows["inside"] = _inside(rows)
    missing = records(planned.drop(index=np.unique(nearest[matched])))
    warnings = _warnings(_known(document, found), same_table, int((~matched).sum()))
    return Scores(rows, missing, by, warnings)


def _identity(
    document: Mapping[str, Any],
    planned: pd.DataFrame,
    results: pd.DataFrame,
    match: Sequence[str] | None,
) -> tuple[str, ...]:
    """The law's inputs and arms, on which a prediction rests, and what else names a run."""
    by = document.get("by")
    needed = [*document["columns"].values(), *([by] if by else []), *(match or ())]
    for name, rows in (("planned rows", planned), ("results", results)):
        for column in needed:
            if column not in rows:
                raise AnalysisError(
                    f"the {name} have no column {column!r}: predictions are matched by "
                    f"{', '.join(needed)}"
                )
    named = [x for x in IDENTITY if x in planned and x in results] if match is None else []
    return tuple(dict.fromkeys([*needed, *named]))


def _refuse_ambiguous(planned: pd.DataFrame, by: Sequence[str]) -> None:
    repeated = planned[list(by)].astype(str).duplicated(keep=False).to_numpy()
    if repeated.any():
        first, second = np.flatnonzero(repeated)[:2]
        raise AnalysisError(
            f"several planned rows are the same in {', '.join(by)}, such as {first} and {second}: "
            "give a column that tells them apart with --match"
        )


def _refuse_shared(results: pd.DataFrame, nearest: np.ndarray, by: Sequence[str]) -> None:
    """AnalysisError if results of one planned row [results] are not of several seeds or runs."""
    told = next((name for name in ("seed", RUN) if name in results), None)
    names = np.arange(len(results)) * 0 if told is None else results[told].astype(str).to_numpy()
    seen: set[tuple[int, Any]] = set()
    for row, key in zip(results.index, zip(nearest.tolist(), names, strict=True), strict=True):
        if key in seen:
            same = "they have no seeds" if told is None else f"they have the same {told} {key[1]!r}"
            raise AnalysisError(
                f"result row {row} and an earlier one go with one planned row by {', '.join(by)}, "
                f"and {same}: choose with --where, or tell them apart with --match"
            )
        seen.add(key)


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


def _warnings(known: int, same_table: bool, unmatched: int) -> tuple[str, ...]:
    found = []
    if same_table:
        found.append("the results are the table that was fitted: nothing here was foretold")
    if known:
        found.append(f"{known} of the results were among the rows fitted: these were not foretold")
    if unmatched:
        found.append(f"{unmatched} results go with no planned row and are left out")
    return tuple(found)
