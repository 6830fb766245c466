"""One step: accumulation, skipped updates, loss scaling, further losses, what is random, and that
both arms can learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import regularizers
from bitnet_jax import train_step as module
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.model import apply_model, linear_layers
from bitnet_jax.packing import unpack
from bitnet_jax.train_step import (
    LOSS_SCALE_GROWTH_INTERVAL,
    compiled_eval_step,
    compiled_init,
    compiled_train_step,
)

LR, DECAY = np.float32(0.01), np.float32(0.1)

# Each a compiled program of its own; the first is also what test_train resumes.
STOCHASTIC = {"quantization.estimator": "stochastic", "optim.latents": "bfloat16_stochastic"}
REGULARIZED = {"loss.regularizer": "sin2", "loss.regularizer_weight": 100.0}


@pytest.fixture(scope="module")
def step_config(tiny_config, tiny_corpus):
    def make(precision="fp32", overrides=None, **changes):
        overrides = {"precision": precision, **(overrides or {})}
        step = resolve(tiny_config(overrides), tiny_corpus).step
        return dataclasses.replace(step, **changes)

    return make


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (8, 17)).astype(np.int32)


def one_step(config, tokens, state=None, *strength):
    """The state and metrics after a step; the given state stays alive, though steps donate."""
    state = compiled_init(config)(0) if state is None else jax.tree.map(jnp.copy, state)
    return compiled_train_step(config)(state, tokens, LR, DECAY, *strength)


def gradients(config, state, metrics):
    """The gradients of a first step, from Adam's first moments, with the clipping undone."""
    adams = jax.tree.leaves(state.opt_state, is_leaf=lambda node: hasattr(node, "mu"))
    (mu,) = [node.mu for node in adams if hasattr(node, "mu")]
    unclip = max(1.0, float(metrics["grad_norm"]) / config.optimizer.clip_norm)
    return jax.tree.map(
        lambda m: np.asarray(m, np.float64) / (1 - config.optimizer.b1) * unclip, mu
    )


def logits_of(config, params, tokens):
    logits = jax.jit(apply_model, static_argnums=(0, 1))
    return np.asarray(logits(config.model, config.precision, params, tokens[:, :-1]), np.float64)


def assert_bitwise_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.asarray(x).dtype == jnp.asarray(y).dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    "precision, overrides, error",
    [("fp32", {}, 1e-6), ("ternary", REGULARIZED, 1e-3)],
    ids=["plain", "regularized"],
)
def test_four_microbatches_equal_one(step_config, tokens, precision, overrides, error):
    """Up to the rounding of the arm's products; a regularizer counts once, not four times."""
    config = step_config(precision, overrides)
    whole, metrics = one_step(config, tokens)
    parts, part_metrics = one_step(dataclasses.replace(config, microbatches=4), tokens)
    assert part_metrics.keys() == metrics.keys()
    for key in metrics:
        np.testing.assert_allclose(part_metrics[key], metrics[key], rtol=error)
    expected = flat(gradients(config, whole, metrics))
    found = flat(gradients(config, parts, part_metrics))
    np.testing.assert_allclose(found, expected, atol=error * abs(expected).max())


