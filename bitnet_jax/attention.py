"""Causal grouped-query attention. Axis legend in `model.py`; G = N/K query heads share a key head.

Written out rather than taken from `jax.nn.dot_product_attention`, which has no float16 path on a
CPU and multiplies float32 cotangents in its backward pass: here backward products run in the arm's
compute dtype, in every arm, and what is saved for them is one matrix of probabilities in 16 bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H) + causal mask) v; softmax and accumulation are float32.

    The result has q's dtype, as have the operands of every product.
    """
    batch, length, heads, head_size = q.shape
    kv_heads = k.shape[2]
    # The query heads of a group become further rows of one product with their key head.
    rows = q.reshape(batch, length, kv_heads, -1, head_size).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, -1, head_size)
    y = _attend(rows, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    y = y.reshape(batch, kv_heads, -1, length, head_size).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, length, heads, head_size)


@jax.custom_vjp
def _attend(
    q: Float[Array, "B K GT H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"]
) -> Float[Array, "B K GT H"]:
    return _attend_forward(q, k, v)[0]


def _attend_forward(q, k, v):
    length = k.shape[2]
    mask = np.where(np.tril(np.ones((length, length), bool)), 0, -np.inf).astype(np.float32)
    mask = np.tile(mask, (q.shape[2] // length, 1))[None, None]
    scores = _product(q, k, 3, 3) * q.shape[3] ** -0.5 + mask
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    y = _product(weights, v, 3, 2).astype(q.dtype)
    return y, (q, k, v, weights, y)


def _attend_backward(residuals, g):
    """d scores = p * (dp - sum(p dp)), where sum(p dp) = g . y (FlashAttention, appendix B.2)."""
    q, k, v, weights, y = residuals
    d_weights = _product(g, v, 3, 3)
    inner = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = weights.astype(jnp.float32) * (d_weights - inner) * q.shape[3] ** -0.5
    d_scores = d_scores.astype(q.dtype)
    dq, dk = _product(d_scores, k, 3, 2), _product(d_scores, q, 2, 2)
    dv = _product(weights, g, 2, 2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Float[Array, "B K _ _"]:
    """Contract one axis of each, for every sequence and head, accumulating in float32."""
    exactness = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = ((axis_a,), (axis_b,)), ((0, 1), (0, 1))
    return jax.lax.dot_general(
        a, b, dimensions, precision=exactness, preferred_element_type=jnp.float32
    )
