"""The quantized product against integers in numpy and against the plain composition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.matmul import code_dot, quantized_dot, reference_dot
from bitnet_jax.precision import PRECISIONS, get_precision

# Unit roundoff of an arm's compute dtype: of one rounding to it, relative.
ROUNDOFF = {"ternary": 2**-8, "bf16": 2**-8, "fp16": 2**-11, "fp32": 0.0}
FLOAT32 = 4e-6  # accumulation of some 60 products in float32, relative to the sum of magnitudes
CARRIERS = ("bfloat16", "int8")


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def codes_and_product(x, w, precision, transposed=False):
    qx, qw = precision.activation_quantizer(x), precision.weight_quantizer(w)
    return qx, qw, quantized_dot(x, w, precision, transposed)


@functools.partial(jax.jit, static_argnums=(3, 4))
def forward_and_gradients(x, w, g, precision, transposed=False):
    """y, dx, dw of the fused product, for cotangent g."""
    y, pullback = jax.vjp(lambda x, w: quantized_dot(x, w, precision, transposed), x, w)
    return y, *pullback(g.astype(y.dtype))


@functools.partial(jax.jit, static_argnums=3)
def reference(x, w, g, precision):
    y, pullback = jax.vjp(lambda x, w: reference_dot(x, w, precision), x, w)
    return y, *pullback(g)


def operands(precision, seed=0):
    """Tokens [2, 7, 60] of different sizes, kernel [60, 24], a cotangent the dtype holds exactly"""
    x = gaussian(2, 7, 60, seed=seed) * np.logspace(-1, 1, 14, dtype=np.float32).reshape(2, 7, 1)
    g = gaussian(2, 7, 24, seed=seed + 1).astype(precision.compute_dtype)
    return x, 0.1 * gaussian(60, 24, seed=seed + 2), g.astype(np.float32)


def assert_within(actual, expected, bound):
    excess = np.abs(np.asarray(actual, np.float64) - expected) - bound
    assert (excess <= 0).all(), f"beyond the bound by up to {excess.max()}"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_ternary_forward_is_the_integer_product(carrier, transposed):
    """To the bit: integers in numpy, both scales once, one rounding to bfloat16."""
    precision = get_precision("ternary", carrier)
    x, w, _ = operands(precision)
    qx, qw, y = codes_and_product(x, w.T if transposed else w, precision, transposed)
    w_codes = np.asarray(qw.codes, np.int64)
    integers = np.asarray(qx.codes, np.int64) @ (w_codes.T if transposed else w_codes)
    scaled = integers.astype(np.float32) * (np.asarray(qx.scale) * np.asarray(qw.scale)[None])
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, scaled.astype(jnp.bfloat16))


@pytest.mark.parametrize("seed", range(3))
def test_carriers_are_equal_bit_for_bit(seed):
    results = []
    for carrier in CARRIERS:
        precision = get_precision("ternary", carrier)
        results.append(forward_and_gradients(*operands(precision, seed), precision))
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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("arm", PRECISIONS)
def test_product_and_gradients_against_plain_composition(arm, transposed):
    """Each bound counts the roundings to the compute dtype that the arm makes, and no more.

    Forward: of the result (u |y|), and in unquantized arms of both operands (2u |x||w|).
    dx: of the kernel (u |g||w|); none where codes are exact. dw: of x, or of g times x's scale.
    """
    precision, u = get_precision(arm), ROUNDOFF[arm]
    x, w, g = operands(precision)
    y, dx, dw = forward_and_gradients(x, w.T if transposed else w, g, precision, transposed)
    y_ref, dx_ref, dw_ref = (np.asarray(a, np.float64) for a in reference(x, w, g, precision))
    operand_u = 0 if precision.quantized else u
    rows_x, rows_g = (np.abs(a).reshape(-1, a.shape[-1]).astype(np.float64) for a in (x, g))
    x_w, g_w, x_g = np.abs(x) @ np.abs(w), np.abs(g) @ np.abs(w).T, rows_x.T @ rows_g
    assert y.dtype == precision.compute_dtype and dx.dtype == dw.dtype == jnp.float32
    assert_within(y, y_ref, 1.01 * (u * np.abs(y_ref) + 2 * operand_u * x_w) + 2 * FLOAT32 * x_w)
    assert_within(dx, dx_ref, 1.01 * operand_u * g_w + 2 * FLOAT32 * g_w)
    assert_within(dw.T if transposed else dw, dw_ref, 1.01 * u * x_g + 2 * FLOAT32 * x_g)


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("arm", PRECISIONS)
def test_cotangents_have_the_dtypes_of_their_primals(arm, x_dtype):
    precision = get_precision(arm)
    x, w, g = operands(precision)
    shapes = jax.eval_shape(
        lambda x, w, g: forward_and_gradients(x, w, g, precision), x.astype(x_dtype), w, g
    )
    assert [a.dtype for a in shapes] == [precision.compute_dtype, x_dtype, jnp.float32]
    assert [a.shape for a in shapes] == [g.shape, x.shape, w.shape]


def test_vmap_over_runs_equals_a_loop():
    """Each member keeps its own scale: their kernels differ by factors of ten."""
    precision = get_precision("ternary")
    members = [operands(precision, seed) for seed in (0, 10, 20)]
    members = [(x, 10.0**i * w, g) for i, (x, w, g) in enumerate(members)]
    stacked = (np.stack(a).astype(np.float32) for a in zip(*members, strict=True))
    together = jax.jit(jax.vmap(lambda x, w, g: forward_and_gradients(x, w, g, precision)))(
        *stacked
    )
    for i, (x, w, g) in enumerate(members):
        alone = forward_and_gradients(x, w.astype(np.float32), g, precision)
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
            y = quantized_dot(x, kernel, precision).astype(jnp.float32)
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


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_values_come_out_as_nan(carrier, bad):
    """Codes cannot hold NaN; the scale carries it: a bad token to itself, a bad kernel to all."""
    precision = get_precision("ternary", carrier)
    x, w, g = operands(precision)
    x_bad, w_bad = x.copy(), w.copy()
    x_bad[1, 3, 5], w_bad[4, 2] = bad, bad
    clean = np.asarray(forward_and_gradients(x, w, g, precision)[0], np.float32)
    y, dx, dw = (np.asarray(a, np.float32) for a in forward_and_gradients(x_bad, w, g, precision))
    assert np.isnan(y[1, 3]).all() and np.isnan(dw).all() and np.isfinite(dx).all()
    y[1, 3] = clean[1, 3]
    np.testing.assert_array_equal(y, clean)
    y, dx, dw = (np.asarray(a, np.float32) for a in forward_and_gradients(x, w_bad, g, precision))
    assert np.isnan(y).all() and np.isnan(dx).all() and np.isfinite(dw).all()


@pytest.mark.parametrize("arm", ["fp16", "bf16", "fp32"])
def test_nan_passes_through_unquantized_arms(arm):
    precision = get_precision(arm)
    x, w, g = operands(precision)
    x[1, 3, 5] = np.nan
    y = np.isnan(forward_and_gradients(x, w, g, precision)[0].astype(jnp.float32))
    assert y[1, 3].all() and y.sum() == 24


def test_float32_products_are_not_left_to_the_device():
    """A GPU's default for float32 operands is TF32, of 10 bits: forward and both gradients."""
    precision = get_precision("fp32")
    jaxpr = str(
        jax.make_jaxpr(forward_and_gradients, static_argnums=3)(*operands(precision), precision)
    )
    assert jaxpr.count("dot_general[") == jaxpr.count("precision=(Precision.HIGHEST") == 3
