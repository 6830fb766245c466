"""Codes in 2 bits: by hand, and there and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.packing import fits, pack, unpack
from bitnet_jax.quantize import QUANTIZERS

FITTING = [name for name, q in QUANTIZERS.items() if q.reach is not None and fits(q)]


def test_bytes_by_hand():
    """Trits -1, 0, 1, 1, -1 are the places 0, 1, 2, 2 and 0: 0b10_10_01_00, then zeros."""
    packed = pack(jnp.array([-1, 0, 1, 1, -1], jnp.int8), QUANTIZERS["ternary_absmean"])
    np.testing.assert_array_equal(packed, np.array([0b10100100, 0], np.uint8))


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("shape", [(1,), (4,), (7,), (3, 5), (2, 3, 8)])
def test_there_and_back(name, shape):
    q = QUANTIZERS[name]
    grid = np.arange(q.low, q.high + 1, q.gap)
    codes = np.random.default_rng(0).choice(grid, shape).astype(np.int8)
    packed = pack(jnp.asarray(codes), q)
    assert packed.dtype == jnp.uint8 and packed.shape == (*shape[:-1], -(-shape[-1] // 4))
    back = unpack(packed, shape[-1], q)
    assert back.dtype == jnp.int8
    np.testing.assert_array_equal(back, codes)


def test_which_grids_fit():
    """Trits, signs and 2-bit grids do; 3 bits and more do not."""
    assert {"ternary_absmean", "binary", "int2_absmax"} <= set(FITTING)
    assert not any(fits(QUANTIZERS[f"int{bits}_absmax"]) for bits in (3, 4, 8))
