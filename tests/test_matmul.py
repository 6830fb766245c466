"""The quantized product against integers in numpy and against plain compositions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.lax import stop_gradient

from bitnet_jax.granularity import Granularity, initial_step, quantize_kernel
from bitnet_jax.matmul import (
    DEPLOYED,
    Context,
    Weights,
    code_dot,
    plain_dot,
    quantized_dot,
    quantized_dots,
    reference_dot,
)
from bitnet_jax.precision import PRECISIONS, get_precision
from bitnet_jax.quantize import quantize

# Unit roundoff of an arm's compute dtype: of one rounding to it, relative.
ROUNDOFF = {"ternary": 2**-8, "binary": 2**-8, "bf16": 2**-8, "fp16": 2**-11, "fp32": 0.0}
FLOAT32 = 4e-6  # accumulation of some 60 products in float32, relative to the sum of magnitudes
CARRIERS = ("bfloat16", "int8")
D, F = 60, 24
GRANULARITIES = {  # and whether tensor parallelism would cut the kernel along its inputs
    "tensor": (Granularity(), False),
    "channel": (Granularity("channel"), False),
    "group": (Granularity("group", 12), False),
    "shard": (Granularity("shard", 4), False),
    "row shard": (Granularity("shard", 3), True),
}


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def float_arm(weights="ternary_absmean", activations="int8_absmax", **changes):
    """An arm whose results are float32, so that tests see the codes and not bfloat16's rounding."""
    return get_precision("fp32", weights=weights, activations=activations, **changes)


def granular(arm_or_name, kind, **changes):
    granularity, row_parallel = GRANULARITIES[kind]
    return get_precision(arm_or_name, granularity=granularity, **changes), row_parallel


@functools.partial(jax.jit, static_argnums=(3, 4))
def codes_and_product(x, w, step, precision, row_parallel=False):
    qx = quantize(precision.activation_quantizer, x, (x.ndim - 1,))
    qw = quantize_kernel(precision.weight_quantizer, precision.granularity, w, row_parallel, step)
    return qx, qw, quantized_dot(x, w, step, DEPLOYED, precision, row_parallel)


@functools.partial(jax.jit, static_argnums=(5, 6))
def forward_and_gradients(x, w, step, context, g, precision, row_parallel=False):
    """y, dx, dw and that of the step, of the fused product, for cotangent g."""

    def product(x, w, step):
        return quantized_dot(x, w, step, context, precision, row_parallel)

    y, pullback = jax.vjp(product, x, w, step)
    return y, *pullback(g.astype(y.dtype))


def plain_run(x, w, g, precision):
    """y, dx and dw of a deployed product whose scales are not learned."""
    return forward_and_gradients(x, w, None, DEPLOYED, g, precision, False)[:3]


@functools.partial(jax.jit, static_argnums=3)
def reference(x, w, g, precision):
    y, pullback = jax.vjp(lambda x, w: reference_dot(x, w, precision), x, w)
    return y, *pullback(g)


def operands(precision, seed=0):
    """Tokens [2, 7, 60] of different sizes, kernel [60, 24], a cotangent the dtype holds exactly"""
    x = gaussian(2, 7, D, seed=seed) * np.logspace(-1, 1, 14, dtype=np.float32).reshape(2, 7, 1)
    g = gaussian(2, 7, F, seed=seed + 1).astype(precision.compute_dtype)
    return x, 0.1 * gaussian(D, F, seed=seed + 2), g.astype(np.float32)


def assert_within(actual, expected, bound):
    excess = np.abs(np.asarray(actual, np.float64) - expected) - bound
    assert (excess <= 0).all(), f"beyond the bound by up to {excess.max()}"


# ---- Forward -----------------------------------------------------------------------------------


def integers(qx, qw):
    """The product of the codes of each slice, [I, *B, F] in int64."""
    slices, size, _ = qw.codes.shape
    x = np.asarray(qx.codes, np.int64).reshape(*qx.codes.shape[:-1], slices, size)
    return np.einsum("...is,isf->i...f", x, np.asarray(qw.codes, np.int64))


