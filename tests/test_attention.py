"""Attention against float64 numpy, a plain implementation's gradients, and causality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.attention import causal_attention

HEADS = 4
KV_HEADS = pytest.mark.parametrize("kv_heads", [4, 2, 1])


def inputs(kv_heads, *, seed=0, dtype=np.float32):
    """q, k, v and a cotangent for B, T, H = 2, 6, 8."""
    rng = np.random.default_rng(seed)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return tuple(rng.normal(size=(2, 6, n, 8)).astype(np.float32).astype(dtype) for n in heads)


def naive_attention(q, k, v):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    y = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        kv = n // (q.shape[2] // k.shape[2])  # consecutive query heads share a key head
        scores = k[b, : t + 1, kv] @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        y[b, t, n] = weights / weights.sum() @ v[b, : t + 1, kv]
    return y


def plain_attention(q, k, v):
    """For its gradients: float32 jnp throughout, key heads repeated, differentiated by jax."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") / np.sqrt(q.shape[3])
    mask = np.tril(np.ones(scores.shape[2:], bool))[None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")


@functools.partial(jax.jit, static_argnums=0)
def gradients(function, q, k, v, g):
    return jax.vjp(function, q, k, v)[1](g)


attend = jax.jit(causal_attention)


@KV_HEADS
def test_values_against_naive_softmax(kv_heads):
    q, k, v, _ = inputs(kv_heads)
    y = attend(q, k, v)
    np.testing.assert_allclose(y, naive_attention(q, k, v), atol=2e-6)  # values of order 1


@KV_HEADS
def test_gradients_against_plain_jnp(kv_heads):
    arrays = inputs(kv_heads)
    ours, plain = gradients(causal_attention, *arrays), gradients(plain_attention, *arrays)
    for a, b in zip(ours, plain, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=5e-6)  # values of order 1, sums of up to 24 terms


@pytest.mark.parametrize("dtype, roundoff", [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)])
def test_16_bit_values_and_gradients(dtype, roundoff):
    """Several roundings (weights, scores' gradient, result): within 4 roundoffs of the largest."""
    arrays = inputs(2, dtype=dtype)
    wide = tuple(a.astype(np.float32) for a in arrays)
    ours = attend(*arrays[:3]), *gradients(causal_attention, *arrays)
    plain = naive_attention(*wide[:3]), *gradients(plain_attention, *wide)
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == dtype
        error = np.abs(np.asarray(a, np.float32) - b).max()
        assert error <= 4 * roundoff * np.abs(b).max()


@KV_HEADS
def test_later_tokens_leave_earlier_outputs_equal_to_the_bit(kv_heads):
    q, k, v, _ = inputs(kv_heads)
    others = inputs(kv_heads, seed=1)
    before = np.asarray(attend(q, k, v))
    for t in range(1, 6):
        mixed = (
            np.concatenate([a[:, :t], b[:, t:]], 1)
            for a, b in zip((q, k, v), others[:3], strict=True)
        )
        after = np.asarray(attend(*mixed))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(-1).all()


def test_every_token_sees_all_tokens_before_it_and_none_after():
    """With values as one-hot positions, the output is the attention weights themselves."""
    q, k, _, _ = inputs(1)
    v = np.broadcast_to(np.eye(6, 8, dtype=np.float32)[None, :, None], (2, 6, 1, 8))
    weights = np.asarray(attend(q, k, v))[..., :6].transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(np.tri(6) > 0, weights.shape))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_float16_with_scores_beyond_its_range():
    """q.k reaches 5e6, softmax's input 2e6; float16 ends at 65504. Scores are float32."""
    q, k, v, g = inputs(2, dtype=np.float16)
    q, k = 400 * q, 400 * k
    y = np.asarray(attend(q, k, v))
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, naive_attention(q, k, v), atol=4 * 2**-10)  # two float16 ulps
    for gradient in gradients(causal_attention, q, k, v, g):
        assert np.isfinite(gradient).all()
