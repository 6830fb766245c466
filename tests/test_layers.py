"""BitLinear, RMSNorm and rotary positions."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_latents import quantized_shapes

from bitnet_jax.granularity import Granularity
from bitnet_jax.hadamard import rotate_hadamard
from bitnet_jax.layers import BitLinear, RMSNorm, bit_linears, rotary_angles, rotate
from bitnet_jax.matmul import DEPLOYED, Context, quantized_dot
from bitnet_jax.precision import get_precision

# Compiling takes longest here: half as long without LLVM's optimizations.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


product = jit(quantized_dot, static_argnums=(4, 5))
NORMAL = jax.nn.initializers.normal()


@pytest.mark.parametrize("arm", ["ternary", "fp16"])
def test_bit_linear_is_the_quantized_product_of_a_float32_master(arm):
    precision, x = get_precision(arm), gaussian(2, 5, 12)
    layer = BitLinear(12, 7, precision, NORMAL)
    params = jit(layer.init)(jax.random.key(0), x)["params"]
    assert {name: (p.shape, p.dtype) for name, p in params.items()} == {
        "kernel": ((12, 7), jnp.float32)  # and no bias
    }
    y = jit(layer.apply)({"params": params}, x)
    np.testing.assert_array_equal(y, product(x, params["kernel"], None, DEPLOYED, precision))


@pytest.mark.parametrize("arm", ["ternary", "fp32"])
def test_bit_linear_normalises_then_rotates_then_quantizes(arm):
    """Its norm's scales are not all 1, so that norm and rotation do not commute."""
    precision = get_precision(arm, rotate=True)
    x, scale = 3 * gaussian(2, 5, 12), np.linspace(0.2, 2, 12, dtype=np.float32)
    layer = BitLinear(12, 7, precision, NORMAL, residual=True, norm_epsilon=1e-2)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    assert shapes["norm"]["scale"].shape == (12,) and set(shapes) == {"kernel", "norm"}
    params = {"kernel": gaussian(12, 7, seed=1), "norm": {"scale": scale}}
    y = jit(layer.apply)({"params": params}, x)
    inputs = rotate_hadamard(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-2) * scale)
    expected = product(inputs, params["kernel"], None, DEPLOYED, precision)
    # In the ternary arm a rounding may move one of 12 activations to the next of 256 levels.
    bound = 1e-5 if arm == "fp32" else 0.1
    np.testing.assert_allclose(y.astype(np.float32), expected.astype(np.float32), atol=bound)
    assert np.abs(np.asarray(expected, np.float32)).max() > 2


def test_only_layers_that_add_to_the_residual_stream_rotate_and_only_where_the_arm_does():
    x, params = gaussian(2, 5, 12), {"kernel": gaussian(12, 7, seed=1)}

    def output(rotate, residual):
        layer = BitLinear(12, 7, get_precision("fp32", rotate=rotate), NORMAL, residual)
        return np.asarray(jit(layer.apply)({"params": params}, x))

    plain = output(False, False)
    np.testing.assert_array_equal(output(True, False), plain)
    np.testing.assert_array_equal(output(False, True), plain)
    np.testing.assert_allclose(output(True, True), rotate_hadamard(x) @ params["kernel"], atol=1e-5)
    assert np.abs(output(True, True) - plain).max() > 1


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind, size", [("tensor", 1), ("channel", 1), ("group", 4), ("shard", 2)])
def test_a_learned_step_starts_where_its_rule_says_and_is_what_the_product_uses(
    kind, size, residual
):
    """LSQ: 2 mean|w| of every block that shares a step."""
    precision = get_precision("ternary", weights="ternary_lsq", granularity=Granularity(kind, size))
    layer, x = BitLinear(12, 6, precision, NORMAL, residual), gaussian(3, 12)
    params = jit(layer.init)(jax.random.key(0), x)["params"]
    w = np.abs(np.asarray(params["kernel"], np.float64))
    expected = {
        "tensor": lambda: w.mean().reshape(1, 1, 1),
        "channel": lambda: w.mean(0).reshape(1, 1, 6),
        "group": lambda: w.reshape(3, 4, 6).mean(1, keepdims=True),
        "shard": lambda: (
            w.reshape(2, 6, 6).mean((1, 2)).reshape(2, 1, 1)
            if residual
            else w.reshape(12, 2, 3).mean((0, 2)).reshape(1, 1, 2, 1)
        ),
    }[kind]()
    assert set(params) == {"kernel", "step"} and params["step"].dtype == jnp.float32
    assert params["step"].shape == expected.shape
    np.testing.assert_allclose(params["step"], 2 * expected, rtol=1e-6)
    moved = params | {"step": 1.5 * params["step"]}
    y = jit(layer.apply)({"params": moved}, x)
    used = product(x, params["kernel"], moved["step"], DEPLOYED, precision, residual)
    np.testing.assert_array_equal(y, used)
    assert (y != jit(layer.apply)({"params": params}, x)).any()


