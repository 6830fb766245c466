"""Predict the losses of planned runs before they are trained, and score them afterwards.

    python -m analysis.predict endpoints.parquet --planned=grid.csv --law=chinchilla \\
        --n=params_non_embedding --d=tokens --loss=loss --by=precision --cluster=run_id
    python -m analysis.predict --score=predictions-2026-01-31.json results.parquet

The first writes a dated file, which is never overwritten: commit it before the runs begin. It holds
the fit and 95 % intervals for new runs. The second says how far off they were.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.command import Parser, status
from analysis.fitting import Fit
from analysis.laws import LAWS, get_law
from analysis.plot_option import add_plot, plot_path, write_figures
from analysis.predictions import Request, fingerprints, fit_table, predict_table, sha256
from analysis.scores import carried, read_predictions, score
from analysis.solver import OBJECTIVES
from analysis.tables import LOSS_HELP, AnalysisError, finished, mixed_arms, read_table, select

if TYPE_CHECKING:
    import pandas as pd

_INPUTS = tuple(dict.fromkeys(name for law in LAWS.values() for name in law.inputs))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.predict", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="what is known; with --score, the results")
    parser.add_argument("--planned", metavar="FILE", help="a table of the runs to predict")
    parser.add_argument("--law", default="chinchilla", help=f"one of {', '.join(LAWS)}")
    for name in _INPUTS:
        parser.add_argument(f"--{name}", metavar="COLUMN", help="of the law: see analysis.fit")
    parser.add_argument("--baseline", metavar="GROUP", help="the group that others are worth in")
    parser.add_argument("--loss", metavar="COLUMN", help=LOSS_HELP)
    parser.add_argument("--where", metavar="EXPR", help="rows of FILE to use")
    parser.add_argument("--by", metavar="COLUMN", help="a fit for each value, as of precision")
    parser.add_argument(
        "--cluster", metavar="COLUMN", help="drawn whole; default: run_id, if there"
    )
    parser.add_argument("--objective", default="huber", help=f"one of {', '.join(OBJECTIVES)}")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="0: no intervals")
    parser.add_argument("--out", metavar="PATH", help="a .json file, or the folder for it")
    parser.add_argument("--date", help="YYYY-MM-DD, of the file's name; today")
    parser.add_argument("--score", metavar="JSON", help="compare these predictions with FILE")
    parser.add_argument("--match", metavar="COLUMN,...", help="with --score: what names a run")
    add_plot(parser, "with --score: draw them")
    parser.add_argument("--json", action="store_true", help="with --score: print JSON")
    return parser


def _request(args: argparse.Namespace) -> Request:
    columns = {name: getattr(args, name) for name in get_law(args.law).inputs}
    for name, column in {"planned": args.planned, **columns, "loss": args.loss}.items():
        if column is None:
            raise AnalysisError(f"--law={args.law} needs --{name}")
    return Request(
        args.law,
        columns,
        args.loss,
        args.objective,
        args.bootstrap,
        args.baseline,
        args.cluster,
        args.by,
    )


def _day(args: argparse.Namespace) -> date:
    try:
        return date.today() if args.date is None else date.fromisoformat(args.date)
    except ValueError as error:
        raise AnalysisError(f"--date={args.date}: expected YYYY-MM-DD") from error


def _path(args: argparse.Namespace) -> Path:
    """The file to write, which is not yet there."""
    day = _day(args)
    out = Path(args.out or ".")
    path = out if out.suffix == ".json" else out / f"predictions-{day.isoformat()}.json"
    if path.exists():
        raise AnalysisError(f"{path} is there already; a prediction is never overwritten")
    return path


def _write(path: Path, document: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x") as file:  # not even one that appeared since
            file.write(json.dumps(document, indent=2, default=str) + "\n")
    except OSError as error:
        raise AnalysisError(f"--out={path}: cannot be written ({error.strerror})") from error


def _predict(args: argparse.Namespace, argv: Sequence[str]) -> None:
    for name in ("plot", "match", "json"):
        if getattr(args, name):
            raise AnalysisError(f"--{name} goes with --score, of predictions that are made already")
    request, path = _request(args), _path(args)
    frame = read_table(args.file)
    if args.where is not None:
        frame = select(frame, args.where)
    fits = fit_table(frame, request)
    rows, warnings = predict_table(fits, read_table(args.planned), request)
    if args.where is None and args.group is None and args.by is None:
        warnings += _doubts_of_arms(finished(frame), fits[""])
    document = {
        "command": shlex.join(["python", "-m", "analysis.predict", *argv]),
        "date": args.date or date.today().isoformat(),
        "table": args.file,
        "sha256": sha256(args.file),
        "columns": dict(request.columns),
        "loss": request.loss,
        "by": request.by,
        "fits": {label: found.to_json() for label, found in fits.items()},
        "fitted_rows": fingerprints(finished(frame), request.columns, request.loss),
        "planned": rows,
        "warnings": warnings,
    }
    _write(path, document)
    print(_readable(document))
    print(f"wrote {path}")


def _doubts_of_arms(kept: "pd.DataFrame", found: Fit) -> list[str]:
    """A warning of arms under one law; AnalysisError where they leave its parameters arbitrary."""
    arms = mixed_arms(kept)
    if arms is None:
        return []
    choose = "choose one arm with --where, or a law of each with --by"
    if found.undetermined:
        raise AnalysisError(f"{arms}: one law of all of them is arbitrary; {choose}")
    return [f"{arms}: one law is fitted to all of them; {choose}"]


def _readable(document: Mapping[str, Any]) -> str:
    lines = [f"warning: {warning}" for warning in document["warnings"]]
    for label, found in document["fits"].items():
        lines.append(f"{label}: {found['equation']}" if label else found["equation"])
        lines += [f"warning: {warning}" for warning in found["warnings"]]
    for row in document["planned"]:
        lines.append(f"  {carried(row)}: {row['predicted']:.5f}{_interval(row)}")
    return "\n".join(lines)


def _interval(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f" [{row['low']:.5f}, {row['high']:.5f}]"


def _score(args: argparse.Namespace) -> None:
    plot = plot_path(args.plot)
    if args.out is not None and Path(args.out).exists():
        raise AnalysisError(f"{args.out} is there already")
    results = read_table(args.file)
    if args.where is not None:
        results = select(results, args.where)
    document = read_predictions(args.score)
    match = None if args.match is None else args.match.split(",")
    found = score(
        document, results, match=match, same_table=sha256(args.file) == document["sha256"]
    )
    if args.out is not None:
        _write(Path(args.out), found.to_json())
    print(json.dumps(found.to_json(), indent=2) if args.json else found.readable())
    if plot is not None:
        from analysis import plots

        write_figures(plot, {"": lambda: plots.predicted_and_measured(found.rows)})


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    _day(args)
    if args.score is not None:
        _score(args)
    else:
        _predict(args, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
