"""Products of packed codes: equal to plain integers and to the training forward, bit for bit."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import packed_dot
from bitnet_jax.deployed import deploy
from bitnet_jax.errors import ConfigError
from bitnet_jax.generate import decode_step, decoder, prefill
from bitnet_jax.granularity import Granularity, quantize_kernel
from bitnet_jax.ladder import LADDER
from bitnet_jax.matmul import DEPLOYED, Weights, quantized_dots
from bitnet_jax.model import TransformerConfig, init_params
from bitnet_jax.packed_dot import (
    FEW_ROWS,
    PLANES,
    RowKernel,
    _quotient,
    chosen_products,
    deployed_dots,
    pack_kernel,
    packed_products,
    unpack_kernel,
)
from bitnet_jax.packed_dot_pallas import place_products
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


@pytest.mark.parametrize("rows", [1, FEW_ROWS["xla"], FEW_ROWS["xla"] + 3])
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


# The kernel for GPUs, interpreted


def both_ways(name, packing, shape, rows, seed=0):
    """Products by XLA, by Pallas, and of int64, of random codes at both ends of int8."""
    q, (slices, inputs, _) = kernel_of(name, *shape, seed), shape
    x = np.random.default_rng(seed).integers(-128, 128, (rows, slices * inputs)).astype(np.int8)
    kernels = (pack_kernel(q, QUANTIZERS[name], packing, way) for way in ("xla", "pallas"))
    found = [np.asarray(products(jnp.asarray(x), kernel, name)) for kernel in kernels]
    sliced = x.reshape(rows, slices, inputs).astype(np.int64)
    expected = np.einsum("bid,idf->ibf", sliced, np.asarray(q.codes, np.int64))
    return *found, expected[0] if slices == 1 else expected


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    "shape,rows",
    [((1, 1, 1), 1), ((1, 41, 6), 2), ((3, 7, 65), 17), ((2, 701, 70), 64), ((1, 640, 64), 16)],
)
def test_the_kernel_for_gpus(packing, shape, rows):
    """Equal to the bit: tiles that are full, that are not, and several of each axis."""
    by_xla, by_pallas, expected = both_ways("ternary_absmean", packing, shape, rows)
    assert by_pallas.dtype == by_xla.dtype == np.int32
    np.testing.assert_array_equal(by_pallas, by_xla)
    np.testing.assert_array_equal(by_pallas, expected)


@pytest.mark.parametrize("name,packing", PAIRS)
def test_the_kernel_for_gpus_on_every_grid(name, packing):
    by_xla, by_pallas, expected = both_ways(name, packing, (2, 37, 5), 3)
    np.testing.assert_array_equal(by_pallas, by_xla)
    np.testing.assert_array_equal(by_pallas, expected)


WIDTHS = sorted({width for shape in LADDER.values() for width in (shape.width, shape.ff_width)})


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_the_kernel_for_gpus_at_every_width(width):
    """Of the ladder, at the largest sums that there are: all codes of x at one end."""
    random = np.random.default_rng(width)
    codes = random.integers(-1, 2, (1, width, 5)).astype(np.int8)
    codes[..., 0] = 1
    x = np.full((1, width), -128, np.int8)
    for packing in PACKINGS:
        kernel = Quantized(jnp.asarray(codes), jnp.ones((1, 1, 1)))
        kernel = pack_kernel(kernel, QUANTIZERS["ternary_absmean"], packing, "pallas")
        found = products(jnp.asarray(x), kernel, "ternary_absmean")
        np.testing.assert_array_equal(found, x.astype(np.int64) @ codes[0].astype(np.int64))


def an_h100():
    """What JAX from 0.11 or so on must be told; before, it took the newest that it knew."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_kernel_is_lowered_for_cuda(packing):
    """Without a device. Packed bytes go in as they are: no array of their size is wider."""
    kernel = pack_kernel(kernel_of("ternary_absmean", 2, 401, 70),
                         QUANTIZERS["ternary_absmean"], packing)  # fmt: skip
    way = jax.jit(lambda x, packed: place_products(x, packed, PACKINGS[packing]))
    with an_h100():
        traced = way.trace(jnp.zeros((3, 2, 401), jnp.int8), kernel.packed)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    planes, count, outputs = 2 * PLANES, *kernel.packed.shape[2:]
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert re.search(
        rf"tensor<{planes}x{count}x{outputs}xui8>.*-> tensor<{planes}x16x70xi32>", text
    )
    assert not re.search(rf"tensor<[0-9x]*{count}x{outputs}x(?!ui8)", text)


def test_which_way_products_go(monkeypatch):
    assert chosen_products("auto") == chosen_products("xla") == "xla"
    assert chosen_products("pallas") == "pallas", "interpreted, where it is asked for"
    with pytest.raises(ConfigError, match="products='triton'.*auto, xla, pallas"):
        chosen_products("triton")
    for platform, auto in (("gpu", "pallas"), ("tpu", "xla")):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert chosen_products("auto") == auto and chosen_products("xla") == "xla"
    with pytest.raises(ConfigError, match="products='pallas': .*for GPUs; take xla on a tpu"):
        chosen_products("pallas")


@pytest.mark.parametrize("way", ["xla", "pallas"])
def test_up_to_how_many_rows(way, monkeypatch):
    """Packed codes are multiplied as they are; above, they are unpacked for all rows."""
    counted = []

    def counting(x, kernel, quantizer):
        counted.append(len(x))
        return packed_products(x, kernel, quantizer)

    monkeypatch.setattr(packed_dot, "packed_products", counting)
    precision = get_precision("ternary")
    kernel = pack_kernel(kernel_of("ternary_absmean", 1, 20, 6), precision.weight_quantizer,
                         "2bit", way)  # fmt: skip
    for rows in (1, FEW_ROWS[way], FEW_ROWS[way] + 1):
        jax.eval_shape(lambda x: deployed_dots(x, (kernel,), precision), jnp.ones((rows, 20)))
    assert counted == [1, FEW_ROWS[way]]


@pytest.mark.slow
def test_a_model_by_either_way():
    """Its logits are the same to the bit, of a prompt and of the tokens after it."""
    config = TransformerConfig(vocab_size=16, layers=1, width=32, ff_width=96, heads=2, kv_heads=2)
    precision = get_precision("ternary")
    deployed = deploy(init_params(config, precision, jax.random.key(0)), precision)
    found = []
    for way in ("xla", "pallas"):
        model = decoder(config, precision, deployed, "2bit", way)
        kernels = jax.tree.leaves(model.blocks[0]["codes"], is_leaf=lambda x: hasattr(x, "packed"))
        assert {kernel.products for kernel in kernels} == {way}
        caches, logits = jax.jit(functools.partial(prefill, config, precision), static_argnums=2)(
            model, jnp.asarray([[3, 1, 4, 1, 5, 9]]), 8
        )
        step = jax.jit(functools.partial(decode_step, config, precision))
        found.append((logits, step(model, caches, jnp.asarray([2]))[1]))
    jax.tree.map(np.testing.assert_array_equal, *found)
