"""Codes and scales, against the published formulas in numpy and known answers."""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantize import (
    QUANTIZERS,
    SCALE_FLOOR,
    dequantize,
    normal_error,
    normal_gain,
    normal_values,
    quantize,
)

ROWS = [name for name in QUANTIZERS if name != "none"]
LEARNED = [name for name in ROWS if QUANTIZERS[name].learned]
SYMMETRIC = [name for name in ROWS if name != "int4_absmean"]  # which clips at -8 and 7
SHAPE = (48, 80)  # of most tensors here: each row is then compiled once for each choice of axes
TENSOR, ROW = (0, 1), (1,)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _run(quantizer, x, axes, step, noise):
    q = quantize(quantizer, x, axes, step, noise)
    return q.codes, q.scale, dequantize(q)


def run(name, x, axes=TENSOR, step=None, noise=None):
    """Codes, scale and values in numpy, of the compiled quantizer."""
    return tuple(np.asarray(a) for a in _run(QUANTIZERS[name], x, axes, step, noise))


# ---- The published formulas, for a whole tensor: codes and scale -------------------------------


def round_clip(x, low, high):
    return np.clip(np.rint(x), low, high)


def faq(w):
    """Training Tips, Code and FAQ: scale = 1 / clamp(mean |w|), u = round(w scale).clip / scale."""
    scale = 1 / np.abs(w).mean().clip(min=1e-5)
    return round_clip(w * scale, -1, 1), 1 / scale


def paper(w):
    """BitNet b1.58: RoundClip(W / (gamma + epsilon), -1, 1), times gamma."""
    gamma = np.abs(w).mean()
    return round_clip(w / (gamma + 1e-5), -1, 1), gamma


def trilm(w):
    """TriLM: gamma = epsilon + mean |w|, W = round(clip(w / gamma, -1, 1)) gamma."""
    gamma = 1e-5 + np.abs(w).mean()
    return np.rint(np.clip(w / gamma, -1, 1)), gamma


def absmedian(w):
    gamma = max(np.median(np.abs(w)), 1e-5)
    return round_clip(w / gamma, -1, 1), gamma


def twn(w):
    """Ternary Weight Networks: above .7 mean |w|, and the mean of what is above."""
    above = np.abs(w) > 0.7 * np.abs(w).mean()
    return np.where(above, np.sign(w), 0), np.abs(w)[above].mean()


def optimal(w):
    """Max 1960, table I, N = 3: threshold .6120 sigma, level 1.224 sigma."""
    sigma = np.sqrt((w * w).mean())
    return np.where(np.abs(w) > 0.612 * sigma, np.sign(w), 0), 1.224 * sigma


def lsq(w):
    """LSQ: a step that starts at 2 mean |w| / sqrt(Q_P), Q_P = 1."""
    step = 2 * np.abs(w).mean() / math.sqrt(1)
    return np.rint(np.clip(w / step, -1, 1)), step


def binary(w):
    """BitNet: Sign(W - alpha), with alpha the mean and Sign(0) = -1, times mean |W|."""
    return np.where(w - w.mean() > 0, 1, -1), np.abs(w).mean()


def absmax(bits):
    def reference(w):
        """In float32 and the library's order, so that no product falls to another side of a tie."""
        high, largest = np.float32(2 ** (bits - 1) - 1), np.abs(w).max().astype(np.float32)
        codes = round_clip(w.astype(np.float32) * (high / largest), -high - 1, high)
        return codes, largest / high

    return reference


def a48(x):
    """BitNet a4.8: beta / sqrt 7 RoundClip(sqrt 7 / beta X, -8, 7), beta = mean |X|."""
    beta = np.abs(x).mean()
    return round_clip(math.sqrt(7) / beta * x, -8, 7), beta / math.sqrt(7)


