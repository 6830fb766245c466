"""The quantized matrix product: integer forward, straight-through backward, one custom_vjp.

`quantized_dots` is what every linear layer of every arm runs: the products of one input with one
kernel or several (q, k, v), for which it is quantized once. `reference_dot` is the plain
composition that each must equal: fake-quantize both operands, multiply in float32, differentiate.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from bitnet_jax import carriers, estimators, packing, sharding
from bitnet_jax.granularity import kernel_step_gradient, kernel_values, quantize_kernel
from bitnet_jax.layout import moved
from bitnet_jax.precision import Precision
from bitnet_jax.quantize import Quantized, dequantize, quantize
from bitnet_jax.saving import mark


class Weights(NamedTuple):
    """A kernel of a quantized product.

    step: learned scales of the kernel, where the weight quantizer has them.
    quantized: the kernel's codes and scales where they are known already, as where they are made
      once for all microbatches of a step; None quantizes here.
    """

    kernel: Float[Array, "D F"]
    step: Float[Array, "..."] | None = None
    quantized: Quantized | None = None


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


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def quantized_dots(
    x: Float[Array, "*B D"],
    weights: tuple[Weights, ...],
    context: Context,
    precision: Precision,
    row_parallel: bool = False,
) -> tuple[Float[Array, "*B _"], ...]:
    """x @ kernel through the arm's quantizers, in the arm's compute dtype, for each kernel [D, F].

    Forward: the product of the codes, exact where both are integers, with the scales applied once
    after it. What is trained is what is deployed: an integer engine gives the same numbers.
    Backward: straight-through. With x' and w' the dequantized operands, dx = sum of g w'^T and
    dw = x'^T g, as 16-bit products (32-bit in the fp32 arm) with float32 accumulation; the arm's
    estimators then say where these gradients pass. Learned scales get a gradient too.

    row_parallel: how tensor parallelism would cut the kernels, which per-shard scales depend on.
    """
    return _forward(x, weights, context, precision, row_parallel)[0]


def quantized_dot(
    x: Float[Array, "*B D"],
    w: Float[Array, "D F"],
    step: Float[Array, "..."] | None,
    context: Context,
    precision: Precision,
    row_parallel: bool = False,
) -> Float[Array, "*B F"]:
    """`quantized_dots` with a single kernel."""
    return quantized_dots(x, (Weights(w, step),), context, precision, row_parallel)[0]


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


class _Kernel(NamedTuple):
    """What the backward pass needs of a kernel. A mask is None where everything passes."""

    operand: Quantized
    mask: Array | None
    learned: tuple[Array, Array, Array] | None  # kernel, step and codes, for a learned step
    like: Array  # of size 0: it carries the primal's dtype, which the cotangent must have


class _Residuals(NamedTuple):
    """What the backward pass needs. Codes are int8."""

    x: Quantized
    mask: Array | None
    like: Array
    kernels: tuple[_Kernel, ...]
    strength: Array | None


def _forward(x, weights, context, precision, row_parallel):
    x_key, *w_keys = [None] * (1 + len(weights))
    if context.key is not None:
        x_key, *w_keys = jax.random.split(context.key, 1 + len(weights))
    noise = _noise(x_key, precision.activation_estimator, x)
    q = quantize(precision.activation_quantizer, x, (x.ndim - 1,), noise=noise)
    mask = estimators.passes(precision.activation_estimator, precision.activation_quantizer, x, q)
    if context.strength is not None:
        q = _blend(q, x, context.strength)
    q = mark(_operand(q, precision), "operand")
    kernels = tuple(
        _kernel(w, context.strength, key, precision, row_parallel)
        for w, key in zip(weights, w_keys, strict=True)
    )
    ys = tuple(
        code_product(q, _whole(k.operand, precision, row_parallel), precision).astype(
            precision.compute_dtype
        )
        for k in kernels
    )
    return ys, _Residuals(q, mask, jnp.zeros((0,), x.dtype), kernels, context.strength)


def _kernel(w: Weights, strength, key, precision: Precision, row_parallel: bool) -> _Kernel:
    kernel, quantizer = w.kernel, precision.weight_quantizer
    q = w.quantized
    if q is None:
        # Quantize the float32 master, then cast: the other order changes codes.
        noise = _noise(key, precision.estimator, kernel)
        q = quantize_kernel(quantizer, precision.granularity, kernel, row_parallel, w.step, noise)
    blocks = kernel.reshape(q.codes.shape)
    mask = estimators.passes(precision.estimator, quantizer, blocks, q)
    learned = None if w.step is None else (kernel, w.step, q.codes)
    if strength is not None:
        q = _blend(q, blocks, strength)
        q = q._replace(codes=q.codes.reshape(1, *kernel.shape))  # one product, whatever was sliced
    operand = _operand(q, precision)
    if operand.codes.shape[0] == 1:
        operand = operand._replace(codes=sharding.scattered(operand.codes, row_parallel))
    if operand.codes.dtype == jnp.int8:
        operand = mark(operand, "operand")
    return _Kernel(operand, mask, learned, jnp.zeros((0,), kernel.dtype))


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


def _whole(w: Quantized, precision: Precision, row_parallel: bool) -> Quantized:
    """The operand of a kernel that is cut over devices, gathered: its codes are what travels."""
    if w.codes.shape[0] > 1:  # slices with scales of their own: the compiler's to lay out
        return w
    quantizer, codes = precision.weight_quantizer, w.codes
    if precision.wire == "packed" and codes.dtype == jnp.int8 and packing.fits(quantizer):
        packed = sharding.scattered(packing.pack(codes, quantizer), row_parallel)
        packed = sharding.gathered(packed, row_parallel)
        return w._replace(codes=packing.unpack(packed, codes.shape[-1], quantizer))
    return w._replace(codes=sharding.gathered(codes, row_parallel))


# ---- Products ----------------------------------------------------------------------------------


def code_product(x: Quantized, w: Quantized, precision: Precision) -> Float[Array, "*B F"]:
    """sum over slices of (codes of x . codes of w) * scale of w; then times the scale of x."""
    slices, size, _ = w.codes.shape
    last = x.codes.ndim - 1
    if slices == 1:
        y = code_dot(x.codes, w.codes[0], precision, ((last,), (0,)))
    else:
        sliced = jnp.moveaxis(x.codes.reshape(*x.codes.shape[:-1], slices, size), -2, 0)
        y = code_dot(sliced, w.codes, precision, ((last + 1,), (1,)), ((0,), (0,)))
    return scaled(y, x.scale, w.scale)


def scaled(
    y: Float[Array, "..."], x_scale: Float[Array, "*B 1"], w_scale: Float[Array, "I 1 _"]
) -> Float[Array, "*B F"]:
    """Products of codes times their scales. y: [*B, F], or of several slices [I, *B, F]."""
    slices, last = len(w_scale), x_scale.ndim - 1
    if slices == 1:
        return y * (x_scale * w_scale.reshape((1,) * last + (-1,)))
    return jnp.sum(y * w_scale.reshape(slices, *(1,) * last, -1), axis=0) * x_scale


def code_dot(
    x: Array,
    w: Array,
    precision: Precision,
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    batch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> Float[Array, "..."]:
    """Contract two operands in the arm's dtype, accumulating in float32 (int32 for int8 codes)."""
    both_int8 = x.dtype == w.dtype == jnp.int8
    if both_int8:
        return _integer_dot(x, w, precision, (contract, batch))
    dtype = precision.compute_dtype
    exactness = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return lax.dot_general(
        x.astype(dtype),
        w.astype(dtype),
        (contract, batch),
        precision=exactness,  # a GPU's default for float32 operands is TF32
        preferred_element_type=jnp.float32,
    )


