"""Products of packed codes: equal to plain integers and to the training forward, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.granularity import Granularity, quantize_kernel
from bitnet_jax.matmul import DEPLOYED, Weights, quantized_dots
from bitnet_jax.packed_dot import (
    FEW_ROWS,
    PLANES,
    RowKernel,
    _quotient,
    deployed_dots,
    pack_kernel,
    packed_products,
    unpack_kernel,
)
from bitnet_jax.packing import PACKINGS, fits
from bitnet_jax.precision import get_precision
from bitnet_jax.quantize import QUANTIZERS, Quantized, quantize

PAIRS = [
    (name, packing)
    for name in ("ternary_absmean", "binary", "int2_absmax", "int2_stretched")
    for packing in PACKINGS
    if fits(QUANTIZERS[name], PACKINGS[packing])
]


def kernel_of(name, slices, inputs, outputs, seed=0):
    """Random codes with scales of 1, 2, .."""
    q = QUANTIZERS[name]
    random = np.random.default_rng(seed)
    codes = random.choice(np.arange(q.low, q.high + 1, q.gap), (slices, inputs, outputs))
    scale = jnp.arange(1.0, 1 + slices * outputs).reshape(slices, 1, outputs)
    return Quantized(jnp.asarray(codes.astype(np.int8)), scale)


@functools.partial(jax.jit, static_argnums=2)
def products(x, kernel, name):
    return packed_products(x, kernel, QUANTIZERS[name])


def test_quotients_are_those_of_division():
    byte = jnp.arange(256, dtype=jnp.uint16)
    for divisor in (1, 3, 9, 27, 81, 4, 16, 64):
        np.testing.assert_array_equal(_quotient(byte, divisor), np.arange(256) // divisor)


@pytest.mark.parametrize("name,packing", PAIRS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 41, 6), (3, 7, 5), (1, 320, 33)])
def test_there_and_back(name, packing, shape):
    q = kernel_of(name, *shape)
    kernel = pack_kernel(q, QUANTIZERS[name], packing)
    back = unpack_kernel(kernel, QUANTIZERS[name])
    np.testing.assert_array_equal(back.codes, q.codes)
    np.testing.assert_array_equal(back.scale, q.scale)
    bytes_an_output = kernel.packed.size / (shape[0] * shape[2])
    assert bytes_an_output < shape[1] / PACKINGS[packing].codes + PLANES


@pytest.mark.parametrize("name,packing", PAIRS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 41, 6), (3, 7, 5)])
@pytest.mark.parametrize("rows", [(), (1,), (2, 2)])
def test_the_plain_integer_product(name, packing, shape, rows):
    """With the codes of x at both ends of int8, which no sum of 16 bits may lose."""
    slices, inputs, _ = shape
    q = kernel_of(name, *shape)
    x = np.random.default_rng(1).integers(-128, 128, (*rows, slices * inputs)).astype(np.int8)
    x.reshape(-1)[:: max(1, x.size // 3)] = -128
    found = products(jnp.asarray(x), pack_kernel(q, QUANTIZERS[name], packing), name)
    sliced = x.reshape(*rows, slices, inputs).astype(np.int64)
    expected = np.einsum("...id,idf->i...f", sliced, np.asarray(q.codes, np.int64))
    np.testing.assert_array_equal(found, expected[0] if slices == 1 else expected)


@pytest.mark.parametrize("name,packing", PAIRS)
@pytest.mark.parametrize("code", [-128, 127])
def test_the_largest_sums(name, packing, code):
    """All codes at one end, on 4,000 inputs: the sums of bytes go through all of 16 bits."""
    q, size = QUANTIZERS[name], 4000
    for end in (q.low, q.high):
        kernel = Quantized(jnp.full((1, size, 2), end, jnp.int8), jnp.ones((1, 1, 1)))
        found = products(jnp.full(size, code, jnp.int8), pack_kernel(kernel, q, packing), name)
        np.testing.assert_array_equal(found, [code * end * size] * 2)


ARMS = {
    "ternary": get_precision("ternary"),
    "binary": get_precision("binary"),
    "16-bit base": get_precision("fp16", weights="int2_absmax", activations="int8_absmax"),
    "int4": get_precision("ternary", activations="int4_absmax"),
    "channel": get_precision("ternary", granularity=Granularity("channel")),
    "floats": get_precision("ternary", activations="none"),
}


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 3])
@pytest.mark.parametrize("arm", ARMS)
def test_three_ways_agree(arm, rows):
    """The training forward, the packed one, and int64 of numpy with the scales applied after."""
    precision, random = ARMS[arm], np.random.default_rng(2)
    x = jnp.asarray(random.normal(size=(rows, 48)), precision.compute_dtype)
    w = jnp.asarray(random.normal(size=(48, 24)), jnp.float32)
    q = quantize_kernel(precision.weight_quantizer, precision.granularity, w)
    kinds = [k for k in PACKINGS if fits(precision.weight_quantizer, PACKINGS[k])]
    kernels = (q, *(pack_kernel(q, precision.weight_quantizer, kind) for kind in kinds))
    (run,) = jax.jit(
        lambda x, w, q: quantized_dots(x, (Weights(w, None, q),), DEPLOYED, precision)
    )(x, w, q)
    found = jax.jit(lambda x, k: deployed_dots(x, k, precision))(x, kernels)
    for y in found:
        assert y.dtype == precision.compute_dtype
        np.testing.assert_array_equal(y, run)
    if precision.activations != "none":
        codes = quantize(precision.activation_quantizer, x, (1,))
        exact = np.asarray(codes.codes, np.int64) @ np.asarray(q.codes[0], np.int64)
        scale = np.asarray(codes.scale) * np.asarray(q.scale).reshape(1, -1)
        expected = jnp.asarray(exact.astype(np.float32) * scale, precision.compute_dtype)
        np.testing.assert_array_equal(run, expected)


@pytest.mark.parametrize("kind,size", [("group", 12), ("shard", 3)])
@pytest.mark.parametrize("rows", [1, 7])
def test_several_slices(kind, size, rows):
    """Their float32 sum is rounded in an order of the program's own: to the last bit of it."""
    precision = get_precision("ternary", granularity=Granularity(kind, size))
    random = np.random.default_rng(3)
    x = jnp.asarray(random.normal(size=(rows, 48)), jnp.float32)
    w = jnp.asarray(random.normal(size=(48, 24)), jnp.float32)
    q = quantize_kernel(precision.weight_quantizer, precision.granularity, w, True)
    wide = get_precision("fp32", weights="ternary_absmean", activations="int8_absmax",
                         granularity=Granularity(kind, size))  # fmt: skip
    kernel = pack_kernel(q, precision.weight_quantizer, "base3")
    run, found = deployed_dots(x, (q, kernel), wide)
    np.testing.assert_allclose(found, run, rtol=0, atol=2e-6 * float(jnp.abs(run).max()))


