"""One step: accumulation, skipped updates, loss scaling, z-loss, and that both arms can learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import train_step as module
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.model import Transformer
from bitnet_jax.train_step import (
    LOSS_SCALE_GROWTH_INTERVAL,
    compiled_eval_step,
    compiled_init,
    compiled_train_step,
)

LR, DECAY = np.float32(0.01), np.float32(0.1)


@pytest.fixture(scope="module")
def step_config(tiny_config, tiny_corpus):
    def make(precision="fp32", **changes):
        step = resolve(tiny_config({"precision": precision}), tiny_corpus).step
        return dataclasses.replace(step, **changes)

    return make


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (8, 17)).astype(np.int32)


def one_step(config, tokens, state=None):
    """The state and metrics after a step; the given state stays alive, though steps donate."""
    state = compiled_init(config)(0) if state is None else jax.tree.map(jnp.copy, state)
    return compiled_train_step(config)(state, tokens, LR, DECAY)


def gradients(config, state, metrics):
    """The gradients of a first step, from Adam's first moments, with the clipping undone."""
    adams = jax.tree.leaves(state.opt_state, is_leaf=lambda node: hasattr(node, "mu"))
    (mu,) = [node.mu for node in adams if hasattr(node, "mu")]
    unclip = max(1.0, float(metrics["grad_norm"]) / config.optimizer.clip_norm)
    return jax.tree.map(
        lambda m: np.asarray(m, np.float64) / (1 - config.optimizer.b1) * unclip, mu
    )


def logits_of(config, params, tokens):
    model = Transformer(config.model, config.precision)
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens[:, :-1]), np.float64)


def assert_bitwise_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_four_microbatches_equal_one(step_config, tokens):
    whole, metrics = one_step(step_config(), tokens)
    parts, part_metrics = one_step(step_config(microbatches=4), tokens)
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(part_metrics[key], metrics[key], rtol=1e-6)
    expected = flat(gradients(step_config(), whole, metrics))
    found = flat(gradients(step_config(), parts, part_metrics))
    np.testing.assert_allclose(found, expected, atol=1e-6 * abs(expected).max())


