"""Codes of up to four levels, four to a byte: trits and signs in 2 bits each."""

import jax.numpy as jnp
from jaxtyping import Array, Int8, UInt8

from bitnet_jax.quantize import Quantizer

LEVELS = 4  # that 2 bits tell apart
CODES = 4  # a byte


def fits(quantizer: Quantizer) -> bool:
    """Whether its codes have few enough levels."""
    return quantizer.levels <= LEVELS


def pack(codes: Int8[Array, "*B F"], quantizer: Quantizer) -> UInt8[Array, "*B ceil(F/4)"]:
    """Codes as their places on the grid, the first of four in a byte's lowest bits."""
    places = ((codes - quantizer.low) // quantizer.gap).astype(jnp.uint8)
    short = -codes.shape[-1] % CODES
    places = jnp.pad(places, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    quads = places.reshape(*codes.shape[:-1], -1, CODES)
    low, second, third, high = (quads[..., i] << (2 * i) for i in range(CODES))
    return low | second | third | high


def unpack(
    packed: UInt8[Array, "*B ceil(F/4)"], size: int, quantizer: Quantizer
) -> Int8[Array, "*B F"]:
    """The codes again; size: how many there are along the last axis, F."""
    places = jnp.stack([(packed >> (2 * i)) & 3 for i in range(CODES)], axis=-1)
    places = places.reshape(*packed.shape[:-1], -1)[..., :size].astype(jnp.int8)
    return places * quantizer.gap + quantizer.low
