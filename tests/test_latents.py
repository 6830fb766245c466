"""Codes and scales of the latents are those that the model's forward pass uses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import train_step
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.granularity import Granularity, kernel_values, quantize_kernel
from bitnet_jax.latents import known_codes, latent_codes, latents
from bitnet_jax.matmul import DEPLOYED
from bitnet_jax.model import TransformerConfig, apply_hidden, apply_model, init_params
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


# Codes that are known already


@EACH_ARM
def test_known_codes_change_no_bit_of_a_forward_pass(arm):
    """With 8-bit activations, too; and they are what it uses: of other weights they change it."""
    arm = dataclasses.replace(arm, activations="int8_absmax")
    params, tokens = random_params(arm), np.arange(12).reshape(2, 6) % 11

    @jit
    def run(params, known):
        codes = None if known is None else known_codes(known, arm)
        return apply_hidden(CONFIG, arm, params, tokens, DEPLOYED, codes)[0]

    plain = run(params, None)
    np.testing.assert_array_equal(run(params, params), plain)
    mirrored = jax.tree.map(lambda w: w[..., ::-1] if w.ndim == 3 else w, params)
    assert (run(params, mirrored) != plain).any()


ACCUMULATED = {"train.microbatches": 4, "precision": "ternary"}
GROUPS = {"quantization.granularity": "group", "quantization.granularity_size": 8}


@pytest.fixture(scope="module")
def batch():
    return np.random.default_rng(0).integers(0, 256, (8, 17)).astype(np.int32)


def step_of(config, batch):
    """(an uncompiled step, its arguments)."""
    state = jax.eval_shape(lambda: train_step.init_state(config, 0))
    step = functools.partial(train_step.train_step, config)
    return step, (state, batch, np.float32(0.01), np.float32(0.1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [{}, {**GROUPS, "quantization.weights": "ternary_lsq"}], ids=["ternary", "group"]
)
def test_codes_of_all_microbatches_at_once_train_the_same(
    tiny_config, tiny_corpus, batch, monkeypatch, overrides
):
    """The same step, to the bit of its loss and to float32's rounding of its gradient's norm."""
    config = resolve(tiny_config({**ACCUMULATED, **overrides}), tiny_corpus).step
    state = jit(functools.partial(train_step.init_state, config))(0)
    step, (_, *rest) = step_of(config, batch)
    found = jit(lambda *a: step(*a))(state, *rest)
    monkeypatch.setattr(train_step, "known_codes", lambda params, arm: None)
    expected = jit(lambda *a: step(*a))(state, *rest)
    for key, value in expected[1].items():
        np.testing.assert_allclose(found[1][key], value, rtol=1e-6)
    for a, b in zip(*(jax.tree.leaves(s.opt_state) for s in (found[0], expected[0])), strict=True):
        size = max(1e-12, np.abs(b).max())
        np.testing.assert_allclose(a, b, atol=1e-6 * size)


def quantized_shapes(jaxpr):
    """The shapes of what a program turns into int8 codes, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "convert_element_type":
            (source,), (result,) = equation.invars, equation.outvars
            if result.aval.dtype == jnp.int8 and source.aval.dtype == jnp.float32:
                yield result.aval.shape
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from quantized_shapes(inner)


@pytest.mark.parametrize(
    "overrides, reused",
    [({}, True), (GROUPS, True), ({"quantization.activation_estimator": "stochastic"}, True),
     ({"quantization.estimator": "stochastic"}, False)],
    ids=["ternary", "group", "stochastic activations", "stochastic"],
)  # fmt: skip
def test_no_microbatch_quantizes_weights_unless_it_draws(
    tiny_config, tiny_corpus, batch, monkeypatch, overrides, reused
):
    """By what becomes int8 within the loop over microbatches: activations, and kernels or not."""
    config = resolve(tiny_config({**ACCUMULATED, **overrides}), tiny_corpus).step

    def of_a_microbatch():
        step, arguments = step_of(config, batch)
        loops = [e for e in jax.make_jaxpr(step)(*arguments).eqns if e.primitive.name == "scan"]
        (microbatches,) = [e for e in loops if e.params["length"] == 4]
        shapes = list(quantized_shapes(microbatches.params["jaxpr"].jaxpr))
        activations = [shape for shape in shapes if shape[:2] == (2, 16)]
        return len(activations), len(shapes) - len(activations)

    activations, weights = of_a_microbatch()
    assert activations >= 4 and bool(weights) == (not reused)
    monkeypatch.setattr(train_step, "known_codes", lambda params, arm: None)
    assert of_a_microbatch()[0] == activations and of_a_microbatch()[1] >= 7
