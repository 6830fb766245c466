"""The quantized matrix product: integer forward, straight-through backward, one custom_vjp.

`quantized_dot` is what every linear layer of every arm runs. `reference_dot` is the plain
composition that it must equal: fake-quantize both operands, multiply in float32, differentiate.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bitnet_jax.precision import Precision
from bitnet_jax.quantize import Quantized, fake_quantize


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def quantized_dot(
    x: Float[Array, "*B D"], w: Float[Array, "_ _"], precision: Precision, transposed: bool = False
) -> Float[Array, "*B F"]:
    """x @ w through the arm's quantizers, in the arm's compute dtype. w is [D, F].

    Forward: the product of the codes, exact where both are integers, with the scales applied once
    after it. What is trained is what is deployed: an integer engine gives the same numbers.
    Backward: straight-through. With x' and w' the dequantized operands, dx = g w'^T and
    dw = x'^T g, as 16-bit products (32-bit in the fp32 arm) with float32 accumulation.

    transposed: w is [F, D] (a tied embedding). Its gradient is then computed in that layout, since
      XLA's CPU backend cannot run a bfloat16 product whose result it must transpose.
    """
    return _forward(x, w, precision, transposed)[0]


def reference_dot(
    x: Float[Array, "*B D"], w: Float[Array, "D F"], precision: Precision
) -> Float[Array, "*B F"]:
    """The same product by plain composition in float32; slow, obvious, and the test's yardstick."""
    x = fake_quantize(x.astype(jnp.float32), precision.activation_quantizer)
    w = fake_quantize(w.astype(jnp.float32), precision.weight_quantizer)
    return jnp.matmul(x, w, precision=lax.Precision.HIGHEST)


def code_dot(
    x: Array, w: Array, precision: Precision, contract: tuple[tuple[int, ...], tuple[int, ...]]
) -> Float[Array, "..."]:
    """Contract two operands in the arm's dtype, accumulating in float32 (int32 for int8 codes)."""
    both_int8 = x.dtype == w.dtype == jnp.int8
    if both_int8 and precision.carrier == "int8":
        operand, accumulator = jnp.int8, jnp.int32
    else:
        operand = jnp.bfloat16 if both_int8 else precision.compute_dtype
        accumulator = jnp.float32
    exactness = lax.Precision.HIGHEST if operand == jnp.float32 else None
    product = lax.dot_general(
        x.astype(operand),
        w.astype(operand),
        (contract, ((), ())),
        precision=exactness,  # a GPU's default for float32 operands is TF32
        preferred_element_type=accumulator,
    )
    return product.astype(jnp.float32)


def _forward(x, w, precision, transposed):
    # Quantize the float32 master, then cast: the other order changes codes.
    qx, qw = precision.activation_quantizer(x), precision.weight_quantizer(w)
    if not precision.quantized:
        qw = Quantized(qw.codes.astype(precision.compute_dtype), qw.scale)
    if precision.activations == "none":
        qx = Quantized(qx.codes.astype(precision.compute_dtype), qx.scale)
    contract = (x.ndim - 1,), (1 if transposed else 0,)
    product = code_dot(qx.codes, qw.codes, precision, contract)
    y = product * (qx.scale * qw.scale.reshape((1,) * x.ndim))
    # Zero-sized markers carry the primal dtypes, which the cotangents must have.
    markers = jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype)
    return y.astype(precision.compute_dtype), (qx, qw, markers)


def _backward(precision, transposed, residuals, g):
    (x_codes, x_scale), (w_codes, w_scale), (x_like, w_like) = residuals
    dtype, last = precision.compute_dtype, g.ndim - 1
    rows = tuple(range(last))
    dx = code_dot(g, w_codes.astype(dtype), precision, ((last,), (0 if transposed else 1,)))
    dx *= w_scale.reshape((1,) * g.ndim)
    # A token's scale multiplies a row of x, so it may as well multiply that row of g.
    scaled_g = g if precision.activations == "none" else (g * x_scale).astype(dtype)
    operands = (
        (scaled_g, x_codes.astype(dtype)) if transposed else (x_codes.astype(dtype), scaled_g)
    )
    dw = code_dot(*operands, precision, (rows, rows))
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype)


quantized_dot.defvjp(_forward, _backward)
