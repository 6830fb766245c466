"""Do two arms follow the same scaling law, and what is a parameter of one worth in the other's?

    python -m analysis.compare results/quickstart/endpoints.parquet \\
        --baseline=fp16 --treatment=ternary --pair=size,seed --cost=model_bits

It ends in one sentence: the verdict (the rule is in analysis/comparing.py), the multiplier of N
with its 95 % interval, and the sizes, tokens and runs that it holds for.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.command import Parser, keep_programs, status
from analysis.comparing import RELEVANT, Comparison, compare
from analysis.nested import ALLOWED
from analysis.plot_option import add_plot, plot_path, write_figures
from analysis.tables import (
    COLUMNS,
    LOSS_HELP,
    TABLES_HELP,
    AnalysisError,
    fitted_rows,
    labels,
    numbers,
    points,
    read_tables,
    refuse_undecayed,
    select,
)
from analysis.two_arms import TwoArms

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 1000
_EXTRAPOLATED = {True: "", False: "  extrapolated"}  # by whether it was measured
_EDGE = 1e-6  # relative: of a search that ended where it began


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.compare", description="Compare the laws of two arms.")
    parser.add_argument("files", nargs="+", metavar="TABLE", help=TABLES_HELP)
    parser.add_argument("--baseline", metavar="ARM", required=True, help="its parameters count one")
    parser.add_argument("--treatment", metavar="ARM", required=True, help="the arm compared to it")
    for name, text in {"n": "parameters", "d": "training tokens", "c": "training FLOPs"}.items():
        parser.add_argument(f"--{name}", metavar="COLUMN", default=COLUMNS[name], help=text)
    parser.add_argument("--loss", metavar="COLUMN", default="loss", help=LOSS_HELP)
    parser.add_argument(
        "--arm", metavar="COLUMN", default="precision", help="which arm a row is of"
    )
    parser.add_argument("--cluster", metavar="COLUMN", default="run_id", help="drawn as a whole")
    parser.add_argument(
        "--pair", metavar="COLUMNS", help="runs equal in them, as size,seed, are drawn together"
    )
    parser.add_argument("--where", metavar="EXPR", help="rows to use, as 'tokens > 1e6'")
    parser.add_argument("--objective", default="log_mse", help=f"one of {', '.join(ALLOWED)}")
    parser.add_argument("--bootstrap", type=int, default=DRAWS, metavar="N", help="draws")
    parser.add_argument(
        "--cost", metavar="COLUMN", action="append", default=[], help="a cost of a size; repeatable"
    )
    parser.add_argument(
        "--relevant",
        type=float,
        default=RELEVANT,
        metavar="SHARE",
        help=f"of the loss, that matters; default: {RELEVANT:g}",
    )
    add_plot(parser, "draw the estimates", "multiplier", "cost-ratios", "differences")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _rows(args: argparse.Namespace) -> "pd.DataFrame":
    """The rows of the two arms."""
    if args.baseline == args.treatment:
        raise AnalysisError(f"--baseline and --treatment are both {args.baseline!r}")
    frame = read_tables(args.files)
    if args.where is not None:
        frame = select(frame, args.where)
    arms = labels(frame, args.arm)
    for option, label in (("baseline", args.baseline), ("treatment", args.treatment)):
        if label not in arms:
            known = ", ".join(dict.fromkeys(arms))
            raise AnalysisError(f"--{option}={label}: column {args.arm!r} has {known}")
    frame = frame[np.isin(arms, [args.baseline, args.treatment])]
    refuse_undecayed(frame)
    return frame


def _two_arms(args: argparse.Namespace, frame: "pd.DataFrame") -> TwoArms:
    columns = {name: getattr(args, name) for name in COLUMNS}
    inputs, loss = points(frame, columns, args.loss, args.cluster)
    runs, pairs = labels(frame, args.cluster), None
    if args.pair is not None:
        named = [labels(frame, column) for column in args.pair.split(",")]
        pairs = np.array([" ".join(row) for row in zip(*named, strict=True)], object)
    return TwoArms(
        arms=(args.baseline, args.treatment),
        **inputs,
        costs={column: numbers(frame, column) for column in args.cost},
        loss=loss,
        group=(frame[args.arm].astype(str) == args.treatment).to_numpy(int),
        runs=runs,
        pairs=pairs,
    )


def _compare_table(args: argparse.Namespace) -> Comparison:
    frame = _rows(args)
    kept = fitted_rows(frame)
    found = compare(
        _two_arms(args, kept),
        objective=args.objective,
        bootstrap=args.bootstrap,
        relevant=args.relevant,
    )
    if len(kept) == len(frame):
        return found
    left_out = f"left out {len(frame) - len(kept)} endpoints that diverged or failed"
    return replace(found, warnings=(*found.warnings, left_out))


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def _interval(row: Mapping[str, Any]) -> str:
    shown = f"{_number(row['value'])}"
    if row["low"] is None and row["high"] is None:
        return shown
    return f"{shown}  [{_number(row['low'])}, {_number(row['high'])}]"


def _readable(document: Mapping[str, Any]) -> str:
    """The JSON document as lines for a person; a dash is what cannot be told."""
    lines = [f"  {'law':<14}parameters  {document['objective']:<12}AIC       AICc      BIC"]
    for step in document["ladder"]:
        criteria = "".join(f"{_number(step[name], '.1f'):<10}" for name in ("aic", "aicc", "bic"))
        size, value = step["n_parameters"], step["objective_value"]
        lines.append(f"  {step['step']:<14}{size:<12}{value:<12.4g}{criteria}")
    for test in document["tests"]:
        lines.append(
            f"  {test['larger']} against {test['smaller']}: statistic {test['statistic']:.4g}, "
            f"p {_number(test['p'], '.2g')}, after Holm {_number(test['p_holm'], '.2g')}"
        )
    if document["estimates"] is not None:
        lines += _readable_estimates(document["estimates"])
    lines += [f"refused: {reason}" for reason in document["refused"]]
    lines += [f"warning: {warning}" for warning in document["warnings"]]
    return "\n".join([*lines, document["sentence"]])


def _readable_estimates(found: Mapping[str, Any]) -> list[str]:
    lines = [f"rho {_interval(found['rho'])}"]
    for kind, text in (("rho_at", "by epm"), ("iso_loss_rho", "by equal loss")):
        for row in found[kind]:
            note = _EXTRAPOLATED[row["measured"]]
            place = f"N {row['n']:.3g}, D {row['d']:.3g}"
            lines.append(f"  rho at {place} {text} {_interval(row)}{note}")
    for name, rows in found["iso_loss_costs"].items():
        for row in rows:
            note = _EXTRAPOLATED[row["measured"]]
            lines.append(f"  {name} for equal loss {row['loss']:.4g}: x {_interval(row)}{note}")
    for name, row in found["crossovers"].items():
        shares = (
            f"; none in the observed range in {row['none_observed']:.0%} of draws, none at all in "
            f"{row['none_within_reach']:.0%}"
        )
        drawn = found["rho"]["low"] is not None
        lines.append(f"  {_crossover(name, row)}{shares if drawn else ''}")
    return lines


def _crossover(name: str, row: Mapping[str, Any]) -> str:
    """From which cost on the treatment is as good, in words that say what was not measured."""
    low, high = row["searched"]
    value, seen = row["value"], row["observed"]
    if value is None:
        return f"as good from no {name} on, up to {high:.3g}, the most that was searched"
    if value <= low * (1 + _EDGE):
        interval = "" if row["high"] is None else f", 95 % interval up to {row['high']:.4g}"
        return f"as good at every {name} from {low:.3g} on, the least that was searched{interval}"
    inside = seen is not None and seen[0] <= value <= seen[1]
    return f"as good from {name} {_interval(row)} on{_EXTRAPOLATED[inside]}"


def comparison(argv: Sequence[str]) -> Comparison:
    """What the command's arguments ask for, as a notebook takes it; AnalysisError as there."""
    keep_programs()
    return _compare_table(_parser().parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    plot = plot_path(args.plot)
    found = _compare_table(args)
    document = found.to_json()
    print(json.dumps(document, indent=2) if args.json else _readable(document))
    if plot is not None:
        from analysis import figures

        drawn = {
            "multiplier": figures.multiplier,
            "cost-ratios": figures.cost_ratios,
            "differences": figures.relative_difference,
        }
        write_figures(plot, {name: partial(draw, found) for name, draw in drawn.items()})


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