@pytest.mark.parametrize("carrier", CARRIERS)
def test_ternary_forward_is_the_integer_product(carrier):
    """To the bit: integers in numpy, both scales once, one rounding to bfloat16."""
    precision = get_precision("ternary", carrier)
    x, w, _ = operands(precision)
    qx, qw, y = codes_and_product(x, w, None, precision)
    scaled = integers(qx, qw)[0].astype(np.float32) * (np.asarray(qx.scale) * qw.scale.item())
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, scaled.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "kind, weights, carrier",
    [
        ("tensor", "int2_stretched", "bfloat16"),
        ("tensor", "int2_stretched", "int8"),
        ("channel", "ternary_lsq", "bfloat16"),
        ("group", "ternary_lsq", "bfloat16"),
        ("group", "ternary_lsq", "int8"),
        ("shard", "int2_stretched", "bfloat16"),
        ("row shard", "int2_stretched", "bfloat16"),
        ("row shard", "int2_stretched", "int8"),
    ],
)
def test_forward_is_the_integer_product_of_every_granularity(kind, weights, carrier):
    """To the bit of float32: with powers of two as scales, adding up slices does not round."""
    precision, row_parallel = granular("fp32", kind, weights=weights, activations="int8_absmax",
                                       carrier=carrier)  # fmt: skip
    x, w, _ = operands(precision)
    step = np.asarray(
        initial_step(precision.weight_quantizer, precision.granularity, w, row_parallel)
    )
    step = np.exp2(np.round(np.log2(step)) + np.arange(step.size).reshape(step.shape) % 3 - 1)
    qx, qw, y = codes_and_product(x, w, step.astype(np.float32), precision, row_parallel)
    sums = integers(qx, qw)
    assert len(sums) == {"group": 5, "row shard": 3}.get(kind, 1)
    w_scale = np.asarray(qw.scale)[:, :, None, :]  # [I, 1, 1, F or 1] against sums [I, 2, 7, F]
    total = (sums * w_scale.astype(np.float64)).sum(0)
    assert y.dtype == jnp.float32 and np.unique(qw.scale).size > (kind != "tensor")
    np.testing.assert_array_equal(y, total.astype(np.float32) * np.asarray(qx.scale))


@pytest.mark.parametrize(
    "kind, weights",
    [("channel", "ternary_absmean"), ("group", "binary"), ("row shard", "int4_absmax")],
)
def test_forward_with_other_scales_is_the_integer_product_but_for_their_roundings(kind, weights):
    precision, row_parallel = granular("fp32", kind, weights=weights, activations="int4_absmean")
    x, w, _ = operands(precision)
    qx, qw, y = codes_and_product(x, w, None, precision, row_parallel)
    terms = integers(qx, qw) * np.asarray(qw.scale, np.float64)[:, :, None, :]
    x_scale = np.asarray(qx.scale, np.float64)
    # Two products, and the sum of up to five slices: a rounding of 2^-24 each.
    assert_within(y, terms.sum(0) * x_scale, 8 * 2**-24 * np.abs(terms).sum(0) * x_scale)


@pytest.mark.parametrize("kind", ["tensor", "group"])
@pytest.mark.parametrize("seed", range(2))
def test_carriers_are_equal_bit_for_bit(seed, kind):
    results = []
    for carrier in CARRIERS:
        precision, row_parallel = granular("ternary", kind, carrier=carrier)
        x, w, g = operands(precision, seed)
        results.append(forward_and_gradients(x, w, None, DEPLOYED, g, precision, row_parallel)[:3])
    for bfloat16, int8 in zip(*results, strict=True):
        np.testing.assert_array_equal(bfloat16, int8)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_carriers_are_exact_at_the_extremes(carrier):
    """4096 products of one sign: 2^19, far beyond bfloat16's 2^8, within float32's 2^24."""
    rng = np.random.default_rng(0)
    x = [np.full(4096, 127), np.full(4096, -128), rng.integers(-128, 128, 4096)]
    w = [np.full(4096, 1), np.full(4096, -1), rng.integers(-1, 2, 4096)]
    x, w = np.array(x, np.int8), np.array(w, np.int8).T
    product = code_dot(x, w, get_precision("ternary", carrier), ((1,), (0,)))
    assert product.dtype == jnp.float32
    np.testing.assert_array_equal(product, x.astype(np.int64) @ w.astype(np.int64))


@pytest.mark.parametrize("carrier", CARRIERS)
def test_8_bit_weights_are_exact_beyond_2_to_the_24(carrier):
    """2000 products of up to 127^2 are 3.2e7, which float32 sums cannot hold exactly."""
    precision = float_arm("int8_absmax", carrier=carrier)
    rng = np.random.default_rng(0)
    x, w = (rng.integers(a, 128, (2000, 6)).astype(np.float32) for a in (90, 101))
    x[0], w[0] = 127, 127  # the scales are exactly 1
    qx, qw, y = codes_and_product(x.T.copy(), w, None, precision)
    exact = x.T.astype(np.int64) @ w.astype(np.int64)
    assert exact.min() > 2**24 and (qx.scale == 1).all() and qw.scale.item() == 1
    np.testing.assert_array_equal(y, exact.astype(np.float32))
    raw = code_dot(qx.codes, qw.codes[0], precision, ((1,), (0,)))
    np.testing.assert_array_equal(raw, exact.astype(np.float32))


