"""The default sweep: a scaling law in minutes on a laptop.

    python -m experiments.run --sweep

Four sizes x three token budgets x {ternary, fp16} on WikiText-2 bytes. The budgets of a size and
arm are branches of one trunk, so eight runs give twenty-four endpoints. Smaller sizes get more
tokens, so that sizes meet at equal compute and the best of them can be seen. A demonstration of the
machinery and a first look; one seed and a factor of twelve in size do not decide anything.
"""

from ml_collections import ConfigDict

from bitnet_jax.configs import default
from sweeps.grid import Point, axis, parse_arg, product, zipit


def get_config(arg: str | None = None) -> ConfigDict:
    """The base of every run, and the axes."""
    parse_arg(arg)
    c = default.get_config()
    c.name = "quickstart"
    c.eval.tokens = 131_072
    c.sweep.sizes = ("27k", "95k", "160k", "330k")
    c.sweep.tokens = (1_600_000, 1_280_000, 960_000, 800_000)  # largest budget of each size
    c.sweep.shares = (0.25, 0.5, 1.0)  # the budgets of a size, of its largest
    c.sweep.precisions = ("ternary", "fp16")
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """Smallest first, the two arms of a size one after the other."""
    budgets = [
        tuple(int(tokens * s) for s in config.sweep.shares) for tokens in config.sweep.tokens
    ]
    return product(
        zipit(axis("model.size", config.sweep.sizes), axis("train.tokens", budgets)),
        axis("precision", config.sweep.precisions),
    )
