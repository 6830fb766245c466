"""Losses on latents: values, gradients and minima by hand, and what they do not move."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.granularity import Granularity
from bitnet_jax.latents import Latents
from bitnet_jax.precision import Precision
from bitnet_jax.quantize import QUANTIZERS
from bitnet_jax.regularizers import REGULARIZERS, regularizer

TERNARY = Precision("arm", "ternary_absmean")
GRIDS = {
    "ternary_absmean": (-1, 0, 1),
    "binary": (-1, 1),
    "int2_stretched": (-3, -1, 1, 3),
    "int4_absmax": tuple(range(-8, 8)),
}
EACH_GRID = pytest.mark.parametrize("weights", GRIDS)


def value_and_gradient(name, weights, grid, codes, scale=2.0):
    """Of single latents that lie at `grid` scales, and have these codes."""
    shape = (1, 1, -1, 1)
    codes = jnp.asarray(codes, jnp.int8).reshape(shape)
    values = jnp.asarray(grid, jnp.float32).reshape(shape) * scale

    def term(values):
        latent = Latents(values, codes, jnp.full((1, 1, 1, 1), scale))
        return REGULARIZERS[name](latent, QUANTIZERS[weights])

    terms, pullback = jax.vjp(term, values)
    return np.ravel(terms), np.ravel(pullback(jnp.ones_like(terms))[0]) * scale


def nearest(weights, grid):
    levels = np.array(GRIDS[weights])
    return levels[np.abs(np.subtract.outer(grid, levels)).argmin(-1)]


@pytest.mark.parametrize("name", REGULARIZERS)
@EACH_GRID
def test_the_levels_and_they_alone_are_the_minima(name, weights):
    """Value and slope are 0 there, and the slope leads back to them from either side."""
    levels = np.array(GRIDS[weights], float)
    gap = levels[1] - levels[0]
    values, slopes = value_and_gradient(name, weights, levels, levels)
    np.testing.assert_allclose(values, 0, atol=1e-9)
    np.testing.assert_allclose(slopes, 0, atol=1e-4)
    for side in (-0.2 * gap, 0.2 * gap):
        inside = (levels + side >= levels[0]) & (levels + side <= levels[-1])
        away, back = value_and_gradient(name, weights, levels + side, levels)
        assert (away[inside] > 0.01).all() and (back[inside] * side > 0).all()


@EACH_GRID
def test_sin2_by_hand(weights):
    """Of the distance to the nearest level, in gaps: .1 -> sin^2 18 degrees, 1/2 -> 1."""
    levels = np.array(GRIDS[weights], float)
    gap = levels[1] - levels[0]
    for part, value in [(0.1, math.sin(math.pi / 10) ** 2), (0.25, 0.5), (0.5, 1.0)]:
        for sign in (-1, 1):
            grid = levels + sign * part * gap
            values, slopes = value_and_gradient("sin2", weights, grid, nearest(weights, grid))
            np.testing.assert_allclose(values, value, atol=2e-5)
            slope = sign * math.pi / gap * math.sin(2 * math.pi * part)
            np.testing.assert_allclose(slopes, slope, atol=1e-4)


def test_sin2_waves_go_on_beyond_the_grid():
    """Unlike dampening: 1.75 scales is a quarter from the next multiple, and pulled there."""
    value, slope = value_and_gradient("sin2", "ternary_absmean", [1.75], [1])
    np.testing.assert_allclose(value, 0.5, atol=1e-5)
    np.testing.assert_allclose(slope, -math.pi, rtol=1e-4)


def test_dampening_by_hand():
    """(code - w)^2 with the code held; nothing beyond the last levels, however far."""
    grid, codes = [0.4, 0.6, -0.3, 0.8, 1.3, -7.0], [0, 1, 0, 1, 1, -1]
    values, slopes = value_and_gradient("dampening", "ternary_absmean", grid, codes)
    np.testing.assert_allclose(values, [0.16, 0.16, 0.09, 0.04, 0, 0], atol=1e-6)
    np.testing.assert_allclose(slopes, [0.8, -0.8, -0.6, -0.4, 0, 0], atol=1e-6)
    values, slopes = value_and_gradient("dampening", "binary", [0.1, -0.4, 1.5], [1, -1, 1])
    np.testing.assert_allclose(values, [0.81, 0.36, 0], atol=1e-6)
    np.testing.assert_allclose(slopes, [-1.8, 1.2, 0], atol=1e-6)
    values, slopes = value_and_gradient("dampening", "int2_stretched", [2.5, -0.1, 4], [3, -1, 3])
    np.testing.assert_allclose(values, [0.25, 0.81, 0], atol=1e-6)
    np.testing.assert_allclose(slopes, [-1, 1.8, 0], atol=1e-6)


# Of a whole tree


def tree(**kernels):
    """A parameter tree with these kernels, attention's q and the MLP's down."""
    group = {"q": "attention", "down": "mlp"}
    blocks = {"attention": {"sub_norm": {"scale": np.full((2, 4), 9.0)}}, "mlp": {}}
    for name, kernel in kernels.items():
        blocks[group[name]][name] = {"kernel": jnp.asarray(kernel, jnp.float32)}
    return {"embedding": np.full((3, 4), 5.0), "blocks": blocks}


@functools.partial(jax.jit, static_argnums=(0, 2))
def whole(name, params, precision):
    return jax.value_and_grad(regularizer, argnums=1)(name, params, precision)


def kernels():
    rng = np.random.default_rng(0)
    q, down = rng.normal(size=(2, 4, 8)), rng.normal(size=(2, 12, 4))
    q[1] *= 30
    return {"q": q, "down": 0.01 * down}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_mean_is_over_weights_and_the_scale_is_held(name):
    """Value and gradient against finite differences in float64, each kernel's mean|w| fixed."""
    kernel = kernels()
    value, gradient = whole(name, tree(**kernel), TERNARY)
    scales = {n: np.abs(w).mean((1, 2), keepdims=True) for n, w in kernel.items()}
    codes = {n: np.clip(np.round(w / scales[n]), -1, 1) for n, w in kernel.items()}

    def terms(n, w):
        grid = w / scales[n]
        if name == "sin2":
            return np.sin(np.pi * grid) ** 2
        return (codes[n] - np.clip(grid, -1, 1)) ** 2

    count = sum(w.size for w in kernel.values())
    expected = sum(terms(n, w).sum() for n, w in kernel.items()) / count
    assert float(value) == pytest.approx(expected, rel=1e-5)
    for n, w in kernel.items():
        small = 1e-6 * scales[n]
        slope = (terms(n, w + small) - terms(n, w - small)) / (2 * small) / count
        group = "attention" if n == "q" else "mlp"
        found = np.asarray(gradient["blocks"][group][n]["kernel"])
        tolerance = 1e-4 * np.abs(slope).max((1, 2), keepdims=True)
        assert (np.abs(found - slope) < tolerance).all()
        assert np.abs(slope).max() > 0
    assert not np.any(gradient["embedding"])


