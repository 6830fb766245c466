"""The Hadamard matrices and the rotation built of them."""

import math
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.hadamard import factors, hadamard_matrix, rotate_hadamard, supported
from bitnet_jax.ladder import LADDER

# Primes q = 3 mod 4 with q + 1 <= 256 and no power of two, by hand from a table of primes.
PALEY_PRIMES = (11, 19, 23, 43, 47, 59, 67, 71, 79, 83, 103, 107, 131, 139, 151, 163, 167, 179)
PALEY_PRIMES += (191, 199, 211, 223, 227, 239, 251)
POWERS = tuple(2**k for k in range(9))
ORDERS = sorted((*POWERS, *(q + 1 for q in PALEY_PRIMES)))
WIDTHS = sorted({2**k * n for n in ORDERS for k in range(9) if 2**k * n <= 256})


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(width):
    """The rotation of that width as one matrix, in float64."""
    blocks = (hadamard_matrix(n).astype(np.float64) for n in factors(width))
    return reduce(np.kron, blocks, np.ones((1, 1))) / np.sqrt(width)


def products(width):
    """Precision and operands of the matrix products that rotating a bfloat16 is made of."""
    jaxpr = jax.make_jaxpr(rotate_hadamard)(jnp.zeros((3, width), jnp.bfloat16))
    equations = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    return [(e.params["precision"], *(v.aval for v in e.invars)) for e in equations]


@pytest.mark.parametrize("order", ORDERS)
def test_matrix_is_hadamard_exactly(order):
    matrix = hadamard_matrix(order)
    assert matrix.shape == (order, order) and matrix.dtype == np.int8
    assert set(np.unique(matrix)) <= {-1, 1}
    wide = matrix.astype(np.int64)
    np.testing.assert_array_equal(wide @ wide.T, order * np.eye(order, dtype=np.int64))


@pytest.mark.parametrize("order", [-4, 0, *(n for n in range(1, 257) if n not in ORDERS), 1028])
def test_matrix_of_another_order_is_refused(order):
    """28 and 52 (27 and 51 are not prime), 6 and 14 (5 and 13 are 1 mod 4), every odd order..."""
    with pytest.raises(ValueError, match=rf"order {order}:"):
        hadamard_matrix(order)


def test_matrices_known_values():
    """Checkpoints depend on them. Squares modulo 11: 1, 3, 4, 5, 9."""
    np.testing.assert_array_equal(
        hadamard_matrix(4), [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    )
    first_column = [1 if a in (0, 1, 3, 4, 5, 9) else -1 for a in range(11)]
    circulant = np.stack([np.roll(first_column, j) for j in range(11)], axis=1)
    expected = np.block([[np.ones((1, 12))], [-np.ones((11, 1)), circulant]])
    np.testing.assert_array_equal(hadamard_matrix(12), expected)


def test_supported_widths_up_to_256():
    """All products of a power of two and an order, and nothing else."""
    assert [width for width in range(-8, 257) if supported(width)] == WIDTHS
    assert not {6, 10, 11, 28, 36, 52, 92, 100, 172, 188} & set(WIDTHS)


@pytest.mark.parametrize("width", WIDTHS)
def test_product_of_the_factors_is_the_width(width):
    orders = factors(width)
    assert math.prod(orders) == width
    assert all(n <= 64 for n in orders if n in POWERS)
    assert sum(n not in POWERS for n in orders) <= 1
    # The matrix has the entries +-1 / sqrt(width), and its inverse is its transpose.
    matrix = dense(width)
    np.testing.assert_allclose(np.abs(matrix), np.full_like(matrix, width**-0.5), rtol=1e-12)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-12)


@pytest.mark.parametrize(
    "width, orders",
    {
        1: (),
        2: (2,),
        64: (64,),
        128: (16, 8),
        4096: (64, 64),
        8192: (32, 16, 16),
        12: (12,),
        48: (4, 12),  # 47 is prime too, but 12 is cheaper
        96: (8, 12),
        160: (8, 20),
        352: (8, 44),
        416: (4, 104),
        5632: (16, 8, 44),
        28672: (16, 8, 224),
    }.items(),
)
def test_factors_known_values(width, orders):
    assert factors(width) == orders


