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
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from analysis.command import Parser, status
from analysis.fitting import Fit, fit
from analysis.laws import LAWS, get_law
from analysis.plot_option import add_plot, plot_path, write_figures
from analysis.solver import OBJECTIVES
from analysis.tables import (
    LOSS_HELP,
    RUN,
    TABLES_HELP,
    AnalysisError,
    clusters_of,
    fitted_rows,
    mixed_arms,
    plausible_inputs,
    points,
    read_table,
    read_tables,
    select,
)

if TYPE_CHECKING:
    import pandas as pd

_INPUTS = {
    "n": "parameters",
    "d": "training tokens",
    "c": "training FLOPs",
    "u": "unique training tokens",
    "weight_bits": "bits a weight",
    "activation_bits": "bits an activation",
    "group_size": "weights that share a scale; 1 where nothing is quantized",
    "gmse": "mean squared error of the weights' grid on a unit Gaussian; 0 without a grid",
    "group": "arm, for laws with parameters for each",
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.fit", description="Fit a scaling law to a table.")
    parser.add_argument("files", nargs="+", metavar="TABLE", help=TABLES_HELP)
    parser.add_argument("--law", default="chinchilla", help=f"one of {', '.join(LAWS)}")
    for name, text in _INPUTS.items():
        parser.add_argument(f"--{name}", metavar="COLUMN", help=text)
    parser.add_argument("--baseline", metavar="GROUP", help="the group that others are worth in")
    parser.add_argument("--loss", metavar="COLUMN", required=True, help=LOSS_HELP)
    parser.add_argument("--where", metavar="EXPR", help="rows to use, as 'precision == \"fp16\"'")
    parser.add_argument("--objective", default="huber", help=f"one of {', '.join(OBJECTIVES)}")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N", help="resamples")
    parser.add_argument(
        "--cluster", metavar="COLUMN", help=f"resample its values whole; default: {RUN}, if there"
    )
    parser.add_argument("--predict", metavar="FILE", help="a table of inputs to predict at")
    add_plot(parser, "draw the points and the law")
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
    frame = read_tables(args.files)
    if args.where is not None:
        frame = select(frame, args.where)
    kept = fitted_rows(frame)
    inputs, loss = points(kept, columns, args.loss, args.cluster)
    clusters, warnings = clusters_of(kept, args.cluster)
    found = fit(
        args.law,
        inputs,
        loss,
        objective=args.objective,
        bootstrap=args.bootstrap,
        clusters=clusters,
        baseline=args.baseline,
    )
    warnings = (*warnings, *_doubts_of_arms(args, kept, found))
    if len(kept) < len(frame):
        count = len(frame) - len(kept)
        warnings += (f"left out {count} endpoints that diverged, failed or did not decay",)
    return replace(found, warnings=(*found.warnings, *warnings))


def _doubts_of_arms(args: argparse.Namespace, kept: "pd.DataFrame", found: Fit) -> tuple[str, ...]:
    """A warning of arms under one law; AnalysisError where they leave its parameters arbitrary."""
    arms = mixed_arms(kept) if args.where is None and args.group is None else None
    if arms is None:
        return ()
    if found.undetermined:
        raise AnalysisError(
            f"{arms}: one law of all of them is arbitrary ({', '.join(found.undetermined)} are not "
            "determined); choose one arm with --where, or a law of arms with --group"
        )
    return (
        f"{arms}: one law is fitted to all of them; choose one arm with --where, or a law of arms "
        "with --group",
    )


def _predictions(
    found: Fit, path: str, columns: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row a prediction, and warnings of those beyond the fitted range."""
    inputs = found.encoded(plausible_inputs(read_table(path), columns))
    beyond = [f"predictions: {warning}" for warning in found.beyond(inputs)]
    losses = found.predict(inputs)
    interval = found.predict_interval(inputs)
    if interval is None:
        return [{"loss": float(loss), "low": None, "high": None} for loss in losses], beyond
    rows = zip(losses, *interval, strict=True)
    return [
        {"loss": float(x), "low": float(low), "high": float(high)} for x, low, high in rows
    ], beyond


def _readable(document: Mapping[str, Any]) -> str:
    """The JSON document as lines for a person."""
    lines = [
        document["equation"],
        f"{document['n_points']} points, "
        f"{document['objective']} {document['objective_value']:.6g}, "
        f"rms log residual {document['rms_log_residual']:.3g} "
        f"(largest {document['max_log_residual']:.3g}), "
        f"{document['share_of_starts']:.0%} of {document['starts']} starts agree, "
        f"gradient {document['gradient']:.1g}",
    ]
    width = max(map(len, document["params"]))
    for name, value in document["params"].items():
        error = document["standard_errors"].get(name)
        low_high = document["intervals"].get(name)
        lines.append(
            f"  {name:<{width}}  {value:<14.8g}"
            + ("" if error is None else f"  se {error:<10.3g}")
            + (f"  95 % [{low_high[0]:.6g}, {low_high[1]:.6g}]" if low_high else "")
        )
    lines += _held_out_lines(document["held_out"])
    for row in document["predictions"]:
        interval = "" if row["low"] is None else f"  [{row['low']:.5f}, {row['high']:.5f}]"
        lines.append(f"  predicted loss {row['loss']:.5f}{interval}")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in document["warnings"])])


def _held_out_lines(held_out: Mapping[str, Any] | None) -> list[str]:
    if held_out is None:
        return []
    without = f"without the largest {held_out['of']}"
    if "refused" in held_out:
        return [f"{without}: {held_out['refused']}"]
    return [
        f"fitted {without}, it predicts those {held_out['points']} within "
        f"{held_out['mean_relative_error']:.2%} on average, "
        f"{held_out['max_relative_error']:.2%} at worst"
    ]


def _run(args: argparse.Namespace) -> None:
    columns, plot = _columns(args), plot_path(args.plot)
    found = _fit_table(args, columns)
    document = found.to_json() | {"predictions": []}
    if args.predict is not None:
        document["predictions"], beyond = _predictions(found, args.predict, columns)
        document["warnings"] += beyond
    print(json.dumps(document, indent=2) if args.json else _readable(document))
    if plot is not None:
        from analysis import plots

        write_figures(plot, {"": lambda: plots.law_and_points(found)})


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