def pareto(levels, shift):
    def reference(w):
        """ParetoQ: (round(clip(w / alpha, -.99, .99) n - shift) + shift) / n times alpha."""
        alpha, n = np.abs(w).max(), levels / 2
        on_grid = np.rint(np.clip(w / alpha, -0.99, 0.99) * n - shift) + shift
        return (on_grid / 0.5, alpha / n / 2) if shift else (on_grid, alpha / n)

    return reference


REFERENCES = {
    "ternary_absmean": faq,
    "ternary_absmean_paper": paper,
    "ternary_absmean_trilm": trilm,
    "ternary_absmedian": absmedian,
    "ternary_twn": twn,
    "ternary_optimal": optimal,
    "ternary_lsq": lsq,
    "ternary_stretched": pareto(3, 0),
    "binary": binary,
    "int2_absmax": absmax(2),
    "int2_stretched": pareto(4, 0.5),
    "int3_absmax": absmax(3),
    "int4_absmax": absmax(4),
    "int4_absmean": a48,
    "int8_absmax": absmax(8),
}


def assert_formula(name, w):
    codes, scale, values = run(name, w)
    expected_codes, expected_scale = REFERENCES[name](w.astype(np.float64))
    assert codes.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (1,) * w.ndim
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_allclose(scale.item(), expected_scale, rtol=5e-7)  # roundings of float32
    np.testing.assert_array_equal(values, codes * scale)


def test_every_row_has_a_reference():
    assert set(REFERENCES) == set(ROWS)


@pytest.mark.parametrize("mean", [0.0, 0.4])
@pytest.mark.parametrize("name", ROWS)
def test_published_formula(name, mean):
    assert_formula(name, (0.02 * (gaussian(*SHAPE) + np.float32(mean))).astype(np.float32))


@pytest.mark.parametrize("sigma", [4e-6, 1.5e-5])
@pytest.mark.parametrize("name", [n for n in ROWS if n.startswith("ternary_absmean")])
def test_three_placements_of_epsilon(name, sigma):
    """mean |w| is .8 sigma: a third of the published epsilon, and a little above it."""
    assert_formula(name, (np.float32(sigma) * gaussian(*SHAPE)).astype(np.float32))


def test_placements_of_epsilon_differ_near_it_and_there_alone():
    names = ("ternary_absmean", "ternary_absmean_paper", "ternary_absmean_trilm")
    near = [run(name, np.float32(1.5e-5) * gaussian(*SHAPE)) for name in names]
    faq, paper, trilm = (scale.item() for _, scale, _ in near)
    assert faq == paper and trilm == pytest.approx(faq + 1e-5)
    zeros = [np.mean(codes == 0) for codes, _, _ in near]
    assert zeros[0] < 0.33 and zeros[1] == zeros[2] > 0.5
    far = [run(name, gaussian(*SHAPE))[2] for name in names]
    assert [np.abs(values - far[0]).max() < 2e-5 for values in far] == [True] * 3


def test_ternary_absmean_is_the_blog_s_variant():
    """Experiments with BitNet 1.5: the deployed values u as codes -1, 0, 1 and a scale beside.

    Its codes are u divided by its largest, and the scale is that largest. In float32, on weights
    whose mean is exact, so that the order of a sum plays no part.
    """
    w = np.rint(100 * gaussian(64, 64)).astype(np.float32) / 1024
    scale = np.float32(1) / np.maximum(np.abs(w).mean(), np.float32(1e-5))
    u = np.clip(np.rint(w * scale), -1, 1) / scale
    beside = np.abs(u).max()
    codes, own_scale, values = run("ternary_absmean", w)
    np.testing.assert_array_equal(u / beside, codes)  # exactly -1, 0 and 1
    assert abs(own_scale.item() - beside) <= np.spacing(beside)
    np.testing.assert_allclose(values, u, rtol=2**-23)


@pytest.mark.parametrize("name", ["ternary_absmean", "int4_absmean", "binary"])
def test_other_shapes(name):
    w = gaussian(3, 5, 11)
    codes, scale, _ = run(name, w, (0, 1, 2))
    expected_codes, expected_scale = REFERENCES[name](w.astype(np.float64))
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_allclose(scale, np.full((1, 1, 1), expected_scale), rtol=5e-7)


