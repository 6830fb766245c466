"""What a person sees: a table a suite, the ratios and what they should be, and notes."""

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import display
from experiments.benchmark.result import Result

# What a value's unit is, by the end of its key, and how it is written.
UNITS = {
    "seconds": lambda x: duration(x),
    "bytes": lambda x: f"{display.count(x)}B",
    "per_s": lambda x: f"{display.count(x)}",
    "share": lambda x: f"{x:.1%}",
}


def show(screen: Console, environment: dict[str, Any], result: Result) -> None:
    """Everything but the numbers of single rounds, which the JSON document has."""
    for suite, rows in groupby(result.measurements, key=lambda row: row["suite"]):
        screen.print(_measurements(suite, list(rows)))
    screen.print(_ratios(result))
    for note in result.notes:
        screen.print(note, soft_wrap=True, markup=False)
    device, commit = environment["device"], environment["git_commit"]
    screen.print(f"{device}, jax {environment['jax_version']}, commit {commit}", soft_wrap=True)


def _measurements(suite: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=suite, title_justify="left")
    keys = [key for key, value in rows[0].items() if key != "suite" and not _of_rounds(value)]
    for key in keys:
        words = any(isinstance(row[key], str) for row in rows)
        table.add_column(key.replace("_", " "), justify="left" if words else "right")
    for row in rows:
        table.add_row(*(cell(key, row[key]) for key in keys))
    return table


def _of_rounds(value: Any) -> bool:
    return isinstance(value, list)


def _ratios(result: Result) -> Table:
    table = Table(title="ratios: median over the rounds, and range", title_justify="left")
    table.add_column("name")
    for column in ("median", "min", "max", "goal"):
        table.add_column(column, justify="right")
    table.add_column("")
    for name, ratio in result.ratios.items():
        goal = "-" if ratio.goal is None else f"<= {ratio.goal:g}"
        verdict = {None: "", True: "met", False: "missed"}[ratio.met]
        numbers = (f"{value:.3f}" for value in ratio[:3])
        table.add_row(name, *numbers, goal, verdict)
    return table


def cell(key: str, value: Any) -> str:
    """A value in the unit that its key's end names."""
    if value is None:
        return "-"
    unit = next((write for end, write in UNITS.items() if key.endswith(end)), None)
    if unit and not isinstance(value, str):
        return unit(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Three digits and a unit: 12.3 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
