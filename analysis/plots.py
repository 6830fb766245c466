"""Figures, one function each; every one returns a matplotlib Figure and `save` writes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from analysis.curves import loss_against_compute
from analysis.fitting import Fit
from analysis.information import points as ends
from analysis.learning_rate import RateCurve, rate_curves
from analysis.style import (
    COLOURS,
    COUNT_COLOURS,
    DASHES,
    MARKERS,
    STYLE,
    arm_name,
    arm_styles,
    as_written,
    count_axis,
    count_bar,
    count_norm,
    handle,
    rate_axis,
)
from analysis.tables import COLUMNS, count_text, finished

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

    from analysis.designs import Design

_TITLE = 62  # letters of a line of a title
_PANELS = 3  # side by side


def save(figure: Figure, path: str | Path) -> tuple[Path, Path]:
    """Write `path`.png (150 dots an inch) and `path`.svg, the same bytes for the same figure."""
    path = Path(path)
    png, svg = path.with_name(path.name + ".png"), path.with_name(path.name + ".svg")
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, dpi=150, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return png, svg


def loss_vs_compute(
    endpoints: pd.DataFrame,
    fits: Mapping[str, Fit] | None = None,
    references: Mapping[str, float] | None = None,
) -> Figure:
    """Held-out loss of every finished endpoint against its training FLOPs, an arm a colour.

    `endpoints` is a results table; `fits` holds a fit for each arm, drawn as its compute-optimal
    frontier (dashed where that leaves the observed sizes and tokens) with its 95 % band if it was
    bootstrapped; `references` are losses in nats a token, drawn as labelled horizontal lines.
    """
    rows = finished(endpoints)
    arms = list(dict.fromkeys(rows["precision"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 4.9), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        for arm, (colour, marker) in arm_styles(arms).items():
            own = rows[rows["precision"] == arm]
            _draw_runs(axes, own, colour, marker)
            if fits and arm in fits:
                _draw_frontier(axes, own, fits[arm], colour)
        _label_sizes(axes, rows)
        _widen(axes, rows, references or {})
        bits = _bits_per_nat(rows)
        _draw_references(axes, references or {}, bits)
        if bits is not None:
            there_and_back = (partial(np.multiply, bits), partial(np.multiply, 1 / bits))
            axes.secondary_yaxis("right", functions=there_and_back).set_ylabel("bits per byte")
        axes.set_xlabel("training compute (FLOPs)")
        axes.set_ylabel("held-out loss (nats per token)")
        axes.legend(handles=_legend(arms, fits or {}), loc="lower left")
    return figure


def _legend(arms: list[str], fits: Mapping[str, Fit]) -> list[Line2D]:
    """A marker for each arm and, once, what the lines are."""
    handles = [
        handle(arm_name(arm), linestyle="none", marker=marker, color=colour)
        for arm, (colour, marker) in arm_styles(arms).items()
    ]
    laws = {found.law.name for found in fits.values()}
    if "power" in laws:
        handles.append(handle("fitted power law", linewidth=2))
    if "chinchilla" in laws:
        handles.append(handle("fitted compute-optimal frontier", linewidth=2))
        beyond = "where the optimum leaves the observed N or D"
        handles.append(handle(beyond, linewidth=1.3, linestyle=DASHES))
    return handles


def _draw_runs(axes: Axes, rows: pd.DataFrame, colour: str, marker: str) -> None:
    """An arm's endpoints with standard errors; those of one run are joined."""
    for _, run in rows.groupby("run_id", sort=False):
        line = run.sort_values("flops")
        axes.plot(line["flops"], line["loss"], color=colour, alpha=0.3, linewidth=1, zorder=2)
    axes.errorbar(
        rows["flops"],
        rows["loss"],
        yerr=rows["loss_stderr"],
        linestyle="none",
        color=colour,
        marker=marker,
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.8,
        elinewidth=1.2,
        capsize=2,
        zorder=4,
    )


