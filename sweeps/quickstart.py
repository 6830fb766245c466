"""The default sweep: a scaling law in minutes on a laptop.

    python -m experiments.run --sweep

Four sizes x three token budgets x {ternary, fp16} on WikiText-2 bytes. The budgets of a size and
arm are branches of one trunk, so eight runs give twenty-four endpoints. A demonstration of the
machinery and a first look; one seed and a factor of twelve in size do not decide anything.
"""

from ml_collections import ConfigDict

from bitnet_jax.configs import default
from sweeps.grid import Point, axis, product


def get_config(arg: str | None = None) -> ConfigDict:
    """The base of every run, and the axes."""
    del arg
    c = default.get_config()
    c.name = "quickstart"
    c.train.tokens = (300_000, 600_000, 1_200_000)
    c.sweep.sizes = ("27k", "95k", "160k", "330k")
    c.sweep.precisions = ("ternary", "fp16")
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """Smallest first, the two arms of a size one after the other."""
    return product(
        axis("model.size", config.sweep.sizes),
        axis("precision", config.sweep.precisions),
    )
