"""What each ingredient of a training recipe is worth, from runs that differ in one of them.

    python -m analysis.ingredients results/ingredients/endpoints.parquet --plot=figures/ingredients

A variant and its base share a seed, so initial values and data order: they are compared seed by
seed, which takes out what the seed does to both. Few seeds determine a variance badly; as the
variants' variances are alike, each is drawn towards what they have in common (Smyth 2004, "Linear
models and empirical Bayes methods for assessing differential expression", Stat. Appl. Genet. Mol.
Biol. 3:3; the R package limma). All losses are in nats a token.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy import stats
from scipy.special import digamma, polygamma

from analysis.command import Parser, status
from analysis.multiplicity import SIGNIFICANT, holm
from analysis.plot_option import add_plot, plot_path, write_figures
from analysis.style import STYLE
from analysis.tables import AnalysisError, finished, numbers, read_table, require, select

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BASE = "base"
COVERAGE = 0.95

# A variance this far below the median one is that of a change which changed next to nothing (one
# that trains to the same bits has none): it says nothing of the noise, and its logarithm would
# swamp the others'. limma's threshold, where such a variance is raised instead.
_LEAST_VARIANCE = 1e-5

# The verdict of each kind where the variant's loss is above the base's, below it, or not seen to
# be either.
_VERDICTS = {
    "without": ("helps", "hurts", "no effect seen"),
    "with": ("hurts", "helps", "no effect seen"),
    "instead": ("worse", "better", "no difference seen"),
}
_TITLES = {
    "without": "without one ingredient",
    "with": "with one ingredient more",
    "instead": "an alternative instead",
}
_VARIANT = ["tag_base", "tag_kind", "tag_change"]


class Prior(NamedTuple):
    """What the variances of paired differences have in common: Smyth's s0^2 and d0."""

    variance: float  # s0^2, (nats a token)^2
    dof: float  # d0; 0: nothing to learn from; inf: they differ no more than chance makes them


@dataclass(frozen=True)
class Comparison:
    """The effects, the bases that they are measured from and the noise that they are held against.

    effects: a row a variant, sorted by base, kind, difference; columns base, kind, factor, change,
      base_loss, difference (variant minus base, mean over pairs), low, high and half_width (of the
      95 % interval; the half-width is how small an effect could have been seen), stderr
      (moderated), dof, pairs, diverged and ended (runs), p, p_holm, verdict, weight_mse,
      base_weight_mse. NaN where fewer than two pairs finished.
    bases: a row a base; columns base, seeds (finished), diverged, loss (mean) and seed_sd (its
      standard deviation from seed to seed; NaN with one seed).
    """

    effects: pd.DataFrame
    bases: pd.DataFrame
    prior: Prior

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints: NaN is null, an infinite d0 the string "inf"."""
        dof = self.prior.dof
        return {
            "bases": _records(self.bases),
            "prior": {"s0": math.sqrt(self.prior.variance), "d0": dof if dof < math.inf else "inf"},
            "effects": _records(self.effects),
        }


def compare(frame: pd.DataFrame) -> Comparison:
    """Hold every variant of a results table against its base, seed by seed.

    Raises:
      AnalysisError: a missing column, no base rows, no variants, an unknown kind, a seed that
        appears twice in a variant, fewer than two seeds shared by any variant and its base.
    """
    import pandas as pd

    rows = _tagged(frame)
    base_rows = dict(iter(rows[rows["tag_kind"] == BASE].groupby("tag_base")))
    bases = pd.DataFrame([_base(str(name), own) for name, own in base_rows.items()])
    found = pd.DataFrame([
        _paired(key, own, base_rows[key[0]])
        for key, own in rows[rows["tag_kind"] != BASE].groupby(_VARIANT)
    ])  # fmt: skip
    if found["pairs"].max() < 2:
        raise AnalysisError("fewer than 2 seeds finished both in a variant and in its base")
    common = _add_intervals(found)
    found["verdict"] = [_verdict(row) for row in found.to_dict("records")]
    found = found.drop(columns="variance").sort_values(["base", "kind", "difference"])
    return Comparison(found.reset_index(drop=True), bases, common)


def _tagged(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that belong to a base, their tags strings (CSV has no empty string), all checked."""
    require(frame, *_VARIANT, "weight_mse", "seed", "status", "loss")
    tags = [*_VARIANT, "tag_factor"]
    frame = frame.assign(tag_factor=frame.get("tag_factor", ""))
    frame[tags] = frame[tags].astype(object).fillna("").astype(str)
    rows = frame[frame["tag_base"] != ""]
    for kind in rows["tag_kind"].unique():
        if kind not in (BASE, *_VERDICTS):
            known = ", ".join((BASE, *_VERDICTS))
            raise AnalysisError(f"unknown tag_kind {kind!r}: expected one of {known}")
    is_base = rows["tag_kind"] == BASE
    if not is_base.any():
        raise AnalysisError("no base rows: no row has the tag_kind 'base'")
    if is_base.all():
        raise AnalysisError("no variants: every row has the tag_kind 'base'")
    orphans = set(rows["tag_base"]) - set(rows.loc[is_base, "tag_base"])
    if orphans:
        raise AnalysisError(f"no base rows for the variants of {min(orphans)!r}")
    repeated = rows[rows.duplicated([*_VARIANT, "seed"])]
    if len(repeated):
        base, kind, change, seed = repeated.iloc[0][[*_VARIANT, "seed"]]
        raise AnalysisError(
            f"{' '.join(filter(None, (base, kind, change)))!r} has seed {seed} more than once: "
            "choose one size and budget with --where"
        )
    numbers(finished(rows), "loss")
    return rows