# ---- Grids -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_levels_and_grid(name):
    row = QUANTIZERS[name]
    levels = {"ternary": 3, "binary": 2, "int2": 4, "int3": 8, "int4": 16, "int8": 256}
    assert row.levels == levels[name.split("_")[0]]
    assert row.ternary == name.startswith("ternary_")
    grid = np.arange(row.low, row.high + 1, row.gap)
    assert len(grid) == row.levels and (0 in grid) == (row.gap == 1)
    assert np.isin(run(name, gaussian(*SHAPE))[0], grid).all()


def test_no_quantization_is_no_grid():
    assert not QUANTIZERS["none"].ternary and not QUANTIZERS["none"].learned


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_quantization(dtype):
    x = jnp.asarray(gaussian(3, 4), dtype)
    q = quantize(QUANTIZERS["none"], x, (1,))
    assert q.codes is x and q.scale.shape == (1, 1) and q.scale.dtype == jnp.float32
    np.testing.assert_array_equal(dequantize(q), x.astype(jnp.float32))


@pytest.mark.parametrize("gamma", [1.0, 3.0, 49.0, 0.37])
def test_ternary_ties_round_to_even(gamma):
    """Half of gamma rounds to 0, the next float above it to 1; 1.5 gamma rounds to 2, then 1."""
    gamma = np.float32(gamma)
    w = np.array([0.5, 1.5, -0.5, -1.5], np.float32) * gamma
    codes, scale, _ = run("ternary_absmean", w, (0,))
    assert scale.item() == gamma  # these sums are exact: the ties are true ones
    np.testing.assert_array_equal(codes, [0, 1, 0, -1])
    above = np.concatenate([np.nextafter(w[:1], 9 * gamma), w[1:]])
    codes, scale, _ = run("ternary_absmean", above, (0,))
    assert scale.item() == gamma
    np.testing.assert_array_equal(codes, [1, 1, 0, -1])


def test_int8_ties_round_to_even():
    x = np.array([127, 0.5, 1.5, 2.5, -0.5, -2.5, 126.5], np.float32)  # the scale is exactly 1
    np.testing.assert_array_equal(run("int8_absmax", x, (0,))[0], [127, 0, 2, 2, 0, -2, 126])


def test_ties_of_grids_without_a_zero_go_down():
    """The sign of 0 is -1; of the mean, too."""
    np.testing.assert_array_equal(
        run("binary", np.array([0, 0, 1, -1], np.float32), (0,))[0], [-1, -1, 1, -1]
    )
    np.testing.assert_array_equal(
        run("binary", np.array([2, 2, 3, 1], np.float32), (0,))[0], [-1, -1, 1, -1]
    )
    x = np.array([0, 2, -2, 4, -4], np.float32)  # the scale is exactly 1
    codes, scale, _ = run("int2_stretched", x, (0,))
    assert scale.item() == 1
    np.testing.assert_array_equal(codes, [-1, 1, -3, 3, -3])


def test_int8_is_tight_and_one_token_at_a_time():
    x = gaussian(6, 40, seed=3) * np.logspace(-3, 3, 6, dtype=np.float32)[:, None]
    codes, scale, values = run("int8_absmax", x, ROW)
    top = np.abs(x).argmax(-1)[:, None]
    signs = np.sign(np.take_along_axis(x, top, -1))
    np.testing.assert_array_equal(np.take_along_axis(codes, top, -1), 127 * signs)
    # Half a step; the rest is float32's rounding of 127 steps.
    assert (np.abs(values - x) <= scale * (0.5 + 127 * 2**-22)).all()


# ---- Normal weights ----------------------------------------------------------------------------


def density(t):
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def trit_error(scale, threshold):
    """E (q(x) - x)^2 of standard normal values, from E[|x|; |x| > t] = 2 density(t)."""
    return 1 - 4 * scale * density(threshold) + scale**2 * math.erfc(threshold / math.sqrt(2))