def test_grad_norm_is_before_clipping_and_the_update_after(step_config, tokens):
    config = step_config()
    state, metrics = one_step(config, tokens)
    assert float(metrics["grad_norm"]) > 1.05 * config.optimizer.clip_norm
    unclip = float(metrics["grad_norm"]) / config.optimizer.clip_norm
    clipped = flat(gradients(config, state, metrics)) / unclip
    assert np.linalg.norm(clipped) == pytest.approx(config.optimizer.clip_norm, rel=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("precision", ["fp32", "ternary"])
def test_non_finite_loss_changes_nothing_and_is_counted(step_config, tokens, precision, poison):
    config = step_config(precision)
    state, _ = one_step(config, tokens)
    state.params["embedding"] = state.params["embedding"].at[int(tokens[0, 0]), 0].set(poison)
    once, metrics = one_step(config, tokens, state)
    assert not np.isfinite(metrics["loss"])
    assert_bitwise_equal((once.params, once.opt_state), (state.params, state.opt_state))
    assert int(once.skips) == int(metrics["skips"]) == 1
    twice, _ = one_step(config, tokens, once)
    assert int(twice.skips) == 2
    healthy = twice.replace(params=compiled_init(config)(0).params)
    after, metrics = one_step(config, tokens, healthy)
    assert int(after.skips) == 0 and np.isfinite(metrics["loss"])


def test_loss_scale_halves_at_an_overflow_down_to_one(step_config, tokens):
    config = step_config("fp16")
    state = compiled_init(config)(0)
    assert float(state.loss_scale) == 2**15
    huge = state.replace(loss_scale=jnp.float32(2.0**120), good_steps=jnp.int32(7))
    after, metrics = one_step(config, tokens, huge)
    assert np.isfinite(metrics["loss"]), "the loss is fine; only its scaled gradient overflows"
    assert float(after.loss_scale) == float(metrics["loss_scale"]) == 2.0**119
    assert (int(after.skips), int(after.good_steps)) == (1, 0)
    assert_bitwise_equal(after.params, state.params)
    state.params["embedding"] = state.params["embedding"].at[:].set(np.nan)
    for scale, halved in ((4.0, 2.0), (1.0, 1.0)):
        poisoned = state.replace(loss_scale=jnp.float32(scale))
        assert float(one_step(config, tokens, poisoned)[0].loss_scale) == halved


def test_loss_scale_doubles_after_the_interval(step_config, tokens):
    config = step_config("fp16")
    ready = compiled_init(config)(0).replace(good_steps=jnp.int32(LOSS_SCALE_GROWTH_INTERVAL - 2))
    before, _ = one_step(config, tokens, ready)
    assert (float(before.loss_scale), int(before.good_steps)) == (2**15, 499)
    after, metrics = one_step(config, tokens, before)
    assert (float(after.loss_scale), int(after.good_steps)) == (2**16, 0)
    assert float(metrics["loss_scale"]) == 2**16


def test_loss_scale_cancels_in_the_gradient(step_config, tokens):
    """Scales are powers of two: where nothing under- or overflows, they change nothing at all."""
    config = step_config("fp16")
    state = compiled_init(config)(0)
    results = [
        one_step(config, tokens, state.replace(loss_scale=jnp.float32(scale)))
        for scale in (2.0**15, 2.0**12)
    ]
    norms = [float(metrics["grad_norm"]) for _, metrics in results]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert float(results[0][1]["loss"]) == float(results[1][1]["loss"])


def test_fp32_never_scales_its_loss(step_config, tokens):
    state = compiled_init(step_config())(0)
    assert float(state.loss_scale) == 1.0
    ready = state.replace(good_steps=jnp.int32(LOSS_SCALE_GROWTH_INTERVAL))
    assert float(one_step(step_config(), tokens, ready)[0].loss_scale) == 1.0


def test_fp16_gradients_are_close_to_fp32(step_config, tokens):
    """Within float16's rounding: a few units of 2^-11 after a handful of products."""
    found, exact = (
        gradients(step_config(p), *one_step(step_config(p), tokens)) for p in ("fp16", "fp32")
    )
    for leaf, reference in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        error = np.linalg.norm(leaf - reference) / np.linalg.norm(reference)
        assert 0 < error < 5e-3


def test_z_loss_moves_the_gradient_but_not_the_reported_loss(step_config, tokens):
    """Its gradient is the derivative of weight * mean(log^2 Z), by finite differences."""
    weight, config = 0.1, step_config()
    plain, metrics = one_step(config, tokens)
    moved, z_metrics = one_step(step_config(z_loss=weight), tokens)
    assert float(z_metrics["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    with_z = gradients(config, moved, z_metrics)["embedding"]
    extra = with_z - gradients(config, plain, metrics)["embedding"]
    params = compiled_init(config)(0).params

    def penalty(step):
        embedding = np.asarray(params["embedding"] + step * extra / np.linalg.norm(extra))
        logits = logits_of(config, {**params, "embedding": embedding.astype(np.float32)}, tokens)
        return weight * np.mean(np.log(np.exp(logits).sum(axis=-1)) ** 2)

    slope = (penalty(3e-4) - penalty(-3e-4)) / 6e-4
    assert slope == pytest.approx(np.linalg.norm(extra), rel=1e-3)


@pytest.mark.parametrize("precision", ["ternary", "fp16"])
def test_one_batch_is_overfitted(step_config, tokens, precision):
    """128 uniformly random bytes, 5.5 nats each, learned by heart in 400 steps."""
    config = step_config(precision)
    state, step = compiled_init(config)(0), compiled_train_step(config)
    for i in range(400):
        state, metrics = step(state, tokens, np.float32(0.02 * (1 - i / 400)), np.float32(0))
        if i == 0:
            assert float(metrics["loss"]) > 5
    assert float(metrics["loss"]) < 0.1
    assert float(compiled_eval_step(config)(state.params, tokens).mean()) < 0.1


@pytest.mark.parametrize("precision", ["fp32", "ternary"])
def test_eval_step_is_the_mean_cross_entropy_of_each_row(step_config, tokens, precision):
    config = step_config(precision)
    params = compiled_init(config)(0).params
    nats = compiled_eval_step(config)(params, tokens)
    logits = logits_of(config, params, tokens)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0].mean(axis=-1)
    assert nats.shape == (8,)
    np.testing.assert_allclose(nats, expected, rtol=2e-6)


def test_train_loss_is_what_eval_reports(step_config, tokens):
    config = step_config()
    params = jax.tree.map(jnp.copy, compiled_init(config)(0).params)
    _, metrics = one_step(config, tokens)
    expected = compiled_eval_step(config)(params, tokens).mean()
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_every_arm_starts_from_the_same_parameters(step_config):
    reference = compiled_init(step_config())(3)
    for precision in ("ternary", "fp16"):
        assert_bitwise_equal(compiled_init(step_config(precision))(3).params, reference.params)
    other = compiled_init(step_config())(4)
    assert not np.array_equal(flat(other.params), flat(reference.params))


def test_learning_rate_and_decay_are_traced(step_config, tokens):
    """One program serves every learning rate and seed: rule 5 of the design."""
    config = step_config()
    assert module.compiled_train_step(config) is compiled_train_step(step_config())
    one_step(config, tokens)
    programs = compiled_train_step(config)._cache_size()
    for lr, decay in ((0.5, 0.0), (1e-5, 3.0)):
        state = compiled_init(config)(9)
        compiled_train_step(config)(state, tokens, np.float32(lr), np.float32(decay))
    assert compiled_train_step(config)._cache_size() == programs