def _base(name: str, rows: pd.DataFrame) -> dict[str, Any]:
    """A row of `Comparison.bases`."""
    losses = finished(rows)["loss"]
    return {
        "base": name,
        "seeds": len(losses),
        "diverged": int((rows["status"] == "diverged").sum()),
        "loss": losses.mean(),
        "seed_sd": losses.std(ddof=1),
    }


def _paired(key: Sequence[str], rows: pd.DataFrame, base: pd.DataFrame) -> dict[str, Any]:
    """What a variant's own rows and its base's say: the difference, and its variance over seeds."""
    _check_alike(key, rows, base)
    losses, base_losses = (finished(own).set_index("seed")["loss"] for own in (rows, base))
    differences = (losses - base_losses).dropna()  # aligned by seed; a seed of one alone is NaN
    enough = len(differences) >= 2
    return {
        **dict(zip(("base", "kind", "change"), key, strict=True)),
        "factor": rows["tag_factor"].iloc[0],
        "base_loss": base_losses.mean(),
        "difference": differences.mean() if enough else math.nan,
        "variance": differences.var(ddof=1),
        "pairs": len(differences),
        "diverged": int((rows["status"] == "diverged").sum()),
        "ended": int(rows["status"].isin(["ok", "diverged"]).sum()),
        "weight_mse": _error(rows),
        "base_weight_mse": _error(base),
    }


def _error(rows: pd.DataFrame) -> float:
    """Of the rows' weight quantizer; 0 where weights are not quantized."""
    try:
        return float(rows["weight_mse"].iloc[0])
    except (TypeError, ValueError) as error:
        raise AnalysisError(f"column 'weight_mse': {error}") from error


def _check_alike(key: Sequence[str], rows: pd.DataFrame, base: pd.DataFrame) -> None:
    """A variant has its base's budget, and about its base's size."""
    for column, ratio in (("tokens", 1.0), ("params_non_embedding", 1.1)):
        if column not in rows:
            continue
        known = (finished(own).dropna(subset=[column]) for own in (rows, base))
        both = np.concatenate([numbers(own, column) for own in known])
        if len(both) and both.max() > ratio * both.min():
            raise AnalysisError(
                f"{column}: {key[2]!r} and its base {key[0]!r} differ, {both.min():g} to "
                f"{both.max():g}; choose comparable rows with --where"
            )


