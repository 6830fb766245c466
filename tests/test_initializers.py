"""Initial standard deviations of every projection, and what a quantized layer makes of them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.granularity import kernel_values, quantize_kernel
from bitnet_jax.initializers import INITIALIZERS
from bitnet_jax.model import TransformerConfig, init_params
from bitnet_jax.precision import PRECISIONS, Precision, get_precision
from bitnet_jax.quantize import dequantize, normal_gain, quantize

LAYERS = 6
ATTENTION, MLP = ("q", "k", "v", "out"), ("gate", "up", "down")
PROJECTIONS = ATTENTION + MLP
RESIDUAL = 1 / math.sqrt(2 * LAYERS)
SUBLN = math.sqrt(math.log(2 * LAYERS))
# Of a kernel with 400 inputs and 100 outputs: 1/sqrt(400), and Xavier's sqrt(2 / (400 + 100)).
SHAPE, FAN_IN, XAVIER = (400, 100), 0.05, math.sqrt(2 / 500)
STANDARD_DEVIATIONS = {
    "fan_in": lambda p: FAN_IN * (RESIDUAL if p in ("out", "down") else 1),
    "flax": lambda p: FAN_IN,
    "nanotron": lambda p: 0.025 * (RESIDUAL if p in ("out", "down") else 1),
    "subln": lambda p: XAVIER * (1 if p in ("q", "k") else SUBLN),
    "quantizer": lambda p: FAN_IN,  # of an arm that does not quantize
}


@pytest.mark.parametrize("name", INITIALIZERS)
def test_standard_deviations(name):
    """Within four standard errors; the root mean square, so that a mean would show too."""
    precision = get_precision("fp32")
    for i, projection in enumerate(PROJECTIONS):
        init = INITIALIZERS[name](projection, LAYERS, precision)
        kernel = np.asarray(init(jax.random.key(i), SHAPE, jnp.float32), np.float64)
        expected = STANDARD_DEVIATIONS[name](projection)
        error = expected / math.sqrt(2 * kernel.size)
        assert math.sqrt((kernel**2).mean()) == pytest.approx(expected, abs=4 * error), projection
        assert abs(kernel.mean()) < 4 * expected / math.sqrt(kernel.size)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_only_flaxs_default_is_truncated(name):
    """Of 40000 normal values some 1800 lie beyond 2 standard deviations.

    Flax cuts at 2 and rescales, so its largest is 2 / .8796 of the resulting deviation.
    """
    init = INITIALIZERS[name]("q", LAYERS, get_precision("fp32"))
    kernel = np.abs(np.asarray(init(jax.random.key(0), SHAPE, jnp.float32)))
    largest = kernel.max() / np.sqrt((kernel**2).mean())
    assert largest == pytest.approx(2.274, rel=0.02) if name == "flax" else largest > 3.5


def test_depth_matters_where_it_should():
    """At one layer sqrt(ln 2) < 1: SubLN's factor is a factor and not a maximum."""
    precision, key = get_precision("fp32"), jax.random.key(0)

    def ratio(name, projection, deep, shallow=1):
        values = (INITIALIZERS[name](projection, n, precision) for n in (deep, shallow))
        deep, shallow = (np.asarray(init(key, (8, 8), jnp.float32)) for init in values)
        return np.linalg.norm(deep) / np.linalg.norm(shallow)

    for name in ("fan_in", "nanotron"):
        assert ratio(name, "down", 9) == pytest.approx(1 / 3, rel=1e-5)
        assert ratio(name, "up", 9) == pytest.approx(1)
    assert ratio("subln", "up", 9) == pytest.approx(math.sqrt(math.log(18) / math.log(2)), rel=1e-5)
    assert ratio("subln", "q", 9) == pytest.approx(1)
    for name in ("flax", "quantizer"):
        assert ratio(name, "down", 9) == pytest.approx(1)


@pytest.mark.parametrize("activations", ["int8_absmax", "none"])
@pytest.mark.parametrize("weights", ["ternary_absmean", "ternary_twn", "binary", "int4_absmax"])
def test_a_quantized_layers_output_has_variance_one(weights, activations):
    """512 x 512 kernel, normal inputs. The output's variance scatters by about 1 %."""
    precision = Precision("arm", weights, activations)
    init = INITIALIZERS["quantizer"]("down", LAYERS, precision)

    kernel = init(jax.random.key(0), (512, 512), jnp.float32)
    q = quantize_kernel(precision.weight_quantizer, precision.granularity, kernel)
    x = np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32)
    x = dequantize(quantize(precision.activation_quantizer, jnp.asarray(x), (1,)))
    y = np.asarray(x) @ np.asarray(kernel_values(q))
    assert np.mean(np.square(y)) == pytest.approx(1, abs=0.04)
    # These quantizers change the size of what they quantize, int4 by some 3 %.
    assert abs(np.var(kernel) * 512 - 1) > 0.015


@pytest.mark.parametrize("arm", [name for name, p in PRECISIONS.items() if not p.quantized])
def test_the_quantizer_rule_is_the_fan_in_rule_where_nothing_is_quantized(arm):
    """To the bit, at a projection that does not add to the residual stream."""
    kernels = [
        INITIALIZERS[name]("q", LAYERS, get_precision(arm))(jax.random.key(0), (64, 8), jnp.float32)
        for name in ("quantizer", "fan_in")
    ]
    np.testing.assert_array_equal(*kernels)


def test_both_gains_count():
    """Trits: mean square (2/pi) P(|w| > E|w|/2). At 4-bit activations the second gain shows too."""
    share = math.erfc(math.sqrt(2 / math.pi) / 2 / math.sqrt(2))
    arm = Precision("arm", "ternary_absmean", "int4_absmean")
    assert normal_gain(arm.weight_quantizer) == pytest.approx(2 / math.pi * share, rel=1e-3)
    second = normal_gain(arm.activation_quantizer)
    assert abs(second - 1) > 0.005
    one, both = (
        np.asarray(INITIALIZERS["quantizer"]("q", 1, p)(jax.random.key(0), (8, 8), jnp.float32))
        for p in (dataclasses.replace(arm, activations="none"), arm)
    )
    np.testing.assert_allclose(both * math.sqrt(second), one, rtol=1e-5)


def test_the_model_names_its_projections_and_its_depth(monkeypatch):
    calls = set()

    def spy(projection, layers, precision):
        calls.add((projection, layers, precision))
        return lambda key, shape, dtype: made.append((projection, shape)) or jnp.zeros(shape, dtype)

    made = []
    monkeypatch.setitem(INITIALIZERS, "spy", spy)
    config = TransformerConfig(5, layers=3, width=8, ff_width=12, heads=4, kv_heads=2, init="spy")
    arm = get_precision("ternary")
    jax.eval_shape(lambda: init_params(config, arm, jax.random.key(0)))
    assert calls == {(projection, 3, arm) for projection in PROJECTIONS}
    shapes = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 12), (8, 12), (12, 8)]
    assert set(made) == set(zip(PROJECTIONS, shapes, strict=True))
