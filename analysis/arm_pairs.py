"""Each arm of a results table of this project against the 16-bit one: do they follow one law?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.comparing import Comparison, compare
from analysis.tables import (
    COLUMNS,
    AnalysisError,
    clipped,
    finished,
    read_tables,
    require,
    select,
)
from analysis.two_arms import TwoArms

if TYPE_CHECKING:
    import pandas as pd

BASELINES = ("fp16", "bf16", "fp32")  # the first that a table has
COSTS = ("model_bits", "energy_pj_per_token")

Comparisons = dict[str, Comparison | str]  # {treatment: its comparison, or why it was refused}


def baseline_of(frame: pd.DataFrame) -> str | None:
    """The arm that others are held against, if the table has one."""
    return next((arm for arm in BASELINES if (frame["precision"] == arm).any()), None)


def read_arms(
    files: Sequence[str], where: str | None, baseline: str | None
) -> tuple[pd.DataFrame, str]:
    """The rows that a command is asked for, and the arm that it holds others against: the one
    given, or the table's 16-bit one.

    Raises:
      AnalysisError: a table that cannot be read, or none of the arms that are taken by default.
    """
    frame = read_tables(files)
    rows = frame if where is None else select(frame, where)
    require(rows, "precision")
    chosen = baseline or baseline_of(rows)
    if chosen is None:
        raise AnalysisError("no 16-bit arm in the table; name one with --baseline")
    return rows, chosen


def check_arms(frame: pd.DataFrame, *arms: str) -> None:
    """Raises AnalysisError for the first that the table does not have."""
    known = list(dict.fromkeys(map(str, frame["precision"])))
    for arm in arms:
        if arm not in known:
            raise AnalysisError(f"no arm {clipped(arm)}: the table has {', '.join(known)}")


def compare_arms(frame: pd.DataFrame, *, bootstrap: int = 1000) -> Comparisons:
    """Compare every other arm's finished endpoints with the baseline's.

    The runs of both arms that share a size and a seed are drawn together. What cannot be told is
    refused before anything is computed.
    """
    baseline, found = baseline_of(frame), Comparisons()
    for arm in dict.fromkeys(frame["precision"]):
        if baseline is None or arm == baseline:
            continue
        try:
            found[str(arm)] = compare(_pair(frame, baseline, arm), bootstrap=bootstrap)
        except AnalysisError as error:
            found[str(arm)] = str(error)
    return found


def _pair(frame: pd.DataFrame, baseline: str, treatment: str) -> TwoArms:
    rows = finished(frame[frame["precision"].isin([baseline, treatment])])
    if "variant" in rows and rows["variant"].nunique(dropna=False) > 1:
        raise AnalysisError("the runs differ in more than the arm (column variant)")
    runs = rows.drop_duplicates("run_id")
    if runs.duplicated(["precision", "size", "seed"]).any():
        raise AnalysisError("runs of one arm, size and seed differ in something else")
    arms = TwoArms(
        arms=(baseline, treatment),
        **{name: rows[column].to_numpy(float) for name, column in COLUMNS.items()},
        costs={column: rows[column].to_numpy(float) for column in COSTS},
        loss=rows["loss"].to_numpy(float),
        group=(rows["precision"] == treatment).to_numpy(int),
        runs=rows["run_id"].to_numpy(),
        pairs=(rows["size"].astype(str) + " " + rows["seed"].astype(str)).to_numpy(),
    )
    reasons = [*arms.few_clusters(), *arms.fixed_ratios()]
    if reasons:
        raise AnalysisError("; ".join(reasons))
    return arms
