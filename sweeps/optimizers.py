"""Rates for the arms and optimizers that `sweeps/ingredients.py` compares, at one seed.

    python -m experiments.run --sweep --config=sweeps/optimizers.py

At the size and budget of the ingredients: a row of rates for AdamW in both arms, for Lion and for
Muon, and for Bop rates and thresholds.
"""

from ml_collections import ConfigDict

from sweeps import ingredients
from sweeps.grid import Point, axis, chain, parse_arg, product


def get_config(arg: str | None = None) -> ConfigDict:
    """The ingredients' base recipe, and the axes."""
    parse_arg(arg)
    c = ingredients.get_config()
    c.name = "optimizers"
    c.tags.optimizer = ""
    c.seed = 3  # not one of the ingredients' seeds
    c.sweep.adamw = (1.25e-3, 2.5e-3, 5e-3, 7.5e-3, 1e-2, 1.5e-2)
    c.sweep.lion = (3e-4, 6e-4, 1.2e-3, 2.4e-3)
    c.sweep.muon = (2.5e-3, 5e-3, 1e-2, 2e-2)
    c.sweep.bop_lrs = (2.5e-3, 5e-3, 1e-2)
    c.sweep.bop_thresholds = (1e-6, 3e-6, 1e-5, 3e-5)
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """Every rate of every optimizer; Bop with every threshold; and AdamW's in float16."""
    floats = product(
        axis("precision", ["fp16"]),
        axis("tags.optimizer", ["adamw"]),
        axis("optim.peak_lr", config.sweep.adamw),
    )
    rates = [
        product(
            axis("optim.name", [name]),
            axis("tags.optimizer", [name]),
            axis("optim.peak_lr", config.sweep[name]),
        )
        for name in ("adamw", "lion", "muon")
    ]
    bop = product(
        axis("optim.name", ["bop"]),
        axis("tags.optimizer", ["bop"]),
        axis("optim.peak_lr", config.sweep.bop_lrs),
        axis("optim.bop_threshold", config.sweep.bop_thresholds),
    )
    return chain(*rates, bop, floats)
