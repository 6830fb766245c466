"""Causal grouped-query attention. Axis legend in `model.py`; G = N/K query heads share a key head.

Written out rather than taken from `jax.nn.dot_product_attention`, which has no float16 path on a
CPU and multiplies float32 cotangents in its backward pass: here backward products run in the arm's
compute dtype, in every arm. Queries are taken in blocks, each with the keys up to its own end, so
that most of what the mask would throw away is never computed; what is saved for the backward pass
are the probabilities, in 16 bits. On a GPU `cudnn` is the flash kernel instead, which saves none.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bitnet_jax.layout import moved
from bitnet_jax.saving import mark

IMPLEMENTATIONS = ("blocks", "cudnn")

# Queries a block: as few as still make good matrix products. The program grows with the blocks.
BLOCK = 64
MAX_BLOCKS = 8


class Cache(NamedTuple):
    """Keys and values of what a text has so far, and how many tokens that is; S is the most."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    length: Int[Array, ""]


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    implementation: str = "blocks",
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H) + causal mask) v; softmax and accumulation are float32.

    The result has q's dtype, as have the operands of every product.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    batch, length, heads, head_size = q.shape
    kv_heads = k.shape[2]
    scaled = (q.astype(jnp.float32) * head_size**-0.5).astype(q.dtype)
    grouped = scaled.reshape(batch, length, kv_heads, -1, head_size).transpose(0, 2, 3, 1, 4)
    y = _attend(grouped, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_size)


def continued_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], past: Cache
) -> tuple[Float[Array, "B T N H"], Cache]:
    """`causal_attention` of tokens that come after others, or of several that begin a text.

    Operands are those of `causal_attention`, rounded to q's dtype; sums are float32, as there, but
    over the whole cache, whose end the mask makes exact zeros.
    """
    batch, length, heads, head_size = q.shape
    start = (0, 0, past.length, 0)
    keys, values = (
        jax.lax.dynamic_update_slice(old, new.transpose(0, 2, 1, 3).astype(old.dtype), start)
        for old, new in ((past.keys, k), (past.values, v))
    )
    now = Cache(keys, values, past.length + length)
    if length > 1:  # the first
        return causal_attention(q, k, v), now
    scaled = (q.astype(jnp.float32) * head_size**-0.5).astype(q.dtype)
    rows = scaled.reshape(batch, k.shape[2], -1, head_size).astype(jnp.float32)
    unseen = jnp.arange(keys.shape[2]) > past.length
    # As float32: XLA's CPU backend has no fast 16-bit product of a vector.
    scores = _product(rows, keys.astype(jnp.float32), 3, 3)
    scores += jnp.where(unseen, -jnp.inf, 0.0)[None, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype).astype(jnp.float32)
    y = _product(weights, values.astype(jnp.float32), 3, 2).astype(q.dtype)
    return y.reshape(batch, 1, heads, head_size), now


@jax.custom_vjp
def _attend(
    q: Float[Array, "B K G T H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"]
) -> Float[Array, "B K G T H"]:
    """q comes scaled."""
    return _attend_forward(q, k, v)[0]


def query_blocks(length: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each block of queries."""
    size = max(BLOCK, -(-length // MAX_BLOCKS))
    for start in range(0, length, size):
        yield start, min(start + size, length)


def _rows(x: Float[Array, "B K G T H"], start: int, end: int) -> Float[Array, "B K Gt H"]:
    """A block of queries; those of a group become further rows of one product."""
    return x[:, :, :, start:end].reshape(*x.shape[:2], -1, x.shape[4])


def _forward_block(q, k, v, start, end):
    """The outputs and probabilities of queries [start, end)."""
    visible = np.arange(end)[None, :] <= np.arange(start, end)[:, None]
    mask = np.tile(np.where(visible, 0, -np.inf).astype(np.float32), (q.shape[2], 1))
    scores = _product(_rows(q, start, end), k[:, :, :end], 3, 3) + mask[None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    y = _product(weights, v[:, :, :end], 3, 2).astype(q.dtype)
    return y.reshape(*q.shape[:3], end - start, q.shape[4]), weights


def _attend_forward(q, k, v):
    blocks = [_forward_block(q, k, v, *block) for block in query_blocks(q.shape[3])]
    y = jnp.concatenate([y for y, _ in blocks], axis=3)
    residuals = mark((q, k, v, tuple(weights for _, weights in blocks), y), "attention")
    return residuals[-1], residuals


def _attend_backward(residuals, g):
    """d scores = p * (dp - sum(p dp)), where sum(p dp) = g . y (FlashAttention, appendix B.2)."""
    q, k, v, all_weights, y = residuals
    inner = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    length, dq = q.shape[3], []
    dk = dv = jnp.zeros((*k.shape[:2], k.shape[3], length), jnp.float32)  # heads before keys
    for weights, (start, end) in zip(all_weights, query_blocks(length), strict=True):
        rows = _rows(g, start, end)
        d_weights = _product(rows, v[:, :, :end], 3, 3) - _rows(inner, start, end)
        d_scores = (weights.astype(jnp.float32) * d_weights).astype(q.dtype)
        block = _product(d_scores, k[:, :, :end], 3, 2)
        dq.append(block.reshape(*q.shape[:3], end - start, q.shape[4]))
        unseen = ((0, 0), (0, 0), (0, 0), (0, length - end))
        # Of the two operands the smaller one is moved.
        dk += jnp.pad(_product(moved(_rows(q, start, end)), d_scores, 3, 2), unseen)
        dv += jnp.pad(_product(moved(rows), weights, 3, 2), unseen)
    # Without the barrier XLA would fold the transpose into a product that a CPU cannot do.
    dk, dv = (jnp.swapaxes(jax.lax.optimization_barrier(d), 2, 3) for d in (dk, dv))
    dq = jnp.concatenate(dq, axis=3)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Float[Array, "B K _ _"]:
    """Contract one axis of each, for every sequence and key head, accumulating in float32."""
    exactness = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = ((axis_a,), (axis_b,)), ((0, 1), (0, 1))
    return jax.lax.dot_general(
        a, b, dimensions, precision=exactness, preferred_element_type=jnp.float32
    )
