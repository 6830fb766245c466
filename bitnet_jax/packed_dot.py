"""Kernels as an engine holds them, and the products of a model that is used and not trained.

Packed codes are multiplied without being unpacked. With C the codes (places p on a grid that begins
at `low`, `gap` apart), a token's product is

    sum_i x_i C_i = gap * sum_i p_i x_i + low * sum_i x_i,

and a byte of the digits p_0, p_1, .. has the quotients q_i = byte // levels^i, of which
p_i = q_i - levels * q_(i+1), so that byte by byte

    sum_i p_i x_i = q_0 x_0 + sum_(i>0) q_i (x_i - levels * x_(i-1)).

A quotient is one multiplication and one shift. PLANES bytes are added up in 16 bits, modulo 2^16,
within which their true sum lies; these sums in 32. All of it is exact, whatever the order.

The layout is for XLA on a CPU, which makes vector code of sums of a few arrays and of sums along an
axis that is not the last, and nothing of the kind of 8-bit products with a single row. A GPU has a
kernel of its own (packed_dot_pallas.py), with the same sums.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, Int32, UInt8, UInt16

from bitnet_jax.errors import choose, require
from bitnet_jax.matmul import code_dot, code_product, scaled
from bitnet_jax.packed_dot_pallas import place_products
from bitnet_jax.packing import PACKINGS, Packing, pack, unpack
from bitnet_jax.precision import Precision
from bitnet_jax.quantize import Quantized, Quantizer, quantize

PLANES = 4  # with five trits a byte their sum is at most 4 * 5 * 2 * 128
FEW_ROWS = {"xla": 4, "pallas": 64}  # more rows than these share what is unpacked for them
PRODUCTS = ("auto", "xla", "pallas")  # how packed codes are multiplied


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scale"],
    meta_fields=["inputs", "packing", "products"],
)
@dataclasses.dataclass(frozen=True)
class PackedKernel:
    """Codes several to a byte, as `packed_products` reads them.

    packed: of each slice, output f's byte [r, c] has the codes of the inputs (r C + c) n + i.
    inputs: of a slice, without what fills it up to PLANES * C * n. packing: a name.
    products: `xla` or `pallas`, with the same result; on a CPU the latter is interpreted, slowly.
    """

    packed: UInt8[Array, "I R C F"]
    scale: Float[Array, "I 1 _"]
    inputs: int
    packing: str
    products: str = "xla"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class RowKernel:
    """A kernel that is not quantized, an output a row: one input's product is fastest so."""

    values: Float[Array, "F D"]


Kernel = Quantized | PackedKernel | RowKernel


def chosen_products(products: str) -> str:
    """`xla` or `pallas`; of `auto`, on a GPU the latter and elsewhere the former.

    Raises:
      ConfigError: another name, or Pallas on a device that its kernel is not written for.
    """
    choose("products", products, PRODUCTS)
    platform = jax.default_backend()
    if products == "auto":
        return "pallas" if platform == "gpu" else "xla"
    possible = products == "xla" or platform in ("gpu", "cpu")
    require(possible, "products", products, f"the kernel is for GPUs; take xla on a {platform}")
    return products


def pack_kernel(
    q: Quantized, quantizer: Quantizer, packing: str, products: str = "xla"
) -> PackedKernel:
    """Codes [I, d, F] packed. They must fit (`packing.fits`)."""
    kind, inputs = PACKINGS[packing], q.codes.shape[1]
    packed = pack(jnp.swapaxes(q.codes, 1, 2), quantizer, kind)
    short = -packed.shape[2] % PLANES
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, short)))
    packed = packed.reshape(*packed.shape[:2], PLANES, -1)
    return PackedKernel(jnp.transpose(packed, (0, 2, 3, 1)), q.scale, inputs, packing, products)


def unpack_kernel(kernel: PackedKernel, quantizer: Quantizer) -> Quantized:
    """The codes [I, d, F] again."""
    slices, _, _, outputs = kernel.packed.shape
    packed = kernel.packed.transpose(0, 3, 1, 2).reshape(slices, outputs, -1)
    codes = unpack(packed, kernel.inputs, quantizer, PACKINGS[kernel.packing])
    return Quantized(jnp.swapaxes(codes, 1, 2), kernel.scale)


