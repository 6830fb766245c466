"""The files under a directory of results: reading them, and the commands that write them.

A file that is not there raises Missing; one that is damaged raises AnalysisError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from analysis.ingredients import BASE, Comparison, compare
from analysis.tables import (
    COLUMNS,
    AnalysisError,
    finished,
    numbers,
    paired_differences,
    read_table,
    require,
)
from analysis.verdicts import Effects, by_name

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

_SWEEP = "python -m experiments.run --sweep"
_INGREDIENTS = f"{_SWEEP} --config=sweeps/ingredients.py"
_COMMANDS = {
    "ingredients/endpoints": _INGREDIENTS,
    "gradients/latents": "python -m experiments.collect results/gradients --latents",
    "ingredients/latents": "python -m experiments.collect results/ingredients --latents",
    "presets/endpoints": f"{_SWEEP} --config=sweeps/presets.py",
    "optimizers/endpoints": f"{_SWEEP} --config=sweeps/optimizers.py",
    "quickstart/endpoints": _SWEEP,
    "learning_rate/endpoints": f"{_SWEEP} --config=sweeps/learning_rate.py",
    "quantize": "python -m experiments.quantize --run=RUN --json (float16 runs, several seeds)",
    "ladder": "python -m experiments.ladder --csv=results/ladder.csv",
    "decode": "python -m experiments.benchmark --suite=decode --json (still to be written)",
}


class Missing(Exception):
    """A file that is not there; the message says which, and what writes it."""

    def __init__(self, root: Path, name: str, suffix: str):
        super().__init__(f"{root.name}/{name}{suffix} is not there: see {_COMMANDS[name]}")


@dataclass(frozen=True)
class Results:
    """The files under a root, each read when first asked for; Missing where one is not there."""

    root: Path

    def table(self, name: str) -> pd.DataFrame:
        return read_table(self._path(name))

    def _path(self, name: str) -> Path:
        for suffix in (".csv", ".parquet"):
            if (path := self.root / f"{name}{suffix}").exists():
                return path
        raise Missing(self.root, name, ".csv")

    @contextmanager
    def about(self, name: str) -> Iterator[None]:
        """Say of which table it is that something is wrong; words for numbers are, for one."""
        try:
            yield
        except (ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise AnalysisError(f"{self._path(name)}: {reason}") from error

    @cached_property
    def runs(self) -> pd.DataFrame:
        return self.table("ingredients/endpoints")

    @cached_property
    def comparison(self) -> Comparison:
        frame = self.runs
        with self.about("ingredients/endpoints"):
            return compare(frame)

    @cached_property
    def effects(self) -> Effects:
        return by_name(self.comparison.effects)

    @cached_property
    def against_plain_init(self) -> Effects:
        """Effects of `full` whose base is the variant with the plain initialisation."""
        frame = self.runs
        with self.about("ingredients/endpoints"):
            return by_name(against(frame, "full", "residual init"))

    @cached_property
    def latents(self) -> pd.DataFrame:
        return self._full("ingredients/latents", "latent_entropy")

    @cached_property
    def gradients(self) -> pd.DataFrame:
        return self._full("gradients/latents", "gradient_cosine")

    def _full(self, name: str, column: str) -> pd.DataFrame:
        """Rows of `full` only, tags as strings."""
        frame = self.table(name)
        with self.about(name):
            require(frame, "tag_base", "tag_kind", "tag_change", column)
        return frame[frame["tag_base"] == "full"].assign(tag_change=_strings(frame["tag_change"]))

    @cached_property
    def ladder(self) -> pd.DataFrame:
        """A row a size: its counts, and bits and energy of both arms; smallest first."""
        frame = self.table("ladder")
        costs = ["model_bits", "energy_pj_per_token"]
        with self.about("ladder"):
            require(frame, "size", "precision", "params_total", "params_non_embedding", *costs)
            for column in ("params_total", "params_non_embedding", *costs):
                numbers(frame, column)
            if frame.duplicated(["size", "precision"]).any():
                raise AnalysisError("a size and precision stands there more than once")
            arms = [frame[frame["precision"] == arm] for arm in ("ternary", "fp16")]
            both = arms[0].merge(arms[1][["size", *costs]], on="size", suffixes=("", "_fp16"))
            if both.empty:
                raise AnalysisError("no size has both a ternary and an fp16 row")
        return both.sort_values("params_total").reset_index(drop=True)

    @cached_property
    def quantized(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of experiments.quantize for each run."""
        found: dict[str, list[dict[str, Any]]] = {}
        for path in sorted((self.root / "quantize").glob("*.json")):
            run_id, rows = _read_json(path, _quantized_rows)
            found.setdefault(run_id, []).extend(rows)
        if not found:
            raise Missing(self.root, "quantize", "/*.json")
        return found

    @cached_property
    def largest_budgets(self) -> pd.DataFrame:
        """Pairs of the quickstart at each size's largest budget, with their parameters as n."""
        frame = self.table("quickstart/endpoints")
        with self.about("quickstart/endpoints"):
            numbers(finished(frame), "loss")
            numbers(frame, COLUMNS["n"])
            pairs = paired_differences(frame, "fp16", "ternary")
            if pairs.empty:
                raise AnalysisError("no size, budget and seed has both a ternary and an fp16 row")
        pairs["n"] = pairs["size"].map(frame.groupby("size")[COLUMNS["n"]].first())
        largest = pairs.groupby("size")["tokens"].transform("max")
        return pairs[pairs["tokens"] == largest].sort_values(["n", "seed"])

    @cached_property
    def decode_ratios(self) -> dict[str, float]:
        """Medians of the ratios of speeds, tokens a second, ternary over 16 bits."""
        path = self.root / "decode.json"
        if not path.exists():
            raise Missing(self.root, "decode", ".json")
        return _read_json(path, _decode_ratios)


def _read_json(path: Path, read: Callable[[Any], T]) -> T:
    """What `read` makes of a JSON file; AnalysisError if it is not of that form."""
    try:
        return read(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnalysisError(f"{path}: not of the form that its command writes") from error


def _strings(column: pd.Series) -> pd.Series:
    """CSV has no empty string."""
    return column.astype(object).fillna("").astype(str)


def _quantized_rows(document: Any) -> tuple[str, list[dict[str, Any]]]:
    keys = ("weights", "granularity", "calibrated", "difference")
    rows = [{key: row[key] for key in keys} for row in document["results"]]
    for row in rows:
        row["difference"] = float(row["difference"])
    if not any(str(row["weights"]).startswith("ternary") for row in rows):
        raise ValueError("no ternary row")
    return str(document["run_id"]), rows


def _decode_ratios(document: Any) -> dict[str, float]:
    rows = document["ratios"].items()
    found = {name: float(row["median"]) for name, row in rows if name.startswith("decode_speed/")}
    if not found:
        raise ValueError("no ratio of decode speeds")
    return found


def against(frame: pd.DataFrame, base: str, change: str) -> pd.DataFrame | None:
    """Effects within one base of a table, measured from one of its variants.

    The base itself becomes the alternative "the base". None if fewer than two runs of the variant
    finished.
    """
    require(frame, "tag_base", "tag_kind", "tag_change")
    own = frame[frame["tag_base"] == base]
    changes = _strings(own["tag_change"])
    is_new, was_base = changes == change, own["tag_kind"] == BASE
    if len(finished(own[is_new])) < 2:
        return None
    kinds = np.where(is_new, BASE, "instead")
    changes = changes.mask(was_base, "the base").mask(is_new, "")
    return compare(own.assign(tag_kind=kinds, tag_change=changes)).effects