@pytest.mark.parametrize("name", REGULARIZERS)
def test_neither_size_nor_layout_of_the_kernels_counts(name):
    """Units of the grid: a coefficient means the same at every scale and width."""
    kernel = kernels()
    value, gradient = whole(name, tree(**kernel), TERNARY)
    larger, smaller = whole(name, tree(**{n: 8 * w for n, w in kernel.items()}), TERNARY)
    assert float(larger) == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(
        8 * smaller["blocks"]["mlp"]["down"]["kernel"],
        gradient["blocks"]["mlp"]["down"]["kernel"],
        rtol=1e-4,
        atol=1e-6 * np.abs(gradient["blocks"]["mlp"]["down"]["kernel"]).max(),
    )
    twice = {n: np.concatenate([w, w], axis=2) for n, w in kernel.items()}
    assert float(whole(name, tree(**twice), TERNARY)[0]) == pytest.approx(float(value), rel=1e-6)


def test_kernels_at_their_levels_cost_nothing_and_random_ones_half():
    """A binary kernel is at its levels; sin^2 of a phase that is anywhere is 1/2 on average."""
    at = np.where(np.random.default_rng(0).random((2, 4, 8)) < 0.5, -0.3, 0.3)
    for name in REGULARIZERS:
        for weights in ("ternary_absmean", "int8_absmax"):
            value, gradient = whole(name, tree(q=at), Precision("arm", weights))
            assert float(value) < 1e-8
            slopes = gradient["blocks"]["attention"]["q"]["kernel"]
            assert np.abs(slopes).max() < 1e-2
    random = np.random.default_rng(0).normal(size=(2, 64, 64))
    value, _ = whole("sin2", tree(q=random), Precision("arm", "int8_absmax"))
    assert float(value) == pytest.approx(0.5, abs=4 * math.sqrt(1 / 8 / random.size))


def test_each_group_has_its_own_scale():
    """Groups at their own levels; under one scale for the kernel they would not be."""
    sizes = np.repeat([1.0, 0.1, 10.0], 2)[None, :, None]
    kernel = np.sign(np.random.default_rng(0).normal(size=(2, 6, 4))) * sizes
    grouped = Precision("arm", "ternary_absmean", granularity=Granularity("group", 2))
    assert float(whole("dampening", tree(q=kernel), grouped)[0]) < 1e-8
    assert float(whole("dampening", tree(q=kernel), TERNARY)[0]) > 1e-3


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_learned_step_is_a_constant_to_it(name):
    params = tree(q=kernels()["q"])
    params["blocks"]["attention"]["q"]["step"] = jnp.full((2, 1, 1, 1), 0.7)
    value, gradient = whole(name, params, Precision("arm", "ternary_lsq"))
    assert float(value) > 0.01
    layer = gradient["blocks"]["attention"]["q"]
    assert not np.any(layer["step"]) and np.any(layer["kernel"])
