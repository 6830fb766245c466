"""The best learning rate of each size and arm of a sweep over rates.

python -m analysis.learning_rate results/learning_rate/endpoints.parquet
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.tables import COLUMNS, AnalysisError, finished, read_table, require

if TYPE_CHECKING:
    import pandas as pd

_GROUP = [COLUMNS["n"], "size", "precision", COLUMNS["d"]]


def optima(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a size, arm and token budget: best rate tried, and the optimum between the rates.

    The optimum is the vertex of the parabola in log rate through the best rate and its two
    neighbours, on losses averaged over seeds; NaN where the best is the first or last rate tried,
    as then the optimum may lie outside.

    Raises:
      AnalysisError: a missing column.
    """
    import pandas as pd

    require(frame, *_GROUP, "peak_lr", "loss", "status")
    rows = []
    for key, group in finished(frame).groupby(_GROUP):
        losses = group.groupby("peak_lr")["loss"].mean().sort_index()
        best = int(np.argmin(losses))
        inside = 0 < best < len(losses) - 1
        optimum = _vertex(losses.iloc[best - 1 : best + 2]) if inside else np.nan
        rows.append([*key, len(losses), losses.index[best], losses.iloc[best], optimum])
    return pd.DataFrame(rows, columns=[*_GROUP, "rates", "best_rate", "best_loss", "optimum"])


def _vertex(three: pd.Series) -> float:
    """Where the parabola through three points (log rate, loss) has its least loss."""
    curve = np.polyfit(np.log(three.index.to_numpy(float)), three.to_numpy(), 2)
    return float(np.exp(-curve[1] / (2 * curve[0])))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m analysis.learning_rate", description=__doc__)
    parser.add_argument("file", help="a results table, Parquet or CSV")
    try:
        print(optima(read_table(parser.parse_args(argv).file)).to_string(index=False))
    except AnalysisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