@pytest.mark.parametrize(
    "weights, carrier, terms, operand",
    [
        ("ternary_absmean", "bfloat16", 2000, "bf16"),
        ("ternary_absmean", "int8", 2000, "i8"),
        ("int8_absmax", "bfloat16", 1023, "bf16"),  # 1023 * 2^14 < 2^24
        ("int8_absmax", "bfloat16", 1024, "i8"),
    ],
)
def test_what_carries_the_codes(weights, carrier, terms, operand):
    """The carrier, as long as it is exact."""
    codes = jnp.zeros((2, terms), jnp.int8), jnp.zeros((terms, 3), jnp.int8)
    precision = float_arm(weights, carrier=carrier)
    text = str(jax.make_jaxpr(lambda x, w: code_dot(x, w, precision, ((1,), (0,))))(*codes))
    accumulator = "int32" if operand == "i8" else "float32"
    assert f"preferred_element_type={accumulator}" in text
    assert ("bf16[" in text) == (operand == "bf16")


# ---- Gradients of deployed products ------------------------------------------------------------


@pytest.mark.parametrize("arm", PRECISIONS)
def test_product_and_gradients_against_plain_composition(arm):
    """Each bound counts the roundings to the compute dtype that the arm makes, and no more.

    Forward: of the result (u |y|), and in unquantized arms of both operands (2u |x||w|).
    dx: of the kernel (u |g||w|); none where codes are exact. dw: of x, or of g times x's scale.
    """
    precision, u = get_precision(arm), ROUNDOFF[arm]
    x, w, g = operands(precision)
    y, dx, dw = plain_run(x, w, g, precision)
    same_values = precision if precision.quantized else get_precision("fp32")
    y_ref, dx_ref, dw_ref = (np.asarray(a, np.float64) for a in reference(x, w, g, same_values))
    operand_u = 0 if precision.quantized else u
    rows_x, rows_g = (np.abs(a).reshape(-1, a.shape[-1]).astype(np.float64) for a in (x, g))
    x_w, g_w, x_g = np.abs(x) @ np.abs(w), np.abs(g) @ np.abs(w).T, rows_x.T @ rows_g
    assert y.dtype == precision.compute_dtype and dx.dtype == dw.dtype == jnp.float32
    assert_within(y, y_ref, 1.01 * (u * np.abs(y_ref) + 2 * operand_u * x_w) + 2 * FLOAT32 * x_w)
    assert_within(dx, dx_ref, 1.01 * operand_u * g_w + 2 * FLOAT32 * g_w)
    assert_within(dw, dw_ref, 1.01 * u * x_g + 2 * FLOAT32 * x_g)


