"""Which sizes and tokens to train for a budget, so that a law's parameters become known best.

    python -m analysis.design --budget=3e14 --ladder=results/cpu-2core/ladder.csv \\
        --sizes=27k,56k,95k,160k,330k --fit=fit.json --noise=.004,.002 --out=grid.csv

`--fit` is what `python -m analysis.fit --json` printed for smaller runs. The grid is written for
`sweeps/isoflop.py:grid=grid.csv`. Beside its predicted standard errors stand those of an isoFLOP
grid of the same cost, and of one that keeps the ratio of tokens to parameters.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.command import Parser, status
from analysis.designs import (
    MOST_SEEDS,
    RATIOS,
    SAME_RATIO,
    SEEDS,
    Design,
    choose,
    isoflop,
    rows,
    same_ratio,
)
from analysis.exchange import Criterion
from analysis.information import Grid, Noise, Setting
from analysis.laws import Law, get_law
from analysis.plot_option import add_plot, plot_path, write_figures
from analysis.scores import read_json
from analysis.tables import COLUMNS, AnalysisError, count_text, labels, numbers, read_table

FLOPS = "training_flops_per_token"  # of the ladder


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.design", description="Choose a grid for a budget.")
    parser.add_argument("--budget", type=float, required=True, metavar="FLOPS", help="in all arms")
    parser.add_argument("--sizes", metavar="NAME:N,...", help="N parameters; alone, of the ladder")
    parser.add_argument(
        "--ladder",
        metavar="FILE",
        help="a table of size, params_non_embedding and, if known, training_flops_per_token",
    )
    parser.add_argument("--fit", metavar="JSON", help="what `analysis.fit --json` printed")
    parser.add_argument("--law", help="without --fit; a law of n and d, such as rho")
    parser.add_argument("--params", metavar="NAME=X,...", help="its parameters, as rho[ternary]=.5")
    parser.add_argument(
        "--baseline", metavar="GROUP", help="with --law: whose parameters count one"
    )
    parser.add_argument(
        "--noise",
        metavar="RUN,END",
        help="standard deviations of log loss: of a run, and of an endpoint within its run; "
        "default: equal shares of the fit's residuals",
    )
    parser.add_argument("--parameters", metavar="NAME,...", help="to find out; default: those of "
                        "the groups, or the exponents; of D all")  # fmt: skip
    parser.add_argument("--criterion", default="A", help="A: summed variances; D: determinant")
    parser.add_argument("--ratios", default=",".join(f"{r:g}" for r in RATIOS), metavar="R,...",
                        help="tokens a parameter")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at most, of a size")
    parser.add_argument("--decay_fraction", type=float, default=0.2, help="of an endpoint's tokens")
    parser.add_argument(
        "--flops_per_parameter_token",
        type=float,
        metavar="K",
        help="C = K N D; default: the ladder's FLOPs a token, or 6",
    )
    parser.add_argument("--out", metavar="CSV", help="write the grid, a row an endpoint")
    add_plot(parser, "draw the grid")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _floats(flag: str, text: str, count: int | None = None) -> list[float]:
    """The numbers of a flag; AnalysisError if they are none, or not `count`."""
    try:
        values = [float(item) for item in text.split(",")]
    except ValueError as error:
        raise AnalysisError(f"--{flag}={text}: expected numbers between commas") from error
    if count not in (None, len(values)):
        raise AnalysisError(f"--{flag}={text}: expected {count} numbers")
    return values


def _refuse_impossible(args: argparse.Namespace) -> None:
    positive = ("budget", "decay_fraction", "flops_per_parameter_token", "seeds")
    for flag in positive:
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise AnalysisError(f"--{flag}={getattr(args, flag):g}: it must be positive")
    if args.seeds > MOST_SEEDS:
        raise AnalysisError(f"--seeds={args.seeds}: {MOST_SEEDS} are the most")
    if args.decay_fraction > 1:
        raise AnalysisError(f"--decay_fraction={args.decay_fraction:g}: it is a share, at most 1")
    if args.out is not None and Path(args.out).suffix != ".csv":
        raise AnalysisError(f"--out={args.out} does not end in .csv")


def _ratios(args: argparse.Namespace) -> list[float]:
    ratios = sorted(set(_floats("ratios", args.ratios)))
    if not all(0 < ratio < math.inf for ratio in ratios):
        raise AnalysisError(f"--ratios={args.ratios}: they must be positive")
    return ratios


def _sizes(args: argparse.Namespace) -> dict[str, float]:
    """Parameters of each candidate size."""
    ladder = {} if args.ladder is None else _ladder(args.ladder, COLUMNS["n"])
    if args.sizes is None:
        if not ladder:
            raise AnalysisError("give --sizes=NAME:PARAMETERS,... or --ladder=FILE")
        return ladder
    sizes: dict[str, float] = {}
    for item in args.sizes.split(","):
        name, colon, count = item.partition(":")
        if colon:
            sizes[name] = _floats("sizes", count, 1)[0]
            if not 1 <= sizes[name] < math.inf:
                raise AnalysisError(f"--sizes: {item!r}: parameters are a positive number")
        elif name in ladder:
            sizes[name] = ladder[name]
        else:
            known = f"the ladder has {', '.join(ladder)}" if ladder else "write NAME:PARAMETERS"
            raise AnalysisError(f"--sizes: {item!r} has no parameters; {known}")
    return sizes


def _ladder(path: str, column: str) -> dict[str, float]:
    """A column of each size; the arms of a size agree in it."""
    frame = read_table(path)
    names, values = labels(frame, "size"), numbers(frame, column).tolist()
    found: dict[str, float] = {}
    for name, value in zip(names, values, strict=True):
        if found.setdefault(name, value) != value:
            raise AnalysisError(f"{path}: size {name!r} has {column} {found[name]:g} and {value:g}")
    return found


def _flops_per_token(args: argparse.Namespace) -> dict[str, float]:
    """Of the ladder's sizes; empty where it does not say, or the user says what a token costs."""
    if args.ladder is None or args.flops_per_parameter_token is not None:
        return {}
    known = FLOPS in read_table(args.ladder)
    return _ladder(args.ladder, FLOPS) if known else {}


