"""Figures of compute-optimal splits and of two arms compared; `plots.save` writes them.

Every function returns a matplotlib Figure, in the style and the colours of analysis/style.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.estimates import Difference, Estimate
from analysis.isoflop import INTERPOLANTS, Method, Profile, profiles
from analysis.optima import Allocation, Points, PowerLaw
from analysis.style import (
    COLOURS,
    COUNT_COLOURS,
    DASHES,
    GREY,
    MARKERS,
    STYLE,
    arm_name,
    count_axis,
    count_bar,
    count_norm,
    handle,
)
from analysis.tables import AnalysisError, count_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.comparing import Comparison, Estimates

_BEYOND = 1e30  # drawn for an end of an interval that is infinite: far outside any axis
_DODGE = 1.06  # factor of N between points that would otherwise lie on one vertical
_BESIDE = 1.12  # factor of N from the line of a narrow panel to the points beside it
_BUDGETS = 8  # up to as many are written out beside their colours
_FAR = 10.0  # factor beyond all values, to which intervals widen an axis at most
_NOTE = 95  # letters of a line beneath a figure


# ---- Compute-optimal splits ----------------------------------------------------------------------


def isoflop_profiles(points: Points, method: Method | None = None) -> Figure:
    """Loss against parameters, a colour a budget, with the interpolant and its optimum.

    A budget that has no optimum is dashed. AnalysisError if none has sizes enough for a profile.
    """
    method = method or Method()
    found, least = profiles(points, method), INTERPOLANTS[method.interpolant][1]
    if all(len(profile.points.n) < least for profile in found):
        raise AnalysisError(f"no budget has the {least} sizes that {method.name} takes")
    norm = count_norm([profile.compute for profile in found])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 4.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        for profile in found:
            _draw_profile(axes, profile, method, COUNT_COLOURS(norm(profile.compute)))
        count_axis(axes.xaxis)
        axes.set_xlabel("parameters")
        axes.set_ylabel("loss (nats per token)")
        scale = ScalarMappable(norm, COUNT_COLOURS)
        bar = figure.colorbar(scale, ax=axes, label="training compute (FLOPs)", pad=0.02)
        if len(found) <= _BUDGETS:
            bar.set_ticks([profile.compute for profile in found])
            bar.set_ticklabels([f"{profile.compute:.3g}".replace("+", "") for profile in found])
            bar.minorticks_off()
        handles = [
            handle(f"{method.name} through a budget's sizes"),
            handle("its optimum", marker="*", markersize=12, linestyle="none"),
        ]
        if any(profile.refused for profile in found):
            handles.append(handle("a budget without an optimum", linestyle=DASHES))
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _draw_profile(axes: Axes, profile: Profile, method: Method, colour: Any) -> None:
    own = profile.points
    interpolate, least = INTERPOLANTS[method.interpolant]
    n, loss = own.n, own.loss
    if len(n) >= least:
        n = np.geomspace(own.n[0], own.n[-1], 200)
        loss = interpolate(np.log(own.n), own.loss[:, None], np.log(n))[:, 0]
    line = DASHES if profile.refused else "-"
    axes.plot(n, loss, color=colour, linestyle=line, linewidth=1.5, zorder=2)
    axes.plot(
        own.n,
        own.loss,
        color=colour,
        linestyle="none",
        marker="o",
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=3,
    )
    if not profile.refused:
        axes.plot(
            profile.n,
            profile.loss,
            color=colour,
            marker="*",
            markersize=13,
            markeredgecolor="black",
            markeredgewidth=0.7,
            zorder=4,
        )


def allocation(rows: Sequence[Allocation]) -> Figure:
    """Compute-optimal parameters against compute by several approaches, with 95 % bands.

    Each is drawn over the compute that it rests on; one that is refused is named in the legend.
    Beneath, all of them over the last, as their lines often lie on one another. AnalysisError if
    all are refused.
    """
    laws = {row.approach: row.n for row in rows if row.n is not None}
    if not laws:
        reasons = "; ".join(f"{row.approach}: {row.refused}" for row in rows)
        raise AnalysisError(f"no approach has an allocation to draw ({reasons})")
    last = list(laws)[-1]
    with matplotlib.rc_context(STYLE):
        alone = len(laws) == 1
        figure = Figure(figsize=(7.4, 3.6 if alone else 5.4), layout="constrained")
        ratios = (1,) if alone else (3, 2)
        panels = figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios)
        axes = panels[0, 0]
        _draw_power_laws(axes, laws)
        count_axis(axes.yaxis)
        axes.set_ylabel("compute-optimal\nparameters")
        if not alone:
            _draw_power_laws(panels[1, 0], laws, over=last)
            _ratio_ticks(panels[1, 0])
            panels[1, 0].set_ylabel(f"over those of\n{last}")
        panels[-1, 0].set_xlabel("training compute (FLOPs)")
        handles = axes.get_legend_handles_labels()[0]
        refused = (row.approach for row in rows if row.n is None)
        handles += [handle(f"{name}: refused", linestyle="none") for name in refused]
        figure.legend(handles=handles, loc="outside right upper")
    return figure


def _draw_power_laws(axes: Axes, laws: Mapping[str, PowerLaw], over: str | None = None) -> None:
    """With a marker at both ends, so that lines on one another are told apart."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for i, (name, law) in enumerate(laws.items()):
        compute, colour = np.geomspace(*law.observed, 50), COLOURS[i % len(COLOURS)]
        unit = np.array([1.0 if over is None else laws[over].at(c) for c in compute])
        axes.plot(
            compute,
            np.array([law.at(c) for c in compute]) / unit,
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            markevery=[0, -1],
            linestyle="-" if i < len(COLOURS) else DASHES,
            linewidth=1.6,
            label=f"{name}: C^{law.exponent:.3f}",
        )
        bands = [band for c in compute if (band := law.interval_at(c)) is not None]
        if bands:
            ends = np.transpose(bands) / unit
            axes.fill_between(compute, *ends, color=colour, alpha=0.15, linewidth=0)