def weight_values(w, step, precision, row_parallel):
    """Each weight's scale [D, F] and quantized value; steps get LSQ's gradient, weights none."""
    quantizer, granularity = precision.weight_quantizer, precision.granularity
    fixed = quantize_kernel(quantizer, granularity, stop_gradient(w), row_parallel, step)
    fixed = stop_gradient(fixed)
    scale = jnp.broadcast_to(fixed.scale, fixed.codes.shape).reshape(D, F)
    codes = fixed.codes.astype(jnp.float32).reshape(D, F)
    if step is None:
        return scale, codes * scale
    if granularity.kind == "group":
        spread = jnp.repeat(step[:, 0], granularity.size, axis=0)
    elif granularity.kind == "shard" and row_parallel:
        spread = jnp.repeat(step[:, 0], D // granularity.size, axis=0)
    elif granularity.kind == "shard":
        spread = jnp.repeat(step[0, :, :, 0], F // granularity.size, axis=1)
    else:
        spread = step[0]
    spread = jnp.broadcast_to(spread, (D, F))
    grad_scale = 1 / np.sqrt(D * F / step.size * quantizer.high)
    s = spread * grad_scale + stop_gradient(spread - spread * grad_scale)
    ratio = jnp.clip(stop_gradient(w) / s, quantizer.low, quantizer.high)
    return scale, (ratio + stop_gradient(codes - ratio)) * s


def estimated(estimator, quantizer, x, values, scale):
    """The quantized values, whose own gradient stays, and the estimator's with respect to x.

    As in QuEST: M x + stop_gradient(q(x) - M x).
    """
    if quantizer.reach is None:
        return x
    if estimator == "trust":
        mask = jnp.abs(values - x) <= quantizer.gap * scale / 2
    elif estimator == "clipped":
        mask = (x >= quantizer.low * scale) & (x <= quantizer.high * scale)
    else:
        mask = jnp.ones_like(x, bool)
    mask = stop_gradient(mask).astype(jnp.float32)
    return values + mask * x - stop_gradient(mask * x)


def composed(x, w, step, strength, precision, row_parallel):
    """The product in float32 by plain differentiation, and what its operands are."""
    x = x.astype(jnp.float32)
    qx = quantize(precision.activation_quantizer, stop_gradient(x), (x.ndim - 1,))
    x_values = qx.codes.astype(jnp.float32) * qx.scale
    x_hat = estimated(
        precision.activation_estimator, precision.activation_quantizer, x, x_values, qx.scale
    )
    w_scale, w_values = weight_values(w, step, precision, row_parallel)
    w_hat = estimated(precision.estimator, precision.weight_quantizer, w, w_values, w_scale)
    if strength is not None:
        x_hat, w_hat = (a + strength * (b - a) for a, b in ((x, x_hat), (w, w_hat)))
    return jnp.matmul(x_hat, w_hat, precision=lax.Precision.HIGHEST), (x_hat, w_hat)


@functools.partial(jax.jit, static_argnums=(5, 6))
def composed_and_gradients(x, w, step, strength, g, precision, row_parallel):
    y, pullback, hats = jax.vjp(
        lambda x, w, step: composed(x, w, step, strength, precision, row_parallel),
        x,
        w,
        step,
        has_aux=True,
    )
    return y, *pullback(g), hats


def assert_composition(precision, row_parallel=False, strength=None):
    """y, dx, dw and the steps' gradient of a float32 arm, to float32's accumulation."""
    x, w, g = operands(precision)
    step = None
    if precision.weight_quantizer.learned:
        step = initial_step(precision.weight_quantizer, precision.granularity, w, row_parallel)
        step = step * np.random.default_rng(5).uniform(0.4, 1.2, step.shape).astype(np.float32)
    given = None if strength is None else np.float32(strength)
    actual = forward_and_gradients(x, w, step, Context(given), g, precision, row_parallel)
    *expected, (x_hat, w_hat) = composed_and_gradients(
        x, w, step, given, g, precision, row_parallel
    )
    x_hat, w_hat = np.abs(np.asarray(x_hat)), np.abs(np.asarray(w_hat))
    x_g = x_hat.reshape(-1, D).T @ np.abs(g).reshape(-1, F)
    for a, b, magnitude in zip(
        actual, expected, (x_hat @ w_hat, np.abs(g) @ w_hat.T, x_g), strict=False
    ):
        # The last term: where operands are exactly 0, but scale * (1 - strength) is not.
        assert_within(a, np.asarray(b, np.float64), FLOAT32 * magnitude + 1e-6 * magnitude.mean())
    if step is not None:
        assert actual[3].shape == step.shape
        high, count = precision.weight_quantizer.high, D * F / step.size
        bound = 4 * FLOAT32 * high * count * x_g.mean() / np.sqrt(count * high)
        assert_within(actual[3], np.asarray(expected[3], np.float64), bound)
        assert strength == 0 or np.abs(actual[3]).max() > 100 * bound
    else:
        assert actual[3] is None
    return actual


@pytest.mark.parametrize(
    "kind, weights, estimator, activation_estimator",
    [
        ("tensor", "ternary_absmean", "clipped", "trust"),
        ("group", "ternary_absmean", "clipped", "identity"),
        ("tensor", "int2_stretched", "identity", "identity"),
        ("channel", "ternary_lsq", "identity", "clipped"),
        ("group", "ternary_lsq", "trust", "clipped"),
        ("shard", "ternary_lsq", "trust", "identity"),
        ("row shard", "int2_stretched", "clipped", "clipped"),
    ],
)
def test_every_granularity_and_estimator(kind, weights, estimator, activation_estimator):
    precision, row_parallel = granular(
        "fp32",
        kind,
        weights=weights,
        activations="int4_absmean",
        estimator=estimator,
        activation_estimator=activation_estimator,
    )
    _, dx, dw, _ = assert_composition(precision, row_parallel)
    masked = [0 < np.mean(np.asarray(a) == 0) < 0.8 for a in (dx, dw)]
    assert masked == [activation_estimator != "identity", estimator != "identity"]


@pytest.mark.parametrize(
    "weights, activations",
    [("binary", "int8_absmax"), ("ternary_twn", "none"), ("none", "int8_absmax")],
)
def test_other_pairs_of_quantizers(weights, activations):
    assert_composition(float_arm(weights, activations))


def test_largest_activations_keep_their_gradient():
    """A token's largest value is the grid's last level, however its scale was rounded."""
    precision = get_precision("ternary", activation_estimator="clipped")
    x, g = np.abs(gaussian(4000, 4)), np.ones((4000, 1))
    _, dx, _ = plain_run(x, 1 + np.abs(gaussian(4, 1)), g, precision)
    assert (np.asarray(dx) != 0).all()


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "arm, weights", [*((arm, None) for arm in PRECISIONS), ("ternary", "ternary_lsq")]
)
def test_cotangents_have_the_dtypes_of_their_primals(arm, weights, x_dtype):
    precision = get_precision(arm, weights=weights)
    x, w, g = operands(precision)
    step = np.ones((1, 1, 1), np.float32) if weights else None
    y, dx, dw, d_step = jax.eval_shape(
        lambda x, w, step, g: forward_and_gradients(x, w, step, DEPLOYED, g, precision),
        x.astype(x_dtype),
        w,
        step,
        g,
    )
    assert [a.dtype for a in (y, dx, dw)] == [precision.compute_dtype, x_dtype, jnp.float32]
    assert [a.shape for a in (y, dx, dw)] == [g.shape, x.shape, w.shape]
    assert d_step is None if step is None else (d_step.shape, d_step.dtype) == ((1, 1, 1), "f4")


def test_vmap_over_runs_equals_a_loop():
    """Each member keeps its own scale: their kernels differ by factors of ten."""
    precision = get_precision("ternary")
    members = [operands(precision, seed) for seed in (0, 10, 20)]
    members = [(x, 10.0**i * w, g) for i, (x, w, g) in enumerate(members)]
    stacked = (np.stack(a).astype(np.float32) for a in zip(*members, strict=True))
    together = jax.jit(jax.vmap(lambda x, w, g: plain_run(x, w, g, precision)))(*stacked)
    for i, (x, w, g) in enumerate(members):
        alone = plain_run(x, w.astype(np.float32), g, precision)
        for a, b, name in zip(together, alone, ("y", "dx", "dw"), strict=True):
            size = np.abs(b.astype(jnp.float32)).max()
            # Another order of summation; of y, an ulp of the compute dtype.
            bound = (2 * ROUNDOFF["ternary"] if name == "y" else 2 * FLOAT32) * size
            assert_within(a[i], b, bound)


def test_scan_over_stacked_kernels_scales_each_layer():
    """One scale for the stack would turn the small layer's codes to 0."""
    precision = get_precision("ternary")
    x, g = gaussian(5, 32), gaussian(3, 5, 24, seed=1)
    kernels = gaussian(3, 32, 24, seed=2) * np.array([1, 1e3, 1e-2], np.float32)[:, None, None]

    def loss(kernels):
        def body(total, layer):
            kernel, weights = layer
            y = quantized_dot(x, kernel, None, DEPLOYED, precision).astype(jnp.float32)
            return total + jnp.sum(weights * y), y

        return jax.lax.scan(body, 0.0, (kernels, g))

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(kernels)
    for layer in range(3):
        y_ref, _, dw_ref = reference(x, kernels[layer], g[layer], precision)
        u = ROUNDOFF["ternary"] * 1.01
        assert_within(y[layer], y_ref, u * np.abs(y_ref) + 1e-5 * np.abs(y_ref).max())
        # The cotangent itself is rounded here, and then once more with the token's scale.
        magnitude = np.abs(x).T @ np.abs(g[layer])
        assert_within(gradient[layer], dw_ref, (2 * u + 2 * FLOAT32) * magnitude)


# ---- Warm-up -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, weights, estimator, activation_estimator",
    [
        ("tensor", "ternary_absmean", "identity", "identity"),
        ("group", "ternary_lsq", "identity", "identity"),
        ("row shard", "ternary_absmean", "trust", "clipped"),
    ],
)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_strength_blends_both_operands(kind, weights, estimator, activation_estimator, strength):
    """x + s (q(x) - x), and the gradient of that: what is not quantized yet passes a mask.

    At strength 0 steps of learned scales get none.
    """
    precision, row_parallel = granular(
        "fp32",
        kind,
        weights=weights,
        activations="int4_absmean",
        estimator=estimator,
        activation_estimator=activation_estimator,
    )
    *_, d_step = assert_composition(precision, row_parallel, strength)
    assert d_step is None or (np.asarray(d_step) == 0).all() == (strength == 0)