def test_grad_norm_is_before_clipping_and_the_update_after(step_config, tokens):
    config = step_config()
    state, metrics = one_step(config, tokens)
    assert float(metrics["grad_norm"]) > 1.05 * config.optimizer.clip_norm
    unclip = float(metrics["grad_norm"]) / config.optimizer.clip_norm
    clipped = flat(gradients(config, state, metrics)) / unclip
    assert np.linalg.norm(clipped) == pytest.approx(config.optimizer.clip_norm, rel=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(
    "precision, overrides",
    [
        ("fp32", {}),
        ("ternary", {}),
        ("ternary", STOCHASTIC),
        *(("ternary", {"optim.name": name}) for name in ("lion", "muon", "bop")),
    ],
    ids=["fp32", "ternary", "stochastic", "lion", "muon", "bop"],
)
def test_non_finite_loss_changes_nothing_and_is_counted(
    step_config, tokens, precision, overrides, poison
):
    """Nothing but the counters of skips and of steps, which draws depend on."""
    config = step_config(precision, overrides)
    state, _ = one_step(config, tokens)
    state.params["embedding"] = state.params["embedding"].at[int(tokens[0, 0]), 0].set(poison)
    once, metrics = one_step(config, tokens, state)
    assert not np.isfinite(metrics["loss"])
    assert_bitwise_equal(once.replace(skips=0, steps=0), state.replace(skips=0, steps=0))
    assert int(once.skips) == int(metrics["skips"]) == 1
    assert int(state.steps) == 1 and int(once.steps) == 2
    twice, _ = one_step(config, tokens, once)
    assert int(twice.skips) == 2
    healthy = twice.replace(params=compiled_init(config)(0).params)
    after, metrics = one_step(config, tokens, healthy)
    assert int(after.skips) == 0 and np.isfinite(metrics["loss"])
    assert int(after.steps) == 4
    assert not np.array_equal(flat(after.params), flat(healthy.params))


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


def test_regularizer_is_logged_beside_the_loss_and_its_gradient_enters(step_config, tokens):
    """sin^2(pi w / scale): its derivative is pi/scale sin(2 pi w / scale), over all weights."""
    config, plain = step_config("ternary", REGULARIZED), step_config("ternary")
    params = jax.tree.map(jnp.copy, compiled_init(config)(0).params)
    state, metrics = one_step(config, tokens)
    plain_state, plain_metrics = one_step(plain, tokens)
    assert float(metrics["loss"]) == pytest.approx(float(plain_metrics["loss"]), rel=1e-4)
    assert "regularizer" not in plain_metrics
    kernels = {k: np.float64(v["kernel"]) for k, v in linear_layers(params).items()}
    scales = {k: abs(w).mean(axis=(1, 2), keepdims=True) for k, w in kernels.items()}
    count = sum(w.size for w in kernels.values())
    total = sum(np.sum(np.sin(np.pi * w / scales[k]) ** 2) for k, w in kernels.items())
    assert float(metrics["regularizer"]) == pytest.approx(total / count, rel=1e-5)
    found, without = gradients(config, state, metrics), gradients(plain, plain_state, plain_metrics)
    for name, w in kernels.items():
        extra = linear_layers(found)[name]["kernel"] - linear_layers(without)[name]["kernel"]
        expected = 100 * np.pi / scales[name] * np.sin(2 * np.pi * w / scales[name]) / count
        np.testing.assert_allclose(extra, expected, atol=5e-3 * abs(expected).max())
    rest = found["embedding"] - without["embedding"]
    assert abs(rest).max() < 1e-2 * abs(without["embedding"]).max()


@pytest.mark.parametrize("name", regularizers.REGULARIZERS)
def test_a_regularizer_moves_the_weights_to_their_levels_or_away(step_config, tokens, name):
    """By the coefficient's sign, and from a step's gradient alone: no compiled loop."""
    params = compiled_init(step_config("ternary"))(0).params
    arm = step_config("ternary").precision

    @jax.jit
    def descend(params, sign):
        gradient = jax.grad(lambda p: regularizers.regularizer(name, p, arm))(params)
        return jax.tree.map(lambda w, g: w - sign * 0.3 * g, params, gradient)

    values = [
        float(regularizers.regularizer(name, descend(params, sign), arm)) for sign in (1, 0, -1)
    ]
    assert values == sorted(values) and len(set(values)) == 3


# Warming up quantization


def test_strength_goes_from_no_quantization_to_all_of_it(step_config, tokens):
    """0 is the bf16 arm and 1 the ternary one, whose products are then of 16 bits; loss and
    gradients of every strength lie where they should beside them."""
    ternary, bf16 = step_config("ternary"), step_config("bf16")
    warming = dataclasses.replace(ternary, warming=True)
    state = compiled_init(ternary)(0)
    # Larger weights of the head make the arms' losses differ by much more than rounding.
    state.params["embedding"] = 4 * state.params["embedding"]
    floats = compiled_init(bf16)(0).replace(params=jax.tree.map(jnp.copy, state.params))

    def of(config, state, *strength):
        after, metrics = one_step(config, tokens, state, *map(np.float32, strength))
        return float(metrics["loss"]), flat(gradients(config, after, metrics))

    def distance(a, b):
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    (full_loss, full), (float_loss, exact) = of(ternary, state), of(bf16, floats)
    by_strength = {s: of(warming, state, s) for s in (0.0, 0.5, 1.0)}
    gap = abs(full_loss - float_loss)
    assert gap > 0.05 and distance(exact, full) > 0.3
    assert abs(by_strength[0.0][0] - float_loss) < 0.01 * gap
    assert distance(by_strength[0.0][1], exact) < 0.02
    assert abs(by_strength[1.0][0] - full_loss) < 0.05 * gap
    assert distance(by_strength[1.0][1], full) < 0.05
    half = by_strength[0.5][1]
    assert distance(half, full) > 0.1 and distance(half, exact) > 0.1


def test_evaluation_knows_no_strength(step_config, tokens):
    ternary = step_config("ternary")
    warming = dataclasses.replace(ternary, warming=True)
    params = compiled_init(ternary)(0).params
    nats = [compiled_eval_step(config)(params, tokens) for config in (ternary, warming)]
    np.testing.assert_array_equal(*nats)


# What is random, and how latents are stored


def test_random_steps_are_a_pure_function_of_seed_and_step(step_config, tokens):
    """Again the same bits; another seed or step of the same weights, another draw."""
    config = step_config("ternary", STOCHASTIC)
    assert config.draws and not step_config("ternary").draws
    state = compiled_init(config)(0)
    assert (int(state.seed), int(state.steps)) == (0, 0) and int(compiled_init(config)(7).seed) == 7
    reference, metrics = one_step(config, tokens, state)
    again, again_metrics = one_step(config, tokens, state)
    assert_bitwise_equal((reference, metrics), (again, again_metrics))
    losses = {float(metrics["loss"])}
    for other in (state.replace(seed=jnp.int32(1)), state.replace(steps=jnp.int32(1))):
        moved, other_metrics = one_step(config, tokens, other)
        losses.add(float(other_metrics["loss"]))
        assert not np.array_equal(flat(moved.params), flat(reference.params))
    assert len(losses) == 3
    for seed, steps in ((0, 1), (1, 0)):
        plain = compiled_init(step_config("ternary"))(0)
        other = plain.replace(seed=jnp.int32(seed), steps=jnp.int32(steps))
        after, expected = (one_step(step_config("ternary"), tokens, s)[0] for s in (other, plain))
        assert_bitwise_equal(after.params, expected.params)


def test_a_skipped_step_is_followed_by_another_draw(step_config, tokens):
    """`steps` counts it, so that a step which a draw made fail is not made again."""
    config = step_config("ternary", STOCHASTIC)
    state = compiled_init(config)(0)
    poisoned = jax.tree.map(jnp.copy, state.params)
    poisoned["embedding"] = poisoned["embedding"] * jnp.nan
    skipped, _ = one_step(config, tokens, state.replace(params=poisoned))
    after, metrics = one_step(config, tokens, skipped.replace(params=state.params))
    expected, expected_metrics = one_step(config, tokens, state.replace(steps=jnp.int32(1)))
    assert_bitwise_equal(after, expected)
    assert float(metrics["loss"]) != float(one_step(config, tokens, state)[1]["loss"])


def test_evaluation_draws_nothing(step_config, tokens):
    """A stochastic arm's bfloat16 latents, evaluated as the plain arm's float32 ones."""
    config = step_config("ternary", STOCHASTIC)
    params = compiled_init(config)(0).params
    floats = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    nats = compiled_eval_step(config)(params, tokens)
    expected = compiled_eval_step(step_config("ternary"))(floats, tokens)
    np.testing.assert_allclose(nats, expected, rtol=1e-6)


def test_bfloat16_latents_are_stored_so_and_updated_in_float32(step_config, tokens):
    """One rounding a step, of the float32 sum, to the nearest; everything else is float32."""
    config, plain = step_config(overrides={"optim.latents": "bfloat16"}), step_config()
    state = compiled_init(config)(0)
    exact = compiled_init(plain)(0).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        is_kernel = path[-1].key == "kernel"
        assert leaf.dtype == (jnp.bfloat16 if is_kernel else jnp.float32), path
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} == {
        jnp.dtype("float32"), jnp.dtype("int32"),
    }  # fmt: skip
    for name, layer in linear_layers(state.params).items():
        rounded = linear_layers(exact)[name]["kernel"].astype(jnp.bfloat16)
        np.testing.assert_array_equal(np.float32(layer["kernel"]), np.float32(rounded))
    # The same step in the float32 program, from the rounded kernels.
    floats = compiled_init(plain)(0).replace(
        params=jax.tree.map(lambda w: w.astype(jnp.float32), state.params)
    )
    after, metrics = one_step(config, tokens, state)
    expected, expected_metrics = one_step(plain, tokens, floats)
    assert float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=1e-6)
    found, exact = gradients(config, after, metrics), gradients(plain, expected, expected_metrics)
    for g, reference in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(g, reference, atol=1e-5 * abs(reference).max())
    for name, layer in linear_layers(after.params).items():
        found, reference = layer["kernel"], linear_layers(expected.params)[name]["kernel"]
        assert found.dtype == jnp.bfloat16
        rounded = np.float32(reference.astype(jnp.bfloat16))
        assert np.mean(np.float32(found) == rounded) > 0.995, "up to ties of two programs"
        assert np.mean(np.float32(reference) == rounded) < 0.1


def test_a_step_leaves_the_snapshots_alone(step_config, tokens):
    """Whatever they hold; they are the loop's. Without quantization there are none."""
    assert compiled_init(step_config())(0).snapshots is None
    config = step_config("ternary")
    state = compiled_init(config)(0)
    for codes in state.snapshots:
        assert set(codes) == set(linear_layers(state.params))
        for name, layer in linear_layers(state.params).items():
            w = np.asarray(layer["kernel"])
            scale = abs(w).mean(axis=(1, 2), keepdims=True)
            trits = np.where(abs(w) > scale / 2, np.sign(w), 0)
            stored = unpack(codes[name], w.shape[-1], config.precision.weight_quantizer)
            np.testing.assert_array_equal(stored.reshape(w.shape), trits)
    marked = type(state.snapshots)(
        *(jax.tree.map(lambda c, k=k: jnp.full_like(c, k), codes)
          for k, codes in enumerate(state.snapshots))
    )  # fmt: skip
    plain, _ = one_step(config, tokens)
    after, _ = one_step(config, tokens, state.replace(snapshots=marked))
    assert_bitwise_equal(after.snapshots, marked)
    assert_bitwise_equal(after.params, plain.params)


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
