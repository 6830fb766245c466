"""How the distance between two arms moves with size and tokens, and nothing about either's own law.

    python -m analysis.gap_law results/study-cpu/grid/endpoints.csv --treatment=ternary \\
        --new=results/study-cpu/held_out/endpoints.csv

Fits difference = k (N / 1e5)^a (D / 1e6)^b, in nats a token, to the differences of runs of one
size, budget and seed, by least squares. What a law of each arm says of an irreducible loss, which
small models hardly know, does not enter. Budgets of one pair of runs are branches of two trunks:
intervals (95 %) are of resampled pairs of runs, and for new ones of that and of the scatter about
the fit.

--new: planned endpoints of both arms (experiments.run --dry_run --planned), or trained ones, of
which the measured differences are shown, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import least_squares

from analysis.arm_pairs import check_arms, read_arms
from analysis.command import Parser, status
from analysis.intervals import resamples
from analysis.plot_option import add_plot, plot_path, write_figures
from analysis.tables import (
    TABLES_HELP,
    AnalysisError,
    count_text,
    finished_numbers,
    paired_differences,
    read_table,
    require,
)

if TYPE_CHECKING:
    import pandas as pd

UNITS = {"params_non_embedding": 1e5, "tokens": 1e6}
FEWEST = 5  # pairs of runs: three parameters, and something left to tell how far they are off
LEAST = 0.05  # by which N and D must vary beside each other, of the rounding of budgets far more
EXPONENT = "a + b"  # of N at a fixed ratio of tokens to parameters


@dataclass(frozen=True)
class GapLaw:
    """Parameters k (nats a token), a and b, and their 95 % intervals.

    scatter: standard deviation of the differences about the fit. draws: [R, 3], of resampled runs.
    """

    treatment: str
    baseline: str
    k: float
    a: float
    b: float
    intervals: dict[str, tuple[float, float]]
    scatter: float
    pairs: int
    runs: int
    draws: np.ndarray

    def predict(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Differences [P] at inputs [P, 2] of N and D, and the ends of intervals for new pairs."""
        design = _design(inputs)
        middle = np.exp(design @ [np.log(self.k), self.a, self.b])
        rng = np.random.default_rng(0)
        drawn = np.exp(self.draws @ design.T)
        drawn = drawn + rng.normal(0, self.scatter, drawn.shape)
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        return middle, low, high

    def readable(self) -> str:
        """The law as lines for a person."""
        lines = [
            f"{self.treatment} - {self.baseline} = {self.k:.4f} (N / 1e5)^{self.a:.3f} "
            f"(D / 1e6)^{self.b:.3f} nats, {self.pairs} pairs of {self.runs} pairs of runs"
        ]
        values = {"k": self.k, "a": self.a, "b": self.b, EXPONENT: self.a + self.b}
        for name, value in values.items():
            low, high = self.intervals[name]
            lines.append(f"  {name:5} {value:+.3f} [{low:+.3f}, {high:+.3f}]")
        return "\n".join([*lines, f"scatter about it: {self.scatter:.4f} nats"])


def fit_gap_law(
    frame: pd.DataFrame, baseline: str, treatment: str, *, bootstrap: int = 1000
) -> GapLaw:
    """The law of two arms' differences.

    Raises:
      AnalysisError: too few pairs, sizes or budgets, or a treatment that is not above the baseline.
    """
    pairs = pairs_of(frame, baseline, treatment)
    runs = (pairs["size"].astype(str) + " " + pairs["seed"].astype(str)).to_numpy()
    count = len(set(runs))
    if count < FEWEST or pairs["size"].nunique() < 3 or pairs["tokens"].nunique() < 3:
        raise AnalysisError(
            f"{count} pairs of runs of {pairs['size'].nunique()} sizes: at least {FEWEST} of 3 "
            "sizes and 3 budgets are needed"
        )
    difference = pairs["difference"].to_numpy(float)
    if difference.mean() <= 0:
        raise AnalysisError(f"{treatment!r} is not above {baseline!r}: no power law of a distance")
    design = _design(pairs[list(UNITS)].to_numpy(float))
    if not _told_apart(design):
        raise AnalysisError(
            "tokens rise with parameters at nearly a fixed ratio: nothing tells the exponent of "
            "one from that of the other; take endpoints of several ratios"
        )
    start = np.array([np.log(difference.mean()), 0.0, 0.0])
    theta = _solve(design, difference, np.ones(len(pairs)), start)
    weights = resamples(len(pairs), bootstrap, runs)
    kept = [w for w in weights if _told_apart(design[w > 0])]
    draws = np.stack([_solve(design, difference, w, theta) for w in kept])
    columns = {"k": np.exp(draws[:, 0]), "a": draws[:, 1], "b": draws[:, 2]}
    columns[EXPONENT] = columns["a"] + columns["b"]
    residual = difference - np.exp(design @ theta)
    return GapLaw(
        treatment=treatment,
        baseline=baseline,
        k=float(np.exp(theta[0])),
        a=float(theta[1]),
        b=float(theta[2]),
        intervals={
            name: tuple(np.quantile(values, [0.025, 0.975]).tolist())
            for name, values in columns.items()
        },
        scatter=float(np.sqrt(np.sum(residual**2) / (len(residual) - 3))),
        pairs=len(pairs),
        runs=count,
        draws=draws,
    )