def test_strength_runs_from_the_plain_product_to_the_deployed_one():
    """Within roundings of the operands and the result to the compute dtype."""
    precision, u = get_precision("ternary"), ROUNDOFF["ternary"]
    x, w, g = operands(precision)
    rows_x, rows_g = (np.abs(a).reshape(-1, a.shape[-1]) for a in (x, g))
    magnitudes = np.abs(x) @ np.abs(w), np.abs(g) @ np.abs(w).T, rows_x.T @ rows_g
    for strength, equal in ((0, get_precision("fp32")), (1, precision)):
        context = Context(np.float32(strength))
        actual = forward_and_gradients(x, w, None, context, g, precision)[:3]
        expected = reference(x, w, g, equal)
        for a, b, magnitude in zip(actual, expected, magnitudes, strict=True):
            assert_within(a, np.asarray(b, np.float64), (3.02 * u + 2 * FLOAT32) * magnitude)


# ---- Stochastic rounding -----------------------------------------------------------------------


STOCHASTIC = {"estimator": "stochastic", "activation_estimator": "stochastic"}


def fast_key(seed):
    """Of a generator that compiles within a fraction of the default one's time."""
    return jax.random.key(seed, impl="unsafe_rbg")


def test_without_a_key_stochastic_arms_round_to_nearest():
    arms = [float_arm(), float_arm(**STOCHASTIC)]
    x, w, g = operands(arms[0])
    for nearest, keyless in zip(*(plain_run(x, w, g, arm) for arm in arms), strict=True):
        np.testing.assert_array_equal(nearest, keyless)


