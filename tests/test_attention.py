"""Attention against float64 numpy, a plain implementation's gradients, and causality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.attention import BLOCK, MAX_BLOCKS, causal_attention

HEADS = 4
KV_HEADS = pytest.mark.parametrize("kv_heads", [4, 2, 1])


def inputs(kv_heads, *, seed=0, dtype=np.float32, length=6):
    """q, k, v and a cotangent for B, H = 2, 8."""
    rng = np.random.default_rng(seed)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return tuple(rng.normal(size=(2, length, n, 8)).astype(np.float32).astype(dtype) for n in heads)


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


# Several blocks of queries: 150 are three, the last a short one; 600 are more than MAX_BLOCKS of
# BLOCK, so blocks are larger.


def wide_attention(q, k, v, g):
    """y, dq, dk and dv in float64 numpy, of all queries at once."""
    q, k, v, g = (np.asarray(a, np.float64).transpose(0, 2, 1, 3) for a in (q, k, v, g))
    shared, size = q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    k, v = (np.repeat(a, shared, axis=1) for a in (k, v))
    visible = np.tri(q.shape[2], dtype=bool)
    weights = np.where(visible, np.exp(size * q @ k.swapaxes(2, 3)), 0)
    weights /= weights.sum(-1, keepdims=True)
    y, d_weights = weights @ v, g @ v.swapaxes(2, 3)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * size
    dk, dv = d_scores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ g
    dk, dv = (a.reshape(a.shape[0], -1, shared, *a.shape[2:]).sum(2) for a in (dk, dv))
    return [a.transpose(0, 2, 1, 3) for a in (y, d_scores @ k, dk, dv)]


@pytest.mark.parametrize("kv_heads, length", [(4, 65), (2, 150), (1, 150), (2, 600)])
def test_several_blocks_are_one_attention(kv_heads, length):
    """Values and gradients; the float64 reference is the naive one where both are cheap."""
    arrays = inputs(kv_heads, length=length)
    found = attend(*arrays[:3]), *gradients(causal_attention, *arrays)
    expected = wide_attention(*arrays)
    if length == 65:
        np.testing.assert_allclose(expected[0], naive_attention(*arrays[:3]), atol=1e-12)
    for a, b in zip(found, expected, strict=True):
        # Float32 sums of values of order 1, of up to 600 terms for dk and dv.
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1, np.abs(b).max()))


def test_16_bit_gradients_of_several_blocks():
    """Roundings as in a single block: what blocks add to dk and dv is added up in float32."""
    arrays = inputs(2, dtype=jnp.bfloat16, length=150)
    found = gradients(causal_attention, *arrays)
    for a, b in zip(found, wide_attention(*arrays)[1:], strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(np.asarray(a, np.float64) - b).max() <= 4 * 2**-8 * np.abs(b).max()


@pytest.mark.parametrize("t", [1, 63, 64, 65, 127, 128, 129, 149])
def test_causality_across_the_borders_of_blocks(t):
    """To the bit: later tokens change no earlier output, and get no gradient from one."""
    q, k, v, g = inputs(2, length=150)
    others = inputs(2, seed=1, length=150)
    before = np.asarray(attend(q, k, v))
    mixed = (
        np.concatenate([a[:, :t], b[:, t:]], 1) for a, b in zip((q, k, v), others[:3], strict=True)
    )
    after = np.asarray(attend(*mixed))
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert (after[:, t:] != before[:, t:]).any(-1).all()
    g = np.where(np.arange(150)[None, :, None, None] < t, g, 0)
    for gradient in gradients(causal_attention, q, k, v, g):
        assert (np.asarray(gradient)[:, t:] == 0).all()
        # A first query sees itself alone, so that its scores have no gradient: only v's does.
        assert t == 1 or (np.asarray(gradient)[:, :t] != 0).any(-1).any(-1).mean() > 0.9


@pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 1, 150, 512, 513, 600, 5000])
def test_blocks_tile_the_queries_and_are_few(length):
    """By the shapes of the scores: each query once, with the keys up to its block's end; a program
    of at most MAX_BLOCKS, which leaves out most of what the mask would throw away."""
    shapes = [jax.ShapeDtypeStruct((1, length, n, 8), jnp.float32) for n in (2, 1, 1)]
    (call,) = [
        e
        for e in jax.make_jaxpr(causal_attention)(*shapes).eqns
        if "custom_vjp" in e.primitive.name
    ]
    products = [e for e in call.params["call_jaxpr"].eqns if e.primitive.name == "dot_general"]
    scores = [e.outvars[0].aval.shape for e in products[::2]]
    queries, keys = [shape[2] // 2 for shape in scores], [shape[3] for shape in scores]
    assert len(products) == 2 * len(scores) and len(scores) <= MAX_BLOCKS
    assert keys == list(np.cumsum(queries)) and keys[-1] == length
    assert max(queries) <= max(BLOCK, -(-length // MAX_BLOCKS))
    computed = sum(q * k for q, k in zip(queries, keys, strict=True))
    assert computed <= length * (length + max(queries)) / 2
