"""The option --plot of the commands: where figures go, refused before the computation, and written.

--plot=PATH writes PATH.png and PATH.svg, or PATH-NAME.png and .svg where a command has several
figures. PATH may end in .png itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.tables import AnalysisError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_plot(parser: argparse.ArgumentParser, text: str, *names: str) -> None:
    """The option, with what it draws and the names of its figures, if there are several."""
    paths = ", ".join(f"PATH-{name}" for name in names) or "PATH"
    parser.add_argument("--plot", metavar="PATH", help=f"{text}: {paths}, .png and .svg")


def plot_path(given: str | None) -> Path | None:
    """Where figures go, without .png; None if none were asked for.

    AnalysisError for another ending, for what is a directory, and where nothing can be written.
    """
    if given is None:
        return None
    path = Path(given)
    if path.suffix not in ("", ".png"):
        raise AnalysisError(f"--plot={given}: expected PATH or PATH.png, for PATH.png and PATH.svg")
    if given.endswith(os.sep) or path.is_dir():
        raise AnalysisError(f"--plot={given} is a directory: name the figures in it")
    if not path.parent.is_dir():
        raise AnalysisError(f"--plot={given}: there is no directory {path.parent}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise AnalysisError(
            f"--plot={given}: {path.parent} cannot be written to ({error.strerror})"
        ) from error
    return path.with_suffix("")


def write_figures(path: Path, figures: Mapping[str, Callable[[], Figure]]) -> None:
    """Draw figures by name and write them to `path`-name, or to `path` for the name "".

    What was written, or why a figure cannot be drawn, is a line on stderr.
    """
    from analysis import plots

    for name, draw in figures.items():
        own = path.with_name(f"{path.name}-{name}" if name else path.name)
        try:
            png, svg = plots.save(draw(), own)
        except AnalysisError as error:
            print(f"{own}: not drawn: {error}", file=sys.stderr)
        else:
            print(f"wrote {png} and {svg}", file=sys.stderr)
