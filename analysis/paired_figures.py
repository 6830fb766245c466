"""Figures of two arms' losses pair by pair, of which no law is assumed; `plots.save` writes them.

Every function returns a matplotlib Figure, in the style and the colours of analysis/style.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

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
from analysis.tables import AnalysisError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from analysis.gap_law import GapLaw

_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
_DODGE = 1.05  # factor of N between budgets of one size


def distances(law: GapLaw, pairs: pd.DataFrame, new: pd.DataFrame | None = None) -> Figure:
    """Differences of each pair against tokens, a colour a size, with the law of them.

    pairs: size, params_non_embedding, tokens, difference; those that the law was fitted to. new:
    what it says of others, as of gap_law.new_gaps, drawn as intervals and what was measured there.
    """
    sizes = pairs.groupby("size")["params_non_embedding"].first().sort_values()
    others = [] if new is None else [s for s in new["size"].unique() if s not in sizes]
    if len(sizes) + len(others) > len(COLOURS):
        raise AnalysisError(f"{len(sizes) + len(others)} sizes: colours for {len(COLOURS)}")
    marks = dict(zip([*sizes.index, *others], zip(COLOURS, MARKERS, strict=True), strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        for size, parameters in sizes.items():
            own = pairs[pairs["size"] == size]
            _draw_size(axes, law, own, float(parameters), *marks[size])
        if new is not None:
            for size, own in new.groupby("size", sort=False):
                _draw_new(axes, own, *marks[size])
        axes.axhline(0, color=GREY, linewidth=1.0, zorder=1)
        axes.set_ylim(bottom=min(0.0, *axes.get_ylim()))
        count_axis(axes.xaxis)
        axes.set_xlabel("training tokens")
        treatment, baseline = arm_name(law.treatment), arm_name(law.baseline)
        axes.set_ylabel(f"loss of {treatment}\nabove that of {baseline} (nats per token)")
        entries = [
            handle(f"{size} parameters", color=colour, marker=marker, linestyle="")
            for size, (colour, marker) in marks.items()
        ]
        entries.append(handle(f"N^{law.a:.2f} D^{law.b:.2f}", linestyle=DASHES))
        if new is not None:
            entries.append(handle("predicted (95 %)", linewidth=5, alpha=0.35))
        figure.legend(handles=entries, loc="outside right upper")
    return figure


def _draw_size(
    axes: Axes, law: GapLaw, own: pd.DataFrame, parameters: float, colour: str, marker: str
) -> None:
    """The pairs of a size, and the law over the budgets that it had."""
    tokens = np.geomspace(own["tokens"].min() / 1.15, own["tokens"].max() * 1.15, 50)
    middle, _, _ = law.predict(np.column_stack([np.full(50, parameters), tokens]))
    axes.plot(tokens, middle, color=colour, linestyle=DASHES, linewidth=1.2)
    axes.plot(own["tokens"], own["difference"], linestyle="", color=colour, marker=marker,
              markersize=5, markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip


def _draw_new(axes: Axes, own: pd.DataFrame, colour: str, marker: str) -> None:
    """Intervals of what was predicted, with what was measured if it was."""
    axes.vlines(own["tokens"], own["low"], own["high"], color=colour, alpha=0.35, linewidth=5)
    if "measured" in own:
        axes.plot(own["tokens"], own["measured"], linestyle="", color=colour, marker=marker,
                  markersize=7, markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip


def worth(found: pd.DataFrame, baseline: str, treatment: str) -> Figure:
    """What a parameter is worth at equal loss and tokens, against parameters, by tokens.

    found: as of equal_loss.equal_loss, with params_non_embedding. Bars are its intervals; one that
    leaves the measured sizes has an open end.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        norm = count_norm(found["tokens"].to_numpy(float))
        ends = found[["rho", "rho_low", "rho_high"]].to_numpy(float)
        ends = ends[np.isfinite(ends) & (ends > 0)]
        bottom, top = min(ends.min(), 1.0) / 1.15, max(ends.max(), 1.0) * 1.15
        for _, own in found.groupby("size", sort=False):
            for place, row in enumerate(own.itertuples()):
                at = row.params_non_embedding * _DODGE ** (place - (len(own) - 1) / 2)
                colour = COUNT_COLOURS(norm(row.tokens))
                low, high = max(row.rho_low, bottom / 2), min(row.rho_high, top * 2)
                axes.vlines(at, low, high, color=colour, linewidth=1.4)
                axes.plot(at, row.rho, marker="o", color=colour, markeredgecolor="white")
        axes.set_ylim(bottom, top)
        axes.axhline(1, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
        sizes = found["params_non_embedding"]
        axes.set_xlim(sizes.min() / 1.5, sizes.max() * 1.5)
        count_axis(axes.xaxis)
        axes.yaxis.set_major_locator(FixedLocator(_TICKS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("parameters")
        axes.set_ylabel(
            f"{arm_name(baseline)} parameters that one of\n{arm_name(treatment)} is worth"
        )
        shown = matplotlib.cm.ScalarMappable(norm, COUNT_COLOURS)
        count_bar(figure, shown, axes, "training tokens")
    return figure
