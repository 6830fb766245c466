"""Do branches of one trunk end where runs of their own end, and how many FLOPs do they save?

    python -m analysis.branching results/branching/endpoints.parquet

Column tag_kind says what a row is (sweeps/branching.py): `branched`, an endpoint of a trunk;
`same`, a run of its own that warmed up for as many steps; `own`, one that warmed up for a share of
its own budget. Rows are pairs where size, arm, budget and seed are the same; differences are
branched minus independent, in nats a token.

same: branches are exact if every pair's losses are equal to the last bit.
own: budgets of a seed share a trunk, arms their initial values and data, so differences of one seed
  are averaged first; their mean over seeds has a 95 % interval by Student's t. Seed noise is the
  standard deviation of a branched endpoint's loss from seed to seed, the root mean square over the
  arms and budgets compared.
  Branched and independent endpoints "agree within seed noise" if the whole interval lies within
  plus and minus the seed noise, "differ by more than seed noise" if all of it lies outside; else,
  or where a run has not finished, that "cannot be told". Differences that cancel between arms or
  budgets show in the table alone, which has an interval for each arm and budget.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from analysis.command import Parser, status
from analysis.tables import (
    AnalysisError,
    count_text,
    finished,
    numbers,
    read_table,
    require,
    select,
)

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("branched", "same", "own")
COVERAGE = 0.95

_CELL = ["size", "precision", "tokens"]
_TRUNK = ["size", "precision", "seed"]
_ENDPOINT = [*_CELL, "seed"]


@dataclass(frozen=True)
class Same:
    """Runs with the trunk's own warm-up. runs: in the table; pairs: finished, as was the branch.

    largest: of the pairs' differences, without sign.
    """

    runs: int
    pairs: int
    largest: float

    @property
    def verdict(self) -> str:
        pairs = f"{self.pairs} of {self.runs} pairs finished"
        if self.pairs == 0:
            return f"{pairs}: whether branches are exact cannot be told"
        if self.largest > 0:
            return (
                f"{pairs}, losses differ by up to {self.largest:.2g} nats: branches are NOT exact"
            )
        rest = "" if self.pairs == self.runs else ", as far as they finished"
        return f"{pairs}, their losses are equal to the last bit: branches are exact{rest}"


@dataclass(frozen=True)
class Own:
    """Runs with a warm-up of their own. runs, pairs: as above; seeds: those of the pairs.

    difference: mean over seeds, in [low, high]. noise: of a branched endpoint, seed to seed.
    """

    runs: int
    pairs: int
    seeds: int
    difference: float
    low: float
    high: float
    noise: float

    @property
    def verdict(self) -> str:
        return (
            f"branched minus independent {self.difference:+.4f} nats, 95 % interval "
            f"{self.low:+.4f} to {self.high:+.4f} ({self.pairs} of {self.runs} pairs finished, "
            f"{self.seeds} seeds); seed noise {self.noise:.4f}: {self._words}"
        )

    @property
    def _words(self) -> str:
        if self.pairs < self.runs:
            return "whether they agree cannot be told, as not all runs finished"
        if max(-self.low, self.high) <= self.noise:
            return "branched and independent endpoints agree within seed noise"
        if max(self.low, -self.high) > self.noise:
            return "branched and independent endpoints differ by more than seed noise"
        return "whether they agree cannot be told from so few seeds"


@dataclass(frozen=True)
class Branching:
    """cells: a row a size, arm and budget; columns size, precision, tokens, loss (mean of the
    branched endpoints), noise (their standard deviation from seed to seed), largest_same,
    difference (mean of kind `own`), low, high (its own 95 % interval), pairs (of kind `own`). NaN
    where there is nothing to tell.

    branched_flops, independent_flops: of all branched endpoints, and of a run for each of them.
    """

    cells: pd.DataFrame
    same: Same
    own: Own
    branched_flops: float
    independent_flops: float

    @property
    def ratio(self) -> float:
        return self.branched_flops / self.independent_flops

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints; NaN is null."""
        return {
            "same": _plain({**asdict(self.same), "verdict": self.same.verdict}),
            "own": _plain({**asdict(self.own), "verdict": self.own.verdict}),
            "flops": {
                "branched": self.branched_flops,
                "independent": self.independent_flops,
                "ratio": self.ratio,
            },
            "cells": [_plain(row) for row in self.cells.to_dict("records")],
        }


def compare(frame: pd.DataFrame) -> Branching:
    """Hold the branched endpoints of a results table against the independent ones.

    Raises:
      AnalysisError: a missing column or kind, an unknown kind, an endpoint that occurs twice, fewer
        than two seeds.
    """
    kinds = _by_kind(frame)
    branched = finished(kinds["branched"])
    pairs = {kind: _pairs(branched, kinds[kind]) for kind in ("same", "own")}
    if not pairs["own"].duplicated(_CELL).any():
        raise AnalysisError("fewer than 2 seeds finished both branched and with the kind 'own'")
    cells = _cells(branched, pairs["same"], pairs["own"])
    costs = _flops(kinds["branched"])
    same = Same(len(kinds["same"]), len(pairs["same"]), _largest(pairs["same"]["difference"]))
    return Branching(cells, same, _own(len(kinds["own"]), pairs["own"], cells), *costs)


