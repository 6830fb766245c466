"""How far arms lie above the 16-bit one at each size and budget, pair by pair; no law is assumed.

    python -m analysis.gaps results/study-cpu/grid/endpoints.csv

Runs of one size, budget and seed are a pair. `spread` is the standard deviation of a pair's
difference over the seeds; where there is one seed, it is that of other sizes which says how well
the difference is known.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.arm_pairs import check_arms, read_arms
from analysis.command import Parser, status
from analysis.tables import (
    TABLES_HELP,
    AnalysisError,
    finished_numbers,
    paired_differences,
    require,
)

if TYPE_CHECKING:
    import pandas as pd


def gaps(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A row an arm, size and budget that `baseline` has, too, by arm, size and budget.

    Columns: precision, size, tokens, ratio (tokens a non-embedding parameter), seeds, baseline and
    loss (means, nats a token), difference (its mean), spread (its standard deviation over seeds;
    NaN of one) and percent (of the baseline's loss).

    Raises:
      AnalysisError: a missing column, pairs of several variants, or no pair.
    """
    import pandas as pd

    require(frame, "precision", "size", "params_non_embedding")
    check_arms(frame, baseline)
    rows = finished_numbers(frame, "loss", "tokens", "params_non_embedding")
    parameters = rows.groupby("size")["params_non_embedding"].first()
    others = [arm for arm in dict.fromkeys(rows["precision"]) if arm != baseline]
    found = [_of_arm(paired_differences(rows, baseline, arm), arm) for arm in others]
    table = pd.concat(found) if found else pd.DataFrame()
    if table.empty:
        raise AnalysisError(f"no run shares size, tokens and seed with one of {baseline!r}")
    table.insert(3, "ratio", table["tokens"] / table["size"].map(parameters))
    table["place"] = table["size"].map(parameters)
    order = table.sort_values(["precision", "place", "tokens"], kind="stable")
    return order.drop(columns="place").reset_index(drop=True)


def _of_arm(pairs: pd.DataFrame, arm: str) -> pd.DataFrame:
    if "variant" in pairs and pairs["variant"].nunique() > 1:
        raise AnalysisError("the runs differ in more than the arm (column variant); see --where")
    cells = pairs.groupby(["size", "tokens"], sort=False)
    table = cells.agg(
        seeds=("difference", "size"),
        baseline=("loss_baseline", "mean"),
        loss=("loss_treatment", "mean"),
        difference=("difference", "mean"),
        spread=("difference", "std"),
    ).reset_index()
    table.insert(0, "precision", arm)
    table["percent"] = 100 * table["difference"] / table["baseline"]
    return table


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.gaps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="TABLE", help=TABLES_HELP)
    parser.add_argument("--baseline", metavar="ARM", help="default: fp16, bf16 or fp32")
    parser.add_argument("--where", metavar="EXPR", help="rows to use, as 'size == \"95k\"'")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _run(args: argparse.Namespace) -> None:
    rows, baseline = read_arms(args.files, args.where, args.baseline)
    found = gaps(rows, baseline)
    if args.json:
        records: list[dict[str, Any]] = json.loads(found.to_json(orient="records"))
        print(json.dumps(records, indent=2))
        return
    digits = {"ratio": "{:.0f}", "percent": "{:+.2f}", "difference": "{:+.4f}"}
    shown = {name: text.format for name, text in digits.items()}
    print(found.to_string(index=False, formatters=shown, float_format="{:.4f}".format, na_rep="-"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