def _draw_frontier(axes: Axes, rows: pd.DataFrame, found: Fit, colour: str) -> None:
    ends = rows[COLUMNS["c"]].min(), rows[COLUMNS["c"]].max()
    curve = loss_against_compute(found, rows, np.geomspace(*ends, 200))
    axes.plot(curve.compute, curve.loss, color=colour, linewidth=1.3, linestyle=DASHES, zorder=3)
    axes.plot(
        curve.compute,
        np.where(curve.measured, curve.loss, np.nan),
        color=colour,
        linewidth=2,
        zorder=3,
    )
    if curve.band is not None:
        axes.fill_between(
            curve.compute, *curve.band, color=colour, alpha=0.15, linewidth=0, zorder=1
        )


def _label_sizes(axes: Axes, rows: pd.DataFrame) -> None:
    """Each size's name below its longest training: no other size's curve lies there."""
    for size, own in rows.groupby("size", sort=False):
        last = own[own["flops"] == own["flops"].max()].sort_values("loss").iloc[0]
        axes.annotate(
            as_written(size),
            (last["flops"], last["loss"]),
            xytext=(0, -15),
            ha="center",
            textcoords="offset points",
            fontsize=8.5,
            color="#444444",
            zorder=5,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def _widen(axes: Axes, rows: pd.DataFrame, references: Mapping[str, float]) -> None:
    """Room for labels, and up to the lowest reference that no endpoint has yet passed."""
    low, high = rows["loss"].min(), rows["loss"].max()
    above = [loss for loss in references.values() if loss >= high]
    top = max(high, min(above, default=high))
    margin = 0.1 * (top - low) if top > low else 0.1 * low
    axes.set_ylim(low - 2 * margin, top + margin)


def _draw_references(axes: Axes, references: Mapping[str, float], bits: float | None) -> None:
    """Dotted lines, labelled at the right, where the loss curves have fallen away below them."""
    low, high = axes.get_ylim()
    for label, loss in references.items():
        if not low <= loss <= high:
            continue
        amount = f"{loss * bits:.2f} bits" if bits is not None else f"{loss:.2f} nats"
        axes.axhline(loss, color="#777777", linestyle=":", linewidth=1.2, zorder=1)
        axes.annotate(
            f"{as_written(label)} {amount}",
            (1, loss),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#555555",
            zorder=5,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def _bits_per_nat(rows: pd.DataFrame) -> float | None:
    """Bits a byte for each nat a token, None where the table does not say."""
    if "bits_per_byte" not in rows:
        return None
    ratio = float((rows["bits_per_byte"] / rows["loss"]).median())
    return ratio if math.isfinite(ratio) else None


def loss_vs_parameters(endpoints: pd.DataFrame, fits: Mapping[str, Fit]) -> Figure:
    """Held-out loss against parameters, a panel an arm and a colour a number of training tokens.

    `fits` holds `chinchilla` fits; their curves are drawn at the token counts of the endpoints, or
    at four across their range where there are more than four.
    """
    rows = finished(endpoints)
    arms = list(dict.fromkeys(rows["precision"]))
    tokens = np.unique(rows["tokens"])
    drawn = tokens if tokens.size <= 4 else np.geomspace(tokens[0], tokens[-1], 4)
    sizes = np.geomspace(rows[COLUMNS["n"]].min(), rows[COLUMNS["n"]].max(), 100)
    norm = count_norm(tokens)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.8 + 3.5 * len(arms), 3.8), layout="constrained")
        panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
        for axes, arm in zip(panels, arms, strict=True):
            own = rows[rows["precision"] == arm]
            for d in drawn if arm in fits else ():
                axes.plot(
                    sizes,
                    fits[arm].predict({"n": sizes, "d": d}),
                    color=COUNT_COLOURS(norm(d)),
                    linewidth=1.5,
                    zorder=2,
                )
            points = axes.scatter(
                own[COLUMNS["n"]],
                own["loss"],
                c=own["tokens"],
                cmap=COUNT_COLOURS,
                norm=norm,
                s=38,
                edgecolors="white",
                linewidths=0.8,
                zorder=3,
            )
            axes.set_xscale("log")
            count_axis(axes.xaxis)
            axes.set_title(arm_name(arm), fontsize=10.5)
            axes.set_xlabel("non-embedding parameters")
        panels[0].set_ylabel("held-out loss (nats per token)")
        count_bar(figure, points, list(panels), "training tokens")
    return figure