def _add_intervals(found: pd.DataFrame) -> Prior:
    """Add stderr, dof, interval and p-values to the variants that have a variance."""
    new = ["stderr", "dof", "half_width", "low", "high", "p", "p_holm"]
    found[new] = math.nan
    seen = found[found["pairs"] >= 2]
    difference = seen["difference"].to_numpy()
    variance, dof = seen["variance"].to_numpy(), seen["pairs"].to_numpy() - 1.0
    common = prior(variance, dof)
    stderr = np.sqrt(moderated(variance, dof, common) / (dof + 1))
    total = np.clip(most_dof(seen["base"].to_numpy(), dof), dof, dof + common.dof)
    half = stats.t.ppf((1 + COVERAGE) / 2, total) * stderr
    with np.errstate(divide="ignore", invalid="ignore"):  # without any spread t is 0 / 0 or inf
        p = 2 * stats.t.sf(np.where(difference == 0, 0.0, np.abs(difference) / stderr), total)
    columns = [stderr, total, half, difference - half, difference + half, p, holm(p)]
    found.loc[seen.index, new] = np.column_stack(columns)
    return common


def prior(variances: np.ndarray, dof: np.ndarray) -> Prior:
    """Estimate s0^2 and d0 from sample variances [V] of `dof` [V] degrees of freedom each.

    Smyth (2004), section 6.2: mean and variance of the log variances are matched to those of a
    scaled F distribution. d0 is infinite where the log variances spread no more than chi-square
    sampling makes them, and s0^2 then the pooled variance, as in limma.
    """
    dof, variances = dof[variances > 0], variances[variances > 0]
    if variances.size:
        seen = variances > _LEAST_VARIANCE * np.median(variances)
        dof, variances = dof[seen], variances[seen]
    if variances.size < 2:
        return Prior(float(variances.sum()), 0.0 if variances.size else math.inf)
    centred = np.log(variances) - digamma(dof / 2) + np.log(dof / 2)
    excess = centred.var(ddof=1) - polygamma(1, dof / 2).mean()
    if excess <= 0:
        return Prior(float(np.average(variances, weights=dof)), math.inf)
    d0 = 2 * inverse_trigamma(float(excess))
    return Prior(float(np.exp(centred.mean() + digamma(d0 / 2) - math.log(d0 / 2))), d0)


def inverse_trigamma(value: float) -> float:
    """The x > 0 whose trigamma is `value` > 0, by Newton steps (Smyth 2004, appendix)."""
    if value > 1e7 or value < 1e-6:  # the leading terms, exact there to 1e-6 relative or better
        return 1 / math.sqrt(value) if value > 1 else 1 / value
    x = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(polygamma(1, x))
        step = trigamma * (1 - trigamma / value) / float(polygamma(2, x))
        x += step
        if abs(step) < 1e-10 * x:
            break
    return x


def moderated(variances: np.ndarray, dof: np.ndarray, common: Prior) -> np.ndarray:
    """Variances [V] drawn towards s0^2, each by the weight that d0 has beside its own `dof` [V]."""
    if math.isinf(common.dof):
        return np.full_like(variances, common.variance)
    return (common.dof * common.variance + dof * variances) / (common.dof + dof)


def most_dof(bases: np.ndarray, dof: np.ndarray) -> float:
    """Degrees of freedom of all the variances pooled: no moderated variance can have more.

    limma caps at the sum of `dof` [V], as its variances are independent. Here the variants of a
    base (`bases` [V]) share its runs. If all runs are equally noisy, two of their differences
    correlate by 1/2 and two of their variances by 1/4; Satterthwaite's formula then gives
    4 V / (V + 3) times the degrees of freedom of one, 4 times at most. In simulations with three
    seeds of one base limma's cap left 95 % intervals a coverage of 93 %, this one 94 to 95 %.
    """
    shares = (dof[bases == base] for base in np.unique(bases))
    return float(sum(4 * own.sum() / (own.size + 3) for own in shares))


def _verdict(row: Mapping[str, Any]) -> str:
    """What a variant says of its ingredient, in words."""
    if row["diverged"]:
        return f"diverged {row['diverged']} of {row['ended']}"
    if math.isnan(row["p_holm"]):
        return "too few pairs"
    raises, lowers, neither = _VERDICTS[row["kind"]]
    if row["p_holm"] >= SIGNIFICANT:
        return neither
    return raises if row["difference"] > 0 else lowers