def _by_kind(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each kind, all checked."""
    require(frame, "tag_kind", *_ENDPOINT, "loss", "status")
    kinds = {str(kind): rows for kind, rows in frame.groupby("tag_kind", dropna=False)}
    for kind in kinds.keys() - set(KINDS):
        raise AnalysisError(f"unknown tag_kind {kind!r}: expected one of {', '.join(KINDS)}")
    for kind in KINDS:
        if kind not in kinds:
            raise AnalysisError(f"no rows have the tag_kind {kind!r}: train sweeps/branching.py")
    repeated = frame[frame.duplicated(["tag_kind", *_ENDPOINT])]
    if len(repeated):
        kind, *endpoint = repeated.iloc[0][["tag_kind", *_ENDPOINT]]
        raise AnalysisError(
            f"{kind!r} has {' '.join(map(str, endpoint))} ({', '.join(_ENDPOINT)}) more than once: "
            "choose one sweep's rows with --where"
        )
    numbers(finished(frame), "loss")
    return kinds


def _pairs(branched: pd.DataFrame, independent: pd.DataFrame) -> pd.DataFrame:
    """Finished endpoints of both, side by side, with their `difference`."""
    columns = [*_ENDPOINT, "loss"]
    other = finished(independent)[columns]
    pairs = branched[columns].merge(other, on=_ENDPOINT, suffixes=("", "_independent"))
    return pairs.assign(difference=pairs["loss"] - pairs["loss_independent"])


def _cells(branched: pd.DataFrame, same: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """`Branching.cells`."""
    import pandas as pd

    def within(pairs: pd.DataFrame, key: tuple) -> pd.Series:
        return pairs.loc[(pairs[_CELL] == list(key)).all(axis=1), "difference"]

    rows = []
    for key, group in branched.groupby(_CELL):
        differences = within(own, key)
        mean, low, high = _interval(differences.to_numpy())
        rows.append(
            {
                **dict(zip(_CELL, key, strict=True)),
                "loss": group["loss"].mean(),
                "noise": group["loss"].std(ddof=1),
                "largest_same": _largest(within(same, key)),
                "difference": mean,
                "low": low,
                "high": high,
                "pairs": len(differences),
            }
        )
    return pd.DataFrame(rows)


def _own(runs: int, pairs: pd.DataFrame, cells: pd.DataFrame) -> Own:
    seeds = pairs.groupby("seed")["difference"].mean().to_numpy()
    noises = cells.loc[cells["pairs"] > 0, "noise"].dropna()
    noise = math.sqrt((noises**2).mean())
    return Own(runs, len(pairs), len(seeds), *_interval(seeds), noise)


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of values [V] and the ends of its interval; NaN where there are too few."""
    if len(values) < 2:
        return (float(values.mean()) if len(values) else math.nan), math.nan, math.nan
    mean = float(values.mean())
    t = float(stats.t.ppf((1 + COVERAGE) / 2, len(values) - 1))
    half = t * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _largest(differences: pd.Series) -> float:
    """Without sign; NaN of none."""
    return float(differences.abs().max())


def _flops(branched: pd.DataFrame) -> tuple[float, float]:
    """What the trunks cost with all their branches, and what a run for each endpoint would.

    A table's FLOPs are an endpoint's own, as if it had been trained alone. A trunk goes as far as
    its last branch point; each decay is `tag_decay_fraction` of its budget, in whole steps.
    """
    for column in ("flops", "tokens", "batch_tokens", "tag_decay_fraction"):
        branched = branched.assign(**{column: numbers(branched, column)})
    total = 0.0
    for _, rows in branched.groupby(_TRUNK):
        ends = [round(end) for end in rows["tokens"] / rows["batch_tokens"]]
        shares = rows["tag_decay_fraction"]
        decays = [max(1, round(s * end)) for s, end in zip(shares, ends, strict=True)]
        trunk = max(end - decay for end, decay in zip(ends, decays, strict=True))
        total += (trunk + sum(decays)) * float((rows["flops"] / ends).iloc[0])
    return total, float(branched["flops"].sum())


def readable(found: Branching) -> str:
    """A line a cell, then the verdicts and the cost."""
    import pandas as pd

    rows = found.cells.to_dict("records")
    table = pd.DataFrame({
        "size": [row["size"] for row in rows],
        "arm": [row["precision"] for row in rows],
        "tokens": [count_text(row["tokens"]) for row in rows],
        "loss": [f"{row['loss']:.4f}" for row in rows],
        "seed noise": [_number(row["noise"], "{:.4f}") for row in rows],
        "same: largest": [_number(row["largest_same"], "{:.2g}") for row in rows],
        "own: difference": [_number(row["difference"], "{:+.4f}") for row in rows],
        "95 % interval": [
            "-" if math.isnan(row["low"]) else f"[{row['low']:+.4f}, {row['high']:+.4f}]"
            for row in rows
        ],
        "pairs": [row["pairs"] for row in rows],
    })  # fmt: skip
    return "\n".join([
        table.to_string(index=False),
        "",
        f"same: {found.same.verdict}",
        f"own: {found.own.verdict}",
        f"FLOPs: {found.branched_flops:.4g} branched, {found.independent_flops:.4g} as a run for "
        f"each endpoint, ratio {found.ratio:.3f}",
    ])  # fmt: skip


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON takes them."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.branching", description="Branches, and runs alone.")
    parser.add_argument("file", metavar="TABLE", help="a results table, Parquet or CSV")
    parser.add_argument("--where", metavar="EXPR", help="rows to use, as 'size == \"95k\"'")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _run(args: argparse.Namespace) -> None:
    frame = read_table(args.file)
    found = compare(frame if args.where is None else select(frame, args.where))
    print(json.dumps(found.to_json(), indent=2) if args.json else readable(found))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
