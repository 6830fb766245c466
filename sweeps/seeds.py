"""The noise floor: one size and budget, many seeds, both arms.

    python -m experiments.run --sweep --config=sweeps/seeds.py

A difference between two runs that is smaller than twice the spread seen here is no difference.
"""

from ml_collections import ConfigDict

from bitnet_jax.configs import default
from sweeps.grid import Point, axis, parse_arg, product


def get_config(arg: str | None = None) -> ConfigDict:
    """The base of every run, and the axes."""
    parse_arg(arg)
    c = default.get_config()
    c.name = "seeds"
    c.model.size = "95k"
    c.train.tokens = (600_000,)
    c.sweep.seeds = (0, 1, 2, 3, 4)
    c.sweep.precisions = ("ternary", "fp16")
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """Every seed in every arm; a seed's two arms share initial values and data order."""
    return product(axis("seed", config.sweep.seeds), axis("precision", config.sweep.precisions))
