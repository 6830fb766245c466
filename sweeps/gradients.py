"""How near each estimator's gradient comes to what moving a weight really does to the loss.

    python -m experiments.run --sweep --config=sweeps/gradients.py
    python -m experiments.collect results/gradients --latents

The ingredients' base recipe and the variants that act on the gradient, retrained and compared with
finite differences at their endpoints (`bitnet_jax/gradient_check.py`).
"""

from ml_collections import ConfigDict

from sweeps import ingredients
from sweeps.grid import Point, axis, parse_arg, product

VARIANTS = {
    "": {},
    **{
        f"estimator {name}": {"quantization.estimator": name}
        for name in ("clipped", "trust", "stochastic")
    },
    "int8 activations": {"quantization.activations": "none"},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The ingredients' size, budget and seeds."""
    parse_arg(arg)
    c = ingredients.get_config()
    c.name = "gradients"
    c.log.gradient_sample = 64
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """Every variant at every seed."""
    points: list[Point] = []
    for change, keys in VARIANTS.items():
        kind = "base" if not change else "without" if "activations" in change else "instead"
        points.append({**keys, "tags.base": "full", "tags.kind": kind, "tags.change": change})
    return product(points, axis("seed", config.sweep.seeds))
