"""A fingerprint of arrays, made where they are: what a checkpoint was, to tell whether it still is.

Two sums of 32 bits, modulo 2^32, over every word of every leaf. A word is multiplied by an odd
number that depends on its place, and mixed, before it is added: each step is one to one, so that a
change of any one word always changes both sums, and a change of several does but for one chance in
2^64. Sums of integers do not depend on their order: neither on devices nor on a group's size.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

# Odd, without small structure; a column a sum.
_SPREAD, _FIRST, _SECOND = np.array(
    [[0x9E3779B1, 0x27D4EB2F], [0x85EBCA6B, 0x165667B1], [0xC2B2AE35, 0xCC9E2D51]], np.uint32
)
# Leaves of up to so many words are laid end to end: one loop for dozens of them compiles ten times
# faster than dozens of loops. Larger ones stay where they are, since that takes a copy.
_LARGE = 2**20


def fingerprint(tree: Any) -> str:
    """16 hexadecimal digits that depend on each bit, dtype, shape and name of a tree of arrays."""
    return "".join(f"{int(number):08x}" for number in jax.device_get(_sums(tree)))


@jax.jit
def _sums(tree: Any) -> UInt32[Array, "2"]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}" for path, leaf in leaves]
    place = zlib.crc32("\n".join(names).encode())
    words = [_words(leaf) for _, leaf in leaves]
    small = [leaf.reshape(-1) for leaf in words if leaf.size <= _LARGE]
    parts = [jnp.concatenate(small)] if small else []
    total = jnp.asarray(np.uint32(place) * _SPREAD)
    for part in parts + [leaf for leaf in words if leaf.size > _LARGE]:
        total += _sum(part, _places(part.shape) + jnp.uint32(place))
        place = (place + part.size) % 2**32
    return total


def _sum(words: UInt32[Array, "..."], places: UInt32[Array, "..."]) -> UInt32[Array, "2"]:
    words, places = words[..., None], places[..., None]
    weights = _mix(_times(places, _SPREAD), _FIRST) | jnp.uint32(1)
    # Without the mixing two flipped signs would cancel: 2^31 times the sum of two odd numbers is 0.
    mixed = _mix(_mix(words * weights, _FIRST), _SECOND)
    return jnp.sum(mixed, axis=tuple(range(words.ndim - 1)), dtype=jnp.uint32)


def _mix(words: UInt32[Array, "... 2"], multipliers: np.ndarray) -> UInt32[Array, "... 2"]:
    """One to one: high bits are brought to the low ones, and low to high."""
    return _times(words ^ (words >> jnp.uint32(15)), multipliers)


def _times(words: UInt32[Array, "..."], multipliers: np.ndarray) -> UInt32[Array, "... 2"]:
    return words * multipliers.reshape((1,) * (words.ndim - 1) + (2,))


def _places(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Each element's number in row-major order, without moving any to count it."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return place


def _words(leaf: Array) -> UInt32[Array, "..."]:
    """The bits of each element as 32-bit words; of a 64-bit element two, along a new last axis."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
