"""Figures of compute-optimal splits and of two arms compared; `plots.save` writes them.

Every function returns a matplotlib Figure, in the style and the colours of analysis/plots.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.estimates import Difference, Estimate
from analysis.isoflop import INTERPOLANTS, Method, Profile, profiles
from analysis.optima import Allocation, Points, PowerLaw
from analysis.plots import STYLE, arm_name
from analysis.tables import AnalysisError, count_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from analysis.comparing import Comparison, Estimates

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osDvPX*"
_DASHES = (0, (4, 2.5))
_GREY = "#777777"
_COLOUR_MAP = "viridis"
_BEYOND = 1e30  # drawn for an end of an interval that is infinite: far outside any axis
_DODGE = 1.05  # factor of N between points that would otherwise lie on one vertical


# ---- Compute-optimal splits ----------------------------------------------------------------------


def isoflop_profiles(points: Points, method: Method | None = None) -> Figure:
    """Loss against parameters, a colour a budget, with the interpolant and its optimum.

    A budget that has no optimum is dashed.
    """
    method = method or Method()
    found = profiles(points, method)
    colours = matplotlib.colormaps[_COLOUR_MAP]
    norm = LogNorm(found[0].compute / 1.05, found[-1].compute * 1.05)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 4.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        for profile in found:
            _draw_profile(axes, profile, method, colours(norm(profile.compute)))
        _count_axis(axes.xaxis)
        axes.set_xlabel("parameters")
        axes.set_ylabel("loss (nats per token)")
        scale = matplotlib.cm.ScalarMappable(norm, colours)
        figure.colorbar(scale, ax=axes, label="training compute (FLOPs)", pad=0.02)
        handles = [
            _handle(f"{method.name} through a budget's sizes"),
            _handle("its optimum", marker="*", markersize=12, linestyle="none"),
        ]
        if any(profile.refused for profile in found):
            handles.append(_handle("a budget without an optimum", linestyle=_DASHES))
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _draw_profile(axes: Axes, profile: Profile, method: Method, colour: object) -> None:
    own = profile.points
    interpolate, least = INTERPOLANTS[method.interpolant]
    n, loss = own.n, own.loss
    if len(n) >= least:
        n = np.geomspace(own.n[0], own.n[-1], 200)
        loss = interpolate(np.log(own.n), own.loss[:, None], np.log(n))[:, 0]
    line = _DASHES if profile.refused else "-"
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
    AnalysisError if all are.
    """
    laws = {row.approach: row.n for row in rows if row.n is not None}
    if not laws:
        reasons = "; ".join(f"{row.approach}: {row.refused}" for row in rows)
        raise AnalysisError(f"no approach has an allocation to draw ({reasons})")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 4.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        for i, (name, law) in enumerate(laws.items()):
            _draw_power_law(axes, name, law, i)
        handles = axes.get_legend_handles_labels()[0]
        refused = (row.approach for row in rows if row.n is None)
        handles += [_handle(f"{name}: refused", linestyle="none") for name in refused]
        _count_axis(axes.yaxis)
        axes.set_xlabel("training compute (FLOPs)")
        axes.set_ylabel("compute-optimal parameters")
        figure.legend(handles=handles, loc="outside right upper")
    return figure


def _draw_power_law(axes: Axes, name: str, law: PowerLaw, number: int) -> None:
    """With a marker at both ends, so that lines on one another are told apart."""
    compute = np.geomspace(*law.observed, 50)
    colour = _COLOURS[number % len(_COLOURS)]
    axes.plot(
        compute,
        law.at(compute),  # type: ignore[arg-type]
        color=colour,
        marker=_MARKERS[number % len(_MARKERS)],
        markevery=[0, -1],
        linestyle="-" if number < len(_COLOURS) else _DASHES,
        linewidth=1.6,
        label=f"{name}: C^{law.exponent:.3f}",
    )
    bands = [band for c in compute if (band := law.interval_at(c)) is not None]
    if bands:
        axes.fill_between(compute, *np.transpose(bands), color=colour, alpha=0.15, linewidth=0)


# ---- Two arms ------------------------------------------------------------------------------------


