"""The noise floor of a results table: how far a loss moves from seed to seed.

    python -m analysis.seed_noise results/study-cpu/grid/endpoints.csv

Endpoints that differ in their seed alone are a cell. The noise of an arm and size is the root mean
square over its cells of the standard deviation within a cell, with seeds minus one degrees of
freedom each; endpoints of one trunk are not independent, so the budgets of a size tell less than
their number. The difference of two arms is taken seed by seed, where both have the seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.arm_pairs import baseline_of
from analysis.command import Parser, status
from analysis.tables import (
    TABLES_HELP,
    AnalysisError,
    finished_numbers,
    read_tables,
    require,
    select,
)

if TYPE_CHECKING:
    import pandas as pd

# What else a cell shares, in tables that have it. Arms are paired whatever their rates and decays.
_RECIPE = ("variant", "schedule", "warmup_tokens", "batch_tokens", "data")
_RATES = ("peak_lr", "weight_decay")
_COLUMNS = ("precision", "size", "cells", "endpoints", "noise")


def seed_noise(frame: pd.DataFrame) -> pd.DataFrame:
    """A row an arm and size, and a row each difference of an arm and the 16-bit one.

    Columns: precision (of a difference `ternary - fp16`), size, cells, endpoints in them, noise
    (nats a token). Cells of one seed are left out. There are no differences where an arm has
    several rates or decays.

    Raises:
      AnalysisError: a missing column, a cell with a seed twice, or no cell with two seeds.
    """
    import pandas as pd

    require(frame, "precision", "size", "seed", "tokens", "loss", "params_non_embedding")
    rows = finished_numbers(frame, "loss", "tokens", "params_non_embedding")
    rows = rows.assign(**{c: rows[c].map(str) if c in rows else "" for c in _RECIPE + _RATES})
    cell = ["precision", "size", "tokens", *_RECIPE]
    if rows.duplicated([*cell, *_RATES, "seed"]).any():
        raise AnalysisError("endpoints of one arm, size, budget and seed differ in something else")
    paired = pd.DataFrame()
    if not rows.duplicated([*cell, "seed"]).any():
        paired = _noise(_differences(rows), cell)
    found = pd.concat([_noise(rows, [*cell, *_RATES]), paired])
    if found.empty:
        raise AnalysisError("no two endpoints differ in their seed alone: there is no noise to see")
    return found


def _differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Losses minus the baseline's at the same seed, as arms of their own."""
    baseline = baseline_of(rows)
    key = [*_RECIPE, "size", "tokens", "seed"]
    own = rows.loc[rows["precision"] == baseline, [*key, "loss"]]
    others = rows[rows["precision"] != baseline]
    paired = others.merge(own, on=key, suffixes=("", "_of_baseline"))
    return paired.assign(
        precision=paired["precision"] + f" - {baseline}",
        loss=paired["loss"] - paired["loss_of_baseline"],
    )


def _noise(rows: pd.DataFrame, cell: list[str]) -> pd.DataFrame:
    cells = rows.groupby([*cell, "params_non_embedding"], sort=False)["loss"].agg(["count", "var"])
    cells = cells[cells["count"] > 1].reset_index()
    cells["freedom"] = cells["count"] - 1
    cells["squares"] = cells["freedom"] * cells["var"]
    by_size = cells.groupby(["precision", "params_non_embedding", "size"]).agg(
        cells=("count", "size"),
        endpoints=("count", "sum"),
        squares=("squares", "sum"),
        freedom=("freedom", "sum"),
    )
    by_size["noise"] = np.sqrt(by_size["squares"] / by_size["freedom"])
    return by_size.reset_index()[list(_COLUMNS)]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.seed_noise", description="Noise from seed to seed.")
    parser.add_argument("files", nargs="+", metavar="TABLE", help=TABLES_HELP)
    parser.add_argument("--where", metavar="EXPR", help="rows to use, as 'size == \"95k\"'")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _run(args: argparse.Namespace) -> None:
    frame = read_tables(args.files)
    found = seed_noise(frame if args.where is None else select(frame, args.where))
    if args.json:
        records: list[dict[str, Any]] = json.loads(found.to_json(orient="records"))
        print(json.dumps(records, indent=2))
    else:
        print(found.to_string(index=False))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
