"""How fast this machine trains, for the dry run's times."""

import math
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from bitnet_jax.errors import ConfigError
from experiments.plan import Plan
from experiments.summary import read_summary

# A training step of a small model reaches about this share of a large matrix product's rate.
ASSUMED_UTILISATION = 0.2


def flops_per_second(plan: Plan) -> tuple[float, str]:
    """FLOP/s to expect, and where the number comes from.

    From the finished runs under the same workdir if there are any; otherwise a share of the rate of
    a matrix product timed now.
    """
    rates = list(_measured(plan))
    if rates:
        rates.sort()
        return rates[len(rates) // 2], f"median of {len(rates)} finished runs"
    return ASSUMED_UTILISATION * _product_rate(), (
        f"{ASSUMED_UTILISATION:.0%} of a matrix product timed now, a guess"
    )


def _measured(plan: Plan) -> Iterable[float]:
    for path in plan.directory.parent.glob("*/runs/*/summary.json"):
        try:
            summary = read_summary(path.parent)
            rate = summary["total_flops"] / summary["wall_s"]
            if summary["status"] == "ok" and 0 < rate < math.inf:
                yield rate
        except (ConfigError, OSError, KeyError, TypeError, ArithmeticError):
            continue  # a damaged summary tells no speed; its own sweep says so


def _product_rate(side: int = 1024, repeats: int = 5) -> float:
    a = jnp.ones((side, side), jnp.bfloat16)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(a))
    began = time.perf_counter()
    for _ in range(repeats):
        result = product(a)
    jax.block_until_ready(result)
    return 2 * side**3 * repeats / (time.perf_counter() - began)