@pytest.mark.parametrize("arm", ["fp32", "bf16", "fp16"])
def test_a_kernel_by_rows(arm):
    """The product with what is not quantized; one input or several."""
    precision, random = get_precision(arm), np.random.default_rng(4)
    w = random.normal(size=(24, 48)).astype(np.float32)
    for shape in ((48,), (1, 48), (3, 48)):
        x = jnp.asarray(random.normal(size=shape), jnp.float32)
        kernel = RowKernel(jnp.asarray(w, precision.compute_dtype))
        (y,) = deployed_dots(x, (kernel,), precision)
        wide = np.asarray(x.astype(precision.compute_dtype), np.float64)
        expected = wide @ np.asarray(kernel.values, np.float64).T
        assert y.shape == (*shape[:-1], 24) and y.dtype == precision.compute_dtype
        tolerance = 2 * float(jnp.finfo(precision.compute_dtype).eps)
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=tolerance, atol=1e-5)


def test_what_is_not_finite_stays_so():
    """A NaN in a token makes all of its outputs NaN, as in training, and no other token's."""
    precision = get_precision("ternary")
    q = kernel_of("ternary_absmean", 1, 20, 6)
    kernel = pack_kernel(q, precision.weight_quantizer, "2bit")
    (y,) = deployed_dots(jnp.ones((2, 20)).at[0, 3].set(jnp.nan), (kernel,), precision)
    assert jnp.isnan(y[0]).all() and jnp.isfinite(y[1]).all()