# Okabe and Ito's colours and a marker for each verdict, told apart without colour too.
_GOOD, _BAD, _NEITHER, _DIVERGED = range(4)
_MARKS = (
    ("#0072B2", "o", "the ingredient helps, the alternative is better"),
    ("#D55E00", "s", "the ingredient hurts, the alternative is worse"),
    ("#777777", "D", "no effect or difference seen"),
    ("#000000", "X", "some runs diverged"),
)
_KIND_MARKS = {"instead": ("#0072B2", "o"), "without": ("#D55E00", "s"), "with": ("#009E73", "^")}
_LEADER = {
    "arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 4,
}  # fmt: skip
_ROW = 0.19  # inches a variant
_FAR = 4.0  # times the upper quartile: an effect that would squeeze the others is cut off


def _mark(verdict: str) -> int:
    if verdict.startswith("diverged"):
        return _DIVERGED
    if verdict in ("helps", "better"):
        return _GOOD
    return _BAD if verdict in ("hurts", "worse") else _NEITHER


def plot_effects(effects: pd.DataFrame) -> Figure:
    """Differences with 95 % intervals, a column a base, a panel a kind, sorted by difference.

    An effect far beyond the others is an arrow at the edge. All stand as numbers at the right,
    where a variant of which runs diverged says so.
    """
    columns = [
        [_downwards(own[own["kind"] == kind]) for kind in _TITLES if (own["kind"] == kind).any()]
        for _, own in effects.groupby("base", sort=False)
    ]
    height = max(sum(_ROW * len(own) + 0.5 for own in column) for column in columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2 * len(columns), height + 0.9), layout="constrained")
        body, foot = figure.subfigures(2, 1, height_ratios=(height + 0.4, 0.5))
        parts = body.subfigures(1, len(columns), squeeze=False)[0]
        for part, column in zip(parts, columns, strict=True):
            ratios = [len(own) + 0.6 for own in column]
            panels = part.subplots(len(column), 1, sharex=True, squeeze=False, height_ratios=ratios)
            limits = _limits(effects[effects["base"] == column[0]["base"].iloc[0]])
            for axes, own in zip(panels[:, 0], column, strict=True):
                _draw_forest(axes, own, limits)
            panels[-1, 0].set_xlabel("held-out loss minus the base's (nats per token)")
        used = sorted({_mark(verdict) for verdict in effects["verdict"]})
        foot.legend(handles=[_handle(*_MARKS[i]) for i in used], loc="center", ncols=2)
    return figure


def _downwards(rows: pd.DataFrame) -> pd.DataFrame:
    """In the order of a panel, which is drawn from below: the least difference comes out on top."""
    return rows.sort_values("difference", ascending=False, na_position="first")


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Limits of x [nats a token] that hold zero and all intervals but those far out."""
    reach = np.maximum(rows["low"].abs(), rows["high"].abs())
    near = rows[reach <= _FAR * reach.quantile(0.75)]
    if near.empty:
        return -1.0, 1.0
    low, high = min(near["low"].min(), 0.0), max(near["high"].max(), 0.0)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _draw_forest(axes: Axes, rows: pd.DataFrame, limits: tuple[float, float]) -> None:
    """A panel of `plot_effects`: a line a variant, its number at the right."""
    base, kind = rows[["base", "kind"]].iloc[0]
    axes.axvline(0, color="#555555", linewidth=1, zorder=1)
    for y, row in enumerate(rows.to_dict("records")):
        if math.isnan(row["difference"]):
            continue
        colour, marker, _ = _MARKS[_mark(row["verdict"])]
        difference, error = row["difference"], row["half_width"]
        if not limits[0] <= difference <= limits[1]:
            marker, error = (">" if difference > 0 else "<"), None
            difference = limits[difference > 0]
        axes.errorbar(
            difference, y, xerr=error, color=colour, marker=marker,
            markersize=4, elinewidth=1.5, clip_on=error is not None, zorder=3,
        )  # fmt: skip
    axes.set_xlim(limits)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_yticks(range(len(rows)), rows["change"], fontsize=8.5)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_title(f"{base}: {_TITLES[kind]}", fontsize=10.5, loc="left")
    beside = axes.secondary_yaxis("right")
    texts = [_beside(row) for row in rows.to_dict("records")]
    beside.set_yticks(range(len(rows)), texts, fontsize=8)
    beside.tick_params(length=0)
    beside.spines["right"].set_visible(False)


def _beside(row: Mapping[str, Any]) -> str:
    """A variant's number at the right of its line, and whether runs of it diverged."""
    if math.isnan(row["difference"]):
        return str(row["verdict"])
    number = f"{row['difference']:+.4f} ± {row['half_width']:.4f}".replace("-", "\N{MINUS SIGN}")
    return f"{number}, {row['verdict']}" if row["diverged"] else number


