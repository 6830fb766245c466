"""Schedules at known steps; every optimizer against a reference; how latents are stored."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax.optim import (
    LATENTS,
    OPTIMIZERS,
    SCHEDULES,
    OptimizerConfig,
    Schedule,
    apply_direction,
    decay_mask,
    direction,
    store,
    tuned_peak_lr,
)
from bitnet_jax.precision import get_precision
from bitnet_jax.quantize import quantize

WSD = Schedule("wsd", warmup_steps=10, decay_fraction=0.2)
FP32, TERNARY, BINARY = (get_precision(name) for name in ("fp32", "ternary", "binary"))


@pytest.mark.parametrize("name", SCHEDULES)
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


def test_trilm_drops_the_peak_half_way_and_the_decay_at_two_thirds():
    schedule = Schedule("trilm", warmup_steps=0, second_peak=0.625)
    assert schedule.decay_start(90) == 0
    factors = {step: schedule.factors(step, (0, 90)) for step in range(91)}
    expected = {
        0: (1, 1), 44: (46 / 90, 1), 45: (0.3125, 1), 59: (0.625 * 31 / 90, 1),
        60: (0.625 / 3, 0), 90: (0, 0),
    }  # fmt: skip
    for step, pair in expected.items():
        assert factors[step] == pytest.approx(pair, abs=1e-12)
    odd = [schedule.factors(step, (0, 100))[1] for step in (66, 67)]
    assert odd == [1, 0], "two thirds of 100 lie between the steps 66 and 67"


@pytest.mark.parametrize("name, off", [("two_stage", 50), ("trilm", 67)])
def test_the_second_peak_is_a_ratio_of_the_first(name, off):
    """Without a drop the two stages are one line; weight decay ends all the same."""
    one, two = (Schedule(name, 10, second_peak=peak) for peak in (1.0, 0.25))
    for step in range(100):
        factor, decay = one.factors(step, (0, 100))
        line = (step + 1) / 10 if step < 10 else 1 - (step - 10) / 90
        assert factor == pytest.approx(line, abs=1e-12) and decay == (step < off)
        dropped = 0.25 if step >= 50 else 1
        assert two.factors(step, (0, 100)) == pytest.approx((dropped * factor, decay), abs=1e-12)
    assert Schedule(name, 0).second_peak == 2 / 3


def some_params(rng):
    return {
        "embedding": rng.normal(size=(7, 4)).astype(np.float32),
        "head": rng.normal(size=(7, 4)).astype(np.float32),
        "final_norm": {"scale": rng.normal(size=4).astype(np.float32)},
        "blocks": {
            "q": {
                "kernel": rng.normal(size=(2, 4, 6)).astype(np.float32),
                "step": rng.normal(size=(2, 1, 1, 1)).astype(np.float32),
            },
            "norm": {"scale": rng.normal(size=(2, 4)).astype(np.float32)},
        },
    }


def test_decay_mask_takes_matrices_and_leaves_norms_and_learned_scales():
    assert decay_mask(some_params(np.random.default_rng(0))) == {
        "embedding": 1.0,
        "head": 1.0,
        "final_norm": {"scale": 0.0},
        "blocks": {"q": {"kernel": 1.0, "step": 0.0}, "norm": {"scale": 0.0}},
    }


def test_decay_mask_refuses_a_parameter_it_does_not_know():
    with pytest.raises(ValueError, match=r"decide whether parameter \['blocks'\]\['bias'\] decays"):
        decay_mask({"blocks": {"bias": np.zeros(3)}})


def some_grads(rng, params, size=1.0):
    return jax.tree.map(lambda p: (size * rng.normal(size=p.shape)).astype(np.float32), params)


def run_steps(config, params, grads, rates, decay=0.0, precision=FP32):
    """Parameters after each step, the first of them included."""
    optimizer = direction(config)

    @jax.jit
    def step(params, state, grads, lr):
        updates, state = optimizer.update(grads, state, params, learning_rate=lr)
        return apply_direction(config, precision, params, updates, lr, jnp.float32(decay)), state

    states, state = [params], optimizer.init(params)
    for g, lr in zip(grads, rates, strict=True):
        params, state = step(params, state, g, jnp.float32(lr))
        states.append(params)
    return states


def assert_close(found, expected, rtol=1e-6, atol=1e-7):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected
    )


def global_norm(tree):
    return math.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(tree)))


def clipped(grads, clip_norm=1.0):
    factor = min(1.0, clip_norm / global_norm(grads))
    return jax.tree.map(lambda g: np.float64(g) * factor, grads)


def kernel_of(params):
    return np.asarray(params["blocks"]["q"]["kernel"])


def with_kernel(params, kernel):
    blocks = params["blocks"]
    return {**params, "blocks": {**blocks, "q": {**blocks["q"], "kernel": kernel}}}


class NumpyAdam:
    """Adam as in arXiv:1412.6980, algorithm 1, for one array."""

    def __init__(self, b1, b2, epsilon):
        self.b1, self.b2, self.epsilon = b1, b2, epsilon
        self.m = self.v = self.t = 0

    def __call__(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        m, v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        return m / (np.sqrt(v) + self.epsilon)


@pytest.mark.parametrize("clip_norm", [1.0, 1e9])
def test_update_equals_optax_adamw(clip_norm):
    """20 steps with moving gradients, most of them above the norm where clipping acts."""
    rng, lr, decay = np.random.default_rng(0), 0.01, 0.3
    params = reference_params = some_params(rng)
    config = OptimizerConfig(b1=0.8, b2=0.9, epsilon=1e-6, clip_norm=clip_norm)
    matrices = jax.tree_util.tree_map_with_path(
        lambda p, _: p[-1].key not in ("scale", "step"), params
    )
    reference = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(lr, b1=0.8, b2=0.9, eps=1e-6, weight_decay=decay, mask=matrices),
    )

    @jax.jit
    def reference_step(params, state, grads):
        updates, state = reference.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    reference_state = reference.init(params)
    grads = [some_grads(rng, params, 0.01 if i % 5 == 0 else 3.0) for i in range(20)]
    for g in grads:
        reference_params, reference_state = reference_step(reference_params, reference_state, g)
    assert_close(run_steps(config, params, grads, [lr] * 20, decay)[-1], reference_params)


def test_learning_rate_and_decay_are_decoupled():
    """Without a gradient a matrix shrinks by lr x decay, a norm stays; without lr nothing moves."""
    config, params = OptimizerConfig(), some_params(np.random.default_rng(0))
    zeros = jax.tree.map(np.zeros_like, params)
    shrunk = apply_direction(config, FP32, params, zeros, np.float32(0.5), np.float32(0.5))
    for matrix in (lambda p: p["head"], kernel_of):
        np.testing.assert_array_equal(matrix(shrunk), 0.75 * matrix(params))
    np.testing.assert_array_equal(shrunk["final_norm"]["scale"], params["final_norm"]["scale"])
    np.testing.assert_array_equal(shrunk["blocks"]["q"]["step"], params["blocks"]["q"]["step"])
    still = apply_direction(config, FP32, params, params, np.float32(0), np.float32(0.5))
    jax.tree.map(np.testing.assert_array_equal, still, params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends(name):
    """A quadratic's loss falls at every parameter: no direction has the wrong sign."""
    rng = np.random.default_rng(1)
    params, target = some_params(rng), some_params(rng)
    optimizer = direction(config := OptimizerConfig(name, bop_ratio=10.0, clip_norm=100.0))

    @jax.jit
    def step(params, state, lr):
        grads = jax.tree.map(lambda p, t: p - t, params, target)
        updates, state = optimizer.update(grads, state, params, learning_rate=lr)
        return apply_direction(config, TERNARY, params, updates, lr, jnp.float32(0)), state

    def losses(params):
        """Of the kernel as trits, which are all that Bop has."""
        kernel = np.asarray(codes_of(kernel_of(params))) - codes_of(kernel_of(target))
        rest = jax.tree.map(lambda p, t: np.sum(np.square(p - t)), params, target)
        return with_kernel(rest, np.sum(np.square(kernel)))

    first, state = losses(params), optimizer.init(params)
    for i in range(100):
        params, state = step(params, state, jnp.float32(0.1 * (1 - i / 100)))
    last = losses(params)
    paths = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: a / b, last, first))
    for path, ratio in paths:
        assert ratio < 0.5, (jax.tree_util.keystr(path), ratio)


