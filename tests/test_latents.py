"""Codes and scales of the latents are those that the model's forward pass uses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.granularity import Granularity, kernel_values, quantize_kernel
from bitnet_jax.latents import latent_codes, latents
from bitnet_jax.matmul import DEPLOYED
from bitnet_jax.model import TransformerConfig, apply_model, init_params
from bitnet_jax.precision import Precision
from bitnet_jax.quantize import Quantized

# Compiling takes longest here: half as long without LLVM's optimizations.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
latents_of, codes_of = jit(latents, static_argnums=1), jit(latent_codes, static_argnums=1)
CONFIG = TransformerConfig(vocab_size=11, layers=2, width=16, ff_width=24, heads=4, kv_heads=2)
FP32 = Precision("fp32", compute_dtype=jnp.float32)
# Weights alone, computed in float32: the forward pass is that of the dequantized kernels.
ARMS = {
    f"{weights}-{blocks.kind}": Precision(
        "arm", weights, granularity=blocks, compute_dtype=jnp.float32
    )
    for weights, blocks in [
        ("ternary_absmean", Granularity()),
        ("binary", Granularity("channel")),
        ("ternary_lsq", Granularity("group", 4)),
        ("int4_absmax", Granularity("shard", 2)),
    ]
}
EACH_ARM = pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
SHAPES = {
    "attention/q": (16, 16),
    "attention/k": (16, 8),
    "attention/v": (16, 8),
    "attention/out": (16, 16),
    "mlp/gate": (16, 24),
    "mlp/up": (16, 24),
    "mlp/down": (24, 16),
}


def random_params(arm):
    """Kernels of normal values, one block's fifty times the other's; learned steps of 1."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(CONFIG, arm, jax.random.key(0)))

    def draw(path, leaf):
        if path[-1].key == "step":
            return rng.uniform(0.3, 2, leaf.shape).astype(np.float32)
        values = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return np.abs(values)
        return values * np.array([1, 0.02], np.float32)[:, None, None] if leaf.ndim == 3 else values

    return jax.tree_util.tree_map_with_path(draw, shapes)


def layer_of(params, name):
    group, projection = name.split("/")
    return params["blocks"][group][projection]


@EACH_ARM
def test_each_block_is_quantized_alone(arm):
    params = random_params(arm)
    found, codes = latents_of(params, arm), codes_of(params, arm)
    assert {n: (x.values.shape[0], x.values.size) for n, x in found.items()} == {
        n: (2, 2 * inputs * outputs) for n, (inputs, outputs) in SHAPES.items()
    }
    assert codes.keys() == found.keys()

    @jit
    def alone(params, i):
        """One block's kernels, each by itself."""
        quantized = {}
        for name in SHAPES:
            layer = {key: leaf[i] for key, leaf in layer_of(params, name).items()}
            residual = name in ("attention/out", "mlp/down")
            quantized[name] = quantize_kernel(
                arm.weight_quantizer,
                arm.granularity,
                layer["kernel"],
                residual,
                layer.get("step"),
            )
        return quantized

    blocks = [alone(params, i) for i in range(2)]
    for name, latent in found.items():
        kernel = layer_of(params, name)["kernel"]
        assert latent.codes.dtype == jnp.int8 and latent.values.dtype == jnp.float32
        np.testing.assert_array_equal(codes[name], latent.codes)
        np.testing.assert_array_equal(latent.values.reshape(kernel.shape), kernel)
        for i in range(2):
            np.testing.assert_array_equal(latent.codes[i], blocks[i][name].codes)
            np.testing.assert_allclose(latent.scale[i], blocks[i][name].scale, rtol=1e-6)


@EACH_ARM
def test_the_forward_pass_uses_these_codes_and_scales(arm):
    """The unquantized model of the dequantized latents gives the quantized model's logits."""
    params = random_params(arm)
    tokens = np.arange(12).reshape(2, 6) % 11
    dequantized = jax.tree.map(lambda leaf: leaf, params)
    for name, latent in latents_of(params, arm).items():
        values = jax.vmap(kernel_values)(Quantized(latent.codes, latent.scale))
        layer = layer_of(dequantized, name)
        layer.clear()
        layer["kernel"] = values
    run = jit(apply_model, static_argnums=(0, 1))
    expected = np.asarray(run(CONFIG, FP32, dequantized, tokens, DEPLOYED))
    size = np.abs(expected).max()
    found = run(CONFIG, arm, params, tokens, DEPLOYED)
    np.testing.assert_allclose(found, expected, atol=2e-5 * size)
    plain = run(CONFIG, FP32, random_params(FP32), tokens, DEPLOYED)
    assert np.abs(plain - expected).max() > 0.05 * size


def test_latents_stored_in_bfloat16_are_quantized_in_float32():
    """As a step does: the stored values are widened first, and then nothing is 16 bits wide."""
    arm = ARMS["ternary_absmean-tensor"]
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), random_params(arm))
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    found, widened = latents_of(params, arm), latents_of(wide, arm)
    for narrow, expected in zip(found.values(), widened.values(), strict=True):
        for a, b in zip(narrow, expected, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_the_noise_of_training_is_not_in_the_latents():
    arm = ARMS["ternary_absmean-tensor"]
    drawing = dataclasses.replace(arm, estimator="stochastic")
    params = random_params(arm)
    nearest = codes_of(params, arm)
    for name, codes in codes_of(params, drawing).items():
        np.testing.assert_array_equal(codes, nearest[name])
