"""What the figures share: style, names and marks of arms, ticks of counts, entries of legends.

Colours are Okabe and Ito's (2008), told apart by colour-blind readers; what has a colour of its own
has a marker of its own too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.tables import count_text

ARM_NAMES = {
    "ternary": "ternary (W1.58 A8)",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
}
_ARM_STYLES = {
    "ternary": ("#D55E00", "o"),
    "fp16": ("#0072B2", "s"),
    "bf16": ("#009E73", "D"),
    "fp32": ("#555555", "^"),
}
_OTHER_STYLES = (("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X"), ("#000000", "*"))
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osDvPX^"
# Of a count: viridis without its palest colours, which are lost on white.
COUNT_COLOURS = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))
GREY = "#777777"
DASHES = (0, (4, 2.5))
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": True,
    "legend.framealpha": 1.0,
    "legend.edgecolor": "#dddddd",
    "legend.fontsize": 9,
    "svg.hashsalt": "bitnet_jax",
}
_SPARSE, _SPARSER = 2.3, 4.0  # decades from which an axis has two ticks in each, and one


def arm_name(arm: str) -> str:
    """An arm in words, or its own name if it has none."""
    return ARM_NAMES.get(arm, as_written(arm))


def as_written(text: object) -> str:
    """A word of the data as a label: matplotlib takes what stands between dollars for a formula."""
    return str(text).replace("$", r"\$")


def arm_styles(arms: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each arm; an arm without one of its own takes the next spare."""
    others = [arm for arm in arms if arm not in _ARM_STYLES]
    spare = {arm: _OTHER_STYLES[i % len(_OTHER_STYLES)] for i, arm in enumerate(others)}
    return {arm: _ARM_STYLES.get(arm) or spare[arm] for arm in arms}


def count_axis(axis: Axis, room: float = 1.0) -> None:
    """Ticks as 200k or 1M, as many a decade as fit; `room` is the axis' length over the usual."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low) / room
    subs = (1, 2, 5) if decades < _SPARSE else (1, 3) if decades < _SPARSER else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_formatter(NullFormatter())


def rate_axis(axis: Axis) -> None:
    """Ticks as 0.001 or 0.03, two or three a decade."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 3) if high / low > 10 else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def count_norm(counts: Sequence[float] | np.ndarray) -> LogNorm:
    """From the least to the greatest count, a little apart so that one alone has a colour."""
    return LogNorm(min(counts) / 1.05, max(counts) * 1.05)


def count_bar(figure: Figure, shown: ScalarMappable, axes: Axes | list[Axes], label: str) -> None:
    """A colour bar of a count beside axes."""
    bar = figure.colorbar(shown, ax=axes, label=label, pad=0.02)
    count_axis(bar.ax.yaxis)
    bar.minorticks_off()


def _tick(value: float, _position: int) -> str:
    return count_text(value)


def handle(label: str, **style: Any) -> Line2D:
    """Entry of a legend: grey unless told, as what it stands for has several colours."""
    return Line2D([], [], **({"color": GREY, "label": label} | style))