MEAN = math.sqrt(2 / math.pi)  # of the magnitude
MEDIAN = statistics.NormalDist().inv_cdf(0.75)
TWN = 2 * density(0.7 * MEAN) / math.erfc(0.7 * MEAN / math.sqrt(2))
LARGEST = statistics.NormalDist().inv_cdf(1 - 0.5 / 65536)

# Codes' borders and the scale of each row on standard normal values.
TRITS = {
    "ternary_absmean": (MEAN, MEAN / 2),
    "ternary_absmean_paper": (MEAN, MEAN / 2),
    "ternary_absmean_trilm": (MEAN, MEAN / 2),
    "ternary_absmedian": (MEDIAN, MEDIAN / 2),
    "ternary_twn": (TWN, 0.7 * MEAN),
    "ternary_optimal": (1.224, 0.612),
    "ternary_lsq": (2 * MEAN, MEAN),
    "ternary_stretched": (LARGEST / 1.5, LARGEST / 3),
}
GRIDS = {
    "binary": (MEAN, (-1, 1)),
    "int2_absmax": (LARGEST, range(-2, 2)),
    "int2_stretched": (LARGEST / 4, (-3, -1, 1, 3)),
    "int3_absmax": (LARGEST / 3, range(-4, 4)),
    "int4_absmax": (LARGEST / 7, range(-8, 8)),
    "int4_absmean": (MEAN / math.sqrt(7), range(-8, 8)),
    "int8_absmax": (LARGEST / 127, range(-128, 128)),
}


def moments(name):
    """E (q(x) - x)^2 and E q(x)^2 by the midpoint rule."""
    x = (np.arange(360_000) + 0.5) / 20_000 - 9
    mass = np.exp(-x * x / 2)
    mass /= mass.sum()
    if name in TRITS:
        scale, threshold = TRITS[name]
        values = np.where(np.abs(x) > threshold, scale * np.sign(x), 0)
    else:
        scale, codes = GRIDS[name]
        levels = scale * np.array(codes)
        values = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    return mass @ (values - x) ** 2, mass @ values**2


@pytest.mark.parametrize("name", ROWS)
def test_error_and_gain_on_normal_values(name):
    error, gain = moments(name)
    assert normal_error(QUANTIZERS[name]) == pytest.approx(error, rel=1e-3, abs=4e-6)
    assert normal_gain(QUANTIZERS[name]) == pytest.approx(gain, rel=1e-3)
    if name in TRITS:
        scale, threshold = TRITS[name]
        assert trit_error(scale, threshold) == pytest.approx(error, rel=1e-4)
        kept = math.erfc(threshold / math.sqrt(2))
        assert normal_gain(QUANTIZERS[name]) == pytest.approx(scale**2 * kept, rel=1e-3)


@pytest.mark.parametrize(
    "name, error",
    [
        ("ternary_absmean", 0.263),
        ("ternary_absmedian", 0.318),
        ("ternary_twn", 0.1916),
        ("ternary_optimal", 0.1902),
        ("binary", 0.3634),
    ],
)
def test_known_errors_on_normal_values(name, error):
    digits = len(str(error)) - 2
    assert round(normal_error(QUANTIZERS[name]), digits) == error


def test_the_optimal_trits_are_optimal():
    best = trit_error(*TRITS["ternary_optimal"])
    around = [trit_error(1.224 * a, 0.612 * b) for a in (0.98, 1, 1.02) for b in (0.98, 1, 1.02)]
    assert min(around) == best == around[4]


def test_no_quantization_has_no_error():
    assert normal_error(QUANTIZERS["none"]) == 0
    assert normal_gain(QUANTIZERS["none"]) == pytest.approx(1, rel=1e-3)


def test_errors_are_known_while_a_program_is_traced():
    """They are initial values of models, which are made under jit."""
    normal_error.cache_clear()
    twice = jax.jit(lambda x: x * normal_error(QUANTIZERS["ternary_optimal"]))(2.0)
    assert float(twice) == pytest.approx(2 * 0.1902, abs=1e-4)