def test_lion_is_the_sign_of_an_interpolated_momentum():
    """arXiv:2302.06675, algorithm 2, in float64; clipping by the global norm comes first."""
    rng, lr, decay = np.random.default_rng(2), 0.01, 0.3
    params, b1, b2 = some_params(rng), 0.7, 0.9
    grads = [some_grads(rng, params, 0.01 if i % 3 == 0 else 3.0) for i in range(6)]
    found = run_steps(OptimizerConfig("lion", b1, b2), params, grads, [lr] * 6, decay)[-1]
    momentum = jax.tree.map(np.zeros_like, params)
    mask = decay_mask(params)
    expected = jax.tree.map(np.float64, params)
    for g in map(clipped, grads):
        u = jax.tree.map(lambda m, g: np.sign(b1 * m + (1 - b1) * g), momentum, g)
        expected = jax.tree.map(lambda w, u, d: w - lr * (u + decay * d * w), expected, u, mask)
        momentum = jax.tree.map(lambda m, g: b2 * m + (1 - b2) * g, momentum, g)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def muon_updates(grads):
    """The direction that each gradient gives a kernel of these shapes, all else without one."""
    params = with_kernel(some_params(np.random.default_rng(0)), np.zeros_like(grads[0]))
    zeros = jax.tree.map(np.zeros_like, params)
    states = run_steps(
        OptimizerConfig("muon", clip_norm=1e9),
        params,
        [with_kernel(zeros, g.astype(np.float32)) for g in grads],
        [1.0] * len(grads),
    )
    kernels = [kernel_of(p).astype(np.float64) for p in states]
    return [before - after for before, after in zip(kernels, kernels[1:], strict=False)]


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_muon_orthogonalises_each_matrix_of_a_stack(shape):
    """Every layer's update has its gradient's singular vectors and singular values near
    .2 sqrt(max(in, out)), however large or small that gradient is beside another layer's.

    Five of Newton and Schulz' iterations bring singular values to .68 to 1.14, not to 1.
    """
    rng = np.random.default_rng(3)
    left = np.linalg.qr(rng.normal(size=(3, shape[0], shape[0])))[0][..., : min(shape)]
    right = np.linalg.qr(rng.normal(size=(3, shape[1], shape[1])))[0][..., : min(shape)]
    values = np.geomspace(1, 0.1, min(shape)) * np.array([1e-3, 1, 30.0])[:, None]
    (update,) = muon_updates([(left * values[:, None, :]) @ right.swapaxes(1, 2)])
    scale = 0.2 * math.sqrt(max(shape))
    inner = left.swapaxes(1, 2) @ update @ right / scale  # in the gradient's own bases
    diagonal = np.diagonal(inner, axis1=1, axis2=2)
    assert diagonal.min() > 0.65 and diagonal.max() < 1.2
    off = inner - diagonal[:, :, None] * np.eye(min(shape))
    assert abs(off).max() < 1e-3
    norms = [np.linalg.norm(x, axis=(1, 2)) for x in (update / scale, inner)]
    np.testing.assert_allclose(*norms, rtol=1e-4)