def _handle(colour: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], linestyle="none", marker=marker, color=colour, label=label)


def weight_variants(effects: pd.DataFrame) -> pd.DataFrame:
    """The variants with a difference whose weights are quantized otherwise than their base's."""
    other = ~np.isclose(effects["weight_mse"], effects["base_weight_mse"], rtol=1e-9, atol=0)
    named = (effects["kind"] == "instead") & (effects["factor"] == "weights")
    measured = effects[["difference", "weight_mse"]].notna().all(axis=1)
    return effects[measured & (other | named)]


def plot_prediction(effects: pd.DataFrame) -> Figure:
    """Whether the weight quantizer's error foretells the loss: a panel a base, a point a variant.

    Raises:
      AnalysisError: no variant differs from its base in its weights.
    """
    chosen = weight_variants(effects)
    if chosen.empty:
        raise AnalysisError("no variant differs from its base in its weights' quantizer")
    panels_of = list(chosen.groupby("base", sort=False))
    height = max(4.6, 0.16 * max(len(own) for _, own in panels_of) + 1.4)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6 * len(panels_of), height), layout="constrained")
        panels = figure.subplots(1, len(panels_of), squeeze=False)[0]
        for axes, (base, own) in zip(panels, panels_of, strict=True):
            _draw_prediction(axes, own)
            axes.set_title(f"{base}: {_correlation(own)}", fontsize=10.5)
            axes.set_xlabel("weight quantizer's mean squared error\n(standard normal weights)")
        panels[0].set_ylabel("held-out loss minus the base's (nats per token)")
        handles = [_handle(*_KIND_MARKS[kind], kind) for kind in chosen["kind"].unique()]
        handles.append(Line2D([], [], color="#555555", linestyle=":", label="the base"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _correlation(rows: pd.DataFrame) -> str:
    """Spearman's rank correlation of quantizer error and loss difference, and of how many."""
    n = len(rows)
    if n < 3 or rows["weight_mse"].nunique() < 2:
        return f"too few errors for a correlation (n = {n})"
    rho = stats.spearmanr(rows["weight_mse"], rows["difference"]).statistic
    return f"Spearman {rho:.2f} (n = {n})"


def _draw_prediction(axes: Axes, rows: pd.DataFrame) -> None:
    """A panel of `plot_prediction`; a variant of which runs diverged is hollow."""
    axes.axhline(0, color="#555555", linestyle=":", linewidth=1, zorder=1)
    axes.axvline(
        rows["base_weight_mse"].iloc[0], color="#555555", linestyle=":", linewidth=1, zorder=1
    )
    for row in rows.to_dict("records"):
        colour, marker = _KIND_MARKS[row["kind"]]
        axes.errorbar(
            row["weight_mse"], row["difference"], yerr=row["half_width"], color=colour,
            marker=marker, markersize=5.5, elinewidth=1.2, zorder=3,
            markerfacecolor="white" if row["diverged"] else colour,
        )  # fmt: skip
    axes.margins(x=0.08)
    _label_aside(axes, rows)


def _label_aside(axes: Axes, rows: pd.DataFrame) -> None:
    """Names in a column right of the panel, each joined to its point: no two can overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    rows = rows.sort_values("difference")
    places = spread((rows["difference"].to_numpy() - low) / (high - low), 1 / max(24, len(rows)))
    for place, row in zip(places, rows.to_dict("records"), strict=True):
        axes.annotate(
            row["change"],
            (row["weight_mse"], row["difference"]),
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops=_LEADER,
        )


def spread(places: np.ndarray, gap: float) -> np.ndarray:
    """Ascending places in 0..1, moved apart until `gap` lies between any two that fit."""
    moved = places.copy()
    for i in range(1, moved.size):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(moved.size)):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved


def readable(found: Comparison) -> str:
    """The comparison as lines for a person: the noise floor, then a line a variant."""
    import pandas as pd

    noise = [
        f"{row['base']}: loss {row['loss']:.4f} nats a token, seed-to-seed standard deviation "
        f"{row['seed_sd']:.4f} over {row['seeds']} seeds"
        + (f", {row['diverged']} diverged" if row["diverged"] else "")
        for row in found.bases.to_dict("records")
    ]
    s0, d0 = math.sqrt(found.prior.variance), found.prior.dof
    rows = found.effects
    tested = rows.dropna(subset="p_holm")
    table = pd.DataFrame({
        "base": rows["base"], "kind": rows["kind"], "change": rows["change"],
        "base loss": rows["base_loss"].map("{:.4f}".format),
        "difference": _written(rows, "{difference:+.4f}"),
        "95 % interval": _written(rows, "[{low:+.4f}, {high:+.4f}]"),
        "half-width": _written(rows, "±{half_width:.4f}"),
        "p (Holm)": _written(rows, "{p_holm:.2g}"),
        "pairs": rows["pairs"],
        "verdict": rows["verdict"],
    })  # fmt: skip
    return "\n".join([
        *noise,
        f"paired differences: standard deviation s0 {s0:.4f} from seed to seed, d0 {d0:.3g} "
        "degrees of freedom",
        "the differences of one base share its runs, so their errors move together",
        "an effect below the half-width of its interval would hardly be seen, nor, adjusted "
        f"for all {len(tested)} tested, one below about {_least_seen(tested):.4f}",
        "",
        *_aligned(table),
    ])  # fmt: skip


def _least_seen(tested: pd.DataFrame) -> float:
    """The difference at which a median variant passes the first, strictest step of Holm's."""
    level = 1 - SIGNIFICANT / len(tested) / 2
    return float((stats.t.ppf(level, tested["dof"]) * tested["stderr"]).median())


def _written(rows: pd.DataFrame, form: str) -> list[str]:
    """A cell a row, '-' where there is no difference."""
    records = rows.to_dict("records")
    return ["-" if math.isnan(row["difference"]) else form.format(**row) for row in records]


def _aligned(table: pd.DataFrame) -> Iterator[str]:
    """Lines of a table: words flush left, numbers flush right."""
    words = {"base", "kind", "change", "verdict"}
    cells = [list(table.columns), *(list(map(str, row)) for row in table.to_numpy())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (
            cell.ljust(width) if name in words else cell.rjust(width)
            for cell, width, name in zip(line, widths, table.columns, strict=True)
        )
        yield "  ".join(padded).rstrip()


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON takes them."""
    return [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in frame.to_dict("records")
    ]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis.ingredients", description="Worth of ingredients.")
    parser.add_argument("file", metavar="TABLE", help="a results table, Parquet or CSV")
    parser.add_argument("--where", metavar="EXPR", help="rows to use, as 'size == \"95k\"'")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_plot(parser, "draw them", "effects", "errors")
    parser.add_argument("--csv", metavar="FILE", help="write the effects as CSV")
    return parser


def _run(args: argparse.Namespace) -> None:
    frame = read_table(args.file)
    plot = plot_path(args.plot)
    found = compare(frame if args.where is None else select(frame, args.where))
    if args.csv is not None:
        found.effects.to_csv(args.csv, index=False)
    if plot is not None:
        figures = {"effects": lambda: plot_effects(found.effects)}
        if len(weight_variants(found.effects)):
            figures["errors"] = lambda: plot_prediction(found.effects)
        write_figures(plot, figures)
    print(json.dumps(found.to_json(), indent=2) if args.json else readable(found))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, or 2 for what the user can mend."""
    return status(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