def test_normal_values_are_quantiles():
    values, normal = np.asarray(normal_values()), statistics.NormalDist()
    assert len(values) == 65536
    expected = [normal.inv_cdf((i + 0.5) / 65536) for i in range(0, 65536, 64)]
    np.testing.assert_allclose(values[::64], expected, rtol=1e-4, atol=1e-6)


def test_ternary_of_sampled_normal_weights():
    """31.0 % zeros and a squared error of .2634 sigma^2, within four standard errors."""
    w = np.float32(0.05) * np.random.default_rng(1).standard_normal(1 << 20, np.float32)
    codes, _, values = run("ternary_absmean", w, (0,))
    zeros = math.erf(MEAN / 2 / math.sqrt(2))
    assert zeros == pytest.approx(0.310, abs=5e-4)
    assert np.mean(codes == 0) == pytest.approx(zeros, abs=1.8e-3)
    squared_error = np.mean((values - w) ** 2, dtype=np.float64)
    assert squared_error / 0.05**2 == pytest.approx(trit_error(MEAN, MEAN / 2), abs=1.8e-3)


# ---- Symmetries --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_codes_ignore_the_scale(name):
    """Powers of two multiply without rounding: the scale follows, unless epsilon is part of it."""
    x = gaussian(*SHAPE)
    codes, scale, _ = run(name, x)
    for factor in (0.25, 1024.0):
        scaled = run(name, np.float32(factor) * x)
        np.testing.assert_array_equal(scaled[0], codes)
        epsilon = 4e-5 if name == "ternary_absmean_trilm" else 0
        np.testing.assert_allclose(scaled[1], factor * scale, rtol=epsilon)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_codes_follow_the_sign(name):
    x = gaussian(*SHAPE)
    codes, scale, _ = run(name, x)
    np.testing.assert_array_equal(run(name, -x)[0], -codes)
    np.testing.assert_array_equal(run(name, -x)[1], scale)


def test_int4_absmean_clips_one_level_lower_than_high():
    x = gaussian(*SHAPE)
    x[0, :2] = 9, -9
    np.testing.assert_array_equal(run("int4_absmean", x)[0][0, :2], [7, -8])


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("ternary_absmean", jnp.bfloat16),
        ("ternary_optimal", jnp.float16),
        ("binary", jnp.bfloat16),
        ("int8_absmax", jnp.bfloat16),
        ("int8_absmax", jnp.float16),
    ],
)
def test_16_bit_input_is_upcast_first(name, dtype):
    x = gaussian(*SHAPE).astype(dtype)
    for low, high in zip(run(name, x), run(name, x.astype(np.float32)), strict=True):
        assert low.dtype == high.dtype
        np.testing.assert_array_equal(low, high)


@pytest.mark.parametrize("name", ["ternary_absmedian", "ternary_twn", "ternary_optimal", "binary"])
def test_several_axes_about_one_that_is_kept(name):
    x = gaussian(*SHAPE) * np.logspace(-2, 2, 48, dtype=np.float32)[:, None]
    codes, scale, _ = run(name, x, ROW)
    several = run(name, x.reshape(48, 8, 10).swapaxes(0, 1).copy(), (0, 2))
    assert several[1].shape == (1, 48, 1)
    np.testing.assert_array_equal(several[0].swapaxes(0, 1).reshape(SHAPE), codes)
    np.testing.assert_allclose(several[1].ravel(), scale.ravel(), rtol=3e-7)  # another order


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_tensor_are_quantized_as_if_alone(name):
    x = gaussian(*SHAPE) * np.logspace(-2, 2, 48, dtype=np.float32)[:, None]
    codes, scale, _ = run(name, x, ROW)
    assert scale.shape == (48, 1)
    for i in (0, 20, 47):
        alone = REFERENCES[name](x[i].astype(np.float64))
        np.testing.assert_array_equal(codes[i], alone[0])
        np.testing.assert_allclose(scale[i].item(), alone[1], rtol=5e-7)


