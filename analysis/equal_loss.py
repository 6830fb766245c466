"""What a parameter of an arm is worth, read off the losses themselves: no law is assumed.

    python -m analysis.equal_loss results/study-cpu/grid/endpoints.csv --treatment=ternary

For each size and budget of the treatment: the size of the baseline that has the same loss after as
many tokens, between sizes that were trained. Losses are interpolated in the logarithm of tokens,
then of parameters (by monotone cubics); what would need more than was measured is left out. The
same for costs: bits of a model, picojoules a token.

Intervals (95 %) are of seed noise alone, in both arms, as the table's repeated seeds have it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from analysis.arm_pairs import COSTS, check_arms, read_arms
from analysis.command import Parser, status
from analysis.plot_option import add_plot, plot_path, write_figures
from analysis.seed_noise import seed_noise
from analysis.tables import (
    TABLES_HELP,
    AnalysisError,
    count_text,
    finished_numbers,
    require,
)

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 2000
STEPS = 100  # of the grid of sizes in which a loss is looked for, between neighbours
SHOWN = {"rho": "rho", "model_bits": "bits", "energy_pj_per_token": "energy"}  # of the columns


def equal_loss(
    frame: pd.DataFrame, baseline: str, treatment: str, *, noise: float | None = None
) -> pd.DataFrame:
    """A row a size and budget of the treatment whose loss some baseline between two sizes has.

    noise: standard deviation of a run's loss from seed to seed (nats a token); default: that of the
    table's repeated seeds.

    Columns: size, params_non_embedding, tokens, ratio (tokens a parameter), loss, rho (the
    baseline's parameters over the treatment's at equal loss and tokens), and of costs that the
    table has the treatment's over the baseline's; each with ..._low and ..._high.

    Raises:
      AnalysisError: a missing column, unknown noise, or no such row.
    """
    import pandas as pd

    require(frame, "precision", "size", "params_non_embedding", "tokens", "seed", "loss")
    check_arms(frame, baseline, treatment)
    costs = [cost for cost in COSTS if cost in frame]
    rows = finished_numbers(frame, "loss", "tokens", "params_non_embedding", *costs)
    noise = _noise(rows, (baseline, treatment)) if noise is None else noise
    cells = {arm: _cells(rows[rows["precision"] == arm], costs) for arm in (baseline, treatment)}
    rng, found = np.random.default_rng(0), []
    luck = {
        (arm, size): noise / np.sqrt(own["seeds"].max()) * rng.normal(size=DRAWS)
        for arm, table in cells.items()
        for size, own in table.groupby("size", sort=False)
    }
    for cell in cells[treatment].itertuples():
        curve = _curve(cells[baseline], cell.tokens)
        if len(curve) < 2:
            continue
        shifts = np.stack([luck[baseline, size] for size in curve["size"]], axis=1)
        losses = curve["loss"].to_numpy() + np.vstack([np.zeros(len(curve)), shifts])  # [1 + R, S]
        wanted = cell.loss + np.append(0.0, luck[treatment, cell.size])
        parameters = curve["params_non_embedding"].to_numpy(float)
        size = _where(np.log(parameters), losses, wanted)  # [1 + R], logarithms
        if not np.isfinite(size[0]):
            continue
        row = {"size": cell.size, "params_non_embedding": cell.params_non_embedding,
               "tokens": cell.tokens, "ratio": cell.tokens / cell.params_non_embedding,
               "loss": cell.loss}  # fmt: skip
        row |= _with_interval("rho", np.exp(size) / cell.params_non_embedding)
        for cost in costs:
            there = _cost_at(size, parameters, curve[cost].to_numpy(float))
            with np.errstate(divide="ignore"):
                row |= _with_interval(cost, getattr(cell, cost) / there)
        found.append(row)
    if not found:
        raise AnalysisError(f"no loss of {treatment!r} lies between those of sizes of {baseline!r}")
    return pd.DataFrame(found)


def _noise(rows: pd.DataFrame, arms: tuple[str, str]) -> float:
    """Root mean square of both arms' noise, by seeds."""
    try:
        table = seed_noise(rows[rows["precision"].isin(arms)])
    except AnalysisError as error:
        raise AnalysisError(f"{error}; give --noise") from error
    own = table[table["precision"].isin(arms)]
    return float(np.sqrt(np.mean(own["noise"] ** 2)))