# ---- Two arms ------------------------------------------------------------------------------------


def multiplier(comparison: Comparison) -> Figure:
    """What a parameter of the treatment is worth, against parameters, a panel a number of tokens.

    The line with its band is of the law `epm`, in which the multiplier moves with N and D; the
    points, a little beside their N, are of laws that share nothing, at equal loss. Bars and band
    are 95 % intervals.
    """
    found = _estimates(comparison)
    panels: dict[float, list[tuple[float, Estimate, Estimate]]] = defaultdict(list)
    for (n, d, moving), (_, _, separate) in zip(found.rho_at, found.iso_loss_rho, strict=True):
        panels[d].append((n, moving, separate))
    both = [x for _, _, x in (*found.rho_at, *found.iso_loss_rho)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.9), layout="constrained")
        drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (d, rows) in zip(drawn, panels.items(), strict=True):
            sizes = np.array([row[0] for row in rows])
            axes.set_xscale("log")
            axes.set_yscale("log")
            _draw_moving(axes, sizes, [row[1] for row in rows])
            apart = [row[2] for row in rows]
            _draw_points(
                axes, sizes * _BESIDE, apart, COLOURS[1], "D", label="laws that share nothing"
            )
            axes.axhline(1, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
            axes.set_xlim(sizes.min() / 1.5, sizes.max() * 1.5)
            count_axis(axes.xaxis, room=0.5)
            axes.set_title(f"{count_text(d)} tokens", fontsize=10)
            axes.set_xlabel("parameters")
        _ratio_axis(drawn[0], both)
        baseline, treatment = map(arm_name, comparison.arms.arms)
        drawn[0].set_ylabel(f"{baseline} parameters\nthat one of {treatment} is worth")
        handles = drawn[0].get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
        _note(figure, comparison, both)
    return figure


def _draw_moving(axes: Axes, n: np.ndarray, rows: Sequence[Estimate]) -> None:
    axes.plot(
        n,
        [row.value for row in rows],
        color=COLOURS[0],
        marker="o",
        markersize=4,
        linewidth=1.8,
        label="multiplier that moves (epm)",
        zorder=3,
    )
    if all(math.isfinite(end) for row in rows for end in (row.low, row.high)):
        ends = [row.low for row in rows], [row.high for row in rows]
        axes.fill_between(n, *ends, color=COLOURS[0], alpha=0.18, linewidth=0, zorder=1)


def cost_ratios(comparison: Comparison) -> Figure:
    """Cost of the treatment over the baseline's at equal loss, against that loss, a colour a cost.

    Hollow where a compute-optimal model lies outside its arm's sizes or tokens; what no size
    reaches is not drawn. Costs after the first stand a little to the right of their loss. Bars are
    95 % intervals.
    """
    costs = _estimates(comparison).iso_loss_costs
    losses = [row.loss for row in costs["flops"]]
    step = (max(losses) - min(losses)) / 60
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.3), layout="constrained")
        axes = figure.add_subplot()
        axes.set_yscale("log")
        for i, rows in enumerate(costs.values()):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            for measured in (True, False):
                own = [row for row in rows if row.measured == measured]
                at = [row.loss + i * step for row in own]
                own_ratios = [row.ratio for row in own]
                _draw_points(axes, at, own_ratios, colour, marker, hollow=not measured)
        axes.axhline(1, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
        ratios = [row.ratio for rows in costs.values() for row in rows]
        _ratio_axis(axes, ratios)
        baseline, treatment = map(arm_name, comparison.arms.arms)
        axes.set_xlabel("loss that both reach (nats per token)")
        axes.set_ylabel(f"cost of {treatment}\nover that of {baseline}")
        figure.legend(handles=_cost_legend(list(costs)), loc="outside upper center", ncols=3)
        _note(figure, comparison, ratios)
    return figure


def _cost_legend(costs: Sequence[str]) -> list[Line2D]:
    names = {
        "flops": "training FLOPs",
        "model_bits": "bits of the model",
        "energy_pj_per_token": "energy of a token",
    }
    handles = [
        handle(
            names.get(cost, cost),
            linestyle="none",
            marker=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
        )
        for i, cost in enumerate(costs)
    ]
    return [*handles, handle("extrapolated", linestyle="none", marker="o", fillstyle="none")]


def relative_difference(comparison: Comparison) -> Figure:
    """Relative difference of loss, treatment over baseline, at each size and budget, in percent.

    By laws that share nothing; bars are 95 % intervals, side by side where budgets share a size.
    Dashed lines bound what is not relevant.
    """
    rows = _estimates(comparison).differences
    norm = count_norm([row.d for row in rows])
    relevant = 100 * comparison.relevant
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        for n, row in zip(_dodged(rows), rows, strict=True):
            percent = Estimate(*(100 * x for x in vars(row.relative).values()))
            _draw_points(axes, [n], [percent], COUNT_COLOURS(norm(row.d)), "o")
        axes.axhline(0, color=GREY, linewidth=1, zorder=1)
        for end in (-relevant, relevant):
            axes.axhline(end, color=GREY, linestyle=DASHES, linewidth=1.1, zorder=1)
        sizes = sorted({row.n for row in rows})
        axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
        count_axis(axes.xaxis)
        baseline, treatment = map(arm_name, comparison.arms.arms)
        axes.set_xlabel("parameters")
        axes.set_ylabel(f"loss of {treatment}\nover that of {baseline}, minus 1 (%)")
        count_bar(figure, ScalarMappable(norm, COUNT_COLOURS), axes, "training tokens")
        bounds = handle(f"relevant from {relevant:.3g} % on", linestyle=DASHES)
        figure.legend(handles=[bounds], loc="outside upper center")
        _note(figure, comparison, [row.relative for row in rows])
    return figure


def _dodged(rows: Sequence[Difference]) -> list[float]:
    """Sizes, moved apart a little where several budgets share one, less than half to the next."""
    budgets: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        budgets[row.n].append(row.d)
    sizes, most = sorted(budgets), max(map(len, budgets.values()))
    gap = min((b / a for a, b in zip(sizes, sizes[1:], strict=False)), default=math.inf)
    step = min(_DODGE, gap ** (0.5 / most))
    middle = {n: (len(own) - 1) / 2 for n, own in budgets.items()}
    ranks = [sorted(budgets[row.n]).index(row.d) - middle[row.n] for row in rows]
    return [row.n * step**rank for row, rank in zip(rows, ranks, strict=True)]


def _note(figure: Figure, comparison: Comparison, rows: Sequence[Estimate]) -> None:
    """Beneath the figure: why there are no intervals, and how many values are not drawn."""
    notes = []
    if not any(math.isfinite(row.low) for row in rows):
        why = "; ".join(comparison.refused) or "no bootstrap"
        notes.append(f"no intervals: {why}")
    count = sum(not math.isfinite(row.value) for row in rows)
    if count:
        notes.append(f"not drawn: {count} of {len(rows)}, which no size reaches")
    if notes:
        lines = [line for note in notes for line in wrap(note, _NOTE)]
        figure.supxlabel("\n".join(lines), fontsize=8.5, color="#444444")


def _estimates(comparison: Comparison) -> Estimates:
    if comparison.estimates is None:
        raise AnalysisError(f"no estimates to draw: {'; '.join(comparison.refused)}")
    return comparison.estimates


# ---- What they share -----------------------------------------------------------------------------


def _draw_points(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    rows: Sequence[Estimate],
    colour: Any,
    marker: str,
    *,
    label: str | None = None,
    hollow: bool = False,
) -> None:
    """Estimates with bars where they have intervals; one that is not finite is left out."""
    drawn = [(at, row) for at, row in zip(x, rows, strict=True) if math.isfinite(row.value)]
    if not drawn:
        return
    at, kept = zip(*drawn, strict=True)
    values = np.array([row.value for row in kept])
    ends = np.array([(row.low, row.high) for row in kept]).T
    below, above = values - ends[0], np.minimum(ends[1], _BEYOND) - values
    bars = np.maximum([below, above], 0.0)  # a value may lie outside its percentiles
    axes.errorbar(
        at,
        values,
        yerr=bars if np.isfinite(bars).any() else None,
        linestyle="none",
        color=colour,
        marker=marker,
        markersize=6,
        markerfacecolor="white" if hollow else colour,
        markeredgecolor=colour if hollow else "white",
        markeredgewidth=1.3 if hollow else 0.8,
        elinewidth=1.2,
        capsize=2,
        label=label,
        zorder=4,
    )


def _ratio_axis(axes: Axes, rows: Sequence[Estimate]) -> None:
    """About 1 and all values with their intervals, but for ends far beyond; ratios written out."""
    values = [1.0, *(row.value for row in rows if 0 < row.value < math.inf)]
    least, most = min(values) / _FAR, max(values) * _FAR
    ends = [end for row in rows for end in (row.low, row.high) if not math.isnan(end)]
    shown = [*values, *np.clip(ends, least, most)]
    axes.set_ylim(min(shown) / 1.15, max(shown) * 1.15)
    _ratio_ticks(axes)


def _ratio_ticks(axes: Axes) -> None:
    """Ratios written out: at 1, 2 and 5, at every digit, or evenly where they hardly differ."""
    low, high = axes.get_ylim()
    wide = LogLocator(subs=(1, 2, 5) if high / low > 4 else range(1, 10))
    axes.yaxis.set_major_locator(wide if high / low > 2 else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
