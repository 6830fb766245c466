"""The best learning rate of each size and arm of a sweep over rates.

python -m analysis.learning_rate results/learning_rate/endpoints.parquet
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.tables import COLUMNS, AnalysisError, finished, read_table, require

if TYPE_CHECKING:
    import pandas as pd

_GROUP = [COLUMNS["n"], "size", "precision", COLUMNS["d"]]


@dataclass(frozen=True)
class RateCurve:
    """Losses (nats a token, means over seeds) of one size and arm at R peak learning rates.

    parabola: in log rate, highest power first, through the best rate and its two neighbours; None
      where the best is the first or last rate tried, as then the optimum may lie outside.
    """

    n: float
    size: str
    arm: str
    tokens: float
    rates: np.ndarray  # [R] rising
    losses: np.ndarray  # [R]
    parabola: np.ndarray | None  # [3]

    @property
    def optimum(self) -> float:
        """The rate at the vertex of the parabola; NaN without one."""
        if self.parabola is None:
            return float("nan")
        return float(np.exp(-self.parabola[1] / (2 * self.parabola[0])))


def rate_curves(frame: pd.DataFrame) -> list[RateCurve]:
    """Of the finished endpoints; AnalysisError for a missing column, or if there are none."""
    require(frame, *_GROUP, "peak_lr", "loss", "status")
    kept = finished(frame)
    if kept.empty:
        raise AnalysisError("no endpoint is finished: there are no losses to compare rates by")
    found = []
    for (n, size, arm, tokens), group in kept.groupby(_GROUP):
        means = group.groupby("peak_lr")["loss"].mean().sort_index()
        rates, losses = means.index.to_numpy(float), means.to_numpy(float)
        parabola = _parabola(rates, losses)
        found.append(RateCurve(n, str(size), str(arm), tokens, rates, losses, parabola))
    return found


def _parabola(rates: np.ndarray, losses: np.ndarray) -> np.ndarray | None:
    best = int(losses.argmin())
    if not 0 < best < len(losses) - 1:
        return None
    about = slice(best - 1, best + 2)
    return np.polyfit(np.log(rates[about]), losses[about], 2)


def optima(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a size, arm and token budget: best rate tried, and the optimum between the rates.

    Raises:
      AnalysisError: a missing column, or no finished endpoint.
    """
    import pandas as pd

    rows = []
    for curve in rate_curves(frame):
        best = int(curve.losses.argmin())
        least = curve.rates[best], curve.losses[best]
        key = curve.n, curve.size, curve.arm, curve.tokens
        rows.append([*key, len(curve.rates), *least, curve.optimum])
    return pd.DataFrame(rows, columns=[*_GROUP, "rates", "best_rate", "best_loss", "optimum"])


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