def _cells(rows: pd.DataFrame, costs: Sequence[str]) -> pd.DataFrame:
    """Means over the seeds, by parameters and tokens."""
    cells = rows.groupby(["size", "params_non_embedding", "tokens"], as_index=False)
    table = cells.agg(
        loss=("loss", "mean"), seeds=("seed", "nunique"), **{c: (c, "first") for c in costs}
    )
    return table.sort_values(["params_non_embedding", "tokens"]).reset_index(drop=True)


def _curve(cells: pd.DataFrame, tokens: float) -> pd.DataFrame:
    """The loss of each size at a budget within what it was trained for, by parameters."""
    kept = []
    for _, own in cells.groupby("size", sort=False):
        counts = own["tokens"].to_numpy(float)
        if len(own) > 1 and counts[0] <= tokens <= counts[-1]:
            at = PchipInterpolator(np.log(counts), own["loss"].to_numpy())(np.log(tokens))
            kept.append(own.iloc[0].to_dict() | {"loss": float(at)})
    import pandas as pd

    return pd.DataFrame(kept)


def _where(x: np.ndarray, losses: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each curve [R, S] over x [S] first falls to the loss wanted [R]; -inf where it begins
    below it, inf where it never does."""
    between = zip(x[:-1], x[1:], strict=True)
    grid = np.unique(np.concatenate([np.linspace(low, high, STEPS) for low, high in between]))
    curves = PchipInterpolator(x, losses, axis=1)(grid)
    below = curves <= wanted[:, None]
    at = below.argmax(axis=1)
    rows, before = np.arange(len(wanted)), np.maximum(at - 1, 0)
    upper, lower = curves[rows, before], curves[rows, at]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(upper > lower, (upper - wanted) / (upper - lower), 0.0)
    found = grid[before] + share * (grid[at] - grid[before])
    found = np.where(below[:, 0], np.where(curves[:, 0] == wanted, x[0], -np.inf), found)
    return np.where(below.any(axis=1), found, np.inf)


def _cost_at(size: np.ndarray, parameters: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The baseline's cost at sizes [R], logarithms; 0 below the smallest, inf above the largest."""
    found = np.exp(np.interp(size, np.log(parameters), np.log(costs)))
    return np.where(np.isfinite(size), found, np.exp(size))


def _with_interval(name: str, values: np.ndarray) -> dict[str, float]:
    """The first of the values, and where 95 % of the others lie; inf beyond what was measured."""
    low, high = np.quantile(values[1:], [0.025, 0.975], method="nearest")
    return {name: float(values[0]), f"{name}_low": float(low), f"{name}_high": float(high)}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m analysis.equal_loss", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("files", nargs="+", metavar="TABLE", help=TABLES_HELP)
    parser.add_argument("--treatment", metavar="ARM", default="ternary")
    parser.add_argument("--baseline", metavar="ARM", help="default: fp16, bf16 or fp32")
    parser.add_argument("--noise", type=float, metavar="NATS", help="default: of repeated seeds")
    parser.add_argument("--where", metavar="EXPR", help="rows to use, as 'size == \"95k\"'")
    add_plot(parser, "draw what a parameter is worth")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _run(args: argparse.Namespace) -> None:
    if args.noise is not None and not 0 < args.noise < 1:
        raise AnalysisError(f"--noise={args.noise}: it must lie between 0 and 1 nats")
    plot = plot_path(args.plot)
    rows, baseline = read_arms(args.files, args.where, args.baseline)
    found = equal_loss(rows, baseline, args.treatment, noise=args.noise)
    if plot is not None:
        from analysis import paired_figures

        write_figures(plot, {"": lambda: paired_figures.worth(found, baseline, args.treatment)})
    if args.json:
        records: list[dict[str, Any]] = json.loads(found.to_json(orient="records"))
        print(json.dumps(records, indent=2))
        return
    shown = found[["size"]].assign(
        tokens=found["tokens"].map(count_text),
        ratio=found["ratio"].map("{:.0f}".format),
        loss=found["loss"].map("{:.3f}".format),
    )
    for column, title in SHOWN.items():
        if column in found:
            shown[title] = [_text(*v) for v in found[[column, f"{column}_low", f"{column}_high"]]
                            .itertuples(index=False)]  # fmt: skip
    print(shown.to_string(index=False))


def _text(value: float, low: float, high: float) -> str:
    ends = [f"{end:.2f}" if 0 < end < np.inf else "-" for end in (low, high)]
    return f"{value:.2f} [{', '.join(ends)}]"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
