"""Every published recipe beside a 16-bit LLaMA, at one small size and three seeds.

    python -m experiments.run --sweep --config=sweeps/presets.py
    python -m analysis.ingredients results/presets/endpoints.parquet

The recipes are those of `bitnet_jax/configs/presets.py`, with this project's rates. The blog's two
keep the rate of 5e-4 that it gave both arms; at this size it is a tenth of either arm's best.
"""

from ml_collections import ConfigDict

from bitnet_jax import ladder
from bitnet_jax.configs.presets import LLAMA, PRESETS
from bitnet_jax.errors import ConfigError
from sweeps import ingredients
from sweeps.grid import Point, axis, parse_arg, product


def get_config(arg: str | None = None) -> ConfigDict:
    """The ingredients' size, budget and seeds."""
    parse_arg(arg)
    c = ingredients.get_config()
    c.name = "presets"
    c.sweep.presets = tuple(PRESETS)
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """The LLaMA in bfloat16, then every recipe, each at every seed."""
    rate = {"optim.peak_lr": config.sweep.float_lr}
    llama = {**LLAMA, **rate, "precision": "bf16", **_tags("base", "")}
    for name in config.sweep.presets:
        if name not in PRESETS:
            raise ConfigError(
                f"sweep.presets={name!r} is unknown; choose from {', '.join(PRESETS)}"
            )
    recipes = [
        {**_as_wide(config, PRESETS[name]()), **_tags("instead", name)}
        for name in config.sweep.presets
    ]
    return product([llama, *recipes], axis("seed", config.sweep.seeds))


def _as_wide(config: ConfigDict, keys: Point) -> Point:
    """A recipe without a gate gets its matrix's parameters in the other two."""
    if keys.get("model.gated", True):
        return keys
    return {**keys, "model.ff_width": 3 * ladder.get_shape(config.model.size).ff_width // 2}


def _tags(kind: str, change: str) -> Point:
    tags = {"base": "llama", "kind": kind, "change": change, "factor": "recipe" if change else ""}
    return {f"tags.{key}": value for key, value in tags.items()}
