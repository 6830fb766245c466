"""Gradients through rounding, against compositions with stop_gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient

from bitnet_jax.estimators import (
    ESTIMATORS,
    apply_mask,
    fake_quantize,
    passes,
    step_gradient,
)
from bitnet_jax.quantize import QUANTIZERS, SCALE_FLOOR, Quantized, dequantize, quantize

SHAPE = (16, 24)
TENSOR, ROW = (0, 1), (1,)
# Rows with values beyond the last level, symmetric or not, with a zero or without.
CLIPPING = ("ternary_absmean", "ternary_twn", "ternary_lsq", "int4_absmean", "binary")


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- Each estimator as its paper writes it -----------------------------------------------------


def straight_through(row, x, q, scale):
    """x + stop_gradient(q(x) - x)"""
    del row, scale
    return x + stop_gradient(q - x)


def clip_then_straight_through(row, x, q, scale):
    """Clip to the grid, and then straight through."""
    clipped = jnp.clip(x, row.low * scale, row.high * scale)
    return clipped + stop_gradient(q - clipped)


def trusted(row, x, q, scale):
    """M x + stop_gradient(q(x) - M x), M where they are at most half a step apart."""
    close = jnp.abs(q - x) <= row.gap * scale / 2
    mask = stop_gradient(close.astype(x.dtype))
    return mask * x + stop_gradient(q - mask * x)


COMPOSITIONS = {
    "identity": straight_through,
    "clipped": clip_then_straight_through,
    "trust": trusted,
    "stochastic": straight_through,
}


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def both(x, g, name, axes, estimator):
    """Value and gradient of fake_quantize and of the composition, in one program.

    Eager and compiled means differ in the order of their sums.
    """
    row = QUANTIZERS[name]

    def composed(x):
        q = quantize(row, stop_gradient(x), axes)
        return COMPOSITIONS[estimator](row, x, dequantize(q), q.scale)

    value, pullback = jax.vjp(lambda x: fake_quantize(x, row, axes, estimator), x)
    expected, expected_pullback = jax.vjp(composed, x.astype(jnp.float32))
    gradients = pullback(g)[0], expected_pullback(g.astype(jnp.float32))[0]
    return value, gradients[0], expected, gradients[1]


def test_every_estimator_has_a_composition():
    assert set(COMPOSITIONS) == set(ESTIMATORS)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", CLIPPING)
def test_value_and_gradient_are_the_composition_s(name, estimator):
    x, g = 3 * gaussian(*SHAPE, seed=4), gaussian(*SHAPE, seed=5)
    value, gradient, expected, expected_gradient = both(x, g, name, ROW, estimator)
    np.testing.assert_allclose(value, expected, atol=1e-6 * np.abs(x).max())
    np.testing.assert_array_equal(gradient, expected_gradient)
    # Some weights learn; all do where the estimator passes everything, else not all.
    share = np.mean(np.asarray(gradient) == g)
    assert share == 1 if estimator in ("identity", "stochastic") else 0.4 < share < 1


@pytest.mark.parametrize("estimator", ["clipped", "trust"])
@pytest.mark.parametrize("name", [*CLIPPING, "int2_stretched"])
def test_where_the_gradient_passes(name, estimator):
    """Far beyond the last level it does not; within the grid it does; half a step beyond is what
    the two differ in."""
    row = QUANTIZERS[name]
    x = gaussian(*SHAPE)
    _, scale, _ = plain(name, x, TENSOR)
    ends = np.array([row.low, row.high]) * scale.item()
    beyond = row.gap * scale.item() / 2
    x[0, :4] = ends[0] - 0.9 * beyond, ends[1] + 0.9 * beyond, *(0.999 * ends)
    x[1, :2] = ends[0] - 1.1 * beyond, ends[1] + 1.1 * beyond
    mask = np.asarray(passes(estimator, row, x, Quantized(nearest(row, x, scale), scale)))
    np.testing.assert_array_equal(mask[0, :4], [estimator == "trust"] * 2 + [True] * 2)
    np.testing.assert_array_equal(mask[1, :2], False)


def nearest(row, x, scale):
    grid = np.arange(row.low, row.high + 1, row.gap)
    return grid[np.abs(x[..., None] / scale[..., None] - grid).argmin(-1)].astype(np.int8)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _plain(row, x, axes):
    q = quantize(row, x, axes)
    return q.codes, q.scale, dequantize(q)


def plain(name, x, axes):
    return tuple(np.asarray(a) for a in _plain(QUANTIZERS[name], x, axes))


@pytest.mark.parametrize("estimator", ["clipped", "trust"])
@pytest.mark.parametrize("name", ["int3_absmax", "int4_absmax", "int8_absmax"])
def test_nothing_lies_beyond_a_grid_that_reaches_the_largest_value(name, estimator):
    """However max / 127 is rounded, 127 times it must not leave the largest value out.

    The codes and scales are made in a program of their own, as none may assume how it is fused.
    """
    row, x = QUANTIZERS[name], np.abs(gaussian(4000, 4, seed=6))
    codes, scale, _ = plain(name, x, ROW)
    for rounded in (scale, np.nextafter(scale, np.float32(0))):
        mask = np.asarray(passes(estimator, row, x, Quantized(codes, rounded)))
        top = x == x.max(1, keepdims=True)
        assert mask[top].all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_not_quantized_passes_everywhere(estimator):
    x = gaussian(*SHAPE)
    row = QUANTIZERS["none"]
    assert passes(estimator, row, x, quantize(row, x, ROW)) is None
    assert apply_mask(None, x) is x
    value, pullback = jax.vjp(lambda x: fake_quantize(x, row, ROW, estimator), x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(pullback(x)[0], x)


def test_a_mask_replaces_what_it_stops():
    """NaN times 0 would be NaN: a gradient that does not pass is 0, and one that does stays."""
    g = np.array([1, np.nan, np.inf, np.nan, -2], np.float32)
    stopped = apply_mask(np.array([True, False, False, True, False]), g)
    np.testing.assert_array_equal(stopped, np.array([1, 0, 0, np.nan, 0], np.float32))


# ---- fake_quantize -----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["identity", "trust"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_fake_quantize_keeps_the_dtype(dtype, estimator):
    """Quantized in float32, then rounded once; the cotangent comes back as it is."""
    x, g = (gaussian(*SHAPE, seed=s).astype(dtype) for s in (4, 5))
    value, gradient, _, expected = both(x, g, "ternary_absmean", TENSOR, estimator)
    assert value.dtype == gradient.dtype == dtype
    _, _, values = plain("ternary_absmean", x, TENSOR)
    np.testing.assert_array_equal(value, values.astype(dtype))
    np.testing.assert_array_equal(gradient, expected.astype(dtype))


def test_fake_quantize_without_jit():
    x, g = gaussian(*SHAPE, seed=4), gaussian(*SHAPE, seed=5)
    row = QUANTIZERS["int8_absmax"]
    value, pullback = jax.vjp(lambda x: fake_quantize(x, row, ROW), x)
    np.testing.assert_array_equal(value, dequantize(quantize(row, x, ROW)))
    np.testing.assert_array_equal(pullback(g)[0], g)  # identity is the default


@pytest.mark.parametrize("estimator", ["identity", "clipped", "trust"])
def test_fake_quantize_under_vmap_has_a_scale_for_each_member(estimator):
    x = gaussian(3, *SHAPE) * np.array([1, 10, 100], np.float32)[:, None, None]
    g = gaussian(3, *SHAPE, seed=6)
    row = QUANTIZERS["ternary_absmean"]

    @jax.jit
    @jax.vmap
    def value_and_gradient(x, g):
        value, pullback = jax.vjp(lambda x: fake_quantize(x, row, TENSOR, estimator), x)
        return value, pullback(g)[0]

    values, gradients = value_and_gradient(x, g)
    for i in range(3):
        value, gradient, _, _ = both(x[i], g[i], "ternary_absmean", TENSOR, estimator)
        np.testing.assert_allclose(values[i], value, rtol=5e-7)  # another order of the mean's sum
        np.testing.assert_array_equal(gradients[i], gradient)


# ---- Learned scales ----------------------------------------------------------------------------


def lsq_values(row, x, step, count):
    """LSQ: the step's gradient scaled by 1/sqrt(count high), and rounding passed straight through.

    Grids without a zero round to the nearest odd number.
    """
    grad_scale = 1 / np.sqrt(count * row.high)
    s = step * grad_scale + stop_gradient(step - step * grad_scale)
    ratio = jnp.clip(x / s, row.low, row.high)
    position = ratio if row.gap == 1 else (ratio - 1) / 2
    position = position + stop_gradient(jnp.round(position) - position)
    return (position if row.gap == 1 else 2 * position + 1) * s


@pytest.mark.parametrize("under", ["jit", "eager", "vmap"])
@pytest.mark.parametrize("name", ["ternary_lsq", "int2_stretched", "int4_absmax"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 1), (1, 24)])
def test_step_gradient_is_lsq_s(name, shape, under):
    """For one step, and for one of each row or column; int4's grid is not symmetric."""
    row, x, g = QUANTIZERS[name], gaussian(*SHAPE), gaussian(*SHAPE, seed=1)
    sizes = np.random.default_rng(2).uniform(0.5, 1.5, shape) / row.high
    step, count = sizes.astype(np.float32), SHAPE[0] * SHAPE[1] // sizes.size
    codes = nearest(row, x, np.broadcast_to(step, SHAPE))

    def own(x, codes, step, g):
        return step_gradient(row, x, Quantized(codes, step), step, g)

    if under == "vmap":
        stacked = (np.stack([a, a[::-1]]) for a in (x, codes, np.broadcast_to(step, SHAPE), g))
        x2, codes2, steps2, g2 = stacked
        steps2 = steps2[:, : shape[0], : shape[1]]
        gradient, flipped = jax.jit(jax.vmap(own))(x2, codes2, steps2, g2)
        np.testing.assert_allclose(
            flipped, gradient[::-1] if shape[0] > 1 else gradient, rtol=1e-4, atol=1e-5
        )
    else:
        gradient = (jax.jit(own) if under == "jit" else own)(x, codes, step, g)
    expected = jax.grad(lambda s: jnp.sum(g * lsq_values(row, x, s, count)))(step)
    assert gradient.shape == shape
    bound = 2e-6 * np.abs(g).sum() * max(row.high, -row.low) / np.sqrt(count * row.high)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=bound)
    assert np.abs(gradient).max() > 1000 * bound


def test_beyond_the_last_level_a_step_s_gradient_is_the_code():
    """A larger step moves a clipped value by the code; of values on the grid it moves nothing."""
    row, step = QUANTIZERS["ternary_lsq"], np.full((1, 1), 0.5, np.float32)
    x = np.array([[0.8, -0.8, 0.3, 0.0, -0.2, 7.0]], np.float32)
    codes = np.array([[1, -1, 1, 0, 0, 1]], np.int8)
    for i, expected in enumerate([1, -1, 0.4, 0, 0.4, 1]):
        g = np.zeros_like(x)
        g[0, i] = 3
        gradient = step_gradient(row, x, Quantized(codes, step), step, g)
        assert gradient.item() == pytest.approx(3 * expected / np.sqrt(6), abs=1e-6)


@pytest.mark.parametrize("step", [-1.0, 0.0, SCALE_FLOOR])
def test_a_step_at_the_floor_gets_no_gradient(step):
    row, x = QUANTIZERS["ternary_lsq"], gaussian(*SHAPE)
    step = np.full((1, 1), step, np.float32)
    q = quantize(row, x, TENSOR, step)
    assert step_gradient(row, x, q, step, np.ones(SHAPE, np.float32)).item() == 0
