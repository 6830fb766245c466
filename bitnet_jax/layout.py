"""Where an operand's axes lie in memory, which decides how fast a CPU multiplies it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bitnet_jax import sharding


def moved(x: Array) -> Array:
    """[..., R, C] as [..., C, R], really moved on a CPU.

    Its fast products read the contracted axis of their left operand in memory order; XLA would
    fold a plain transpose into the product, which then runs at a third to a half of the speed.
    16-bit floats are moved as integers, since they would be moved as float32. On a mesh the halves
    would lie on other devices, and travel.
    """
    if sharding.is_cut():
        return jnp.swapaxes(x, -1, -2)
    return lax.platform_dependent(x, cpu=_by_halves, default=lambda x: jnp.swapaxes(x, -1, -2))


def _by_halves(x: Array) -> Array:
    """A transpose that XLA cannot fold: of two halves, put side by side."""
    bits = lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x
    half = x.shape[-2] // 2
    halves = bits[..., :half, :], bits[..., half:, :]
    bits = jnp.concatenate([jnp.swapaxes(part, -1, -2) for part in halves], axis=-1)
    return lax.bitcast_convert_type(bits, x.dtype)