def _assumed(setting: Setting, grid: Grid, ladder: str | None) -> str:
    """What a token is taken to cost, in words."""
    by_ladder = [run.size in setting.flops_per_token for run in grid]
    words = []
    if any(by_ladder):
        known = setting.flops_per_token
        ratios = [known[run.size] / (6 * run.n) for run in grid if run.size in known]
        words.append(
            f"{FLOPS} of {ladder}, {min(ratios):.3g} to {max(ratios):.3g} times 6 N, for the "
            "vocabulary and sequence length that it was made for"
        )
    if not all(by_ladder):
        words.append(
            f"{setting.flops_per_parameter_token:g} N, with neither attention nor embeddings"
        )
    return "; of other sizes ".join(words)


def _setting(args: argparse.Namespace) -> Setting:
    """The law, its parameters and the noise, of a fit or of flags."""
    if (args.fit is None) == (args.law is None or args.params is None):
        raise AnalysisError("give --fit=JSON, or --law=NAME with --params=NAME=X,...")
    noise = None if args.noise is None else Noise(*_floats("noise", args.noise, 2))
    if args.fit is not None:
        if args.baseline is not None:
            raise AnalysisError(f"--baseline={args.baseline}: the fit has its own")
        document = _read_fit(args.fit)
        law, params = _bound(document["law"], document["groups"]), document["params"]
        each = math.sqrt(document["rms_log_residual"] ** 2 / 2)
        noise = noise or Noise(each, each)
    else:
        pairs = [item.partition("=") for item in args.params.split(",")]
        params = {name: _floats("params", value, 1)[0] for name, _, value in pairs}
        groups = re.findall(r"\[([^]]+)\]", args.params)
        law = _bound(args.law, list(dict.fromkeys([args.baseline or "baseline", *groups])))
        if args.baseline is not None and not law.groups:
            raise AnalysisError(f"--baseline={args.baseline}: {law.name!r} has no groups")
        for name in params:
            if name not in law.names:
                known = ", ".join(law.names)
                raise AnalysisError(f"--params: {law.name!r} has no {name!r}; it has {known}")
    if noise is None:
        raise AnalysisError("give --noise=RUN,END, or a --fit with residuals")
    k = 6.0 if args.flops_per_parameter_token is None else args.flops_per_parameter_token
    return Setting(law, params, noise, k, args.decay_fraction, _flops_per_token(args))


def _bound(name: str, labels: Sequence[str]) -> Law:
    """The law for these groups, the baseline first, where it has any."""
    law = get_law(name)
    return law.bind(labels) if law.is_grouped else law


_FIT = {"law", "params", "groups", "rms_log_residual"}