def law_and_points(found: Fit) -> Figure:
    """Measured against fitted loss, and the relative residuals beneath: any law, any inputs.

    The groups of a law that has them differ in colour and marker.
    """
    fitted = found.predict(found.inputs)
    residuals = 100 * (found.loss / fitted - 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 5.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        ends = [min(fitted.min(), found.loss.min()), max(fitted.max(), found.loss.max())]
        above.plot(ends, ends, color="#999999", linewidth=1)
        below.axhline(0, color="#999999", linewidth=1)
        for label, own, colour, marker in _groups(found):
            for axes, values in ((above, found.loss), (below, residuals)):
                axes.plot(
                    fitted[own],
                    values[own],
                    linestyle="none",
                    marker=marker,
                    color=colour,
                    markersize=5,
                    markeredgecolor="white",
                    markeredgewidth=0.6,
                    label=arm_name(label),
                )
        if found.law.groups:
            above.legend(loc="upper left")
        above.set_title(_equation(found), fontsize=10)
        above.set_ylabel("measured loss (nats per token)")
        below.set_ylabel("residual (%)")
        below.set_xlabel("fitted loss (nats per token)")
    return figure


def _groups(found: Fit) -> list[tuple[str, np.ndarray, str, str]]:
    """Name, points [P], colour and marker of each group, or of all points of a law without any."""
    if not found.law.groups:
        return [("", np.ones(found.n_points, bool), COLOURS[0], MARKERS[0])]
    return [
        (label, found.inputs["group"] == i, *style)
        for i, (label, style) in enumerate(arm_styles(found.law.groups).items())
    ]


def _equation(found: Fit) -> str:
    """In numbers, broken between its parts; beneath, a line for each group of what it has alone."""
    parts = found.law.write(found.params).split(", ")
    lines = [", ".join(parts)] if len(", ".join(parts)) <= _TITLE else parts
    for label in found.law.groups:
        own = [p for p in found.law.parameters if p.group == label]
        values = ", ".join(f"{p.name} {found.params[p.full_name]:.4g}" for p in own)
        lines += [f"{arm_name(label)}: {values}"] if own else []
    return "\n".join(part for line in lines for part in wrap(line, _TITLE))


def loss_vs_rate(frame: pd.DataFrame) -> Figure:
    """Held-out loss against peak learning rate, a panel a size and budget, an arm a colour.

    The parabola through the best rate and its neighbours is drawn with its optimum, a star; where
    the best rate is the first or last tried there is neither, and that rate is hollow. Losses are
    means over seeds. AnalysisError: a missing column, or no finished endpoint.
    """
    panels: dict[tuple[float, str, float], list[RateCurve]] = {}
    for curve in rate_curves(frame):
        panels.setdefault((curve.n, curve.size, curve.tokens), []).append(curve)
    styles = arm_styles(sorted({curve.arm for own in panels.values() for curve in own}))
    width = min(len(panels), _PANELS)
    shape = -(-len(panels) // width), width
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.4 + 2.4 * width, 0.7 + 2.9 * shape[0]), layout="constrained")
        grid = figure.subplots(*shape, sharex=True, squeeze=False).ravel()
        for axes, ((_, size, tokens), own) in zip(grid, panels.items(), strict=False):
            for curve in own:
                _draw_rates(axes, curve, *styles[curve.arm])
            axes.set_xscale("log")
            rate_axis(axes.xaxis)
            axes.set_title(f"{size}, {count_text(tokens)} tokens", fontsize=10)
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("peak learning rate")
        for axes in grid[len(panels) :]:
            axes.remove()
        figure.supylabel("held-out loss (nats per token)", fontsize=10.5)
        handles = [
            handle(arm_name(arm), linestyle="none", marker=marker, color=colour)
            for arm, (colour, marker) in styles.items()
        ]
        handles.append(handle("parabola, its optimum", marker="*", markersize=11))
        if any(curve.parabola is None for own in panels.values() for curve in own):
            edge = "best at an end: no optimum"
            handles.append(handle(edge, linestyle="none", marker="o", fillstyle="none"))
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def _draw_rates(axes: Axes, curve: RateCurve, colour: str, marker: str) -> None:
    best = int(curve.losses.argmin())
    inside = curve.parabola is not None
    axes.plot(curve.rates, curve.losses, color=colour, alpha=0.3, linewidth=1, zorder=2)
    axes.plot(
        curve.rates,
        curve.losses,
        linestyle="none",
        color=colour,
        marker=marker,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        markevery=[i for i in range(len(curve.rates)) if inside or i != best],
        zorder=3,
    )
    if curve.parabola is None:
        axes.plot(
            curve.rates[best],
            curve.losses[best],
            color=colour,
            marker=marker,
            fillstyle="none",
            markersize=6.5,
            markeredgewidth=1.3,
            zorder=3,
        )
        return
    rates = np.geomspace(curve.rates[best - 1], curve.rates[best + 1], 60)
    axes.plot(rates, np.polyval(curve.parabola, np.log(rates)), color=colour, linewidth=1.8)
    axes.plot(
        curve.optimum,
        np.polyval(curve.parabola, np.log(curve.optimum)),
        color=colour,
        marker="*",
        markersize=13,
        markeredgecolor="black",
        markeredgewidth=0.7,
        zorder=4,
    )