def test_muon_has_a_momentum_that_each_layer_keeps_for_itself():
    """A gradient that is gone still gives the direction; a layer without any does not move."""
    g = np.random.default_rng(4).normal(size=(2, 6, 9)) * np.array([1, 0])[:, None, None]
    first, second = muon_updates([g, np.zeros_like(g)])
    assert abs(first[0]).min() > 1e-4
    np.testing.assert_allclose(second, first, rtol=1e-3, atol=1e-5)
    assert not first[1].any() and not second[1].any()


def test_muon_updates_are_as_large_as_adams():
    """So that its rates serve: a root mean square of about .2, at every shape."""
    rng = np.random.default_rng(5)
    for shape in ((1, 16, 64), (2, 64, 16), (1, 48, 48)):
        (update,) = muon_updates([rng.normal(size=shape)])
        assert 0.15 < np.sqrt(np.mean(update**2)) < 0.25


@pytest.mark.parametrize("name", ["muon", "bop"])
def test_all_but_kernels_have_adam(name):
    """With the config's moments and epsilon, after clipping by the norm of ALL gradients."""
    rng, lr, decay = np.random.default_rng(6), 0.01, 0.3
    config = OptimizerConfig(name, b1=0.8, b2=0.9, epsilon=1e-2)
    params = some_params(rng)
    grads = [some_grads(rng, params, 0.1 if i % 3 == 0 else 3.0) for i in range(6)]
    found = run_steps(config, params, grads, [lr] * 6, decay, TERNARY)[-1]
    expected, mask = jax.tree.map(np.float64, params), decay_mask(params)
    adams = jax.tree.map(lambda _: NumpyAdam(0.8, 0.9, 1e-2), params)
    for g in map(clipped, grads):
        u = jax.tree.map(lambda adam, g: adam(g), adams, g)
        expected = jax.tree.map(lambda w, u, d: w - lr * (u + decay * d * w), expected, u, mask)
    zero = np.zeros(1)
    assert_close(with_kernel(found, zero), with_kernel(expected, zero), rtol=1e-5, atol=1e-6)
    assert abs(kernel_of(found) - kernel_of(expected)).max() > 0.01, "kernels have another rule"


