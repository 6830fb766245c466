"""The best peak learning rate of each arm at each size, separately.

    python -m experiments.run --sweep --config=sweeps/learning_rate.py

A ternary model wants a rate several times higher than its float twin; tuning one arm and using its
rate in both is a confound of several published comparisons.
"""

from ml_collections import ConfigDict

from bitnet_jax.configs import default
from sweeps.grid import Point, axis, parse_arg, product


def get_config(arg: str | None = None) -> ConfigDict:
    """The base of every run, and the axes."""
    parse_arg(arg)
    c = default.get_config()
    c.name = "learning_rate"
    c.train.tokens = (600_000,)
    c.sweep.sizes = ("27k", "95k", "330k")
    c.sweep.precisions = ("ternary", "fp16")
    c.sweep.peak_lrs = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """Every rate in every arm at every size."""
    return product(
        axis("model.size", config.sweep.sizes),
        axis("precision", config.sweep.precisions),
        axis("optim.peak_lr", config.sweep.peak_lrs),
    )