def multiplier(comparison: Comparison) -> Figure:
    """What a parameter of the treatment is worth, against parameters, a panel a number of tokens.

    The line with its band is of the law `epm`, in which the multiplier moves with N and D; the
    points are of laws that share nothing, at equal loss. Bars and bands are 95 % intervals.
    """
    found = _estimates(comparison)
    panels: dict[float, list[tuple[float, Estimate, Estimate]]] = defaultdict(list)
    for (n, d, moving), (_, _, separate) in zip(found.rho_at, found.iso_loss_rho, strict=True):
        panels[d].append((n, moving, separate))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.9), layout="constrained")
        drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (d, rows) in zip(drawn, panels.items(), strict=True):
            n, moving, separate = zip(*rows, strict=True)
            _draw_moving(axes, n, moving)
            _draw_points(axes, n, separate, _COLOURS[1], "D", "laws that share nothing")
            axes.axhline(1, color=_GREY, linestyle=":", linewidth=1.2, zorder=1)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlim(min(n) / 1.3, max(n) * 1.3)
            _count_axis(axes.xaxis)
            axes.set_title(f"{count_text(d)} tokens", fontsize=10)
            axes.set_xlabel("parameters")
        both = [x for _, _, x in (*found.rho_at, *found.iso_loss_rho)]
        _ratio_axis(drawn[0], both)
        baseline, treatment = map(arm_name, comparison.arms.arms)
        drawn[0].set_ylabel(f"{baseline} parameters\nthat one of {treatment} is worth")
        handles, labels = drawn[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def _draw_moving(axes: Axes, n: Sequence[float], rows: Sequence[Estimate]) -> None:
    axes.plot(
        n,
        [row.value for row in rows],
        color=_COLOURS[0],
        marker="o",
        markersize=4,
        linewidth=1.8,
        label="multiplier that moves (epm)",
        zorder=3,
    )
    if all(math.isfinite(end) for row in rows for end in (row.low, row.high)):
        ends = [row.low for row in rows], [row.high for row in rows]
        axes.fill_between(n, *ends, color=_COLOURS[0], alpha=0.18, linewidth=0, zorder=1)


def cost_ratios(comparison: Comparison) -> Figure:
    """Cost of the treatment over the baseline's at equal loss, against that loss, a colour a cost.

    Hollow where a compute-optimal model lies outside its arm's sizes or tokens; what no size
    reaches is not drawn. Bars are 95 % intervals.
    """
    costs = _estimates(comparison).iso_loss_costs
    losses = [row.loss for row in costs["flops"]]
    step = (max(losses) - min(losses)) / 60
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.3), layout="constrained")
        axes = figure.add_subplot()
        axes.set_yscale("log")
        for i, (cost, rows) in enumerate(costs.items()):
            colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
            for measured in (True, False):
                own = [row for row in rows if row.measured == measured]
                at = [row.loss + i * step for row in own]
                fill = colour if measured else "white"
                _draw_points(axes, at, [row.ratio for row in own], colour, marker, fill=fill)
        axes.axhline(1, color=_GREY, linestyle=":", linewidth=1.2, zorder=1)
        _ratio_axis(axes, [row.ratio for rows in costs.values() for row in rows])
        baseline, treatment = map(arm_name, comparison.arms.arms)
        axes.set_xlabel("loss that both reach (nats per token)")
        axes.set_ylabel(f"cost of {treatment}\nover that of {baseline}")
        figure.legend(handles=_cost_legend(list(costs)), loc="outside upper center", ncols=3)
    return figure


def _cost_legend(costs: Sequence[str]) -> list[Line2D]:
    names = {"flops": "training FLOPs", "model_bits": "bits of the model"}
    handles = [
        _handle(
            names.get(cost, cost),
            linestyle="none",
            marker=_MARKERS[i % len(_MARKERS)],
            color=_COLOURS[i % len(_COLOURS)],
        )
        for i, cost in enumerate(costs)
    ]
    return [*handles, _handle("extrapolated", linestyle="none", marker="o", fillstyle="none")]