def _integer_dot(x, w, precision: Precision, dimensions) -> Float[Array, "..."]:
    """The exact product of int8 codes, in whichever of two equal ways the device is faster at."""
    terms = math.prod(x.shape[axis] for axis in dimensions[0][0])

    def dot(operand, accumulator):
        return lax.dot_general(
            x.astype(operand), w.astype(operand), dimensions, preferred_element_type=accumulator
        ).astype(jnp.float32)

    too_large = _largest_sum(precision, terms) >= 2**24  # for float32 sums to be exact
    if too_large or carriers.resolve(precision.carrier) == "int8":
        return dot(jnp.int8, jnp.int32)
    return dot(jnp.bfloat16, jnp.float32)


def _largest_sum(precision: Precision, terms: int) -> int:
    """A bound on a product of codes: float32 sums are exact below 2^24."""
    x, w = precision.activation_quantizer, precision.weight_quantizer
    return terms * max(-x.low, x.high) * max(-w.low, w.high)


def _backward(precision, row_parallel, r, gs):
    dx = sum(
        _dx(precision, _whole(k.operand, precision, row_parallel), g)
        for k, g in zip(r.kernels, gs, strict=True)
    )
    dx = estimators.apply_mask(r.mask, dx, r.strength).astype(r.like.dtype)
    x = moved(r.x.codes.reshape(-1, r.x.codes.shape[-1]))
    if _scales_x(precision, r):
        x = x.astype(jnp.float32) * r.x.scale.reshape(1, -1)
    x = x.astype(precision.compute_dtype)
    cotangents = tuple(
        _d_weights(precision, row_parallel, r, x, k, g) for k, g in zip(r.kernels, gs, strict=True)
    )
    return dx, cotangents, None