@pytest.mark.parametrize(
    "width", [-12, 0, 3, 6, 7, 10, 11, 14, 28, 30, 36, 52, 92, 100, 172, 5504, 11008]
)
def test_other_widths_are_refused_by_name(width):
    """5504 is 5503 + 1, a Paley order, but too large a factor to be worth it."""
    assert not supported(width)
    with pytest.raises(ValueError, match=rf"width {width}:"):
        factors(width)
    if width > 0:
        with pytest.raises(ValueError, match=rf"width {width}:"):
            jax.eval_shape(rotate_hadamard, jax.ShapeDtypeStruct((2, width), jnp.float32))


def test_ladder_is_supported_but_for_one_width():
    """11008 = 256 * 43, the feed-forward width of 7b."""
    widths = {w for shape in LADDER.values() for w in (shape.width, shape.ff_width)}
    refused = {w for w in widths if not supported(w)}
    assert refused == {11008}
    for width in widths - refused:
        assert math.prod(factors(width)) == width


@pytest.mark.parametrize("width", [1, 2, 12, 32, 48, 128, 160, 352, 416, 768, 1536, 2816, 5632])
def test_rotation_is_the_dense_product(width):
    x = gaussian(2, 3, width)
    y = jax.jit(rotate_hadamard)(x)
    assert y.shape == x.shape and y.dtype == jnp.float32
    np.testing.assert_allclose(y, x.astype(np.float64) @ dense(width), atol=5e-6)


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 5, 48), (0, 48)])
def test_rotation_takes_any_leading_axes(shape):
    x = gaussian(*shape)
    np.testing.assert_allclose(rotate_hadamard(x), x.astype(np.float64) @ dense(48), atol=5e-6)


@pytest.mark.parametrize("width", [64, 96, 416, 8192])
def test_rotation_keeps_norms_and_inner_products(width):
    x = gaussian(4, width)
    y = np.asarray(rotate_hadamard(x), np.float64)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y @ y.T, wide @ wide.T, atol=1e-6 * width)


@pytest.mark.parametrize("width", [32, 48, 352])
def test_gradient_is_the_transposed_rotation(width):
    """Paley's matrices are not symmetric: the rotation itself would be another gradient."""
    x, g = gaussian(2, 3, width), gaussian(2, 3, width, seed=1)
    y, vjp = jax.vjp(jax.jit(rotate_hadamard), x)
    (dx,) = vjp(g)
    np.testing.assert_allclose(dx, g.astype(np.float64) @ dense(width).T, atol=5e-6)
    (back,) = vjp(y)
    np.testing.assert_allclose(back, x, atol=5e-6)
    half = jnp.asarray(x, jnp.bfloat16)
    assert jax.grad(lambda a: rotate_hadamard(a).sum())(half).dtype == jnp.bfloat16


@pytest.mark.parametrize("width", [64, 96, 416, 2816])
def test_an_outlier_is_spread_over_all_entries(width):
    """Of size sqrt(D), wherever it stands, it becomes entries of magnitude 1."""
    places = [0, 1, width // 2, width - 1]
    x = np.zeros((len(places), width), np.float32)
    x[np.arange(len(places)), places] = np.sqrt(width)
    np.testing.assert_allclose(np.abs(rotate_hadamard(x)), np.ones_like(x), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_rotation_computes_in_float32(dtype):
    """A sum of 512 values of 300 would overflow float16 before the division."""
    x = (300 + gaussian(3, 512)).astype(dtype)
    y = rotate_hadamard(x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, rotate_hadamard(x.astype(np.float32)))
    np.testing.assert_allclose(y, x.astype(np.float64) @ dense(512), atol=2e-3)
    assert rotate_hadamard(x[:, :1]).dtype == jnp.float32  # without any product, too


def test_jit_and_vmap_change_nothing():
    x = gaussian(3, 5, 352)
    y = rotate_hadamard(x)
    np.testing.assert_allclose(jax.jit(rotate_hadamard)(x), y, atol=1e-6)
    for axis in range(2):
        mapped = jax.vmap(rotate_hadamard, in_axes=axis, out_axes=axis)
        np.testing.assert_allclose(mapped(x), y, atol=1e-6)


@pytest.mark.parametrize("width", [128, 416, 8192])
def test_products_are_small_and_full_precision(width):
    """One for each factor: the dense matrix is never formed, nor TF32 used on a GPU."""
    found = products(width)
    assert [matrix.shape for _, _, matrix in found] == [(n, n) for n in factors(width)]
    for precision, x, matrix in found:
        assert precision == (jax.lax.Precision.HIGHEST,) * 2
        assert x.dtype == matrix.dtype == jnp.float32