def new_gaps(law: GapLaw, frame: pd.DataFrame) -> pd.DataFrame:
    """What the law says of other endpoints: a row a size and budget, by size and budget.

    Columns: size, tokens, predicted, low, high (nats a token); of trained endpoints also measured,
    and inside, whether that lies between low and high.

    Raises:
      AnalysisError: a missing column, or no size and budget of both arms.
    """
    require(frame, "size", "precision", *UNITS)
    trained = "loss" in frame
    if trained:
        table = pairs_of(frame, law.baseline, law.treatment)
        table = table.groupby(["size", *UNITS], as_index=False)["difference"].mean()
    else:
        cells = frame.groupby(["size", *UNITS])["precision"].agg(set).reset_index()
        both = cells["precision"].map({law.baseline, law.treatment}.issubset)
        table = cells[both].drop(columns="precision")
    if table.empty:
        raise AnalysisError(f"no size and budget has {law.baseline!r} and {law.treatment!r}")
    table = table.sort_values(list(UNITS), kind="stable").reset_index(drop=True)
    middle, low, high = law.predict(table[list(UNITS)].to_numpy(float))
    found = table[["size", "tokens"]].assign(predicted=middle, low=low, high=high)
    if trained:
        found["measured"] = table["difference"]
        found["inside"] = found["measured"].between(found["low"], found["high"])
    return found


def pairs_of(frame: pd.DataFrame, baseline: str, treatment: str) -> pd.DataFrame:
    """Paired differences (tables.paired_differences), with the parameters of each size."""
    require(frame, "size", "precision", *UNITS)
    check_arms(frame, baseline, treatment)
    rows = finished_numbers(frame, "loss", *UNITS)
    pairs = paired_differences(rows, baseline, treatment)
    parameters = rows.groupby("size")["params_non_embedding"].first()
    return pairs.assign(params_non_embedding=pairs["size"].map(parameters))


def _design(inputs: np.ndarray) -> np.ndarray:
    """[P, 3]: one, and the logarithms of N and D in their units."""
    return np.column_stack([np.ones(len(inputs)), np.log(inputs / list(UNITS.values()))])


def _told_apart(design: np.ndarray) -> bool:
    """Whether N and D vary each by itself, by LEAST in the logarithm at least."""
    logs = design[:, 1:] - design[:, 1:].mean(axis=0)
    return bool(np.linalg.svd(logs, compute_uv=False)[-1] >= LEAST * np.sqrt(len(logs)))


def _solve(
    design: np.ndarray, difference: np.ndarray, weights: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """log k, a and b of the least sum of weighted squares."""
    root = np.sqrt(weights)
    return least_squares(lambda theta: root * (np.exp(design @ theta) - difference), start).x


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.gap_law", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="TABLE", help=TABLES_HELP)
    parser.add_argument("--treatment", metavar="ARM", default="ternary")
    parser.add_argument("--baseline", metavar="ARM", help="default: fp16, bf16 or fp32")
    parser.add_argument("--where", metavar="EXPR", help="rows to use, as 'size == \"95k\"'")
    parser.add_argument("--new", metavar="TABLE", help="other endpoints, planned or trained")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="draws")
    add_plot(parser, "draw the differences with the law")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return parser


def _run(args: argparse.Namespace) -> None:
    if args.bootstrap < 100:
        raise AnalysisError(f"--bootstrap={args.bootstrap}: at least 100 draws")
    plot = plot_path(args.plot)
    rows, baseline = read_arms(args.files, args.where, args.baseline)
    law = fit_gap_law(rows, baseline, args.treatment, bootstrap=args.bootstrap)
    new = None if args.new is None else new_gaps(law, read_table(args.new))
    if plot is not None:
        from analysis import paired_figures

        pairs = pairs_of(rows, baseline, args.treatment)
        write_figures(plot, {"": lambda: paired_figures.distances(law, pairs, new)})
    if args.json:
        document: dict[str, Any] = {k: v for k, v in asdict(law).items() if k != "draws"}
        document["new"] = [] if new is None else json.loads(new.to_json(orient="records"))
        print(json.dumps(document, indent=2))
        return
    print(law.readable())
    if new is not None:
        new["tokens"] = new["tokens"].map(count_text)
        print(new.to_string(index=False, float_format="{:.4f}".format))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
