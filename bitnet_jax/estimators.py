"""Gradients through rounding: what stands for the derivative that is zero almost everywhere.

An estimator turns the gradient with respect to the quantized values into one with respect to the
values before. All of them pass it on, and differ in where they do not:

- `identity`: everywhere (Bengio et al. 2013, arXiv:1308.3432), as every BitNet paper does.
- `clipped`: where the value lies within the grid, the derivative of clipping to it (Hubara et al.
  2016, arXiv:1602.02830, eq. 4). A weight beyond the last level gets no gradient.
- `trust`: where rounding moved the value by at most half a step of the grid (QuEST,
  arXiv:2502.05003, section 3.2), so that a weight up to half a step beyond the last level still
  learns.
- `stochastic`: everywhere, and the forward pass rounds up or down by chance, so that the mean of
  the quantized value, within the grid, is the value itself: the estimator is then unbiased for
  a linear loss. Without a random key, as in evaluation, it rounds to nearest.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bitnet_jax.quantize import SCALE_FLOOR, Axes, Quantized, Quantizer, dequantize, quantize

ESTIMATORS = ("identity", "clipped", "trust", "stochastic")


def passes(
    estimator: str, quantizer: Quantizer, x: Float[Array, "..."], q: Quantized
) -> Bool[Array, "..."] | None:
    """Where the gradient passes; None for everywhere. x and the codes have one shape."""
    if quantizer.reach is None or estimator in ("identity", "stochastic"):
        return None
    x = x.astype(jnp.float32)
    # Room for how the scale was rounded: the largest value of a block may be the last level.
    scale = q.scale * (1 + 2**-21)
    if estimator == "trust":
        return jnp.abs(dequantize(q) - x) <= quantizer.gap / 2 * scale
    return (quantizer.low * scale <= x) & (x <= quantizer.high * scale)


def apply_mask(
    mask: Bool[Array, "..."] | None,
    g: Float[Array, "..."],
    strength: Float[Array, ""] | None = None,
) -> Float[Array, "..."]:
    """The gradient where it passes; elsewhere 0, or the share of it that is not quantized yet."""
    if mask is None:
        return g
    return jnp.where(mask, g, 0 if strength is None else (1 - strength) * g)


def step_gradient(
    quantizer: Quantizer,
    x: Float[Array, "..."],
    q: Quantized,
    step: Float[Array, "..."],
    g: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Gradient of a learned scale (LSQ, arXiv:1902.08153, eq. 3 and section 2.2).

    Each value contributes g * (code - x/scale), or g * code where x lies beyond the last level; the
    sum over a block is divided by sqrt(values * high), so that scales move as fast as weights.
    x, codes and g have one shape, against which q.scale broadcasts. A scale below the floor, where
    `quantize` does not let it go, gets no gradient.
    """
    ratio = x.astype(jnp.float32) / q.scale
    inside = (quantizer.low < ratio) & (ratio < quantizer.high)
    terms = g * (q.codes - jnp.where(inside, ratio, 0))
    axes = tuple(axis for axis in range(x.ndim) if step.shape[axis] == 1)
    total = jnp.sum(terms, axis=axes, keepdims=True)
    values = x.size / step.size
    return jnp.where(step > SCALE_FLOOR, total / jnp.sqrt(values * quantizer.high), 0)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def fake_quantize(
    x: Float[Array, "*shape"], quantizer: Quantizer, axes: Axes, estimator: str = "identity"
) -> Float[Array, "*shape"]:
    """The quantized values in x's own dtype; the gradient is the estimator's.

    This is the plain version, the reference of the fused product in `matmul.py`.
    """
    return dequantize(quantize(quantizer, x, axes)).astype(x.dtype)


def _fake_quantize_forward(x, quantizer, axes, estimator):
    q = quantize(quantizer, x, axes)
    return dequantize(q).astype(x.dtype), passes(estimator, quantizer, x, q)


def _fake_quantize_backward(quantizer, axes, estimator, mask, cotangent):
    del quantizer, axes, estimator
    return (apply_mask(mask, cotangent),)


fake_quantize.defvjp(_fake_quantize_forward, _fake_quantize_backward)
