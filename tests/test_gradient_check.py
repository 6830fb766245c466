"""The cosine between an estimator's gradient and differences: by brute force, and its extremes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import estimators
from bitnet_jax.gradient_check import estimator_cosine
from bitnet_jax.granularity import Granularity
from bitnet_jax.loss import cross_entropy
from bitnet_jax.model import TransformerConfig, apply_model, init_params, linear_layers
from bitnet_jax.optim import OptimizerConfig
from bitnet_jax.precision import Precision
from bitnet_jax.train_step import StepConfig

# Compiling takes longest here: half as long without LLVM's optimizations.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MODEL = TransformerConfig(
    vocab_size=7, layers=2, width=4, ff_width=4, heads=2, kv_heads=1, norms="pre"
)
WEIGHTS = 2 * (2 * 16 + 2 * 8 + 3 * 16)
TOKENS = np.random.default_rng(0).integers(0, 7, (4, 9))
FINE = Precision("fine", "int8_absmax")
COARSE = Precision("coarse", "ternary_absmean", granularity=Granularity("shard", 2))


SMOOTH = dataclasses.replace(MODEL, width=16, ff_width=16, activation="silu")


def cosine(precision, params, sample=20, seed=3, model=MODEL, **changes):
    config = StepConfig(model, precision, OptimizerConfig(), **changes)
    return estimator_cosine(config, sample, params, TOKENS, seed)


@functools.cache
def random_params(model=MODEL):
    """Kernels of unit gain; norm scales that are not all 1."""
    shapes = jax.eval_shape(lambda: init_params(model, FINE, jax.random.key(0)))
    rng = np.random.default_rng(1)

    def draw(path, x):
        if path[-1].key == "scale":
            values = rng.uniform(0.5, 2, x.shape)
        else:
            values = rng.normal(size=x.shape) * (1 if x.ndim == 2 else x.shape[1] ** -0.5)
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def cosine_by_brute_force(chosen):
    """Of the coarse arm, at these weights in the order of names, blocks, inputs and outputs."""
    arm = dataclasses.replace(COARSE, compute_dtype=jnp.float32)
    params = random_params()

    def loss(params):
        logits = apply_model(MODEL, arm, params, TOKENS[:, :-1])
        return cross_entropy(logits, TOKENS[:, 1:])[0].mean()

    value, gradients = jit(loss), linear_layers(jit(jax.grad(loss))(params))
    places = [
        (name, place)
        for name, layer in sorted(linear_layers(params).items())
        for place in np.ndindex(layer["kernel"].shape)
    ]
    assert len(places) == WEIGHTS
    estimated, measured = [], []
    for name, place in (places[i] for i in chosen):
        group, projection = name.split("/")
        blocks = params["blocks"]
        kernel = np.asarray(blocks[group][projection]["kernel"])
        axis = 0 if projection in ("out", "down") else 1  # along which its shards lie
        halves = np.split(np.abs(kernel[place[0]]), 2, axis=axis)
        step = halves[place[1 + axis] // halves[0].shape[axis]].mean()
        losses = []
        for sign in (1, -1):
            moved = kernel.copy()
            moved[place] += sign * step
            changed = blocks | {group: blocks[group] | {projection: {"kernel": moved}}}
            losses.append(float(value(params | {"blocks": changed})))
        measured.append((losses[0] - losses[1]) / (2 * step))
        estimated.append(float(gradients[name]["kernel"][place]))
    return np.dot(estimated, measured) / np.linalg.norm(estimated) / np.linalg.norm(measured)


def test_against_brute_force():
    """At weights that the seed draws from all; in 32 bits, though the arm computes in 16."""
    chosen = np.random.default_rng(3).choice(WEIGHTS, size=20, replace=False)
    found = cosine(COARSE, random_params(), sample=20, seed=3)
    assert found == pytest.approx(cosine_by_brute_force(chosen), abs=1e-5)
    assert abs(found) < 0.97
    assert cosine(COARSE, random_params(), sample=20, seed=3) == found
    assert abs(cosine(COARSE, random_params(), sample=20, seed=4) - found) > 0.01


def test_a_sample_is_without_repetition_and_at_most_all_weights():
    """All weights are the same weights whatever the seed."""
    everything = cosine(COARSE, random_params(), sample=WEIGHTS, seed=0)
    for sample, seed in [(WEIGHTS, 1), (10 * WEIGHTS, 2)]:
        assert cosine(COARSE, random_params(), sample, seed) == pytest.approx(everything, abs=1e-5)


def fine_cosine(precision):
    """Of 40 weights, none of which is a kernel's largest: that one moves the scale of all."""
    params, seed = random_params(SMOOTH), 1
    kernels = [np.abs(layer["kernel"]) for _, layer in sorted(linear_layers(params).items())]
    largest = np.concatenate([np.ravel(k == k.max((1, 2), keepdims=True)) for k in kernels])
    chosen = np.random.default_rng(seed).choice(largest.size, size=40, replace=False)
    assert largest.sum() == 14 and not largest[chosen].any()
    return cosine(precision, params, sample=40, seed=seed, model=SMOOTH)


def test_where_the_loss_is_smooth_on_the_scale_of_a_step_the_estimator_is_right():
    assert fine_cosine(FINE) > 0.999


def test_a_gradient_that_is_mostly_masked_is_found_out(monkeypatch):
    """The other name keeps the compiled program of the honest estimator from being used."""
    honest = fine_cosine(FINE)

    def mask(estimator, quantizer, x, q):
        return None if quantizer.reach is None else jnp.abs(q.codes) > 60

    monkeypatch.setattr(estimators, "passes", mask)
    masked = fine_cosine(dataclasses.replace(FINE, name="masked"))
    assert masked < honest - 0.2


def test_kernels_stored_in_bfloat16():
    """The same as for the values that they hold, in float32."""
    params = random_params()

    def stored(dtype):
        blocks = {
            group: {
                name: {"kernel": layer["kernel"].astype(jnp.bfloat16).astype(dtype)}
                if "kernel" in layer
                else layer
                for name, layer in layers.items()
            }
            if group in ("attention", "mlp")
            else layers
            for group, layers in params["blocks"].items()
        }
        return params | {"blocks": blocks}

    narrow, wide = (cosine(COARSE, stored(dtype)) for dtype in (jnp.bfloat16, jnp.float32))
    assert narrow == pytest.approx(wide, abs=1e-5)


def test_the_deployed_model_is_what_is_checked():
    """Neither a quantization that is still warming up nor the noise of training is in it."""
    drawing = dataclasses.replace(COARSE, estimator="stochastic", compute_dtype=jnp.float16)
    found = cosine(drawing, random_params(), warming=True)
    assert found == pytest.approx(cosine(COARSE, random_params()), abs=1e-5)
