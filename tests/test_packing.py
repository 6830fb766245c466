"""Codes in 2 bits and in base 3: by hand, against a slow decoder, there and back, and refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import cost
from bitnet_jax.errors import ConfigError
from bitnet_jax.ladder import LADDER
from bitnet_jax.model import TransformerConfig
from bitnet_jax.packing import (
    BASE_3,
    PACKINGS,
    TWO_BITS,
    PackingError,
    code_counts,
    entropy,
    fits,
    from_bytes,
    pack,
    packed_size,
    to_bytes,
    unpack,
)
from bitnet_jax.quantize import QUANTIZERS

PAIRS = [
    (name, kind)
    for name, q in QUANTIZERS.items()
    for kind, packing in PACKINGS.items()
    if fits(q, packing)
]
TRITS = QUANTIZERS["ternary_absmean"]
UNPACK = jax.jit(unpack, static_argnums=(1, 2, 3))


def drawn(name, shape, seed=0):
    """Random codes of a quantizer's grid."""
    q = QUANTIZERS[name]
    grid = np.arange(q.low, q.high + 1, q.gap)
    return np.random.default_rng(seed).choice(grid, shape).astype(np.int8)


def slowly(data, size, quantizer, packing):
    """Another decoder: whole numbers and divmod, one code at a time."""
    codes = []
    for byte in bytes(data):
        for _ in range(packing.codes):
            byte, digit = divmod(byte, packing.levels)
            codes.append(quantizer.low + quantizer.gap * digit)
        assert byte == 0
    return codes[:size]


# By hand


def test_bytes_by_hand():
    """Trits -1, 0, 1, 1, -1 are the places 0, 1, 2, 2 and 0: 0b10_10_01_00, then zeros."""
    packed = pack(jnp.array([-1, 0, 1, 1, -1], jnp.int8), TRITS)
    np.testing.assert_array_equal(packed, np.array([0b10100100, 0], np.uint8))


def test_base_3_by_hand():
    """Places 0, 1, 2, 2, 0 are 1*3 + 2*9 + 2*27 = 75; five times 2 are 3^5 - 1; 1 alone is 2."""
    codes = jnp.array([-1, 0, 1, 1, -1, 1, 1, 1, 1, 1, 1], jnp.int8)
    packed = pack(codes, TRITS, BASE_3)
    np.testing.assert_array_equal(packed, np.array([75, 242, 2], np.uint8))


def test_which_grids_fit():
    """Trits, signs and 2-bit grids go into 2 bits, trits and signs into base 3; what is not
    quantized has no codes."""
    two, three = ({name for name, kind in PAIRS if kind == k} for k in ("2bit", "base3"))
    assert {"ternary_absmean", "binary", "int2_absmax", "int2_stretched"} <= two
    assert {"ternary_absmean", "ternary_lsq", "binary"} <= three
    assert not three & {"int2_absmax", "int2_stretched", "none"}
    assert not any(fits(QUANTIZERS[f"int{bits}_absmax"]) for bits in (3, 4, 8))
    assert not fits(QUANTIZERS["none"])
    assert (TWO_BITS.bits, BASE_3.bits, BASE_3.bytes) == (2, 1.6, 243)


# There and back


@pytest.mark.parametrize("name,kind", PAIRS)
@pytest.mark.parametrize("shape", [(1,), (4,), (7,), (0,), (3, 5), (2, 3, 8), (2, 0, 3)])
def test_there_and_back(name, kind, shape):
    """As arrays of JAX, in a program, and of numpy; along the last axis."""
    q, packing, codes = QUANTIZERS[name], PACKINGS[kind], drawn(name, shape)
    for put, packs, unpacks in (
        (np.asarray, pack, unpack),
        (jnp.asarray, jax.jit(pack, static_argnums=(1, 2)), UNPACK),
    ):
        packed = packs(put(codes), q, packing)
        assert packed.dtype == np.uint8
        assert packed.shape == (*shape[:-1], packed_size(shape[-1], packing))
        back = unpacks(packed, shape[-1], q, packing)
        assert back.dtype == np.int8 and type(back) is type(put(codes))
        np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("name,kind", PAIRS)
def test_a_decoder_of_another_kind_reads_the_same(name, kind):
    q, packing = QUANTIZERS[name], PACKINGS[kind]
    for size in (0, 1, 4, 5, 6, 999):
        codes = drawn(name, (size,), size)
        data = to_bytes(codes, q, packing)
        assert len(data) == math.ceil(size / packing.codes)
        assert slowly(data, size, q, packing) == codes.tolist()


def test_every_byte_of_base_3_is_five_trits():
    every = np.arange(243, dtype=np.uint8)
    codes = from_bytes(every, (243, 5), TRITS, BASE_3)
    assert len({tuple(row) for row in codes.tolist()}) == 243
    np.testing.assert_array_equal(to_bytes(codes, TRITS, BASE_3), every)


@functools.cache
def ladder_shapes():
    """(inputs, outputs) of every kernel of the ladder."""
    models = [TransformerConfig(256, **shape._asdict()) for shape in LADDER.values()]
    return sorted({shape for model in models for shape in cost.linear_shapes(model).values()})


