"""Tables of results: reading them, choosing rows, and refusing what cannot be meant.

A table is a pandas frame with one row an endpoint. pandas is imported where it is used, so that the
laws and the solver stay quick to import.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

# This project's convention: N counts every parameter, C is the exact training FLOPs.
COLUMNS = {"n": "params_non_embedding", "d": "tokens", "c": "flops"}

SCHEMA_VERSION = 2  # the latest of this project's tables that can be read

COUNT_INPUTS = ("n", "d", "c", "u")  # of a law: parameters, tokens, FLOPs, unique tokens

# Nothing that trains has fewer parameters or tokens; nothing that predicts has a loss above it.
LEAST_COUNT = 1e4
GREATEST_LOSS = 20.0

_EXPRESSION_NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div,
    ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn,
    ast.List, ast.Tuple, ast.Name, ast.Load, ast.Constant,
)  # fmt: skip


class AnalysisError(ValueError):
    """A table or a request that no fit can honour; the message is one sentence for the user."""


def count_text(value: float) -> str:
    """A count in three digits: 210k, 5.18M, 1.4T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a .csv or .parquet table; AnalysisError if that fails, it has no rows, or a
    later version of this project wrote it."""
    import pandas as pd

    path = Path(path)
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise AnalysisError(f"{path}: a table ends in {' or '.join(readers)}")
    if not path.is_file():
        raise AnalysisError(f"{path}: no such file")
    try:
        frame = readers[path.suffix](path)
    except (OSError, ValueError) as error:  # pandas' and pyarrow's parse errors are ValueErrors
        raise AnalysisError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    if frame.empty:
        raise AnalysisError(f"{path}: the table has no rows")
    if {"run_id", "schema_version"} <= set(frame.columns):  # one of this project's
        version = pd.to_numeric(frame["schema_version"], errors="coerce").max()
        if version > SCHEMA_VERSION:
            raise AnalysisError(
                f"{path}: schema_version={version:g}: this code reads up to {SCHEMA_VERSION}; use "
                "the version that wrote it, or a later one"
            )
    return frame


def require(frame: pd.DataFrame, *columns: str) -> None:
    """AnalysisError names the first of `columns` that the table lacks."""
    for column in columns:
        if column not in frame:
            known = ", ".join(map(str, frame.columns))
            raise AnalysisError(f"no column {column!r}: the table has {known}")


def select(frame: pd.DataFrame, expression: str) -> pd.DataFrame:
    """The rows for which a comparison of columns holds, such as `precision == "ternary"`.

    Names must be columns; calls, attributes and indexing are refused, so no code runs.
    """
    import pandas as pd

    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise AnalysisError(f"--where={expression!r} is not an expression") from error
    for node in ast.walk(tree):
        if not isinstance(node, _EXPRESSION_NODES):
            allowed = "columns, literals, comparisons, and, or, not"
            found = type(node).__name__
            raise AnalysisError(f"--where={expression!r} has a {found}: use only {allowed}")
        if isinstance(node, ast.Name):
            require(frame, node.id)
    try:
        # Rewritten from the tree that was checked: pandas' own extensions (@, backticks) are gone.
        chosen = frame.eval(ast.unparse(tree), engine="python")
    except Exception as error:  # pandas raises many kinds for operands that do not compare
        reason = str(error).splitlines()[0]
        raise AnalysisError(f"--where={expression!r} cannot be evaluated ({reason})") from error
    if not (isinstance(chosen, pd.Series) and pd.api.types.is_bool_dtype(chosen)):
        raise AnalysisError(f"--where={expression!r} is not true or false for each row")
    if not chosen.any():
        raise AnalysisError(f"--where={expression!r} leaves no rows")
    return frame[chosen]


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The endpoints that may enter a fit: status 'ok' and at the end of a decay, where recorded."""
    keep = np.ones(len(frame), bool)
    if "status" in frame:
        keep &= (frame["status"] == "ok").to_numpy()
    if "decayed" in frame:
        keep &= frame["decayed"].to_numpy(bool)
    return frame[keep]