def _read_fit(path: str) -> dict[str, Any]:
    document = read_json(path)
    if not isinstance(document, dict) or not document.keys() >= _FIT:
        raise AnalysisError(f"{path}: it is not what `python -m analysis.fit --json` prints")
    params, groups, rms = (document[name] for name in ("params", "groups", "rms_log_residual"))
    numeric = isinstance(params, dict) and all(map(_is_number, params.values()))
    named = isinstance(groups, list) and all(isinstance(label, str) for label in groups)
    if not (isinstance(document["law"], str) and numeric and named):
        raise AnalysisError(f"{path}: law, params or groups are not a fit's")
    if not _is_number(rms) or rms < 0:
        raise AnalysisError(f"{path}: rms_log_residual is {rms!r:.40}, not a number of 0 or more")
    return document


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _criterion(args: argparse.Namespace, law: Law) -> Criterion:
    """Of the parameters that --parameters names, with or without their group."""
    if args.parameters is None and args.criterion == "D":
        wanted = list(law.names)
    elif args.parameters is None:
        groups_own = [p.name for p in law.parameters if p.group]
        wanted = groups_own or [name for name in ("alpha", "beta", "b", "d") if name in law.names]
    else:
        wanted = args.parameters.split(",")
    for name in wanted:
        if name not in law.names and name not in (p.name for p in law.parameters):
            known = ", ".join(law.names)
            raise AnalysisError(f"--parameters: {law.name!r} has no {name!r}; it has {known}")
    chosen = (i for i, p in enumerate(law.parameters) if {p.name, p.full_name} & set(wanted))
    return Criterion(args.criterion, tuple(chosen))


def _document(
    args: argparse.Namespace, design: Design, others: Mapping[str, Design | None]
) -> dict:
    """What --json prints."""
    law = design.setting.law
    compared: dict[str, dict[str, Any]] = {}
    for name, other in others.items():
        if other is None:
            compared[name] = {"refused": "none of this cost lies among these sizes and ratios"}
            continue
        compared[name] = other.to_json()
        if other.refused is None:
            compared[name]["efficiency"] = design.efficiency(other)
    return {
        "law": law.name,
        "params": {name: design.setting.params[name] for name in law.names},
        "criterion": args.criterion,
        "parameters": [law.names[i] for i in design.criterion.indices],
        "noise": {"run": design.setting.noise.run, "endpoint": design.setting.noise.endpoint},
        "budget": args.budget,
        "flops_per_token": _assumed(design.setting, design.grid, args.ladder),
        **design.to_json(),
        "grid": rows(design.grid),
        "compared": compared,
    }


def _readable(document: Mapping[str, Any]) -> str:
    """The JSON document as lines for a person."""
    runs: dict[tuple[str, int], list[int]] = {}
    for row in document["grid"]:
        runs.setdefault((row["size"], row["seed"]), []).append(row["tokens"])
    lines = [f"{count_text(document['cost'])} of {count_text(document['budget'])} FLOPs"]
    for (size, seed), tokens in runs.items():
        lines.append(f"  {size:<6} seed {seed}  {' '.join(map(count_text, tokens))} tokens")
    lines.append(f"training on a token is taken to cost {document['flops_per_token']}")
    noise = document["noise"]
    lines.append(
        f"noise of log loss: {noise['run']:.3g} a run, {noise['endpoint']:.3g} an endpoint"
    )
    lines.append("standard errors of the logarithms; in brackets the least of any unbiased fit")
    lines.append(_errors("this grid", document))
    for name, other in document["compared"].items():
        if "refused" in other:
            lines.append(f"  {name}: {other['refused']}")
        else:
            lines.append(f"{_errors(name, other)}; efficiency {other['efficiency']:.2f}")
    return "\n".join(lines)


def _errors(name: str, document: Mapping[str, Any]) -> str:
    least = document["least_standard_errors"]
    errors = (f"{k} {v:.2g} ({least[k]:.2g})" for k, v in document["standard_errors"].items())
    return f"  {name}: {', '.join(errors)}"


def _run(args: argparse.Namespace) -> None:
    _refuse_impossible(args)
    plot = plot_path(args.plot)
    sizes, setting = _sizes(args), _setting(args)
    criterion = _criterion(args, setting.law)
    ratios = _ratios(args)
    design = choose(setting, sizes, args.budget, criterion, ratios=ratios, seeds=args.seeds)
    others = {
        f"{SAME_RATIO:g} tokens a parameter": same_ratio(design, sizes),
        "the best isoFLOP grid": isoflop(design, sizes, ratios=ratios, seeds=args.seeds),
    }
    document = _document(args, design, others)
    print(json.dumps(document, indent=2) if args.json else _readable(document))
    if args.out is not None:
        import pandas as pd

        pd.DataFrame(document["grid"]).to_csv(args.out, index=False)
    if plot is not None:
        from analysis import plots

        write_figures(plot, {"": lambda: plots.design_grid(design)})


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