# ---- Extremes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-42])
@pytest.mark.parametrize("name", ROWS)
def test_nothing_and_next_to_nothing(name, value):
    """The floor stands in for a division by zero; 1e-42 is a denormal.

    What comes out is no larger than what went in or, without a zero in the grid, than the floor.
    """
    codes, scale, values = run(name, np.full(SHAPE, value, np.float32))
    if QUANTIZERS[name].gap == 1:
        assert (np.abs(values) <= 1.00001 * value).all()
    else:
        assert (np.abs(values) <= SCALE_FLOOR).all() and (np.abs(codes) == 1).all()
    if name != "ternary_twn":  # the others treat so small a tensor as zero
        floor = value if name == "ternary_absmean_paper" else SCALE_FLOOR / QUANTIZERS[name].high
        np.testing.assert_allclose(scale.item(), floor, rtol=1e-5, atol=1e-40)
        assert QUANTIZERS[name].gap == 2 or not codes.any()


@pytest.mark.parametrize("name", ROWS)
def test_huge_values_survive(name):
    """Means and squares do not overflow at 1e37, nor does dividing by the reach flush to 0."""
    x = gaussian(*SHAPE)
    codes, scale, _ = run(name, x)
    huge = run(name, x * np.float32(2**123))
    np.testing.assert_array_equal(huge[0], codes)
    np.testing.assert_allclose(huge[1], scale * np.float32(2**123), rtol=2e-5)  # epsilon's share


@pytest.mark.parametrize(
    "name, share",
    [
        ("ternary_absmean", 1),
        ("ternary_absmean_paper", 1),
        ("ternary_absmean_trilm", 1),
        ("ternary_twn", 1),
        ("ternary_stretched", 2 / 3),
        ("int2_stretched", 3 / 4),
        ("int4_absmax", 1),
        ("int8_absmax", 1),
    ],
)
def test_the_largest_values_survive(name, share):
    """1/gamma of 3e38 is a denormal: multiplied by it, every trit would be flushed to 0."""
    x = np.full(SHAPE, 3e38, np.float32)
    x[::2] *= -1
    np.testing.assert_allclose(run(name, x)[2], np.float32(share) * x, rtol=2e-6)


@pytest.mark.parametrize("name", ["ternary_lsq", "ternary_optimal", "int4_absmean"])
def test_a_scale_beyond_float32_is_nan(name):
    _, scale, values = run(name, np.full(SHAPE, 3e38, np.float32))
    assert np.isnan(scale).all() and np.isnan(values).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", ROWS)
def test_one_bad_value_poisons_what_shares_its_scale_and_no_more(name, rounding, bad):
    noise = None if rounding == "nearest" else np.full(SHAPE, 0.4, np.float32)
    x = gaussian(*SHAPE)
    clean = run(name, x, ROW, noise=noise)
    x[5, 3] = bad
    codes, scale, values = run(name, x, ROW, noise=noise)
    assert np.isnan(values[5]).all() and np.isnan(scale[5]).all() and not codes[5].any()
    others = np.arange(48) != 5
    np.testing.assert_array_equal(codes[others], clean[0][others])
    np.testing.assert_array_equal(scale[others], clean[1][others])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", LEARNED)