def test_strength_and_noise_reach_the_product():
    arm = dataclasses.replace(get_precision("ternary", estimator="stochastic"), name="drawing")
    layer, x, params = BitLinear(12, 7, arm, NORMAL), gaussian(3, 12), {"kernel": gaussian(12, 7)}
    run = jit(lambda s, rngs: layer.apply({"params": params}, x, s, rngs=rngs))
    half = jnp.float32(0.5)
    weaker = product(x, params["kernel"], None, Context(half), arm)
    np.testing.assert_array_equal(run(half, {}), weaker)
    nearest = product(x, params["kernel"], None, DEPLOYED, arm)
    np.testing.assert_array_equal(run(None, {}), nearest)
    drawn, again, other = (run(None, {"rounding": jax.random.key(i)}) for i in (0, 0, 1))
    np.testing.assert_array_equal(drawn, again)
    assert (drawn != nearest).any() and (drawn != other).any()


class Layers(nn.Module):
    """Three layers of one input; `together` or each by itself."""

    fields: tuple
    together: bool

    @nn.compact
    def __call__(self, x, strength=None):
        layers = [
            BitLinear(12, 5 + i, get_precision(arm), NORMAL, residual, epsilon, name=f"layer{i}")
            for i, (arm, residual, epsilon) in enumerate(self.fields)
        ]
        if self.together:
            return bit_linears(layers, x, strength)
        return [layer(x, strength) for layer in layers]


@pytest.mark.parametrize("strength", [None, 0.4])
@pytest.mark.parametrize(
    "fields",
    [
        3 * (("ternary", False, None),),
        3 * (("ternary", False, 1e-2),),  # norms inside: three inputs
        (("ternary", False, None), ("ternary", True, None), ("ternary", False, 1e-2)),
    ],
    ids=["plain", "inside", "mixed"],
)
def test_layers_of_one_input_are_as_many_layers(fields, strength):
    """To the bit, whether their input can be shared or not."""
    x = 3 * gaussian(2, 4, 12)
    strength = None if strength is None else np.float32(strength)
    shapes = jax.eval_shape(Layers(fields, False).init, jax.random.key(0), x)
    params = jax.tree.map(lambda s: np.abs(gaussian(*s.shape, seed=s.size)) + 0.1, shapes)
    ours, each = (jit(Layers(fields, t).apply)(params, x, strength) for t in (True, False))
    for a, b, width in zip(ours, each, (5, 6, 7), strict=True):
        assert a.shape == (2, 4, width)
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


