"""Fit a scaling law to a table of losses.

    python -m analysis.fit results/quickstart/endpoints.parquet --law=chinchilla \\
        --n=params_non_embedding --d=tokens --loss=loss --where='precision == "ternary"'

A fit states its objective, its residuals and how many starts found the same optimum. It refuses
points that cannot identify the law, and warns of parameters that they barely determine.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.command import Parser, status
from analysis.identify import doubts, refuse_unidentified, unidentified
from analysis.laws import LAWS, Law, get_law
from analysis.solver import OBJECTIVES, Problem, refit, solve
from analysis.tables import AnalysisError, finished, numbers, points, read_table, require, select

INTERVAL = (2.5, 97.5)  # percentiles of the bootstrap: 95 % intervals
LEAST_SAMPLES = 20


@dataclass(frozen=True)
class Fit:
    """A fitted law. Losses are in nats a token; parameters are named as in the law's paper."""

    law: Law
    objective: str
    objective_value: float
    params: dict[str, float]
    inputs: dict[str, np.ndarray]  # {name: [P]} as fitted
    loss: np.ndarray  # [P]
    starts: int
    share_of_starts: float  # that reached the optimum
    warnings: tuple[str, ...]
    samples: dict[str, np.ndarray]  # {parameter: [R]} of the bootstrap refits, R = 0 without

    @property
    def n_points(self) -> int:
        return self.loss.size

    @property
    def log_residuals(self) -> np.ndarray:
        """Log of fitted over measured loss [P]."""
        return np.log(self.predict(self.inputs) / self.loss)

    @property
    def rms_log_residual(self) -> float:
        return float(np.sqrt(np.mean(self.log_residuals**2)))

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Least and greatest value of each input."""
        return {name: (float(x.min()), float(x.max())) for name, x in self.inputs.items()}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap interval of each parameter; empty without bootstrap."""
        if not self.sampled:
            return {}
        ends = {name: np.percentile(values, INTERVAL) for name, values in self.samples.items()}
        return {name: (float(low), float(high)) for name, (low, high) in ends.items()}

    @property
    def sampled(self) -> bool:
        """Whether there are bootstrap refits, and so intervals."""
        return next(iter(self.samples.values())).size > 0

    def predict(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Loss at the inputs."""
        return np.asarray(self.law.function(self.params, inputs))

    def predict_interval(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
        """95 % bootstrap interval of the law's loss at inputs [P]; None without bootstrap."""
        if not self.sampled:
            return None
        columns = {name: values[:, None] for name, values in self.samples.items()}
        low, high = np.percentile(self.law.function(columns, inputs), INTERVAL, axis=0)
        return low, high

    def to_json(self) -> dict[str, Any]:
        """What `python -m analysis.fit --json` prints, but for the predictions."""
        return {
            "law": self.law.name,
            "objective": self.objective,
            "objective_value": self.objective_value,
            "n_points": self.n_points,
            "params": self.params,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "warnings": list(self.warnings),
            "rms_log_residual": self.rms_log_residual,
            "max_log_residual": float(np.abs(self.log_residuals).max()),
            "starts": self.starts,
            "share_of_starts": self.share_of_starts,
            "ranges": {name: list(pair) for name, pair in self.ranges.items()},
            "equation": self.law.write(self.params),
            "source": self.law.source,
        }


def fit(
    law: str,
    inputs: Mapping[str, np.ndarray],
    loss: np.ndarray,
    *,
    objective: str = "huber",
    bootstrap: int = 0,
    clusters: np.ndarray | None = None,
    seed: int = 0,
) -> Fit:
    """Fit `law` to losses [P] (nats a token) at inputs {n, d or c: [P]}.

    Objectives: `huber` sums Huber losses (delta 1e-3) of log residuals (Hoffmann et al. 2022, eq.
    3), `lad` sums absolute log residuals, `log_mse` and `mse` average squares of log residuals and
    of residuals. `bootstrap` resamples whole `clusters` [P] (labels; endpoints of one run are not
    independent), or points without them. AnalysisError if the points cannot identify the law.
    """
    chosen = get_law(law)
    if objective not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise AnalysisError(f"unknown objective {objective!r}: choose one of {known}")
    if bootstrap != 0 and bootstrap < LEAST_SAMPLES:
        raise AnalysisError(f"bootstrap={bootstrap}: an interval takes {LEAST_SAMPLES} or more")
    x = {name: np.asarray(inputs[name], float) for name in chosen.inputs}
    y = np.asarray(loss, float)
    refuse_unidentified(chosen, x, y)
    problem = Problem.of(chosen, x, y, OBJECTIVES[objective])
    solution = solve(problem)
    warnings = doubts(problem, solution)
    thetas = _bootstrap(problem, solution.theta, bootstrap, clusters, seed)
    if bootstrap and not len(thetas):
        warnings.append("no intervals: too few independent runs to resample")
    params = {name: float(value) for name, value in problem.natural(solution.theta).items()}
    predicted = chosen.function(params, x)
    residuals = np.log(predicted / y) if OBJECTIVES[objective].logarithmic else predicted - y
    return Fit(
        law=chosen,
        objective=objective,
        objective_value=OBJECTIVES[objective].value(residuals),
        params=params,
        inputs=x,
        loss=y,
        starts=solution.starts,
        share_of_starts=solution.share_of_starts,
        warnings=tuple(warnings),
        samples=problem.natural(thetas),
    )


def _bootstrap(
    problem: Problem, theta: np.ndarray, count: int, clusters: np.ndarray | None, seed: int
) -> np.ndarray:
    """Optima [R, K] of `count` resamples, or none where they would only look like intervals.

    That is with fewer clusters than parameters and three, or when most resamples cannot identify
    the law.
    """
    labels = np.arange(problem.loss.size) if clusters is None else np.asarray(clusters)
    names, membership = np.unique(labels, return_inverse=True)
    if len(names) < theta.size + 3:
        return np.empty((0, theta.size))
    rng = np.random.default_rng(seed)
    kept = []
    for _ in range(count):
        drawn = rng.integers(len(names), size=len(names))
        weights = np.bincount(drawn, minlength=len(names))[membership].astype(float)
        chosen = {name: values[weights > 0] for name, values in problem.inputs.items()}
        if unidentified(problem.law, chosen) is None:
            kept.append(weights)
    if 2 * len(kept) < max(count, 1):
        return np.empty((0, theta.size))
    return refit(problem, theta, np.stack(kept))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.fit", description="Fit a scaling law to a table.")
    parser.add_argument("file", metavar="FILE", help="a .csv or .parquet table, a row an endpoint")
    parser.add_argument("--law", default="chinchilla", help=f"one of {', '.join(LAWS)}")
    parser.add_argument("--n", metavar="COLUMN", help="parameters")
    parser.add_argument("--d", metavar="COLUMN", help="training tokens")
    parser.add_argument("--c", metavar="COLUMN", help="training FLOPs")
    parser.add_argument("--loss", metavar="COLUMN", required=True, help="loss in nats a token")
    parser.add_argument("--where", metavar="EXPR", help="rows to use, as 'precision == \"fp16\"'")
    parser.add_argument("--objective", default="huber", help=f"one of {', '.join(OBJECTIVES)}")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N", help="resamples")
    parser.add_argument("--cluster", metavar="COLUMN", help="resample its values whole: run_id")
    parser.add_argument("--predict", metavar="FILE", help="a table of inputs to predict at")
    parser.add_argument("--plot", metavar="PNG", help="draw the points and the law")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _columns(args: argparse.Namespace) -> dict[str, str]:
    """The column of each input that the law needs."""
    columns = {name: getattr(args, name) for name in get_law(args.law).inputs}
    for name, column in columns.items():
        if column is None:
            raise AnalysisError(f"--law={args.law} needs --{name}=COLUMN")
    return columns


def _fit_table(args: argparse.Namespace, columns: Mapping[str, str]) -> Fit:
    frame = read_table(args.file)
    if args.where is not None:
        frame = select(frame, args.where)
    kept = finished(frame)
    inputs, loss = points(kept, columns, args.loss)
    clusters = None
    if args.cluster is not None:
        require(kept, args.cluster)
        clusters = kept[args.cluster].to_numpy()
    found = fit(
        args.law,
        inputs,
        loss,
        objective=args.objective,
        bootstrap=args.bootstrap,
        clusters=clusters,
    )
    if len(kept) == len(frame):
        return found
    left_out = f"left out {len(frame) - len(kept)} endpoints that diverged, failed or did not decay"
    return replace(found, warnings=(*found.warnings, left_out))


def _predictions(found: Fit, path: str, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    frame = read_table(path)
    inputs = {name: numbers(frame, column) for name, column in columns.items()}
    losses = found.predict(inputs)
    interval = found.predict_interval(inputs)
    if interval is None:
        return [{"loss": float(loss), "low": None, "high": None} for loss in losses]
    rows = zip(losses, *interval, strict=True)
    return [{"loss": float(x), "low": float(low), "high": float(high)} for x, low, high in rows]


def _readable(document: Mapping[str, Any]) -> str:
    """The JSON document as lines for a person."""
    lines = [
        document["equation"],
        f"{document['n_points']} points, "
        f"{document['objective']} {document['objective_value']:.6g}, "
        f"rms log residual {document['rms_log_residual']:.3g} "
        f"(largest {document['max_log_residual']:.3g}), "
        f"{document['share_of_starts']:.0%} of {document['starts']} starts agree",
    ]
    for name, value in document["params"].items():
        low_high = document["intervals"].get(name)
        interval = f"  [{low_high[0]:.6g}, {low_high[1]:.6g}]" if low_high else ""
        lines.append(f"  {name:<6}{value:.8g}{interval}")
    for row in document["predictions"]:
        interval = "" if row["low"] is None else f"  [{row['low']:.5f}, {row['high']:.5f}]"
        lines.append(f"  predicted loss {row['loss']:.5f}{interval}")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in document["warnings"])])


def _run(args: argparse.Namespace) -> None:
    columns = _columns(args)
    if args.plot is not None and Path(args.plot).suffix != ".png":
        raise AnalysisError(f"--plot={args.plot} does not end in .png")
    found = _fit_table(args, columns)
    predictions = _predictions(found, args.predict, columns) if args.predict else []
    document = found.to_json() | {"predictions": predictions}
    print(json.dumps(document, indent=2) if args.json else _readable(document))
    if args.plot is not None:
        from analysis import plots

        plots.save(plots.law_and_points(found), Path(args.plot).with_suffix(""))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