def codes_of(kernel):
    """Trits of each layer by its mean magnitude, in numpy."""
    scale = abs(kernel).mean(axis=(1, 2), keepdims=True)
    return np.where(abs(kernel) > scale / 2, np.sign(kernel), 0).astype(np.int8)


def signs_of(kernel):
    return np.where(kernel > kernel.mean(axis=(1, 2), keepdims=True), 1, -1).astype(np.int8)


@pytest.mark.parametrize(
    "precision, codes_of, levels, gap",
    [(TERNARY, codes_of, {-1, 0, 1}, 1), (BINARY, signs_of, {-1, 1}, 2)],
    ids=["ternary", "binary"],
)
def test_bop_equals_a_slow_loop(precision, codes_of, levels, gap):
    """arXiv:1906.02107, algorithm 1, weight for weight: momentum at bop_ratio x learning rate,
    flips where it passes the threshold, against it; no decay, and clipping first."""
    rng, ratio, threshold = np.random.default_rng(7), 3.0, 4e-3
    config = OptimizerConfig("bop", bop_ratio=ratio, bop_threshold=threshold)
    params = some_params(rng)
    rates = [0.01, 0.02, 0.05, 0.0, 0.02, 0.1, 0.02, 0.02]
    grads = [some_grads(rng, params, 0.05 if i % 3 == 0 else 3.0) for i in range(8)]
    states = run_steps(config, params, grads, rates, 0.3, precision)
    kernel = kernel_of(params)
    codes, momentum, flips = codes_of(kernel).astype(int), np.zeros(kernel.shape), 0
    for g, rate, state in zip(map(clipped, grads), rates, states[1:], strict=True):
        for index, gradient in np.ndenumerate(kernel_of(g)):
            m = momentum[index]
            m = (1 - ratio * rate) * m + ratio * rate * gradient
            momentum[index] = m
            if abs(m) > threshold:
                moved = codes[index] - gap * int(np.sign(m))
                if moved in levels:
                    codes[index], flips = moved, flips + 1
        found = kernel_of(state)
        np.testing.assert_allclose(found, codes / math.sqrt(4), rtol=1e-6)
        np.testing.assert_array_equal(codes_of(found), codes, "codes must read as they were left")
    assert 20 < flips < 48 * 8 / 2
    assert set(np.unique(codes)) == levels


def test_bop_below_its_threshold_keeps_every_code():
    params = some_params(np.random.default_rng(8))
    grads = [some_grads(np.random.default_rng(9), params)] * 3
    config = OptimizerConfig("bop", bop_threshold=10.0)
    last = run_steps(config, params, grads, [0.1] * 3, 0.5, TERNARY)[-1]
    expected = codes_of(kernel_of(params)) / np.sqrt(np.float32(4))
    np.testing.assert_array_equal(kernel_of(last), expected)


