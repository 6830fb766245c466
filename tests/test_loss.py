"""Losses against numpy and optax."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax import loss
from bitnet_jax.loss import bits_per_byte, head_cross_entropy, z_loss
from bitnet_jax.matmul import plain_dot
from bitnet_jax.precision import get_precision

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


# The loss of a head, whose logits are computed in chunks of positions


X, HEAD = (RNG.normal(size=shape).astype(np.float32) for shape in ((3, 5, 8), (11, 8)))
G_NATS, G_Z = (RNG.normal(size=(3, 5)).astype(np.float32) for _ in range(2))


@functools.cache
def of_head(arm, max_logits):
    """nats, log Z, and the gradients for x and the head of a sum of both with random weights."""

    @jax.jit
    def run(x, head):
        precision = get_precision(arm)
        values, pullback = jax.vjp(
            lambda x, head: head_cross_entropy(x, head, TARGETS, precision, max_logits), x, head
        )
        return *values, *pullback((G_NATS, G_Z))

    return run


# 15 positions, 165 logits: 1 chunk, 3 of 5, 4 of 4 (one of them made up), 15 of 1; a bound below
# one position's logits is one at a time, or as many chunks as it asks for.
@pytest.mark.parametrize(
    "arm, roundoff, max_logits",
    [*(("fp32", 0, n) for n in (164, 55, 44, 11, 5)), ("bf16", 2**-8, 44), ("fp16", 2**-11, 44)],
)
def test_chunks_change_nothing(arm, roundoff, max_logits):
    """Values to float32's rounding, and gradients to that of their sums; both paths, nats and log Z

    16-bit logits may round to a neighbour, where another order of summing has crossed a tie.
    """
    whole, chunked = (of_head(arm, n)(X, HEAD) for n in (165, max_logits))
    for a, b in zip(chunked, whole, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        size = np.abs(b).max()
        np.testing.assert_allclose(a, b, atol=(2e-6 + 2 * roundoff) * size)
    nats, log_z = cross_entropy(plain_dot(X, HEAD, get_precision(arm)), TARGETS)
    np.testing.assert_allclose(chunked[0], nats, atol=(2e-6 + 2 * roundoff) * np.abs(nats).max())
    np.testing.assert_allclose(chunked[1], log_z, atol=(2e-6 + 2 * roundoff) * np.abs(log_z).max())


def test_gradients_of_chunks_against_numpy():
    """(softmax - one-hot) * g, and softmax * g of log Z, through the head: in float64."""
    *_, dx, d_head = of_head("fp32", 44)(X, HEAD)
    x, head = X.astype(np.float64), HEAD.astype(np.float64)
    p = np.exp(x @ head.T)
    p /= p.sum(-1, keepdims=True)
    d_logits = (p - np.eye(11)[TARGETS]) * G_NATS[..., None] + p * G_Z[..., None]
    np.testing.assert_allclose(dx, d_logits @ head, atol=5e-6)  # values of up to 5
    np.testing.assert_allclose(d_head, np.einsum("btv,btd->vd", d_logits, x), atol=1e-5)


def arrays_of(jaxpr):
    """The abstract values that a jaxpr's equations make, those of inner ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from arrays_of(inner)


@pytest.mark.parametrize("arm", ["fp32", "bf16"])
def test_all_logits_never_exist_at_once(arm):
    """Neither forward nor backward is there an array beyond the bound, but for a batch's own."""
    x, head = np.zeros((32, 16, 4), np.float32), np.zeros((64, 4), np.float32)
    targets = np.zeros((32, 16), np.int32)

    def total(x, head, max_logits):
        values = head_cross_entropy(x, head, targets, get_precision(arm), max_logits)
        return values[0].mean() + z_loss(values[1])

    def largest(max_logits):
        gradient = jax.grad(lambda x, head: total(x, head, max_logits), argnums=(0, 1))
        return max(a.size for a in arrays_of(jax.make_jaxpr(gradient)(x, head).jaxpr))

    logits = 32 * 16 * 64
    assert largest(logits) == logits, "which is how this would see them"
    assert largest(logits // 8) == logits // 8 > x.size
    assert largest(logits // 64) == x.size
