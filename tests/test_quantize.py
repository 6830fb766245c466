"""Codes and scales, against numpy and known answers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient

from bitnet_jax.quantize import (
    SCALE_FLOOR,
    dequantize,
    fake_quantize,
    identity,
    int8_absmax,
    ternary_absmean,
)

QUANTIZERS = (ternary_absmean, int8_absmax)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _run(quantizer, x):
    q = quantizer(x)
    return q.codes, q.scale, dequantize(q)


def run(quantizer, x):
    """Codes, scale and values in numpy, of the compiled quantizer."""
    return tuple(np.asarray(a) for a in _run(quantizer, x))


@pytest.mark.parametrize("shape", [(48, 80), (3, 5, 11)])
def test_ternary_against_numpy(shape):
    w = 0.02 * gaussian(*shape)
    codes, scale, values = run(ternary_absmean, w)
    gamma = np.abs(w.astype(np.float64)).mean()
    assert codes.dtype == np.int8 and scale.dtype == np.float32
    assert scale.shape == (1,) * len(shape)  # one for the whole tensor
    np.testing.assert_array_equal(codes, np.clip(np.rint(w / gamma), -1, 1))
    np.testing.assert_allclose(scale.item(), gamma, rtol=3e-7)  # a few roundings of float32
    np.testing.assert_array_equal(values, codes * scale)


@pytest.mark.parametrize("gamma", [1.0, 3.0, 49.0, 0.37])
def test_ternary_ties_round_to_even(gamma):
    """Half of gamma rounds to 0, the next float above it to 1; 1.5 gamma rounds to 2, then 1."""
    gamma = np.float32(gamma)
    w = np.array([0.5, 1.5, -0.5, -1.5], np.float32) * gamma
    codes, scale, _ = run(ternary_absmean, w)
    assert scale.item() == gamma  # these sums are exact: the ties are true ones
    np.testing.assert_array_equal(codes, [0, 1, 0, -1])
    above = np.concatenate([np.nextafter(w[:1], 9 * gamma), w[1:]])
    codes, scale, _ = run(ternary_absmean, above)
    assert scale.item() == gamma
    np.testing.assert_array_equal(codes, [1, 1, 0, -1])


def test_ternary_of_gaussian_weights():
    """Known answers: 31.0 % zeros, mean squared error .2634 sigma^2.

    In closed form, with g = sqrt(2/pi) the mean magnitude and t = g/2 the threshold. The tolerance
    is four standard errors of 4M samples.
    """
    w = 0.05 * np.random.default_rng(1).standard_normal(1 << 22, np.float32)
    codes, _, values = run(ternary_absmean, w)
    g = math.sqrt(2 / math.pi)
    zeros = math.erf(g / 2 / math.sqrt(2))
    error = 1 - 2 * g * g * math.exp(-g * g / 8) + g * g * (1 - zeros)
    assert zeros == pytest.approx(0.310, abs=5e-4) and error == pytest.approx(0.2634, abs=1e-4)
    assert np.mean(codes == 0) == pytest.approx(zeros, abs=9e-4)
    squared_error = np.mean((values - w) ** 2, dtype=np.float64)
    assert squared_error / 0.05**2 == pytest.approx(error, abs=9e-4)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_ignore_the_scale_and_follow_the_sign(quantizer):
    x = gaussian(16, 24)
    codes, scale, _ = run(quantizer, x)
    for factor in (0.25, 1024.0):  # powers of two multiply without rounding: the scale follows
        scaled = run(quantizer, factor * x)
        np.testing.assert_array_equal(scaled[0], codes)
        np.testing.assert_array_equal(scaled[1], factor * scale)
    np.testing.assert_array_equal(run(quantizer, -x)[0], -codes)
    np.testing.assert_array_equal(run(quantizer, -x)[1], scale)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_bfloat16_input_is_upcast_first(quantizer):
    x = gaussian(16, 24).astype(jnp.bfloat16)
    for low, high in zip(run(quantizer, x), run(quantizer, x.astype(np.float32)), strict=True):
        assert low.dtype == high.dtype
        np.testing.assert_array_equal(low, high)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-42])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_nothing_and_next_to_nothing_become_zero(quantizer, value):
    """The scale's floor stands in for a division by zero; 1e-42 is a denormal."""
    codes, scale, values = run(quantizer, np.full((16, 24), value, np.float32))
    np.testing.assert_array_equal(codes, 0)
    np.testing.assert_array_equal(values, 0)
    step = SCALE_FLOOR if quantizer is ternary_absmean else SCALE_FLOOR / 127
    np.testing.assert_allclose(scale, np.full_like(scale, step), rtol=1e-6)


