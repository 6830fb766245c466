"""Runs whose weights were quantized after training: nats a token above the run as it was trained.

    python -m analysis.quantized results/study-cpu

reads quantize/*.json there, each what `python -m experiments.quantize --json` prints of a run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.command import Parser, status
from analysis.result_files import Missing, Results
from analysis.tables import AnalysisError

if TYPE_CHECKING:
    import pandas as pd

_ROW = ["weights", "granularity", "scales"]


def quantized(rows: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """A row a quantizer, granularity and way to its scales, in the order of the first run; of each
    run a column, named without the digest of its id, of the loss above that as trained."""
    import pandas as pd

    found = []
    for run, own in rows.items():
        name = run.rpartition("-")[0] or run
        if sum(other.rpartition("-")[0] == name for other in rows) > 1:
            name = run  # else two would be one column, of their mean
        for row in own:
            scales = "calibrated" if row["calibrated"] else "of the weights"
            granularity = row["granularity"] or "-"
            found.append({"run": name, "weights": row["weights"], "granularity": granularity,
                          "scales": scales, "difference": row["difference"]})  # fmt: skip
    table = pd.DataFrame(found)
    order = table[_ROW].drop_duplicates()
    wide = table.pivot_table(index=_ROW, columns="run", values="difference", sort=False)
    return (
        wide.loc[[tuple(row) for row in order.to_numpy()]].reset_index().rename_axis(columns=None)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    parser = Parser(
        prog="python -m analysis.quantized", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("root", type=Path, metavar="DIR", help="a folder that has quantize/*.json")

    def run() -> None:
        try:
            table = quantized(Results(parser.parse_args(argv).root).quantized)
        except Missing as error:
            raise AnalysisError(str(error)) from error
        print(table.to_string(index=False, float_format="{:+.4f}".format, na_rep="-"))

    return status(run)


if __name__ == "__main__":
    sys.exit(main())
