"""Losses against numpy and optax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax import loss
from bitnet_jax.loss import bits_per_byte, z_loss

cross_entropy = jax.jit(loss.cross_entropy)
RNG = np.random.default_rng(0)
LOGITS = (4 * RNG.normal(size=(3, 5, 11))).astype(np.float32)
TARGETS = RNG.integers(0, 11, (3, 5))


def test_cross_entropy_against_numpy_and_optax():
    nats, log_z = cross_entropy(LOGITS, TARGETS)
    wide = LOGITS.astype(np.float64)
    expected_z = np.log(np.exp(wide).sum(-1))
    targets = np.take_along_axis(wide, TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_z, expected_z, rtol=1e-6)
    np.testing.assert_allclose(nats, expected_z - targets, atol=2e-6)  # of numbers up to 20
    reference = jax.jit(optax.softmax_cross_entropy_with_integer_labels)(LOGITS, TARGETS)
    np.testing.assert_allclose(nats, reference, atol=2e-6)


def test_gradient_is_softmax_minus_one_hot():
    gradient = jax.jit(jax.grad(lambda x: cross_entropy(x, TARGETS)[0].sum()))(LOGITS)
    expected = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True) - np.eye(11)[TARGETS]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_known_answers():
    uniform = np.zeros((1, 2, 8), np.float32)
    nats, log_z = cross_entropy(uniform, np.array([[0, 7]]))
    np.testing.assert_allclose(nats, np.full((1, 2), math.log(8)), rtol=1e-6)
    np.testing.assert_allclose(z_loss(log_z), math.log(8) ** 2, rtol=1e-6)
    certain = np.array([[[50.0, 0, 0]]], np.float32)
    np.testing.assert_allclose(cross_entropy(certain, np.array([[0]]))[0], [[0]], atol=1e-6)
    np.testing.assert_allclose(cross_entropy(certain, np.array([[2]]))[0], [[50]], rtol=1e-6)


def test_16_bit_logits_are_summed_in_float32():
    low = jnp.asarray(LOGITS, jnp.bfloat16)
    nats, log_z = cross_entropy(low, TARGETS)
    assert nats.dtype == log_z.dtype == jnp.float32
    np.testing.assert_array_equal(nats, cross_entropy(low.astype(jnp.float32), TARGETS)[0])


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_stay_finite(size):
    logits = size * np.array([[[1, -1, 0]]], np.float32)
    nats, log_z = cross_entropy(logits, np.array([[1]]))
    np.testing.assert_allclose(nats, [[2 * size]], rtol=1e-6)
    np.testing.assert_allclose(log_z, [[size]], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: cross_entropy(x, np.array([[1]]))[0].sum()))(logits)
    np.testing.assert_allclose(gradient, [[[1, -1, 0]]], atol=1e-6)


def test_z_loss_pulls_the_normaliser_to_zero():
    """Mean of squares: positive for either sign, gradient 2 log Z / count."""
    log_z = np.array([[1.0, -2.0, 3.0]], np.float32)
    value, gradient = jax.value_and_grad(z_loss)(log_z)
    np.testing.assert_allclose(value, 14 / 3, rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * log_z / 3, rtol=1e-6)


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2), 8) == pytest.approx(1, rel=1e-15)
    assert bits_per_byte(math.log(256), 1) == pytest.approx(8, rel=1e-15)
    assert bits_per_byte(3.0, 4.5) == pytest.approx(3.0 / 4.5 / math.log(2), rel=1e-15)
