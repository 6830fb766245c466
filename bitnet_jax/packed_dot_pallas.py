"""Products of int8 codes with packed ones, for GPUs: a Pallas kernel that reads packed bytes.

A program makes a tile of the outputs of one plane of bytes. It loads a tile of bytes, takes their
digits apart in registers, and multiplies each with its inputs on tensor cores, in int32: exact,
whatever the order. The planes are summed after it, so that even a narrow model has many programs.

Compiled by Triton, deprecated in JAX 0.12. Tested on a CPU, where Pallas interprets it, and
lowered for CUDA without a device; not yet run on a GPU, so that its tiles are chosen by what tensor
cores take, not by time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, Int32, UInt8

from bitnet_jax.packing import Packing

ROWS = 16  # of x in a tile: the fewest that tensor cores multiply
BYTES = 32  # of an output in a tile: the fewest 8-bit terms that they sum up
OUTPUTS = 64  # in a tile


def place_products(
    x: Int8[Array, "B I d"],
    packed: UInt8[Array, "I R C F"],
    packing: Packing,
    interpret: bool = False,
) -> Int32[Array, "I B F"]:
    """sum_i p_i x_i of each slice, with p the digits of `PackedKernel.packed`.

    interpret: in JAX's own operations, which every backend has, and slowly.
    """
    slices, planes, count, outputs = packed.shape
    rows = -(-len(x) // ROWS) * ROWS
    inputs = _by_digit(x, planes, count, packing.codes, rows)
    sums = _plane_sums(inputs, packed.reshape(-1, count, outputs), packing, interpret)
    sums = jnp.sum(sums.reshape(slices, planes, rows, outputs), axis=1, dtype=jnp.int32)
    return sums[:, : len(x)]


def _by_digit(
    x: Int8[Array, "B I d"], planes: int, count: int, digits: int, rows: int
) -> Int8[Array, "P n b c"]:
    """The inputs of each plane's digits, filled up with zeros to whole tiles."""
    slices = x.shape[1]
    x = jnp.pad(x, ((0, rows - len(x)), (0, 0), (0, planes * count * digits - x.shape[2])))
    x = x.reshape(rows, slices * planes, count, digits).transpose(1, 3, 0, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -count % BYTES)))


def _plane_sums(
    x: Int8[Array, "P n b c"], packed: UInt8[Array, "P C F"], packing: Packing, interpret: bool
) -> Int32[Array, "P b F"]:
    # Here, since they take a second to import, and a JAX without Triton still has the CPU's way.
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    planes, _, rows, padded = x.shape
    _, count, outputs = packed.shape

    def kernel(x_ref: Any, packed_ref: Any, sums_ref: Any) -> None:
        plane, row, column = (pallas.program_id(axis) for axis in range(3))
        rows_here = pallas.ds(row * ROWS, ROWS)
        columns_here = pallas.ds(column * OUTPUTS, OUTPUTS)
        in_matrix = (column * OUTPUTS + jnp.arange(OUTPUTS) < outputs)[None]

        def add_tile(tile: Array, sums: Array) -> Array:
            bytes_here = pallas.ds(tile * BYTES, BYTES)
            in_plane = (tile * BYTES + jnp.arange(BYTES) < count)[:, None]
            quotient = triton.load(
                packed_ref.at[plane, bytes_here, columns_here], mask=in_plane & in_matrix, other=0
            ).astype(jnp.uint32)
            for digit in range(packing.codes):
                rest = lax.div(quotient, jnp.full_like(quotient, packing.levels))
                place = (quotient - packing.levels * rest).astype(jnp.int8)
                inputs = x_ref[plane, digit, rows_here, bytes_here]
                sums += jnp.dot(inputs, place, preferred_element_type=jnp.int32)
                quotient = rest
            return sums

        none = jnp.zeros((ROWS, OUTPUTS), jnp.int32)
        sums = lax.fori_loop(0, padded // BYTES, add_tile, none)
        in_matrix = jnp.broadcast_to(in_matrix, sums.shape)
        triton.store(sums_ref.at[plane, rows_here, columns_here], sums, mask=in_matrix)

    return pallas.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((planes, rows, outputs), jnp.int32),
        grid=(planes, rows // ROWS, pallas.cdiv(outputs, OUTPUTS)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="packed_products",
    )(x, packed)
