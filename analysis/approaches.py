"""The compute-optimal split of parameters and tokens by three approaches, side by side.

    python -m analysis.approaches results/cpu-2core/quickstart/endpoints.csv \\
        --n=params_non_embedding --d=tokens --c=flops --loss=loss --where='precision == "ternary"'

The approaches are those of Hoffmann et al. 2022 (arXiv:2203.15556, section 3): the envelope of
training curves, isoFLOP profiles and a fitted law. Each says what it had to leave out, or why it
cannot say anything. With --sensitivity, so does each choice that the fitted law's numbers rest on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.command import Parser, status
from analysis.envelope import curves, envelope
from analysis.fitting import refuse_samples
from analysis.isoflop import INTERPOLANTS, Method, isoflop
from analysis.optima import LEAST_BUDGETS, Allocation, Points
from analysis.parametric import parametric
from analysis.plot_option import add_plot, plot_path, write_figures
from analysis.sensitivity import sensitivity
from analysis.tables import (
    COLUMNS,
    LOSS_HELP,
    RUN,
    AnalysisError,
    clusters_of,
    count_text,
    fitted_rows,
    labels,
    mixed_arms,
    numbers,
    points,
    read_table,
    select,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

WINDOWS = (4.0, 16.0)  # factors of size about the least loss, for the sensitivity of profiles
MOST_BUDGETS = 1000  # more lie closer than a curve is told
_SHOWN = 3  # notes of an approach, printed for a person


@dataclass(frozen=True)
class Sample:
    """Points and what is known of them: labels of clusters and of runs [P], where there are."""

    points: Points
    clusters: np.ndarray | None = None
    runs: np.ndarray | None = None

    def at_budgets(self, count: int) -> Sample:
        """The runs' curves at `count` budgets, a cluster a run: profiles where none were meant."""
        if self.runs is None:
            raise AnalysisError("profiles at budgets between the points need the runs' names")
        found, labels = curves(self.points, self.runs, count).points()
        return Sample(found, labels, labels)


def sample_of(
    frame: pd.DataFrame,
    columns: Mapping[str, str] = COLUMNS,
    loss: str = "loss",
    *,
    cluster: str | None = None,
    run: str | None = None,
) -> Sample:
    """Of a table's finished rows; all but `frame` name its columns. AnalysisError as of `points`.

    Undecayed endpoints are refused: they would bend every law.
    """
    kept = fitted_rows(frame)
    inputs, losses = points(kept, columns, loss, cluster)
    clusters, _ = clusters_of(kept, cluster)
    runs = None if run is None else labels(kept, run)
    return Sample(Points(inputs["c"], inputs["n"], inputs["d"], losses), clusters, runs)


def compare_approaches(
    sample: Sample,
    *,
    bootstrap: int = 0,
    budgets: int = 0,
    noise: float = 0.0,
    windows: Iterable[float] = (),
    seed: int = 0,
) -> list[Allocation]:
    """Every approach's power laws, and which of them the points refuse.

    Approach 2 takes the points' own budgets, or `budgets` of them from curves of the runs; `noise`
    (nats a token) makes its intervals those of noisy copies. It stands once for each interpolant,
    and again within each of `windows`. `bootstrap` resamples clusters for every other interval.
    """
    options = {"bootstrap": bootstrap, "seed": seed}

    def envelopes() -> Allocation:
        if sample.runs is None:
            raise AnalysisError("an envelope of training curves needs the runs' names")
        return envelope(sample.points, sample.runs, clusters=sample.clusters, **options)

    def profiled(method: Method) -> Allocation:
        own = sample.at_budgets(budgets) if budgets else sample
        return isoflop(own.points, method, clusters=own.clusters, **options)

    methods = [
        Method(interpolant, window, noise, bootstrap if noise else 0)
        for window in (math.inf, *windows)
        for interpolant in INTERPOLANTS
    ]
    return [
        _tried("envelope", envelopes),
        *(_tried(f"isoflop {method.name}", partial(profiled, method)) for method in methods),
        _tried(
            "parametric",
            lambda: parametric(sample.points, clusters=sample.clusters, **options),
        ),
    ]


def _tried(name: str, approach: Callable[[], Allocation]) -> Allocation:
    try:
        return approach()
    except AnalysisError as error:
        return Allocation(name, refused=str(error))