@functools.partial(jax.jit, static_argnums=(3, 4))
def forward(x, w, key, precision, row_parallel=False):
    return quantized_dot(x, w, None, Context(None, key), precision, row_parallel)


@pytest.mark.parametrize(
    "where, kind", [("estimator", "shard"), ("activation_estimator", "row shard")]
)
def test_a_key_decides_the_draws(where, kind):
    """Of weights or activations alone, too; arms that round to nearest do not look at it."""
    fields = {"weights": "int4_absmax", "activations": "int4_absmax"}
    precision, row_parallel = granular("fp32", kind, **fields, **{where: "stochastic"})
    nearest, _ = granular("fp32", kind, **fields)
    x, w, _ = operands(precision)

    def run(key, arm=precision):
        return np.asarray(forward(x, w, key, arm, row_parallel))

    first, again, other = (run(fast_key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) > 0.9 and np.mean(first != run(None)) > 0.9
    np.testing.assert_array_equal(run(fast_key(0), nearest), run(None))


def test_stochastic_products_are_unbiased():
    """A linear loss' expectation is that of the unquantized product, within 4 standard errors.

    One token and one output, as many numbers each: were both operands rounded by one draw, their
    errors would be correlated.
    """
    precision = float_arm("int4_absmax", "int4_absmax", **STOCHASTIC)
    x, w = np.abs(gaussian(1, 32)), np.abs(gaussian(32, 1, seed=1))

    @jax.jit
    @jax.vmap
    def product(key):
        return quantized_dot(x, w, None, Context(None, key), precision)[0, 0]

    y = np.asarray(product(jax.random.split(fast_key(0), 20_000)), np.float64)
    error = y.std() / np.sqrt(len(y))
    exact = (x.astype(np.float64) @ w).item()
    assert abs(y.mean() - exact) < 4 * error and error < 2e-3 * exact
    nearest = quantized_dot(x, w, None, DEPLOYED, precision).item()
    assert abs(nearest - exact) > 4 * error  # which rounding to nearest would not have passed


@pytest.mark.parametrize("strength", [None, 0.5])
def test_the_backward_pass_sees_the_draws_of_the_forward_one(strength):
    """With the identity as cotangent the gradients are the operands themselves, transposed."""
    precision = float_arm("int4_absmax", "int4_absmax", **STOCHASTIC)
    x, w = gaussian(F, D), gaussian(D, F, seed=1)
    strength = None if strength is None else np.float32(strength)
    context = Context(strength, fast_key(3))
    y, dx, dw, _ = forward_and_gradients(x, w, None, context, np.eye(F), precision)
    x_hat, w_hat = np.asarray(dw).T, np.asarray(dx).T
    assert_within(y, (x_hat @ w_hat).astype(np.float64), FLOAT32 * np.abs(x_hat) @ np.abs(w_hat))
    step = np.abs(x).max(1, keepdims=True) / 7 * (strength or 1)
    moved = np.abs(x_hat - x) / step
    assert (moved < 1.0001).all() and 0.25 < moved.mean() < 0.45  # 1/3, not nearest's 1/4


def test_a_key_and_a_strength_get_no_gradient():
    precision = float_arm(**STOCHASTIC)
    x, w, _ = operands(precision)

    def loss(w, strength, key):
        return quantized_dot(x, w, None, Context(strength, key), precision).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    dw, d_strength = gradients(w, jnp.float32(0.5), fast_key(0))
    assert d_strength == 0 and np.abs(dw).min() > 0


# ---- The product without quantization ----------------------------------------------------------


@pytest.mark.parametrize("arm", PRECISIONS)
def test_plain_dot(arm):
    """x @ w^T of the head: against numpy, with both gradients, and never quantized.

    Roundings: of both operands, and of the result; the cotangent is exact.
    """
    precision, u = get_precision(arm), ROUNDOFF[arm]
    x, w, g = operands(precision)
    w = w.T.copy()
    y, pullback = jax.vjp(lambda x, w: plain_dot(x, w, precision), x, w)
    dx, dw = pullback(jnp.asarray(g, y.dtype))
    rows_x, rows_g = x.reshape(-1, D).astype(np.float64), g.reshape(-1, F).astype(np.float64)
    assert y.dtype == precision.compute_dtype and dx.dtype == dw.dtype == jnp.float32
    assert dx.shape == x.shape and dw.shape == w.shape
    for actual, a, b, roundings in (
        (y.reshape(-1, F), rows_x, w.T, 3),
        (dx.reshape(-1, D), rows_g, w, 1),
        (dw, rows_g.T, rows_x, 1),
    ):
        bound = (1.02 * roundings * u + FLOAT32) * (np.abs(a) @ np.abs(b))
        assert_within(actual, a @ b, bound)


def test_plain_dot_keeps_the_dtype_of_its_operands():
    precision = get_precision("bf16")
    x, w, g = operands(precision)
    x = x.astype(jnp.bfloat16)
    _, pullback = jax.vjp(lambda x, w: plain_dot(x, w, precision), x, w.T)
    assert [a.dtype for a in pullback(g.astype(jnp.bfloat16))] == [jnp.bfloat16, jnp.float32]


# ---- Several kernels of one input --------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(4, 5))
def several(x, weights, context, gs, precision, row_parallel):
    """ys, dx, and the cotangents of each kernel and step."""
    ys, pullback = jax.vjp(
        lambda x, weights: quantized_dots(x, weights, context, precision, row_parallel), x, weights
    )
    return ys, *pullback(tuple(g.astype(y.dtype) for g, y in zip(gs, ys, strict=True)))


@pytest.mark.parametrize(
    "arm, kind, strength, fields",
    [
        ("ternary", "tensor", None, {}),
        ("fp16", "tensor", None, {}),
        ("fp32", "group", None,
         {"weights": "ternary_lsq", "estimator": "trust", "activation_estimator": "clipped"}),
        ("fp32", "row shard", 0.3,
         {"weights": "ternary_lsq", "estimator": "clipped", "activation_estimator": "trust"}),
    ],
)  # fmt: skip
def test_several_kernels_are_as_many_products(arm, kind, strength, fields):
    """Values, kernels' and steps' gradients to the bit; dx, their sum, to float32's rounding.

    Known codes of one kernel among others change nothing either.
    """
    if fields:
        fields = {**fields, "activations": "int4_absmean"}
    precision, row_parallel = granular(arm, kind, **fields)
    context = Context(None if strength is None else np.float32(strength))
    x = operands(precision)[0]
    widths, kernels, gs = (24, 12, 36), [], []
    for i, width in enumerate(widths):
        kernel = 10.0**-i * gaussian(D, width, seed=10 + i)
        step = None
        if precision.weight_quantizer.learned:
            quantizer, blocks = precision.weight_quantizer, precision.granularity
            step = initial_step(quantizer, blocks, kernel, row_parallel)
        kernels.append(Weights(kernel.astype(np.float32), step))
        gs.append(gaussian(2, 7, width, seed=20 + i).astype(precision.compute_dtype))
    kernels, gs = tuple(kernels), tuple(np.float32(g) for g in gs)
    ys, dx, d_weights = several(x, kernels, context, gs, precision, row_parallel)
    total, magnitude = 0, 0
    for i, (w, g) in enumerate(zip(kernels, gs, strict=True)):
        one = forward_and_gradients(x, w.kernel, w.step, context, g, precision, row_parallel)
        np.testing.assert_array_equal(ys[i], one[0])
        np.testing.assert_array_equal(d_weights[i].kernel, one[2])
        if w.step is not None:
            np.testing.assert_array_equal(d_weights[i].step, one[3])
        total, magnitude = total + np.float64(one[1]), magnitude + np.abs(one[1])
    assert_within(dx, total, 4 * 2**-24 * magnitude)
    assert np.abs(dx).max() > 0 and len(ys) == 3
    if precision.quantized:
        last = quantize_kernel(
            precision.weight_quantizer, precision.granularity, kernels[2].kernel, row_parallel,
            kernels[2].step,
        )  # fmt: skip
        known = (*kernels[:2], kernels[2]._replace(quantized=last))
        given = several(x, known, context, gs, precision, row_parallel)
        for a, b in zip(jax.tree.leaves(given[:2]), jax.tree.leaves((ys, dx)), strict=True):
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5)


