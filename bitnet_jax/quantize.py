"""Codes and scales: what a tensor becomes before it enters a quantized product.

A quantizer is a pure function `Float[Array, "*shape"] -> Quantized`: codes on an integer grid and a
float32 scale that broadcasts against them, so that `codes * scale` approximates the input. It reads
the float32 master (quantizing after a bfloat16 cast changes .17 % of the trits) and it does not
know of gradients: `fake_quantize` adds the straight-through estimator to any of them, and
`matmul.quantized_dot` builds the fused product on them.

Codes cannot hold NaN. A NaN or infinity in the input makes the SCALE NaN, so every value it covers
is NaN in turn; the codes beneath are 0. Nothing is ever silently rounded to a trit.

Adding a quantizer is one function and one row in a table.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

# Below this the published codes treat a tensor as zero: Microsoft's "Training Tips, Code and FAQ"
# (2024) clamps both mean|W| and max|x| at 1e-5.
SCALE_FLOOR = 1e-5


class Quantized(NamedTuple):
    """`codes * scale` approximates the input.

    codes: int8 for grids, or the input itself where nothing is quantized.
    scale: float32, broadcastable to codes; the step of the grid.
    """

    codes: Num[Array, "..."]
    scale: Float[Array, "..."]


Quantizer = Callable[[Float[Array, "..."]], Quantized]


def dequantize(q: Quantized) -> Float[Array, "..."]:
    """The float32 values that the codes stand for."""
    return q.codes.astype(jnp.float32) * q.scale


def identity(x: Float[Array, "..."]) -> Quantized:
    """No quantization: the input as its own codes, with scale 1."""
    return Quantized(x, jnp.ones((1,) * x.ndim, jnp.float32))


def ternary_absmean(w: Float[Array, "..."]) -> Quantized:
    """Trits by the mean magnitude of the whole tensor (BitNet b1.58, arXiv:2402.17764, eq. 1-3).

    gamma = max(mean|w|, 1e-5); codes = clip(round(w / gamma), -1, 1), halves to even. The floor is
    where the FAQ's reference code puts the paper's epsilon.
    """
    w = w.astype(jnp.float32)
    # Dividing before the sum keeps the mean finite for weights of up to 3e38.
    gamma = jnp.maximum(jnp.sum(jnp.abs(w) / w.size, keepdims=True), SCALE_FLOOR)
    # round(w / gamma) is 0 up to gamma/2, that included. Compared and not divided: XLA multiplies
    # by 1/gamma, which is off by an ulp, and flushed to 0 for gamma above 8.5e37.
    codes = jnp.where(jnp.abs(w) > gamma / 2, jnp.sign(w), 0).astype(jnp.int8)
    return Quantized(codes, _poison(gamma))


def int8_absmax(x: Float[Array, "*B D"]) -> Quantized:
    """Integers -128..127 by each token's largest magnitude (BitNet, arXiv:2310.11453, eq. 4-5).

    codes = clip(round(x * 127 / max(max|x|, 1e-5)), -128, 127) along the last axis.
    """
    x = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), SCALE_FLOOR)
    return _codes(x * (127.0 / largest), low=-128, high=127, scale=_poison(largest / 127.0))


def _codes(grid: Float[Array, "..."], *, low: int, high: int, scale: Array) -> Quantized:
    """Round to the grid. Casting NaN to an integer is undefined, so those codes are set to 0."""
    codes = jnp.clip(jnp.round(grid), low, high)
    return Quantized(jnp.where(jnp.isnan(codes), 0, codes).astype(jnp.int8), scale)


def _poison(scale: Array) -> Array:
    """An infinite scale would give 0 * inf here and inf there: make it NaN everywhere."""
    return jnp.where(jnp.isfinite(scale), scale, jnp.nan)


WEIGHT_QUANTIZERS: dict[str, Quantizer] = {
    "none": identity,
    "ternary_absmean": ternary_absmean,
}
ACTIVATION_QUANTIZERS: dict[str, Quantizer] = {
    "none": identity,
    "int8_absmax": int8_absmax,
}


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def fake_quantize(x: Float[Array, "*shape"], quantizer: Quantizer) -> Float[Array, "*shape"]:
    """The quantized values in x's own dtype; the gradient passes straight through.

    d/dx is taken as the identity (Bengio et al. 2013, arXiv:1308.3432), the estimator of every
    BitNet paper. This is the plain version, the reference of the fused product in `matmul.py`.
    """
    return dequantize(quantizer(x)).astype(x.dtype)


def _fake_quantize_forward(x, quantizer):
    return fake_quantize(x, quantizer), None


def _fake_quantize_backward(quantizer, residual, cotangent):
    del quantizer, residual
    return (cotangent,)


fake_quantize.defvjp(_fake_quantize_forward, _fake_quantize_backward)