def numbers(frame: pd.DataFrame, column: str, *, positive: bool = True) -> np.ndarray:
    """A column as float64 [rows]; AnalysisError names the first that is not positive and finite.

    Without `positive` zero is allowed.
    """
    import pandas as pd

    require(frame, column)
    values = pd.to_numeric(frame[column], errors="coerce").to_numpy(float)
    bad = np.flatnonzero(~(np.isfinite(values) & ((values > 0) | ((values == 0) & (not positive)))))
    if bad.size:
        row, value = frame.index[bad[0]], frame[column].iloc[bad[0]]
        raise AnalysisError(
            f"column {column!r}, row {row}: {value!s} is not a "
            f"{'positive' if positive else 'non-negative'} finite number"
        )
    return values


def read_inputs(frame: pd.DataFrame, columns: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Inputs of a law {name: [rows]}; `columns` says which column is which.

    Counts (n, d, c, u) are positive, groups are labels, and measures of precision not negative.
    """
    inputs = {}
    for name, column in columns.items():
        if name == "group":
            require(frame, column)
            inputs[name] = frame[column].astype(str).to_numpy()
        else:
            inputs[name] = numbers(frame, column, positive=name in COUNT_INPUTS)
    return inputs


def refuse_undecayed(frame: pd.DataFrame) -> None:
    """AnalysisError if some rows say that they are not at the end of a decay."""
    if "decayed" in frame and not frame["decayed"].to_numpy(bool).all():
        count = int((~frame["decayed"].to_numpy(bool)).sum())
        raise AnalysisError(
            f"{count} of {len(frame)} rows are not at the end of a learning-rate decay, and would "
            "bend the law: leave them out with --where=decayed"
        )


def points(
    frame: pd.DataFrame, columns: Mapping[str, str], loss: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs of a law {name: [rows]} and losses [rows], checked for units and repetition.

    `columns` says which column is which input. AnalysisError on values that are not positive and
    finite, on counts in millions or billions, on a loss in bits or a perplexity, on repeated rows.
    """
    inputs = read_inputs(frame, columns)
    for name, values in inputs.items():
        if name in COUNT_INPUTS and np.median(values) < LEAST_COUNT:
            raise AnalysisError(
                f"column {columns[name]!r} has a median of {np.median(values):g}: counts are "
                "expected one by one, not in millions or billions"
            )
    losses = numbers(frame, loss)
    if any(word in loss.lower() for word in ("bits", "bpb")):
        raise AnalysisError(f"column {loss!r} is in bits: the loss is expected in nats a token")
    if np.median(losses) > GREATEST_LOSS:
        raise AnalysisError(
            f"column {loss!r} has a median of {np.median(losses):g}: the loss is expected in nats "
            "a token, not as a perplexity"
        )
    repeated = frame.duplicated().to_numpy()
    if repeated.any():
        row = frame.index[int(np.flatnonzero(repeated)[0])]
        raise AnalysisError(f"row {row} repeats an earlier row: each endpoint counts once")
    return inputs, losses


def paired_differences(frame: pd.DataFrame, baseline: str, treatment: str) -> pd.DataFrame:
    """Loss of one arm minus another's where size, tokens and seed are the same, a row a pair.

    So must be the column `variant`, what else differs from the default recipe, in tables that have
    it.

    An arm with several endpoints there (a learning-rate sweep) is represented by its lowest loss.
    Columns: size, tokens, seed, loss_baseline, loss_treatment, difference (nats a token), stderr
    (of the difference, as if the two evaluations were independent; both read the same tokens, so
    it is an upper bound in practice) and relative (difference over the baseline's loss).
    """
    require(frame, "size", "tokens", "seed", "precision", "loss", "loss_stderr")
    keys = ["size", "tokens", "seed"]
    if "variant" in frame:
        keys.append("variant")
        frame = frame.assign(variant=frame["variant"].fillna(""))
    kept = finished(frame)[[*keys, "precision", "loss", "loss_stderr"]]
    best = kept.sort_values("loss").drop_duplicates([*keys, "precision"]).sort_values(keys)
    left, right = (
        best[best["precision"] == arm].drop(columns="precision") for arm in (baseline, treatment)
    )
    pairs = left.merge(right, on=keys, suffixes=("_baseline", "_treatment"))
    pairs["difference"] = pairs["loss_treatment"] - pairs["loss_baseline"]
    pairs["stderr"] = np.hypot(pairs["loss_stderr_baseline"], pairs["loss_stderr_treatment"])
    pairs["relative"] = pairs["difference"] / pairs["loss_baseline"]
    return pairs.drop(columns=["loss_stderr_baseline", "loss_stderr_treatment"])