def test_several_kernels_draw_by_themselves():
    """Of one key, each rounds by draws of its own: equal kernels then have unequal products."""
    precision = float_arm("int4_absmax", estimator="stochastic")
    x, w, _ = operands(precision)
    context = Context(None, fast_key(0))
    first, second = quantized_dots(x, (Weights(w), Weights(w)), context, precision)
    assert np.mean(np.asarray(first) != second) > 0.9


# ---- Bad values --------------------------------------------------------------------------------


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_values_come_out_as_nan(carrier, bad):
    """Codes cannot hold NaN; the scale carries it: a bad token to itself, a bad kernel to all."""
    precision = get_precision("ternary", carrier)
    x, w, g = operands(precision)
    x_bad, w_bad = x.copy(), w.copy()
    x_bad[1, 3, 5], w_bad[4, 2] = bad, bad
    clean = np.asarray(plain_run(x, w, g, precision)[0], np.float32)
    y, dx, dw = (np.asarray(a, np.float32) for a in plain_run(x_bad, w, g, precision))
    assert np.isnan(y[1, 3]).all() and np.isnan(dw).all() and np.isfinite(dx).all()
    y[1, 3] = clean[1, 3]
    np.testing.assert_array_equal(y, clean)
    y, dx, dw = (np.asarray(a, np.float32) for a in plain_run(x, w_bad, g, precision))
    assert np.isnan(y).all() and np.isnan(dx).all() and np.isfinite(dw).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "kind, reached, weights",
    [
        ("channel", [9], "ternary_absmean"),
        ("shard", range(6, 12), "ternary_twn"),
        ("group", [9], "ternary_lsq"),
    ],
)
def test_a_bad_weight_reaches_the_outputs_of_its_block(kind, reached, weights, bad):
    precision, row_parallel = granular("ternary", kind, weights=weights)
    x, w, _ = operands(precision)
    step = None
    if precision.weight_quantizer.learned:
        step = initial_step(precision.weight_quantizer, precision.granularity, w, row_parallel)
    w[4, 9] = bad
    *_, y = codes_and_product(x, w, step, precision, row_parallel)
    expected = np.isin(np.arange(F), reached)
    np.testing.assert_array_equal(np.isnan(np.asarray(y, np.float32)).all((0, 1)), expected)
    assert np.isfinite(np.asarray(y, np.float32)[..., ~expected]).all()


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_bad_values_pass_through_a_blend(strength):
    precision = get_precision("ternary")
    x, w, g = operands(precision)
    x[1, 3, 5] = np.nan
    context = Context(np.float32(strength))
    y = np.isnan(np.asarray(forward_and_gradients(x, w, None, context, g, precision)[0], "f4"))
    assert y[1, 3].all() and y.sum() == F


@pytest.mark.parametrize("arm", ["fp16", "bf16", "fp32"])
def test_nan_passes_through_unquantized_arms(arm):
    precision = get_precision(arm)
    x, w, g = operands(precision)
    x[1, 3, 5] = np.nan
    y = np.isnan(plain_run(x, w, g, precision)[0].astype(jnp.float32))
    assert y[1, 3].all() and y.sum() == F
    head = np.isnan(plain_dot(x, w.T, precision).astype(jnp.float32))
    assert head[1, 3].all() and head.sum() == F


def test_float32_products_are_not_left_to_the_device():
    """A GPU's default for float32 operands is TF32, of 10 bits: forward and both gradients."""
    precision = get_precision("fp32")
    x, w, g = operands(precision)
    products = {
        "quantized": lambda x, w: quantized_dot(x, w, None, DEPLOYED, precision),
        "plain": lambda x, w: plain_dot(x, w.T, precision),
    }
    for product in products.values():
        jaxpr = str(jax.make_jaxpr(lambda x, w, f=product: jax.vjp(f, x, w)[1](g))(x, w))
        assert jaxpr.count("dot_general[") == jaxpr.count("precision=(Precision.HIGHEST") == 3