def design_grid(design: Design) -> Figure:
    """Each end of a design's runs, as large as it has seeds, over the loss that is expected there.

    The contours are of the law's loss in the baseline's arm, where it has arms.
    """
    seeds = Counter(ends(design.grid))
    n, d = np.array(list(seeds)).T
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(d.min() / 1.7, d.max() * 1.7)
        axes.set_ylim(n.min() / 1.7, n.max() * 1.7)
        axes.grid(visible=False)
        _draw_expected_loss(axes, design)
        for size in np.unique(n):
            own = d[n == size]
            axes.hlines(size, own.min(), own.max(), color=COLOURS[0], linewidth=1, zorder=2)
        sizes = {count: 26 * count for count in sorted(set(seeds.values()))}
        for count, area in sizes.items():
            own = np.array([point for point, times in seeds.items() if times == count])
            axes.scatter(
                own[:, 1],
                own[:, 0],
                s=area,
                color=COLOURS[0],
                edgecolors="white",
                linewidths=0.8,
                label=f"{count} seed{'s' if count > 1 else ''}",
                zorder=3,
            )
        for axis in (axes.xaxis, axes.yaxis):
            count_axis(axis)
        axes.set_xlabel("training tokens")
        axes.set_ylabel("non-embedding parameters")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def _draw_expected_loss(axes: Axes, design: Design) -> None:
    """Labelled contours of the law's loss (nats a token) over the axes' range."""
    d, n = np.meshgrid(np.geomspace(*axes.get_xlim(), 80), np.geomspace(*axes.get_ylim(), 80))
    setting = design.setting
    loss = setting.law(setting.params, {"n": n, "d": d, "group": np.zeros(n.shape)})
    lines = axes.contour(d, n, loss, levels=8, colors="#aaaaaa", linewidths=0.9, zorder=1)
    labels = axes.clabel(
        lines, fmt=lambda level: f"{level:.3g} nats", fontsize=8, colors="#444444", zorder=4
    )
    for label in labels:  # legible where they meet a point
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def predicted_and_measured(scored: pd.DataFrame) -> Figure:
    """Measured losses about those predicted before (%), with 95 % prediction intervals.

    `scored` has predicted, low, high and measured losses, a row a result, as in
    analysis.scores.Scores; low and high may be missing.
    """
    predicted = scored["predicted"].to_numpy(float)
    low, high, measured = (
        100 * (scored[column].to_numpy(float) / predicted - 1)
        for column in ("low", "high", "measured")
    )
    outside = (measured < low) | (measured > high)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0, color="#999999", linewidth=1, zorder=1)
        axes.vlines(predicted, low, high, color="#bbbbbb", linewidth=3, zorder=2,
                    label="95 % prediction interval")  # fmt: skip
        for chosen, colour, marker, label in (
            (~outside, COLOURS[0], "o", "measured"),
            (outside, COLOURS[1], "X", "measured, outside"),
        ):
            if chosen.any():
                axes.scatter(predicted[chosen], measured[chosen], color=colour, marker=marker,
                             edgecolors="white", linewidths=0.8, s=42, label=label,
                             zorder=3)  # fmt: skip
        axes.set_xlabel("predicted loss (nats per token)")
        axes.set_ylabel("measured over predicted loss (%)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