@pytest.mark.parametrize("epsilon, inputs", [(None, 1), (1e-2, 3)])
def test_one_input_is_quantized_once_but_three_are_not(epsilon, inputs):
    """By the int8 arrays that the program makes of floats: inputs, and three kernels."""
    fields = 3 * (("ternary", False, epsilon),)
    x = gaussian(2, 4, 12)
    params = jax.eval_shape(Layers(fields, True).init, jax.random.key(0), x)
    program = jax.make_jaxpr(Layers(fields, True).apply)(params, x)
    shapes = list(quantized_shapes(program.jaxpr))
    assert shapes.count(x.shape) == inputs and len(shapes) == inputs + 3


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_rms_norm_against_numpy(dtype):
    """Computed in float32 whatever comes in: 300^2 alone would overflow float16."""
    x, scale = (300 * gaussian(2, 3, 16)).astype(dtype), gaussian(16, seed=1)
    y = jit(RMSNorm(1e-2).apply)({"params": {"scale": scale}}, x)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-2) * scale
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_rms_norm_epsilon_is_inside_the_root():
    """Of a constant 3 with epsilon 7: 3 / sqrt(9 + 7). Zeros stay zeros, gradients finite."""
    norm = RMSNorm(7.0)
    params = norm.init(jax.random.key(0), np.zeros((1, 4), np.float32))
    np.testing.assert_array_equal(params["params"]["scale"], np.ones(4))
    np.testing.assert_allclose(norm.apply(params, np.full((1, 4), 3.0)), np.full((1, 4), 0.75))
    gradient = jit(jax.grad(lambda x: norm.apply(params, x).sum()))(jnp.zeros((1, 4)))
    np.testing.assert_allclose(gradient, np.full((1, 4), 7**-0.5), rtol=1e-6)


def test_rotary_angles_known_values():
    """H = 4, theta = 100: frequencies 1 and 1/10 radians a position."""
    cos, sin = rotary_angles(3, 4, 100.0)
    angles = np.array([[0, 0], [1, 0.1], [2, 0.2]])
    for half, sign in ((0, -1), (1, 1)):
        np.testing.assert_allclose(cos[:, half], np.cos(angles), rtol=1e-6)
        np.testing.assert_allclose(sin[:, half], sign * np.sin(angles), rtol=1e-6)
    assert cos.dtype == sin.dtype == np.float32


def test_rotate_is_llamas_half_split_formula():
    """x cos + rotate_half(x) sin, with rotate_half([a, b]) = [-b, a] and angles repeated."""
    x = gaussian(2, 9, 3, 8)
    frequencies = 1 / 500.0 ** (np.arange(0, 8, 2) / 8)
    angles = np.tile(np.arange(9)[:, None] * frequencies, 2)[None, :, None]
    rotated_half = np.concatenate([-x[..., 4:], x[..., :4]], -1)
    expected = x * np.cos(angles) + rotated_half * np.sin(angles)
    np.testing.assert_allclose(rotate(x, rotary_angles(9, 8, 500.0)), expected, atol=1e-6)


def test_rotation_keeps_norms_and_the_first_position():
    x = gaussian(2, 9, 3, 8)
    y = np.asarray(rotate(x, rotary_angles(9, 8, 500.0)))
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    norms = np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), norms, rtol=1e-6)
    assert (np.abs(y[:, 1:] - x[:, 1:]).max(-1) > 1e-2).all()


def test_scores_depend_on_relative_positions_alone():
    """The same q and k at every position: q_i . k_j is constant along diagonals, not across."""
    q, k = (np.tile(gaussian(1, 1, 1, 16, seed=s), (1, 12, 1, 1)) for s in (1, 2))
    angles = rotary_angles(12, 16, 500.0)
    q, k = (np.asarray(rotate(a, angles), np.float64)[0, :, 0] for a in (q, k))
    scores = q @ k.T
    for offset in range(-11, 12):
        diagonal = np.diagonal(scores, offset)
        np.testing.assert_allclose(diagonal, np.full_like(diagonal, diagonal[0]), atol=1e-5)
    assert np.ptp(scores[0]) > 0.1 and abs(scores[0, 3] - scores[3, 0]) > 1e-2


def test_rotate_computes_in_float32_and_keeps_the_dtype():
    x = jnp.asarray(gaussian(1, 5, 2, 8), jnp.bfloat16)
    angles = rotary_angles(5, 8, 500.0)
    y = rotate(x, angles)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, rotate(x.astype(jnp.float32), angles).astype(jnp.bfloat16))