@pytest.mark.parametrize("weights", ["ternary_twn", "ternary_optimal", "ternary_absmean_trilm"])
def test_bops_latents_read_back_as_their_codes(weights):
    """Whatever rule makes trits: what is stored must be quantized to what was stored."""
    precision = get_precision("ternary", weights=weights)
    params = some_params(np.random.default_rng(10))
    grads = [some_grads(np.random.default_rng(i), params) for i in range(3)]
    states = run_steps(
        OptimizerConfig("bop", bop_ratio=5.0), params, grads, [0.1] * 3, 0, precision
    )
    for state in states[1:]:
        kernel = kernel_of(state)
        q = quantize(precision.weight_quantizer, jnp.asarray(kernel), (1, 2))
        np.testing.assert_array_equal(np.asarray(q.codes), np.round(kernel * 2))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_latent_clip_bounds_kernels_and_nothing_else(name):
    """By 1.5 deviations of the fan-in initialisation: 1.5 / sqrt(4)."""
    rng, bound = np.random.default_rng(11), 0.75
    params = some_params(rng)
    grads = [some_grads(rng, params)]
    (_, free), (_, bounded) = (
        run_steps(OptimizerConfig(name, latent_clip=clip), params, grads, [0.01])
        for clip in (0.0, 1.5)
    )
    assert abs(kernel_of(free)).max() > 1
    np.testing.assert_array_equal(kernel_of(bounded), np.clip(kernel_of(free), -bound, bound))
    zero = np.zeros(1)
    jax.tree.map(np.testing.assert_array_equal, with_kernel(bounded, zero), with_kernel(free, zero))
    assert abs(bounded["head"]).max() > bound


# How latents are stored

NEAREST, STOCHASTIC = (OptimizerConfig(latents=latents) for latents in LATENTS[1:])
# bfloat16 has 8 significant bits: these lie between 1 and its neighbour 1 + 2^-7, and the like.
BETWEEN = [1 + 2**-7 * share for share in (0.01, 0.25, 0.5, 0.9)]
BETWEEN += [-x for x in BETWEEN] + [x * 2.0**-30 for x in BETWEEN] + [1.7e38, -3.3e-37, 0.1]


def neighbours(x):
    """The bfloat16 below and above in magnitude, by cutting the float32's lower bits."""
    bits = np.float32(x).view(np.uint32)
    low = bits & np.uint32(0xFFFF0000)
    return low.view(np.float32), (low + np.uint32(0x10000)).view(np.float32)


def test_float32_latents_are_stored_as_they_are():
    w = jnp.asarray(BETWEEN, jnp.float32)
    stored = store(OptimizerConfig(), w, None)
    assert stored.dtype == jnp.float32
    np.testing.assert_array_equal(stored, w)


def test_nearest_storage_takes_the_nearer_neighbour_and_ties_to_even():
    stored = store(NEAREST, jnp.asarray(BETWEEN, jnp.float32), None)
    assert stored.dtype == jnp.bfloat16
    for x, found in zip(BETWEEN, np.asarray(stored, np.float32), strict=True):
        low, high = neighbours(x)
        x, low, high = (np.float64(np.float32(v)) for v in (x, low, high))
        expected = low if abs(x - low) <= abs(high - x) else high
        assert found == expected
    tie = store(NEAREST, jnp.float32(1 + 3 * 2**-8), None)
    assert float(tie) == 1 + 2**-6, "between an odd and an even mantissa the even"


@pytest.mark.parametrize("x", BETWEEN)
def test_stochastic_storage_takes_both_neighbours_and_is_unbiased(x):
    """Of 40000 draws, as many go up as the value is near the upper neighbour, to 4 deviations."""
    count = 40_000
    w = jnp.full(count, x, jnp.float32)
    stored = store(STOCHASTIC, w, jax.random.key(0))
    assert stored.dtype == jnp.bfloat16
    low, high = neighbours(x)
    found = np.asarray(stored, np.float32)
    assert set(np.unique(found)) == {low, high}
    share = float((np.float64(np.float32(x)) - low) / (np.float64(high) - low))
    deviation = math.sqrt(share * (1 - share) / count)
    assert abs(np.mean(found == high) - share) < 4 * deviation
    mean = np.mean(found, dtype=np.float64)
    assert abs(mean - np.float64(np.float32(x))) < 4 * deviation * abs(np.float64(high) - low)


