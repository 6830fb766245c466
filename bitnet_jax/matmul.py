"""The quantized matrix product: integer forward, straight-through backward, one custom_vjp.

`quantized_dot` is what every linear layer of every arm runs. `reference_dot` is the plain
composition that it must equal: fake-quantize both operands, multiply in float32, differentiate.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from bitnet_jax import estimators
from bitnet_jax.granularity import kernel_step_gradient, kernel_values, quantize_kernel
from bitnet_jax.precision import Precision
from bitnet_jax.quantize import Quantized, dequantize, quantize


class Context(NamedTuple):
    """What a product depends on beside its operands, at one step of training.

    strength: of quantization, in [0, 1]: both operands are x + strength * (q(x) - x) (warm-up
      quantization, from the Hugging Face team's "Fine-tuning LLMs to 1.58bit", 2024). The operands
      are then no codes, and the product is one of the compute dtype. None: full quantization.
    key: for stochastic rounding. None rounds to nearest.
    """

    strength: Float[Array, ""] | None = None
    key: Key[Array, ""] | None = None


DEPLOYED = Context()  # full quantization, to nearest: how a model is evaluated and used


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def quantized_dot(
    x: Float[Array, "*B D"],
    w: Float[Array, "D F"],
    step: Float[Array, "..."] | None,
    context: Context,
    precision: Precision,
    row_parallel: bool = False,
) -> Float[Array, "*B F"]:
    """x @ w through the arm's quantizers, in the arm's compute dtype.

    Forward: the product of the codes, exact where both are integers, with the scales applied once
    after it. What is trained is what is deployed: an integer engine gives the same numbers.
    Backward: straight-through. With x' and w' the dequantized operands, dx = g w'^T and
    dw = x'^T g, as 16-bit products (32-bit in the fp32 arm) with float32 accumulation; the arm's
    estimators then say where these gradients pass.

    step: learned scales of w, where the weight quantizer has them; they get a gradient too.
    row_parallel: how tensor parallelism would cut w, which per-shard scales depend on.
    """
    return _forward(x, w, step, context, precision, row_parallel)[0]


def reference_dot(
    x: Float[Array, "*B D"], w: Float[Array, "D F"], precision: Precision
) -> Float[Array, "*B F"]:
    """The same product by plain composition in float32; slow, obvious, and the test's yardstick.

    For one scale a tensor that is not learned, rounded to nearest.
    """
    x_hat = estimators.fake_quantize(
        x.astype(jnp.float32),
        precision.activation_quantizer,
        (x.ndim - 1,),
        precision.activation_estimator,
    )
    w_hat = estimators.fake_quantize(
        w.astype(jnp.float32), precision.weight_quantizer, (0, 1), precision.estimator
    )
    return jnp.matmul(x_hat, w_hat, precision=lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def plain_dot(
    x: Float[Array, "*B D"], w: Float[Array, "F D"], precision: Precision
) -> Float[Array, "*B F"]:
    """x @ w^T without quantization, in the arm's compute dtype, forward and backward.

    The product of the head, whose w is an embedding's layout. Its gradient is computed in that
    layout, since XLA's CPU backend cannot run a bfloat16 product whose result it must transpose.
    """
    return _plain_forward(x, w, precision)[0]


# ---- Operands ----------------------------------------------------------------------------------


class _Residuals(NamedTuple):
    """What the backward pass needs. Codes are int8; a mask is None where everything passes."""

    x: Quantized
    w: Quantized
    x_mask: Array | None
    w_mask: Array | None
    learned: tuple[Array, Array, Array] | None  # kernel, step and codes, for a learned step
    strength: Array | None
    x_like: Array  # of size 0: they carry the primals' dtypes, which the cotangents must have
    w_like: Array


def _forward(x, w, step, context, precision, row_parallel):
    x_key, w_key = (None, None) if context.key is None else jax.random.split(context.key)
    qx = quantize(
        precision.activation_quantizer,
        x,
        (x.ndim - 1,),
        noise=_noise(x_key, precision.activation_estimator, x),
    )
    # Quantize the float32 master, then cast: the other order changes codes.
    qw = quantize_kernel(
        precision.weight_quantizer,
        precision.granularity,
        w,
        row_parallel,
        step,
        _noise(w_key, precision.estimator, w),
    )
    w_blocks = w.reshape(qw.codes.shape)
    x_mask = estimators.passes(
        precision.activation_estimator, precision.activation_quantizer, x, qx
    )
    w_mask = estimators.passes(precision.estimator, precision.weight_quantizer, w_blocks, qw)
    codes = qw.codes
    if context.strength is not None:
        qx, qw = _blend(qx, x, context.strength), _blend(qw, w_blocks, context.strength)
        qw = qw._replace(codes=qw.codes.reshape(1, *w.shape))  # one product, whatever was sliced
    y = _product(_operand(qx, precision), _operand(qw, precision), precision)
    residuals = _Residuals(
        _operand(qx, precision),
        _operand(qw, precision),
        x_mask,
        w_mask,
        None if step is None else (w, step, codes),
        context.strength,
        jnp.zeros((0,), x.dtype),
        jnp.zeros((0,), w.dtype),
    )
    return y.astype(precision.compute_dtype), residuals


def _noise(key, estimator, like):
    if key is None or estimator != "stochastic":
        return None
    return jax.random.uniform(key, like.shape, jnp.float32)


def _blend(q: Quantized, x: Array, strength: Array) -> Quantized:
    """x + strength * (q(x) - x), as its own codes."""
    x = x.astype(jnp.float32)
    return Quantized(x + strength * (dequantize(q) - x), jnp.ones((1,) * x.ndim, jnp.float32))


def _operand(q: Quantized, precision: Precision) -> Quantized:
    """Codes that are no integers enter products in the compute dtype."""
    if q.codes.dtype == jnp.int8:
        return q
    return Quantized(q.codes.astype(precision.compute_dtype), q.scale)


# ---- Products ----------------------------------------------------------------------------------


def _product(x: Quantized, w: Quantized, precision: Precision) -> Float[Array, "*B F"]:
    """sum over slices of (codes of x . codes of w) * scale of w; then times the scale of x."""
    slices, size, _ = w.codes.shape
    last = x.codes.ndim - 1
    if slices == 1:
        y = code_dot(x.codes, w.codes[0], precision, ((last,), (0,)))
        return y * (x.scale * w.scale.reshape((1,) * last + (-1,)))
    sliced = jnp.moveaxis(x.codes.reshape(*x.codes.shape[:-1], slices, size), -2, 0)
    y = code_dot(sliced, w.codes, precision, ((last + 1,), (1,)), ((0,), (0,)))
    w_scale = w.scale.reshape(slices, *(1,) * last, -1)
    return jnp.sum(y * w_scale, axis=0) * x.scale


def code_dot(
    x: Array,
    w: Array,
    precision: Precision,
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    batch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> Float[Array, "..."]:
    """Contract two operands in the arm's dtype, accumulating in float32 (int32 for int8 codes)."""
    both_int8 = x.dtype == w.dtype == jnp.int8
    terms = math.prod(x.shape[axis] for axis in contract[0])
    if both_int8 and (precision.carrier == "int8" or _largest_sum(precision, terms) >= 2**24):
        operand, accumulator = jnp.int8, jnp.int32
    else:
        operand = jnp.bfloat16 if both_int8 else precision.compute_dtype
        accumulator = jnp.float32
    exactness = lax.Precision.HIGHEST if operand == jnp.float32 else None
    product = lax.dot_general(
        x.astype(operand),
        w.astype(operand),
        (contract, batch),
        precision=exactness,  # a GPU's default for float32 operands is TF32
        preferred_element_type=accumulator,
    )
    return product.astype(jnp.float32)


def _largest_sum(precision: Precision, terms: int) -> int:
    """A bound on a product of codes: float32 sums are exact below 2^24."""
    x, w = precision.activation_quantizer, precision.weight_quantizer
    return terms * max(-x.low, x.high) * max(-w.low, w.high)


def _backward(precision, row_parallel, r, g):
    dtype, last = precision.compute_dtype, g.ndim - 1
    rows = tuple(range(last))
    if r.w.scale.size == 1:
        codes = r.w.codes.reshape(-1, r.w.codes.shape[2]).astype(dtype)
        dx = code_dot(g, codes, precision, ((last,), (1,))) * r.w.scale.reshape((1,) * g.ndim)
    else:
        dx = code_dot(g, kernel_values(r.w).astype(dtype), precision, ((last,), (1,)))
    # A token's scale multiplies a row of x, so it may as well multiply that row of g.
    scaled_g = g if r.x.codes.dtype != jnp.int8 else (g * r.x.scale).astype(dtype)
    dw = code_dot(r.x.codes.astype(dtype), scaled_g, precision, (rows, rows))
    d_step = None if r.learned is None else _step_gradient(precision, row_parallel, r, dw)
    w_mask = None if r.w_mask is None else r.w_mask.reshape(dw.shape)
    dx = estimators.apply_mask(r.x_mask, dx, r.strength)
    dw = estimators.apply_mask(w_mask, dw, r.strength)
    return dx.astype(r.x_like.dtype), dw.astype(r.w_like.dtype), d_step, None


def _step_gradient(precision, row_parallel, r, dw):
    kernel, step, codes = r.learned
    quantizer, blocks = precision.weight_quantizer, precision.granularity
    g = kernel_step_gradient(quantizer, blocks, kernel, codes, step, dw, row_parallel)
    return g if r.strength is None else g * r.strength


quantized_dot.defvjp(_forward, _backward)


def _plain_forward(x, w, precision):
    dtype, last = precision.compute_dtype, x.ndim - 1
    y = code_dot(x.astype(dtype), w.astype(dtype), precision, ((last,), (1,)))
    likes = jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype)
    return y.astype(dtype), (x.astype(dtype), w.astype(dtype), likes)


def _plain_backward(precision, residuals, g):
    x, w, (x_like, w_like) = residuals
    rows = tuple(range(g.ndim - 1))
    dx = code_dot(g, w, precision, ((g.ndim - 1,), (0,)))
    dw = code_dot(g, x, precision, (rows, rows))
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype)


plain_dot.defvjp(_plain_forward, _plain_backward)
