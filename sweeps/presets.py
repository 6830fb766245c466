"""Every published recipe beside a 16-bit LLaMA, at one small size and three seeds.

    python -m experiments.run --sweep --config=sweeps/presets.py
    python -m analysis.ingredients results/presets/endpoints.parquet

The recipes are those of `bitnet_jax/configs/presets.py`, with this project's rates. The blog's two
keep the rate of 5e-4 that it gave both arms; at this size it is a tenth of either arm's best.
"""

from ml_collections import ConfigDict

from bitnet_jax.configs.presets import LLAMA, PRESETS
from bitnet_jax.errors import choose
from sweeps import ingredients
from sweeps.grid import Point, axis, parse_arg, product, tags


def get_config(arg: str | None = None) -> ConfigDict:
    """The ingredients' size, budget and seeds."""
    parse_arg(arg)
    c = ingredients.get_config()
    c.name = "presets"
    c.sweep.presets = tuple(PRESETS)
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """The LLaMA in bfloat16, then every recipe, each at every seed."""
    llama = {**LLAMA, "optim.peak_lr": config.sweep.float_lr, "precision": "bf16"}
    points = [{**llama, **tags(base="llama", kind="base", change="", factor="")}]
    for name in config.sweep.presets:
        choose("sweep.presets", name, PRESETS)
        recipe = ingredients.as_wide(config, PRESETS[name]())
        words = tags(base="llama", kind="instead", change=name, factor="recipe")
        points.append({**recipe, **words})
    return product(points, axis("seed", config.sweep.seeds))
