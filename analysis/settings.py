"""What a setting costs that was varied while all else stayed, as a decay or a rate.

    python -m analysis.settings results/study-cpu/weight_decay/endpoints.csv --column=weight_decay

Endpoints of one size, budget and seed are a cell. `cost` is the loss above that of the best value,
averaged over the cells that have all values, and `spread` its standard deviation over them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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

_CELL = ["size", "tokens", "seed"]
ALL = "all"  # sizes together


def settings(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row an arm, size and value of the column; where several sizes have the same values, also
    rows of all of them.

    Columns: precision, size, the column's own, cells, cost and spread (nats a token).

    Raises:
      AnalysisError: a missing column, nothing varied, or runs that differ in more than it.
    """
    import pandas as pd

    require(frame, "precision", "loss", *_CELL, column)
    if column in ("precision", "loss", *_CELL):
        raise AnalysisError(f"column {column!r}: runs are compared at equal {', '.join(_CELL)}")
    rows = finished_numbers(frame, "loss")
    found = []
    for precision, arm in rows.groupby("precision", sort=False):
        sizes = {str(size): own for size, own in arm.groupby("size", sort=False)}
        values = [sorted(set(own[column])) for own in sizes.values()]
        if len(sizes) > 1 and all(each == values[0] for each in values):
            sizes[ALL] = arm
        for size, own in sizes.items():
            costs = _costs(own, column)
            costs.insert(0, "size", size)
            costs.insert(0, "precision", precision)
            found.append(costs)
    table = pd.concat(found, ignore_index=True)
    if (table.groupby(["precision", "size"])[column].count() < 2).all():
        raise AnalysisError(f"column {column!r} has one value in each arm and size")
    return table


def _costs(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    if rows.duplicated([*_CELL, column]).any():
        raise AnalysisError(f"runs of one arm, size and seed differ in more than {column!r}")
    cells = rows.pivot(index=_CELL, columns=column, values="loss").dropna()
    if cells.empty:
        raise AnalysisError(f"no size, budget and seed has all values of {column!r}")
    best = cells.mean().idxmin()
    above = cells.sub(cells[best], axis=0)
    table = above.agg(["mean", "std"]).T.reset_index()
    table.columns = [column, "cost", "spread"]
    table.insert(1, "cells", len(cells))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.settings", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="TABLE", help=TABLES_HELP)
    parser.add_argument("--column", metavar="COLUMN", required=True, help="what was varied")
    parser.add_argument("--where", metavar="EXPR", help="rows to use, as 'size == \"95k\"'")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _run(args: argparse.Namespace) -> None:
    frame = read_tables(args.files)
    found = settings(frame if args.where is None else select(frame, args.where), args.column)
    if args.json:
        records: list[dict[str, Any]] = json.loads(found.to_json(orient="records"))
        print(json.dumps(records, indent=2))
        return
    shown = {"cost": "{:.4f}".format, "spread": "{:.4f}".format, args.column: "{:.4g}".format}
    print(found.to_string(index=False, formatters=shown, na_rep="-"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
