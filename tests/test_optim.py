"""Schedules at known steps; the update against optax.adamw."""

import math

import jax
import numpy as np
import optax
import pytest

from bitnet_jax.errors import ConfigError
from bitnet_jax.optim import (
    OptimizerConfig,
    Schedule,
    apply_direction,
    decay_mask,
    direction,
    tuned_peak_lr,
)
from bitnet_jax.precision import get_precision

WSD = Schedule("wsd", warmup_steps=10, decay_fraction=0.2)


@pytest.mark.parametrize("name", ["wsd", "cosine", "two_stage"])
def test_warm_up_is_linear_and_ends_at_the_peak(name):
    """The first step has a learning rate, the tenth of ten the whole one."""
    schedule = Schedule(name, warmup_steps=10)
    decay = None if name == "wsd" else (0, 1000)
    factors = [schedule.factors(step, decay)[0] for step in range(10)]
    np.testing.assert_allclose(factors, np.arange(1, 11) / 10)


def test_no_warm_up():
    assert Schedule("wsd", warmup_steps=0).factors(0, None) == (1.0, 1.0)


def test_wsd_trunk_is_constant():
    assert {WSD.factors(step, None) for step in (9, 10, 500, 10**6)} == {(1.0, 1.0)}


def test_wsd_decay_is_linear_from_the_peak():
    """A fifth of 1000 steps: from 800, where it still is the trunk's, to 0 at 1000."""
    assert WSD.decay_start(1000) == 800
    factors = [WSD.factors(step, (800, 1000)) for step in (800, 850, 900, 999, 1000)]
    np.testing.assert_allclose([f for f, _ in factors], [1, 0.75, 0.5, 0.005, 0], atol=1e-12)
    assert {decay for _, decay in factors} == {1.0}
    warm = Schedule("wsd", warmup_steps=10, final_ratio=0.1)
    assert warm.factors(900, (800, 1000))[0] == pytest.approx(0.55)
    assert warm.factors(1000, (800, 1000))[0] == pytest.approx(0.1)


@pytest.mark.parametrize("end, start", [(1, 0), (2, 1), (10, 8), (1000, 800), (1003, 802)])
def test_wsd_decay_start(end, start):
    """A fifth of the steps, rounded, and at least one."""
    assert WSD.decay_start(end) == start


def test_cosine():
    """From the warm-up's end at 10: the peak, half way half of it, 0 at the end."""
    schedule = Schedule("cosine", warmup_steps=10)
    assert schedule.decay_start(110) == 0
    steps = [10, 35, 60, 85, 110]
    expected = [1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4), 0]
    factors = [schedule.factors(step, (0, 110)) for step in steps]
    np.testing.assert_allclose([f for f, _ in factors], expected, atol=1e-12)
    assert {decay for _, decay in factors} == {1.0}
    floor = Schedule("cosine", warmup_steps=10, final_ratio=0.1)
    assert floor.factors(60, (0, 110))[0] == pytest.approx(0.55)


def test_two_stage_drops_the_peak_and_the_decay_half_way():
    schedule = Schedule("two_stage", warmup_steps=0, second_peak=0.5)
    assert schedule.decay_start(100) == 0
    factors = {step: schedule.factors(step, (0, 100)) for step in (0, 25, 49, 50, 75, 100)}
    expected = {0: (1, 1), 25: (0.75, 1), 49: (0.51, 1), 50: (0.25, 0), 75: (0.125, 0), 100: (0, 0)}
    for step, pair in expected.items():
        assert factors[step] == pytest.approx(pair, abs=1e-12)


def some_params(rng):
    return {
        "embedding": rng.normal(size=(7, 4)).astype(np.float32),
        "head": rng.normal(size=(7, 4)).astype(np.float32),
        "final_norm": {"scale": rng.normal(size=4).astype(np.float32)},
        "blocks": {
            "q": {"kernel": rng.normal(size=(2, 4, 4)).astype(np.float32)},
            "norm": {"scale": rng.normal(size=(2, 4)).astype(np.float32)},
        },
    }


def test_decay_mask_takes_matrices_and_leaves_norms():
    assert decay_mask(some_params(np.random.default_rng(0))) == {
        "embedding": 1.0,
        "head": 1.0,
        "final_norm": {"scale": 0.0},
        "blocks": {"q": {"kernel": 1.0}, "norm": {"scale": 0.0}},
    }


def test_decay_mask_refuses_a_parameter_it_does_not_know():
    with pytest.raises(ValueError, match=r"decide whether parameter \['blocks'\]\['bias'\] decays"):
        decay_mask({"blocks": {"bias": np.zeros(3)}})


@pytest.mark.parametrize("clip_norm", [1.0, 1e9])
def test_update_equals_optax_adamw(clip_norm):
    """20 steps with moving gradients, most of them above the norm where clipping acts."""
    rng, lr, decay = np.random.default_rng(0), 0.01, 0.3
    params = reference_params = some_params(rng)
    config = OptimizerConfig(b1=0.8, b2=0.9, epsilon=1e-6, clip_norm=clip_norm)
    ours = direction(config)
    reference = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            lr,
            b1=0.8,
            b2=0.9,
            eps=1e-6,
            weight_decay=decay,
            mask=jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key != "scale", params),
        ),
    )

    @jax.jit
    def step(params, state, grads, lr, decay):
        updates, state = ours.update(grads, state)
        return apply_direction(params, updates, lr, decay), state

    @jax.jit
    def reference_step(params, state, grads):
        updates, state = reference.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, reference_state = ours.init(params), reference.init(params)
    for i in range(20):
        size = 0.01 if i % 5 == 0 else 3.0
        grads = jax.tree.map(
            lambda p, s=size: (s * rng.normal(size=p.shape)).astype(np.float32), params
        )
        params, state = step(params, state, grads, lr, decay)
        reference_params, reference_state = reference_step(reference_params, reference_state, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        params,
        reference_params,
    )


def test_learning_rate_and_decay_are_decoupled():
    """Without a gradient a matrix shrinks by lr x decay, a norm stays; without lr nothing moves."""
    params = some_params(np.random.default_rng(0))
    zeros = jax.tree.map(np.zeros_like, params)
    shrunk = apply_direction(params, zeros, np.float32(0.5), np.float32(0.5))
    np.testing.assert_array_equal(shrunk["head"], 0.75 * params["head"])
    np.testing.assert_array_equal(shrunk["final_norm"]["scale"], params["final_norm"]["scale"])
    still = apply_direction(params, params, np.float32(0), np.float32(0.5))
    jax.tree.map(np.testing.assert_array_equal, still, params)


def test_unknown_optimizer():
    with pytest.raises(ConfigError, match="optim.name='sgd' is unknown.*adamw"):
        direction(OptimizerConfig(name="sgd"))


def test_tuned_learning_rate_falls_with_size_and_is_higher_for_trits():
    ternary, fp16 = get_precision("ternary"), get_precision("fp16")
    for n in (10**5, 10**8):
        assert tuned_peak_lr(ternary, n) > tuned_peak_lr(fp16, n)
    for arm in (ternary, fp16):
        assert tuned_peak_lr(arm, 10**5) > tuned_peak_lr(arm, 10**6) > tuned_peak_lr(arm, 10**8)
