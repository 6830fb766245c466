"""IsoFLOP profiles: several sizes at each of several compute budgets (Hoffmann et al. 2022, 3.2).

    python -m experiments.run --sweep --config=sweeps/isoflop.py:size=800k

`size` names the largest of the five sizes. The four budgets are multiples of what the middle size
costs at 20 tokens a parameter, each about 1.6 times the one before. Each size reaches each budget
on a branch of its one trunk, for .55 of the FLOPs that a run for each budget would cost.

    python -m experiments.run --sweep --config=sweeps/isoflop.py:grid=grid.csv

trains another grid instead: that which `python -m analysis.design --out=grid.csv` chose, or any
table with columns size and tokens and, for more than one run of a size, seed (which one) or seeds
(how many). The rows of one size and seed are ends of one run.
"""

import csv
import math
from pathlib import Path

from ml_collections import ConfigDict

from bitnet_jax import cost, ladder
from bitnet_jax.configs import default
from bitnet_jax.errors import ConfigError
from bitnet_jax.model import TransformerConfig
from sweeps.grid import Point, axis, parse_arg, product, zipit

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, table 3, for 16-bit models


def get_config(arg: str | None = None) -> ConfigDict:
    """The base of every run, and the axes.

    Raises:
      ConfigError: a size that is unknown or has fewer than four smaller ones; a grid that is no
        table of sizes and tokens.
    """
    values = parse_arg(arg, size="", grid="")
    if values["size"] and values["grid"]:
        raise ConfigError(f"config argument {arg!r}: a grid has its own sizes; give one of the two")
    c = default.get_config()
    c.sweep.precisions = ("ternary", "fp16")
    if values["grid"]:
        c.name = f"isoflop-{Path(values['grid']).stem}"
        c.sweep.grid = read_grid(values["grid"])
        return c
    largest = values["size"] or "800k"
    c.name = f"isoflop-{largest}"
    c.sweep.sizes = _sizes_up_to(largest)
    c.sweep.budgets = (0.5, 0.8, 1.25, 2.0)  # of the middle size at 20 tokens a parameter
    c.sweep.vocab_size = 256  # of the corpus, for the FLOPs of the head
    return c


def _sizes_up_to(largest: str) -> tuple[str, ...]:
    """It and the four sizes below it."""
    ladder.get_shape(largest)
    names = list(ladder.LADDER)
    last = names.index(largest) + 1
    sizes = names[max(0, last - 5) : last]
    if len(sizes) < 4:
        raise ConfigError(f"size={largest!r}: an isoFLOP profile needs four sizes; take {names[3]}")
    return tuple(sizes)


def read_grid(path: str) -> tuple[tuple[str, int, tuple[int, ...]], ...]:
    """The runs of a CSV: size, seed and tokens, ascending, of each.

    Raises:
      ConfigError: no such file, no rows, a missing column, an unknown size, or a count that is no
        positive whole number.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"grid={path!r}: it cannot be read ({error})") from error
    if not rows:
        raise ConfigError(f"grid={path!r}: it has no rows")
    runs: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        for column in ("size", "tokens"):
            if not row.get(column):
                raise ConfigError(f"grid={path!r}: a row has no {column!r}; it needs size, tokens")
        ladder.get_shape(row["size"])
        for seed in _seeds(path, row):
            runs.setdefault((row["size"], seed), set()).add(_count(path, row, "tokens", least=1))
    return tuple((size, seed, tuple(sorted(ends))) for (size, seed), ends in runs.items())


def _seeds(path: str, row: dict[str, str]) -> range:
    """One seed, as many as there should be, or seed 0."""
    if row.get("seed"):
        seed = _count(path, row, "seed", least=0)
        return range(seed, seed + 1)
    return range(_count(path, row, "seeds", least=1)) if row.get("seeds") else range(1)


def _count(path: str, row: dict[str, str], column: str, least: int) -> int:
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not (value.is_integer() and value >= least):
        right = f"expected a whole number from {least}"
        raise ConfigError(f"grid={path!r}: {column} {row[column]!r}; {right}")
    return int(value)


def budgets_in_tokens(config: ConfigDict, size: str) -> tuple[int, ...]:
    """The tokens with which `size` spends each compute budget, in whole batches."""

    def model(name: str) -> TransformerConfig:
        shape = ladder.get_shape(name)._asdict()
        return TransformerConfig(vocab_size=config.sweep.vocab_size, **shape)

    def flops(name: str) -> int:
        return cost.training_flops_per_token(model(name), config.data.sequence_length)

    middle = config.sweep.sizes[len(config.sweep.sizes) // 2]
    parameters = cost.count_parameters(model(middle)).non_embedding
    unit = TOKENS_PER_PARAMETER * parameters * flops(middle)
    batch = config.train.batch_tokens
    return tuple(round(b * unit / flops(size) / batch) * batch for b in config.sweep.budgets)


def sweep(config: ConfigDict) -> list[Point]:
    """Every size with its own budgets, or every run of the grid, in every arm."""
    if "grid" in config.sweep:
        runs = [
            {"model.size": size, "seed": seed, "train.tokens": tokens}
            for size, seed, tokens in config.sweep.grid
        ]
        return product(runs, axis("precision", config.sweep.precisions))
    sizes = config.sweep.sizes
    tokens = [budgets_in_tokens(config, size) for size in sizes]
    return product(
        zipit(axis("model.size", sizes), axis("train.tokens", tokens)),
        axis("precision", config.sweep.precisions),
    )