def test_a_bad_value_poisons_a_learned_scale(name, bad):
    """The scale is a parameter and does not see the weights, so it must be told."""
    x, step = gaussian(*SHAPE), np.full((48, 1), 0.5, np.float32)
    x[5, 3] = bad
    codes, scale, values = run(name, x, ROW, step=step)
    assert np.isnan(values[5]).all() and np.isnan(scale[5]).all() and not codes[5].any()
    assert np.isfinite(np.delete(values, 5, axis=0)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", LEARNED)
def test_a_bad_learned_scale_is_nan(name, bad):
    values = run(name, gaussian(*SHAPE), ROW, step=np.full((48, 1), bad, np.float32))[2]
    assert np.isnan(values).all()


# ---- Learned scales ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_scale_overrides_the_rule(name):
    x = gaussian(*SHAPE)
    step = np.linspace(0.1, 2, 48, dtype=np.float32)[:, None]
    codes, scale, _ = run(name, x, ROW, step=step)
    np.testing.assert_allclose(scale, step, rtol=1.2e-7)
    ratio = x.astype(np.float64) / step
    if QUANTIZERS[name].gap == 2:
        expected = np.clip(2 * np.rint((ratio - 1) / 2) + 1, -3, 3)
    else:
        expected = np.rint(np.clip(ratio, -1, 1))
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("step", [-1.0, 0.0, 1e-9])
@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_scale_has_a_floor(name, step):
    """Where it becomes negative, as a parameter may, it must not flip the weights."""
    x = gaussian(*SHAPE)
    codes, scale, _ = run(name, x, ROW, step=np.full((48, 1), step, np.float32))
    np.testing.assert_allclose(scale, np.full_like(scale, SCALE_FLOOR), rtol=1.2e-7)
    large = np.abs(x) > 1e-4
    np.testing.assert_array_equal(codes[large], (QUANTIZERS[name].high * np.sign(x))[large])


# ---- Stochastic rounding -----------------------------------------------------------------------


def inside(name, x, scale):
    """What stochastic rounding's mean should be: the value, clipped to the grid."""
    row = QUANTIZERS[name]
    centre = x.mean(-1, dtype=np.float64, keepdims=True) if row.centred else 0
    return np.clip(x.astype(np.float64) - centre, row.low * scale, row.high * scale)


@pytest.mark.parametrize("name", ROWS)
def test_stochastic_rounding_is_unbiased_and_takes_one_of_two_neighbours(name):
    """The mean of 4800 draws is the value, within four standard errors of a coin's."""
    row, x = QUANTIZERS[name], gaussian(80, seed=7)
    noise = np.random.default_rng(8).random((100, *SHAPE), np.float32)
    results = [run(name, np.tile(x, (48, 1)), ROW, noise=draw) for draw in noise]
    codes = np.concatenate([codes for codes, _, _ in results])
    scale = results[0][1][0].astype(np.float64)
    target = inside(name, x, scale) / scale
    below = row.low + row.gap * np.floor((target - row.low) / row.gap + 1e-5)
    assert ((codes == below) | (codes == np.minimum(below + row.gap, row.high))).all()
    share = (target - below) / row.gap  # that is rounded up
    error = np.sqrt(np.clip(share * (1 - share), 0, None) / len(codes))
    excess = np.abs(codes.mean(0) - target) - row.gap * (4 * error + 2e-4)
    assert (excess <= 0).all(), excess.max()
    undecided = (share > 0.05) & (share < 0.95)
    assert undecided.any() and (codes.min(0) < codes.max(0))[undecided].all()


@pytest.mark.parametrize("name", [name for name in ROWS if name != "ternary_twn"])
def test_noise_of_a_half_rounds_to_nearest(name):
    """Off ties. TWN's threshold to zero is not half its scale, so it has no nearest in this sense.

    The placements of epsilon agree since they are the same for either rounding.
    """
    x = gaussian(*SHAPE)
    halves = run(name, x, ROW, noise=np.full(SHAPE, 0.5, np.float32))
    for drawn, nearest in zip(halves, run(name, x, ROW), strict=True):
        np.testing.assert_array_equal(drawn, nearest)


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("name", ROWS)
def test_noise_never_leaves_the_grid(name, noise):
    """Rounding all down and all up; 1 - 2^-24 is beyond the largest draw."""
    row, x = QUANTIZERS[name], gaussian(*SHAPE)
    codes, scale, _ = run(name, x, ROW, noise=np.full(SHAPE, noise, np.float32))
    assert np.isin(codes, np.arange(row.low, row.high + 1, row.gap)).all()
    ratio = inside(name, x, scale) / scale
    beyond = codes - ratio if noise else ratio - codes
    assert (beyond >= -1e-4).all() and (beyond <= row.gap + 1e-4).all()
