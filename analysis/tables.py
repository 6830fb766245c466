"""Tables of results: reading them, choosing rows, and refusing what cannot be meant.

A table is a pandas frame with one row an endpoint. pandas is imported where it is used, so that the
laws and the solver stay quick to import.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

# This project's convention: N counts every parameter but the embeddings', C is the exact training
# FLOPs.
COLUMNS = {"n": "params_non_embedding", "d": "tokens", "c": "flops"}

SCHEMA_VERSION = 2  # the latest of this project's tables that can be read

COUNT_INPUTS = ("n", "d", "c", "u")  # of a law: parameters, tokens, FLOPs, unique tokens

# Nothing that trains has fewer parameters or tokens; nothing that predicts has a loss above it.
LEAST_COUNT = 1e4
GREATEST_LOSS = 20.0
_GREATEST = 1e30  # of any number: searches begin in single precision
_LEAST = 1e-30

TABLES_HELP = ".csv or .parquet, a row an endpoint; of several tables all rows are taken"
LOSS_HELP = (
    f"loss in nats a token; what has a median below {GREATEST_LOSS:g} cannot be told from a "
    "perplexity"
)
_NOT_NATS = {  # in a column's name
    "bits": re.compile(r"bits|bpb|(?<![a-z])(bpc|bpt)(?![a-z])"),
    "a perplexity": re.compile(r"perplex|(?<![a-z])ppl"),
}
_CONSISTENT = 0.01  # relative: bytes a token of rows that one tokenizer made

# What tells arms apart in this project's tables.
ARM_COLUMNS = ("precision", "variant")

RUN = "run_id"

_LONGEST = 2000  # characters of an expression
_SHOWN = 60  # of them in a message

_EXPRESSION_NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div,
    ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn,
    ast.List, ast.Tuple, ast.Name, ast.Load, ast.Constant,
)  # fmt: skip


class AnalysisError(ValueError):
    """A table or a request that no fit can honour; the message is one sentence for the user."""


def count_text(value: float) -> str:
    """A count in three digits: 210k, 5.18M, 1.4T, 1.00e16."""
    if value >= 1e15:
        digits, _, exponent = f"{value:.2e}".partition("e+")
        return f"{digits}e{exponent}" if exponent else digits
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
    if any(frame.index.names):  # Parquet keeps an index's name: it is a column that was set aside
        frame = frame.reset_index()
    if {"run_id", "schema_version"} <= set(frame.columns):  # one of this project's
        version = pd.to_numeric(frame["schema_version"], errors="coerce").max()
        if version > SCHEMA_VERSION:
            raise AnalysisError(
                f"{path}: schema_version={version:g}: this code reads up to {SCHEMA_VERSION}; use "
                "the version that wrote it, or a later one"
            )
    return frame


def read_tables(paths: Sequence[str | Path]) -> pd.DataFrame:
    """The rows of several tables with the same columns, such as the parts of a study, in their
    order; AnalysisError as of `read_table`, if columns differ, or if an endpoint occurs twice."""
    import pandas as pd

    first, *others = [read_table(path) for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        differ = sorted(map(str, set(first.columns) ^ set(other.columns)))
        if differ:
            raise AnalysisError(f"{path}: {paths[0]} has other columns: {', '.join(differ)}")
    if not others:
        return first
    together = pd.concat([first, *others], ignore_index=True)
    if {"run_id", "tokens"} <= set(together.columns):
        twice = together[together.duplicated(["run_id", "tokens"])]  # a table given twice, say
        if len(twice):
            run, tokens = twice.iloc[0][["run_id", "tokens"]]
            raise AnalysisError(f"{run} at {tokens} tokens is there twice in these tables")
    return together


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

    shown = f"--where={clipped(expression)}"
    if len(expression) > _LONGEST:
        raise AnalysisError(f"{shown}: {len(expression)} characters; {_LONGEST} are the most")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        _refuse_strange(tree, frame, shown)
        # Rewritten from the tree that was checked: pandas' own extensions (@, backticks) are gone.
        written = ast.unparse(tree)
    except AnalysisError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise AnalysisError(f"{shown} is not an expression") from error
    try:
        chosen = frame.eval(written, engine="python")
    except Exception as error:  # pandas raises many kinds for operands that do not compare
        reason = clipped(str(error).partition("\n")[0])[1:-1]
        raise AnalysisError(f"{shown} cannot be evaluated ({reason})") from error
    if not (isinstance(chosen, pd.Series) and pd.api.types.is_bool_dtype(chosen)):
        raise AnalysisError(f"{shown} is not true or false for each row")
    chosen = chosen.fillna(False)
    if not chosen.any():
        raise AnalysisError(f"{shown} leaves no rows")
    return frame[chosen.to_numpy(bool)]


def clipped(text: str) -> str:
    """A user's text in quotes, short enough for a message."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _refuse_strange(tree: ast.AST, frame: pd.DataFrame, shown: str) -> None:
    """AnalysisError for what may run code, and for arithmetic on what is no number: text times a
    number repeats it, until there is no memory left."""
    for node in ast.walk(tree):
        if not isinstance(node, _EXPRESSION_NODES):
            allowed = "columns, literals, comparisons, and, or, not"
            found = type(node).__name__
            raise AnalysisError(f"{shown} has a {found}: use only {allowed}")
        if isinstance(node, ast.Name):
            require(frame, node.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            for inner in ast.walk(node):
                if not _is_number(inner, frame):
                    text = clipped(ast.unparse(inner))[1:-1]
                    raise AnalysisError(f"{shown} calculates with {text}, which is no number")


def _is_number(node: ast.AST, frame: pd.DataFrame) -> bool:
    """Whether a part of a calculation, if it is a value at all, is a number or a column of them."""
    import pandas as pd

    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    if isinstance(node, ast.Name):
        return pd.api.types.is_numeric_dtype(frame[node.id])
    return not isinstance(node, ast.List | ast.Tuple)


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The endpoints that may enter a fit: status 'ok' and at the end of a decay, where recorded."""
    keep = np.ones(len(frame), bool)
    if "status" in frame:
        keep &= (frame["status"] == "ok").fillna(False).to_numpy(bool)
    if "decayed" in frame:
        keep &= flags(frame, "decayed")
    return frame[keep]


def finished_numbers(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """`finished`, of which each of the columns is a positive number in every row.

    Raises:
      AnalysisError: names the first column and row where it is none.
    """
    import pandas as pd

    rows = finished(frame)
    for column in columns:
        numbers(rows, column)  # of which counts would come back as floats
    return rows.assign(**{column: pd.to_numeric(rows[column]) for column in columns})


def fitted_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The finished rows; AnalysisError if there are none, or if some did not end in a decay."""
    refuse_undecayed(frame)
    kept = finished(frame)
    if kept.empty:
        found = ", ".join(dict.fromkeys(frame["status"].astype(str)))
        raise AnalysisError(
            f"column 'status' leaves out all {len(frame)} rows: only 'ok' counts, it has "
            f"{clipped(found)[1:-1]}"
        )
    return kept


_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def flags(frame: pd.DataFrame, column: str) -> np.ndarray:
    """A column of true and false, or of 1 and 0, as booleans [rows]; AnalysisError for another."""
    found = [_FLAGS.get(str(value).strip().lower()) for value in frame[column]]
    for row, value, flag in zip(frame.index, frame[column], found, strict=True):
        if flag is None:
            raise AnalysisError(
                f"column {column!r}, row {row}: {clipped(str(value))[1:-1]} is not true or false, "
                "nor 1 or 0"
            )
    return np.array(found, bool)


def labels(frame: pd.DataFrame, column: str) -> np.ndarray:
    """A column of names as text [rows]; AnalysisError for the first row without one."""
    require(frame, column)
    missing = np.flatnonzero(frame[column].isna().to_numpy())
    if missing.size:
        row = frame.index[missing[0]]
        raise AnalysisError(
            f"column {column!r}, row {row}: it is empty ({missing.size} of {len(frame)} are); "
            "every row needs a name there"
        )
    return frame[column].astype(str).to_numpy(object)


def clusters_of(
    frame: pd.DataFrame, column: str | None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """What is drawn whole [rows], by default run_id if there, and a warning where nothing is.

    Endpoints of one run share its trunk: they are no independent points.
    """
    if column is None and RUN not in frame:
        return None, (
            f"no column {RUN!r} and no --cluster: each row counts as a run of its own, so standard "
            "errors and intervals are too narrow where runs have several rows",
        )
    return labels(frame, RUN if column is None else column), ()


def mixed_arms(frame: pd.DataFrame) -> str | None:
    """Which columns say that these rows are of several arms; None if none does."""
    found = []
    for column in ARM_COLUMNS:
        if column in frame:
            values = list(dict.fromkeys(frame[column].astype(object).fillna("").astype(str)))
            if len(values) > 1:
                shown = ", ".join(repr(value) for value in values[:4])
                found.append(f"column {column!r} has {len(values)} values ({shown})")
    return " and ".join(found) or None


def numbers(frame: pd.DataFrame, column: str, *, positive: bool = True) -> np.ndarray:
    """A column as float64 [rows]; AnalysisError names the first that is not positive and finite.

    Without `positive` zero is allowed.
    """
    import pandas as pd

    require(frame, column)
    values = pd.to_numeric(frame[column], errors="coerce").to_numpy(float, na_value=np.nan)
    bad = np.flatnonzero(~(np.isfinite(values) & ((values > 0) | ((values == 0) & (not positive)))))
    if bad.size:
        row, value = frame.index[bad[0]], frame[column].iloc[bad[0]]
        raise AnalysisError(
            f"column {column!r}, row {row}: {clipped(str(value))[1:-1]} is not a "
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
            inputs[name] = labels(frame, column)
        else:
            inputs[name] = numbers(frame, column, positive=name in COUNT_INPUTS)
    return inputs


def refuse_undecayed(frame: pd.DataFrame) -> None:
    """AnalysisError if some rows say that they are not at the end of a decay."""
    count = int((~flags(frame, "decayed")).sum()) if "decayed" in frame else 0
    if count:
        import pandas as pd

        boolean = pd.api.types.is_bool_dtype(frame["decayed"])
        chosen = "--where=decayed" if boolean else "--where='decayed == 1'"
        raise AnalysisError(
            f"{count} of {len(frame)} rows are not at the end of a learning-rate decay, and would "
            f"bend the law: leave them out with {chosen}"
        )


def points(
    frame: pd.DataFrame, columns: Mapping[str, str], loss: str, cluster: str | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs of a law {name: [rows]} and losses [rows], checked for units and repetition.

    `columns` says which column is which input; `cluster` which one names what is drawn whole.
    AnalysisError on values that are not positive and finite, on counts in millions or billions, on
    a loss in bits or a perplexity, on repeated rows.
    """
    inputs = plausible_inputs(frame, columns)
    losses = numbers(frame, loss)
    for kind, name in _NOT_NATS.items():
        if name.search(loss.lower()):
            what = f"in {kind}" if kind == "bits" else kind
            raise AnalysisError(f"column {loss!r} is {what}: the loss is expected in nats a token")
    _refuse_extremes(frame, loss, losses, _LEAST)
    if np.median(losses) > GREATEST_LOSS:
        raise AnalysisError(
            f"column {loss!r} has a median of {np.median(losses):g}: the loss is expected in nats "
            "a token, not as a perplexity"
        )
    _refuse_bits(frame, loss, losses)
    _refuse_repeated(frame, columns, loss, RUN if cluster is None else cluster)
    return inputs, losses


def plausible_inputs(frame: pd.DataFrame, columns: Mapping[str, str]) -> dict[str, np.ndarray]:
    """As read_inputs, but AnalysisError also on counts in millions or billions."""
    inputs = read_inputs(frame, columns)
    for name, values in inputs.items():
        if name in COUNT_INPUTS:
            _refuse_extremes(frame, columns[name], values, 1.0)
            if np.median(values) < LEAST_COUNT:
                raise AnalysisError(
                    f"column {columns[name]!r} has a median of {np.median(values):g}: counts are "
                    "expected one by one, not in millions or billions"
                )
    return inputs


def _refuse_extremes(frame: pd.DataFrame, column: str, values: np.ndarray, least: float) -> None:
    strange = np.flatnonzero((values < least) | (values > _GREATEST))
    if strange.size and np.median(values) >= least:
        row, value = frame.index[strange[0]], values[strange[0]]
        raise AnalysisError(
            f"column {column!r}, row {row}: {value:g} is expected between {least:g} and "
            f"{_GREATEST:g}"
        )


def _refuse_bits(frame: pd.DataFrame, loss: str, losses: np.ndarray) -> None:
    """AnalysisError if a column bits_per_byte says that the losses are no nats a token.

    Their ratio is the number of bytes a token, at least one and the same for one tokenizer.
    """
    if "bits_per_byte" not in frame or loss == "bits_per_byte":
        return
    bits = numbers(frame, "bits_per_byte")
    if np.allclose(losses, bits, rtol=1e-6, atol=0):
        raise AnalysisError(
            f"column {loss!r} equals bits_per_byte: the loss is expected in nats a token"
        )
    size = losses / (bits * np.log(2))
    if size.min() < 1 - _CONSISTENT or np.ptp(size) > _CONSISTENT * np.median(size):
        raise AnalysisError(
            f"columns {loss!r} and 'bits_per_byte' mean {size.min():.3g} to {size.max():.3g} bytes "
            "a token: expected is one number of 1 or more, of losses in nats a token and of one "
            "tokenizer"
        )


def _refuse_repeated(
    frame: pd.DataFrame, columns: Mapping[str, str], loss: str, cluster: str
) -> None:
    """AnalysisError for a run's second row at the same tokens, or the same inputs and loss."""
    known = [name for name in (cluster, "seed") if name in frame]
    tests = [[*columns.values(), *known, loss]]
    if RUN in frame:
        tests.append([RUN, columns.get("d", COLUMNS["d"])])
    for test in tests:
        names = list(dict.fromkeys(test))
        if not set(names) <= set(frame):
            continue
        repeated = frame[names].astype(str).duplicated().to_numpy()
        if repeated.any():
            row = frame.index[int(np.flatnonzero(repeated)[0])]
            raise AnalysisError(
                f"row {row} repeats an earlier row in {', '.join(names)}: each endpoint counts once"
            )


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
        frame = frame.assign(variant=frame["variant"].astype(object).fillna(""))
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