# ---- The command ---------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.approaches", description="Compute-optimal splits.")
    add = parser.add_argument
    add("file", metavar="FILE", help="a .csv or .parquet table, a row an endpoint or a step")
    add("--n", metavar="COLUMN", required=True, help="parameters")
    add("--d", metavar="COLUMN", required=True, help="training tokens")
    add("--c", metavar="COLUMN", required=True, help="training FLOPs")
    add("--loss", metavar="COLUMN", required=True, help=LOSS_HELP)
    add("--n_total", metavar="COLUMN", help="parameters by another convention, for --sensitivity")
    add("--where", metavar="EXPR", help="rows to use, as 'precision == \"fp16\"'")
    add("--cluster", metavar="COLUMN", help=f"resample its values whole; default: {RUN}, if there")
    add("--run", metavar="COLUMN", help=f"whose rows are one curve, as {RUN}; for the envelope")
    add("--budgets", type=int, default=0, metavar="N", help="profiles between the runs' points")
    add("--at", type=float, metavar="FLOPS", help="compute to split; by default the largest")
    add("--bootstrap", type=int, default=0, metavar="N", help="resamples")
    add("--noise", type=float, default=0.0, metavar="NATS", help="of a loss, for profiles")
    add("--sensitivity", action="store_true", help="and with other choices, one at a time")
    add_plot(parser, "draw N* and the isoFLOP profiles", "allocation", "profiles")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _refuse_options(args: argparse.Namespace) -> None:
    if args.at is not None and not 0 < args.at < math.inf:
        raise AnalysisError(f"--at={args.at:g}: expected a positive number of FLOPs")
    if not 0 <= args.noise < math.inf or (args.noise and not args.bootstrap):
        raise AnalysisError(
            f"--noise={args.noise:g}: expected 0 or more, and --bootstrap=N with it"
        )
    if args.budgets > MOST_BUDGETS:
        raise AnalysisError(f"--budgets={args.budgets}: {MOST_BUDGETS} are the most")
    if args.budgets and (args.budgets < LEAST_BUDGETS or args.run is None):
        raise AnalysisError(
            f"--budgets={args.budgets}: expected {LEAST_BUDGETS} or more, and --run=COLUMN with it"
        )
    if args.n_total is not None and not args.sensitivity:
        raise AnalysisError("--n_total is for --sensitivity")
    refuse_samples(args.bootstrap)


def _read(args: argparse.Namespace) -> tuple[Sample, np.ndarray | None, list[str]]:
    """The sample, parameters by the other convention, and warnings of the table."""
    frame = read_table(args.file)
    if args.where is not None:
        frame = select(frame, args.where)
    columns = {"n": args.n, "d": args.d, "c": args.c}
    sample = sample_of(frame, columns, args.loss, cluster=args.cluster, run=args.run)
    kept = fitted_rows(frame)
    warnings = clusters_of(kept, args.cluster)[1] if args.bootstrap else []
    arms = mixed_arms(kept) if args.where is None else None
    mixed = [] if arms is None else [f"{arms}: all are taken for one; choose one with --where"]
    other = None if args.n_total is None else numbers(kept, args.n_total)
    return sample, other, [*warnings, *mixed]


def _readable(document: Mapping[str, Any]) -> str:
    """The JSON document as lines for a person."""
    lines = [f"warning: {warning}" for warning in document["warnings"]]
    lines += [f"at {document['at']:.4g} FLOPs", f"{'approach':<30}{'N* ~ C^a':<28}{'N*':<10}D*"]
    for row in document["approaches"]:
        if "refused" in row:
            lines.append(f"{row['approach']:<30}refused: {row['refused']}")
        else:
            low_high = row["n"]["interval"]
            interval = "  [{:.4f}, {:.4f}]".format(*low_high) if low_high else ""
            counts = f"{count_text(row['n']['at']):<10}{count_text(row['d']['at'])}"
            exponent = f"{row['n']['exponent']:.4f}{interval}"
            beyond = "  extrapolated" if row["extrapolated"] else ""
            lines.append(f"{row['approach']:<30}{exponent:<28}{counts}{beyond}")
        lines.extend(f"  note: {note}" for note in row["notes"][:_SHOWN])
        if len(row["notes"]) > _SHOWN:
            lines.append(f"  and {len(row['notes']) - _SHOWN} more: see --json")
    if document["sensitivity"]:
        lines.append(f"{'choice':<30}{'a':<9}{'b':<9}{'E':<9}{'N*':<10}D*")
    for row in document["sensitivity"]:
        if row["refused"]:
            lines.append(f"{row['choice']:<30}refused: {row['refused']}")
        else:
            numbers = "".join(f"{row[name]:<9.4f}" for name in ("a", "b", "e"))
            counts = f"{count_text(row['n']):<10}{count_text(row['d'])}"
            lines.append(f"{row['choice']:<30}{numbers}{counts}")
        lines.extend(f"  warning: {warning}" for warning in row["warnings"])
    return "\n".join(lines)


def _run(args: argparse.Namespace) -> None:
    _refuse_options(args)
    plot = plot_path(args.plot)
    sample, other, warnings = _read(args)
    at = float(sample.points.c.max()) if args.at is None else args.at
    found = compare_approaches(
        sample,
        bootstrap=args.bootstrap,
        budgets=args.budgets,
        noise=args.noise,
        windows=WINDOWS if args.sensitivity else (),
    )
    if all(row.refused for row in found):
        raise AnalysisError(f"no approach says anything; {found[-1].approach}: {found[-1].refused}")
    choices = sensitivity(sample.points, at, n_other=other) if args.sensitivity else []
    document = {
        "n_points": int(sample.points.loss.size),
        "at": at,
        "warnings": warnings,
        "approaches": [row.to_json(at) for row in found],
        "sensitivity": [row.to_json() for row in choices],
    }
    print(json.dumps(document, indent=2) if args.json else _readable(document))
    if plot is not None:
        from analysis import figures

        def profiles() -> Figure:
            own = sample.at_budgets(args.budgets) if args.budgets else sample
            return figures.isoflop_profiles(own.points)

        drawn = {"allocation": lambda: figures.allocation(found), "profiles": profiles}
        write_figures(plot, drawn)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