@pytest.mark.parametrize("size", [8, 1000])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_huge_values_survive(quantizer, size):
    """Neither does the mean overflow, nor does 1/gamma (a denormal) flush the codes to 0."""
    x = np.full((3, size), 3e38, np.float32)
    x[1] *= -1
    np.testing.assert_allclose(run(quantizer, x)[2], x, rtol=2e-6)  # a sum of 3000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_weight_poisons_its_tensor(bad):
    w = gaussian(16, 24)
    w[2, 3] = bad
    codes, scale, values = run(ternary_absmean, w)
    assert np.isnan(values).all() and np.isnan(scale).all()
    assert set(np.unique(codes)) <= {-1, 0, 1}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_activation_poisons_its_token_alone(bad):
    x = gaussian(2, 7, 32)
    clean = run(int8_absmax, x)
    x[1, 3, 2] = bad
    codes, scale, values = run(int8_absmax, x)
    assert np.isnan(values[1, 3]).all() and np.isnan(scale[1, 3]) and not codes[1, 3].any()
    others = np.arange(14).reshape(2, 7) != 10
    np.testing.assert_array_equal(codes[others], clean[0][others])
    np.testing.assert_array_equal(scale[others], clean[1][others])


@pytest.mark.parametrize("shape", [(12,), (2, 7, 32)])
def test_int8_against_numpy(shape):
    """In float32 and in the same order of operations, so equal to the bit."""
    x = gaussian(*shape, seed=2)
    largest = np.abs(x).max(-1, keepdims=True)
    codes, scale, values = run(int8_absmax, x)
    np.testing.assert_array_equal(codes, np.rint(x * (np.float32(127) / largest)))
    np.testing.assert_allclose(scale, largest / np.float32(127), rtol=1.2e-7)  # an ulp
    np.testing.assert_array_equal(values, codes * scale)
    assert codes.dtype == np.int8 and scale.shape == (*shape[:-1], 1)


def test_int8_ties_round_to_even():
    x = np.array([127, 0.5, 1.5, 2.5, -0.5, -2.5, 126.5], np.float32)  # the scale is exactly 1
    np.testing.assert_array_equal(run(int8_absmax, x)[0], [127, 0, 2, 2, 0, -2, 126])


def test_int8_is_tight_and_one_token_at_a_time():
    x = gaussian(6, 40, seed=3) * np.logspace(-3, 3, 6, dtype=np.float32)[:, None]
    codes, scale, values = run(int8_absmax, x)
    top = np.abs(x).argmax(-1)[:, None]
    signs = np.sign(np.take_along_axis(x, top, -1))
    np.testing.assert_array_equal(np.take_along_axis(codes, top, -1), 127 * signs)
    # Half a step; the rest is float32's rounding of 127 steps.
    assert (np.abs(values - x) <= scale * (0.5 + 127 * 2**-22)).all()
    for i, token in enumerate(x):
        alone = run(int8_absmax, token)
        np.testing.assert_array_equal(alone[0], codes[i])
        np.testing.assert_array_equal(alone[1], scale[i])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_identity(dtype):
    x = jnp.asarray(gaussian(3, 4), dtype)
    q = identity(x)
    assert q.codes is x and q.scale.shape == (1, 1) and q.scale.dtype == jnp.float32
    np.testing.assert_array_equal(dequantize(q), x.astype(jnp.float32))


@pytest.mark.parametrize(
    "quantizer, dtype, jit",
    [
        (ternary_absmean, np.float32, True),
        (ternary_absmean, np.float32, False),
        (ternary_absmean, jnp.bfloat16, True),
        (int8_absmax, np.float32, True),
        (int8_absmax, jnp.bfloat16, True),
        (identity, jnp.bfloat16, False),
    ],
)
def test_fake_quantize_is_the_straight_through_estimator(quantizer, dtype, jit):
    """Value codes * scale, gradient as of x + stop_gradient(q(x) - x): the cotangent itself."""
    x, cotangent = (gaussian(16, 24, seed=s).astype(dtype) for s in (4, 5))

    def both(x):
        def composed(x):
            return x + stop_gradient(dequantize(quantizer(x)).astype(x.dtype) - x)

        value, pullback = jax.vjp(lambda x: fake_quantize(x, quantizer), x)
        expected = dequantize(quantizer(x)), jax.vjp(composed, x)[1](cotangent)[0]
        return value, pullback(cotangent)[0], *expected

    # Within one program: eager and compiled means differ in the order of their sums.
    value, gradient, quantized, composed_gradient = (jax.jit(both) if jit else both)(x)
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_array_equal(value, quantized.astype(dtype))
    np.testing.assert_array_equal(gradient, composed_gradient)
    np.testing.assert_array_equal(gradient, cotangent)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_fake_quantize_under_vmap_has_a_scale_for_each_member(quantizer):
    x = gaussian(3, 16, 24) * np.array([1, 10, 100], np.float32)[:, None, None]
    cotangent = gaussian(3, 16, 24, seed=6)

    @jax.jit
    @jax.vmap
    def value_and_gradient(x, cotangent):
        value, pullback = jax.vjp(lambda x: fake_quantize(x, quantizer), x)
        return value, pullback(cotangent)[0]

    values, gradients = value_and_gradient(x, cotangent)
    expected = [run(quantizer, member)[2] for member in x]
    np.testing.assert_allclose(values, expected, rtol=3e-7)  # another order of the mean's sum
    np.testing.assert_array_equal(gradients, cotangent)