@pytest.mark.parametrize("config", [NEAREST, STOCHASTIC], ids=LATENTS[1:])
def test_storage_keeps_what_bfloat16_can_hold(config):
    """Its own values whatever the draw, signed zeros, NaN and infinities included."""
    exact = [0.0, -0.0, 1.0, -1.0, 1 + 2**-7, -(2.0**-126), 3 * 2.0**100, -0.15625]
    w = jnp.tile(jnp.asarray([*exact, np.inf, -np.inf], jnp.float32), (1000, 1))
    stored = np.asarray(store(config, w, jax.random.key(1)), np.float32)
    np.testing.assert_array_equal(stored.view(np.uint32), np.asarray(w).view(np.uint32))
    nan = store(config, jnp.full(1000, jnp.nan), jax.random.key(2))
    assert np.isnan(np.asarray(nan, np.float32)).all()


def test_small_updates_are_lost_to_the_nearest_and_count_on_average_by_chance():
    """100 steps of a twentieth of an ulp: 5 ulps, or none at all."""
    config = {name: OptimizerConfig(latents=name) for name in LATENTS}
    kernel = {"kernel": jnp.ones((1, 50, 80))}
    down, rate = {"kernel": jnp.full((1, 50, 80), -1.0)}, jnp.float32(2**-7 / 20)

    def after(name):
        @jax.jit
        def step(params, key):
            params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
            zero = jnp.float32(0)
            return apply_direction(config[name], FP32, params, down, rate, zero, key)

        params = kernel
        for i in range(100):
            params = step(params, jax.random.key(i))
        return np.asarray(params["kernel"], np.float64)

    np.testing.assert_array_equal(after("bfloat16"), 1)
    np.testing.assert_allclose(after("float32"), 1 + 5 * 2**-7, rtol=1e-5)
    moved = (after("bfloat16_stochastic") - 1) * 2**7  # in ulps: binomial(100, 1/20)
    assert abs(moved.mean() - 5) < 4 * math.sqrt(100 * 0.05 * 0.95 / moved.size)
    assert moved.var() == pytest.approx(100 * 0.05 * 0.95, rel=0.15), "draws are independent"


def test_parameters_are_rounded_by_draws_of_their_own():
    """Two kernels with equal values must not be rounded alike, nor by their place in the tree."""
    kernel = {"kernel": jnp.full((1, 40, 40), 1 + 2**-8)}
    zero = jax.tree.map(jnp.zeros_like, kernel)

    def stored(*names, seed=0):
        tree = apply_direction(
            STOCHASTIC, FP32, dict.fromkeys(names, kernel), dict.fromkeys(names, zero),
            jnp.float32(0), jnp.float32(0), jax.random.key(seed),
        )  # fmt: skip
        return {name: np.asarray(tree[name]["kernel"], np.float32) for name in names}

    both = stored("q", "v")
    assert 0.4 < np.mean(both["q"] == both["v"]) < 0.6
    alone = stored("v")["v"]
    np.testing.assert_array_equal(alone, both["v"], "another parameter moves no other's draw")
    assert 0.4 < np.mean(alone == stored("v", seed=1)["v"]) < 0.6


def test_only_kernels_are_stored_in_fewer_bits():
    params = some_params(np.random.default_rng(12))
    zeros = jax.tree.map(np.zeros_like, params)
    rate = np.float32(0)
    for config in (NEAREST, STOCHASTIC):
        new = apply_direction(config, FP32, params, zeros, rate, rate, jax.random.key(0))
        assert new["blocks"]["q"]["kernel"].dtype == jnp.bfloat16
        zero = np.zeros(1)
        jax.tree.map(
            np.testing.assert_array_equal, with_kernel(new, zero), with_kernel(params, zero)
        )


def test_tuned_learning_rate_falls_with_size_and_is_higher_for_trits():
    ternary, fp16 = get_precision("ternary"), get_precision("fp16")
    for n in (10**5, 10**8):
        assert tuned_peak_lr(ternary, n) > tuned_peak_lr(fp16, n)
    for arm in (ternary, fp16):
        assert tuned_peak_lr(arm, 10**5) > tuned_peak_lr(arm, 10**6) > tuned_peak_lr(arm, 10**8)
