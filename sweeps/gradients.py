"""How near each estimator's gradient comes to what moving a weight really does to the loss.

    python -m experiments.run --sweep --config=sweeps/gradients.py
    python -m experiments.collect results/gradients --latents

The ingredients' base recipe and the variants that act on the gradient, retrained and compared with
finite differences at their endpoints (`bitnet_jax/gradient_check.py`).
"""

from ml_collections import ConfigDict

from sweeps import ingredients
from sweeps.grid import Point, axis, parse_arg, product

ESTIMATORS = ("estimator clipped", "estimator trust", "estimator stochastic")
WITHOUT = ("int8 activations",)


def get_config(arg: str | None = None) -> ConfigDict:
    """The ingredients' size, budget and seeds."""
    parse_arg(arg)
    c = ingredients.get_config()
    c.name = "gradients"
    c.log.gradient_sample = 64
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """Every variant at every seed."""
    estimators = {change: ingredients.INSTEAD[change] for change in ESTIMATORS}
    without = {change: ingredients.WITHOUT[change] for change in WITHOUT}
    kinds = [("instead", estimators), ("without", without)]
    points = ingredients.variants(config, "full", {}, kinds)
    return product(points, axis("seed", config.sweep.seeds))