@pytest.mark.parametrize("kind", PACKINGS)
def test_every_shape_of_the_ladder(kind):
    """Whole kernels up to a million weights; of larger ones the first rows, and the size of all."""
    packing = PACKINGS[kind]
    for inputs, outputs in ladder_shapes():
        size = packed_size(inputs * outputs, packing)
        assert size * packing.codes >= inputs * outputs > (size - 1) * packing.codes
        rows = min(inputs, 2**20 // outputs)
        codes = drawn("ternary_absmean", (rows, outputs))
        data = to_bytes(codes, TRITS, packing)
        assert len(data) == packed_size(codes.size, packing)
        np.testing.assert_array_equal(from_bytes(data, codes.shape, TRITS, packing), codes)


@pytest.mark.parametrize("kind", PACKINGS)
def test_ten_thousand_tensors(kind):
    """Of up to three dimensions of 0 to 12, odd and empty ones among them."""
    random, packing = np.random.default_rng(1), PACKINGS[kind]
    source, empty = drawn("ternary_absmean", (12**3,)), 0
    for _ in range(10_000):
        shape = tuple(random.integers(0, 13, random.integers(1, 4)))
        start = random.integers(0, 64)
        codes = np.roll(source, -start)[: math.prod(shape)].reshape(shape)
        empty += codes.size == 0
        data = to_bytes(codes, TRITS, packing)
        assert len(data) == packed_size(codes.size, packing)
        back = from_bytes(data, shape, TRITS, packing)
        assert back.shape == shape and (back == codes).all()
    assert empty > 500


# Refusals


@pytest.mark.parametrize("name,kind", PAIRS)
def test_no_value_beside_the_grid_is_packed(name, kind):
    """Of all 256 values of an int8, in any place; it is named with its place."""
    q, random = QUANTIZERS[name], np.random.default_rng(2)
    grid = set(range(q.low, q.high + 1, q.gap))
    for value in range(-128, 128):
        codes = drawn(name, (5, 7), value + 128)
        where = random.integers(0, 5), random.integers(0, 7)
        codes[where] = value
        if value in grid:
            to_bytes(codes, q, PACKINGS[kind])
            continue
        with pytest.raises(PackingError) as caught:
            to_bytes(codes, q, PACKINGS[kind], "block 3 mlp/up")
        assert f"block 3 mlp/up: {value} at [{where[0]}, {where[1]}] " in str(caught.value)


@pytest.mark.parametrize("byte", range(243, 256))
def test_a_byte_that_no_trits_give(byte):
    data = np.array([0, 242, byte, 0], np.uint8)
    with pytest.raises(PackingError, match=f"^w: byte 2 is {byte}; .*at most 242$"):
        from_bytes(data, (20,), TRITS, BASE_3, "w")


@pytest.mark.parametrize(
    "name,kind,places",
    [("ternary_absmean", "2bit", (3,)), ("binary", "2bit", (2, 3)), ("binary", "base3", (2,))],
)
@pytest.mark.parametrize("digit", range(4))
def test_a_place_beyond_the_grid(name, kind, places, digit):
    packing = PACKINGS[kind]
    for place in places:
        data = np.array([0, place * packing.levels**digit], np.uint8)
        with pytest.raises(PackingError, match=f"^w: byte 1 has the place {place};"):
            from_bytes(data, (2 * packing.codes,), QUANTIZERS[name], packing, "w")


@pytest.mark.parametrize("kind", PACKINGS)
def test_one_form_alone(kind):
    """What fills the last byte up is zeros, whatever its codes are."""
    packing = PACKINGS[kind]
    for digit in range(1, packing.codes):
        data = np.array([0, packing.levels**digit], np.uint8)
        size = packing.codes + digit
        assert from_bytes(data, (size + 1,), TRITS, packing)[-1] == 0
        with pytest.raises(PackingError, match="^w: byte 1 goes on after the last of"):
            from_bytes(data, (size,), TRITS, packing, "w")


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: to_bytes(np.zeros(3, np.int32), TRITS, BASE_3, "w"), "of type int32; codes are"),
        (lambda: to_bytes(np.zeros(3, np.float32), TRITS, BASE_3, "w"), "of type float32"),
        (lambda: to_bytes(np.zeros(3, bool), TRITS, BASE_3, "w"), "of type bool"),
        (lambda: to_bytes(drawn("int2_absmax", (9,)), QUANTIZERS["int2_absmax"], BASE_3, "w"),
         "a grid of 4 levels; 5 codes a byte leave room for 3"),
        (lambda: from_bytes(np.zeros(2, np.int8), (10,), TRITS, BASE_3, "w"), r"int8\[2\]; bytes"),
        (lambda: from_bytes(np.zeros((2, 1), np.uint8), (10,), TRITS, BASE_3, "w"), r"\[2, 1\]"),
        (lambda: from_bytes(np.zeros(2, np.uint8), (11,), TRITS, BASE_3, "w"), "11 codes take 3"),
        (lambda: from_bytes(np.zeros(2, np.uint8), (5,), TRITS, BASE_3, "w"), "5 codes take 1"),
        (lambda: from_bytes(np.zeros(2, np.uint8), (2,), QUANTIZERS["int4_absmax"], TWO_BITS, "w"),
         "a grid of 16 levels"),
        (lambda: to_bytes(np.zeros(3, np.int8), QUANTIZERS["none"], TWO_BITS, "w"), "a grid of"),
    ],
)  # fmt: skip
def test_what_is_refused(make, message):
    """In one line that begins with the name of what it is."""
    with pytest.raises(PackingError, match=f"^w: .*{message}") as caught:
        make()
    assert "\n" not in str(caught.value) and isinstance(caught.value, ConfigError)


# Entropy


def test_entropy_by_hand():
    """A half, a quarter and a quarter weigh 1/2 * 1 + 1/2 * 2 bits; thirds log2 3."""
    assert entropy(code_counts(np.array([0, 0, -1, 1], np.int8))) == 1.5
    assert entropy([7, 7, 7]) == pytest.approx(math.log2(3), abs=1e-12)
    assert entropy([5, 0]) == entropy([]) == entropy([0]) == 0
    counts = code_counts(np.array([[-128, 127], [-1, -1]], np.int8))
    assert counts.sum() == 4 and counts[128] == counts[127] == 1 and counts[255] == 2
