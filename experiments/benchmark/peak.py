"""The rate that a step's utilisation is a share of."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmark.timing import interleave

# FLOP/s of dense bfloat16 products by the makers' data sheets, a device, by JAX's name of its kind.
# A slice of a GPU (MIG) and the slower cards of the same name are not in it: they are measured.
DENSE_BF16 = {
    r"NVIDIA H200": 989e12,
    r"NVIDIA H100 80GB HBM3": 989e12,  # SXM
    r"NVIDIA A100(?!.*MIG).*": 312e12,
    r"TPU v4": 275e12,
    r"TPU v5 ?(lite|e)": 197e12,
    r"TPU v5p?": 459e12,
    r"TPU v6 ?(lite|e)": 918e12,
}


class Peak(NamedTuple):
    """FLOP/s, and where the number comes from."""

    flops_per_s: float
    source: str


@functools.cache
def peak() -> Peak:
    """The device's: from the table where it is known, else measured now, once a process."""
    device = jax.devices()[0]
    known = known_peak(device.device_kind)
    if known:
        return Peak(known, f"data sheet of the {device.device_kind}, dense bfloat16")
    side = 2048 if device.platform == "cpu" else 8192
    source = (
        f"what XLA reached just now in a product of {side} x {side} bfloat16 into float32, the "
        "fastest of 5; other code may be faster"
    )
    return Peak(_product_rate(side), source)


def known_peak(device_kind: str) -> float | None:
    """The table's entry for one of JAX's device kinds."""
    rates = (rate for kind, rate in DENSE_BF16.items() if re.fullmatch(kind, device_kind))
    return next(rates, None)


def _product_rate(side: int) -> float:
    a = jnp.ones((side, side), jnp.bfloat16)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    seconds = interleave({"product": lambda: product(a, a).block_until_ready()}, repeats=5)
    return 2 * side**3 / min(seconds["product"])