def _scales_x(precision: Precision, r: _Residuals) -> bool:
    """A token's scale multiplies a row of x, so it may as well multiply that row of g.

    x is there once for all kernels. But float16 ends at 65504, which a token's values may pass.
    """
    return r.x.codes.dtype == jnp.int8 and precision.compute_dtype != jnp.float16


def _dx(precision: Precision, w: Quantized, g: Float[Array, "*B F"]) -> Float[Array, "*B D"]:
    dtype, last = precision.compute_dtype, g.ndim - 1
    if w.scale.size > 1:
        return code_dot(g, kernel_values(w).astype(dtype), precision, ((last,), (1,)))
    codes = w.codes.reshape(-1, w.codes.shape[2]).astype(dtype)
    return code_dot(g, codes, precision, ((last,), (1,))) * w.scale.reshape((1,) * g.ndim)


def _d_weights(precision, row_parallel, r: _Residuals, x, k: _Kernel, g) -> Weights:
    if r.x.codes.dtype == jnp.int8 and not _scales_x(precision, r):
        g = (g * r.x.scale).astype(precision.compute_dtype)
    dw = code_dot(x, g.reshape(-1, g.shape[-1]), precision, ((1,), (0,)))
    # Each device's part of the batch gives a part of the sum: those are added and then cut.
    dw = sharding.gathered(dw[None], row_parallel)[0]
    d_step = None
    if k.learned is not None:
        kernel, step, codes = k.learned
        quantizer, blocks = precision.weight_quantizer, precision.granularity
        d_step = kernel_step_gradient(quantizer, blocks, kernel, codes, step, dw, row_parallel)
        d_step = d_step if r.strength is None else d_step * r.strength
    mask = None if k.mask is None else k.mask.reshape(dw.shape)
    dw = estimators.apply_mask(mask, dw, r.strength)
    return Weights(dw.astype(k.like.dtype), d_step)


quantized_dots.defvjp(_forward, _backward)


def _plain_forward(x, w, precision):
    dtype, last = precision.compute_dtype, x.ndim - 1
    y = code_dot(x.astype(dtype), w.astype(dtype), precision, ((last,), (1,)))
    likes = jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype)
    return y.astype(dtype), (x.astype(dtype), w.astype(dtype), likes)


def _plain_backward(precision, residuals, g):
    x, w, (x_like, w_like) = residuals
    dx = code_dot(g, w, precision, ((g.ndim - 1,), (0,)))
    g, x = (a.reshape(-1, a.shape[-1]) for a in (g, x))
    dw = code_dot(moved(g), x, precision, ((1,), (0,)))
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype)


plain_dot.defvjp(_plain_forward, _plain_backward)