def deployed_dots(
    x: Float[Array, "*B D"], kernels: tuple[Kernel, ...], precision: Precision
) -> tuple[Float[Array, "*B _"], ...]:
    """The forward products of `matmul.quantized_dots`, fully quantized, to the bit.

    For kernels of which nothing but the codes is there, and no gradients. Products of values that
    are no codes on both sides are rounded as their order is, which a RowKernel may change.
    """
    q = quantize(precision.activation_quantizer, x, (x.ndim - 1,))
    if q.codes.dtype != jnp.int8:
        q = q._replace(codes=q.codes.astype(precision.compute_dtype))
    return tuple(_dot(q, w, precision).astype(precision.compute_dtype) for w in kernels)


def _dot(x: Quantized, w: Kernel, precision: Precision) -> Float[Array, "*B F"]:
    if isinstance(w, RowKernel):
        return _row_dot(x.codes, w.values, precision) * x.scale
    if isinstance(w, PackedKernel):
        rows = x.codes.size // x.codes.shape[-1]
        if x.codes.dtype == jnp.int8 and rows <= FEW_ROWS[w.products]:
            y = packed_products(x.codes, w, precision.weight_quantizer)
            return scaled(y.astype(jnp.float32), x.scale, w.scale)
        w = unpack_kernel(w, precision.weight_quantizer)
    if w.codes.dtype != jnp.int8:
        w = w._replace(codes=w.codes.astype(precision.compute_dtype))
    return code_product(x, w, precision)


def _row_dot(x: Array, values: Array, precision: Precision) -> Float[Array, "*B F"]:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 1 and values.dtype.itemsize == 2:
        # XLA's CPU backend has fast 16-bit products of matrices, and none of a vector.
        rows = jnp.broadcast_to(rows, (2, rows.shape[1]))
    y = code_dot(rows, values, precision, ((1,), (1,)))
    return y[: x.size // x.shape[-1]].reshape(*x.shape[:-1], -1)


def packed_products(
    x: Int8[Array, "*B D"], kernel: PackedKernel, quantizer: Quantizer
) -> Int32[Array, "..."]:
    """Exact products of codes: [*B, F], or [I, *B, F] of several slices."""
    slices, packing = len(kernel.packed), PACKINGS[kernel.packing]
    rows = x.reshape(-1, slices, kernel.inputs)
    if kernel.products == "pallas":
        on_cpu = jax.default_backend() == "cpu"
        sums = place_products(rows, kernel.packed, packing, interpret=on_cpu)
    else:
        one = functools.partial(_slice_product, packing)
        sums = jax.vmap(jax.vmap(one), in_axes=(0, None), out_axes=1)(rows, kernel.packed)
    offset = quantizer.low * jnp.sum(rows, axis=2, dtype=jnp.int32).T[..., None]
    sums = quantizer.gap * sums + offset
    sums = sums.reshape(slices, *x.shape[:-1], -1)
    return sums[0] if slices == 1 else sums


def _slice_product(
    packing: Packing, x: Int8[Array, "d"], packed: UInt8[Array, "R C F"]
) -> Int32[Array, "F"]:
    planes, count, _ = packed.shape
    filled = jnp.pad(x, (0, planes * count * packing.codes - len(x)))
    digits = filled.reshape(planes, count, packing.codes).astype(jnp.int16)
    lower = jnp.pad(digits, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    # Made once: in the same loop as the sums they would be made again for every output.
    factors = lax.optimization_barrier(digits - packing.levels * lower)
    sums = jnp.int16(0)
    for plane in range(planes):
        byte = packed[plane].astype(jnp.uint16)
        for i in range(packing.codes):
            quotient = _quotient(byte, packing.levels**i).astype(jnp.int16)
            sums = sums + quotient * factors[plane, :, i, None]
    # Without the barrier the sums of a column would be made one after another, without vectors.
    return jnp.sum(lax.optimization_barrier(sums), axis=0, dtype=jnp.int32)


def _quotient(byte: UInt16[Array, "..."], divisor: int) -> UInt16[Array, "..."]:
    multiplier, shift = _reciprocal(divisor)
    return byte * jnp.uint16(multiplier) >> jnp.uint16(shift)


@functools.cache
def _reciprocal(divisor: int) -> tuple[int, int]:
    """(m, s) with byte * m >> s == byte // divisor for every byte, within 16 bits."""
    byte = np.arange(256)
    return next(
        (m, s)
        for s in range(16)
        if (m := -(-(2**s) // divisor)) * 255 < 2**16 and (byte * m >> s == byte // divisor).all()
    )