def relative_difference(comparison: Comparison) -> Figure:
    """Relative difference of loss, treatment over baseline, at each size and budget, in percent.

    By laws that share nothing; bars are 95 % intervals. Dashed lines bound what is not relevant.
    """
    rows = _estimates(comparison).differences
    budgets = [row.d for row in rows]
    norm = LogNorm(min(budgets) / 1.05, max(budgets) * 1.05)
    colours = matplotlib.colormaps[_COLOUR_MAP]
    relevant = 100 * comparison.relevant
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        for n, row in zip(_dodged(rows), rows, strict=True):
            percent = Estimate(*(100 * x for x in vars(row.relative).values()))
            _draw_points(axes, [n], [percent], colours(norm(row.d)), "o")
        axes.axhline(0, color=_GREY, linewidth=1, zorder=1)
        for end in (-relevant, relevant):
            axes.axhline(end, color=_GREY, linestyle=_DASHES, linewidth=1.1, zorder=1)
        sizes = sorted({row.n for row in rows})
        axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
        _count_axis(axes.xaxis)
        baseline, treatment = map(arm_name, comparison.arms.arms)
        axes.set_xlabel("parameters")
        axes.set_ylabel(f"loss of {treatment}\nover that of {baseline}, minus 1 (%)")
        scale = matplotlib.cm.ScalarMappable(norm, colours)
        bar = figure.colorbar(
            scale,
            ax=axes,
            label="training tokens",
            pad=0.02,
            ticks=LogLocator(subs=(1, 2, 5)),
            format=FuncFormatter(_count),
        )
        bar.minorticks_off()
        handle = _handle(f"relevant from {relevant:.3g} % on", linestyle=_DASHES)
        figure.legend(handles=[handle], loc="outside upper center")
    return figure


def _dodged(rows: Sequence[Difference]) -> list[float]:
    """Sizes, moved apart a little where several budgets share one."""
    budgets: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        budgets[row.n].append(row.d)
    middle = {n: (len(own) - 1) / 2 for n, own in budgets.items()}
    ranks = [sorted(budgets[row.n]).index(row.d) - middle[row.n] for row in rows]
    return [row.n * _DODGE**rank for row, rank in zip(rows, ranks, strict=True)]


def _estimates(comparison: Comparison) -> Estimates:
    if comparison.estimates is None:
        raise AnalysisError(f"no estimates to draw: {'; '.join(comparison.refused)}")
    return comparison.estimates


# ---- What they share -----------------------------------------------------------------------------


def _draw_points(
    axes: Axes,
    x: Sequence[float],
    rows: Sequence[Estimate],
    colour: object,
    marker: str,
    label: str | None = None,
    *,
    fill: object = None,
) -> None:
    """Estimates with bars where they have intervals; one that is not finite is left out."""
    drawn = [(at, row) for at, row in zip(x, rows, strict=True) if math.isfinite(row.value)]
    if not drawn:
        return
    at, kept = zip(*drawn, strict=True)
    values = np.array([row.value for row in kept])
    ends = np.array([(row.low, row.high) for row in kept]).T
    below, above = values - ends[0], np.minimum(ends[1], _BEYOND) - values
    bars = np.nan_to_num(np.maximum([below, above], 0.0))
    axes.errorbar(
        at,
        values,
        yerr=bars if bars.any() else None,
        linestyle="none",
        color=colour,
        marker=marker,
        markersize=6,
        markerfacecolor=colour if fill is None else fill,
        markeredgecolor="white" if fill in (None, colour) else colour,
        markeredgewidth=0.8 if fill in (None, colour) else 1.3,
        elinewidth=1.2,
        capsize=2,
        label=label,
        zorder=4,
    )


def _ratio_axis(axes: Axes, rows: Sequence[Estimate]) -> None:
    """From the least to the greatest finite end, and 1; ratios written out."""
    ends = [x for row in rows for x in (row.value, row.low, row.high) if 0 < x < _BEYOND]
    axes.set_ylim(min(*ends, 1.0) / 1.15, max(*ends, 1.0) * 1.15)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 4 else range(1, 10)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _count_axis(axis: Axis) -> None:
    """Ticks at 1, 2 and 5, or at powers of ten over more than two decades, as 200k or 1M."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    axis.set_major_formatter(FuncFormatter(_count))
    axis.set_minor_formatter(NullFormatter())


def _count(value: float, _position: int) -> str:
    return count_text(value)


def _handle(label: str, **style: object) -> Line2D:
    """Of a legend: grey, as what it stands for has several colours."""
    return Line2D([], [], **{"color": _GREY, "label": label} | style)  # type: ignore[arg-type]
