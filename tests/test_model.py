"""The transformer: one module, the same parameters and the same causality in every arm."""

import dataclasses
import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.layers import RMSNorm
from bitnet_jax.matmul import quantized_dot
from bitnet_jax.model import (
    ACTIVATIONS,
    Block,
    Mlp,
    Transformer,
    TransformerConfig,
    init_params,
    linear_kernel,
    unquantized,
)
from bitnet_jax.precision import PRECISIONS, get_precision

CONFIG = TransformerConfig(vocab_size=19, layers=3, width=32, ff_width=48, heads=4, kv_heads=2)
UNTIED = dataclasses.replace(CONFIG, tied_embeddings=False)
TOKENS = np.array([[3, 1, 4, 0, 5, 9, 2, 6], [8, 7, 18, 17, 16, 15, 14, 13]])  # none comes twice
TERNARY, FP16, FP32 = (get_precision(name) for name in ("ternary", "fp16", "fp32"))


SEED = jax.random.key(0)


def shapes_of(config):
    return jax.eval_shape(lambda: init_params(config, FP32, SEED))


@functools.partial(jax.jit, static_argnums=(2, 3))
def apply(params, tokens, config, precision):
    return Transformer(config, precision).apply({"params": params}, tokens)


def logits_of(params, config=CONFIG, precision=FP32, tokens=TOKENS):
    return np.asarray(apply(params, tokens, config, precision))


def loss(params, config, precision):
    logits = Transformer(config, precision).apply({"params": params}, TOKENS)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])


loss_and_gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))


def random_params(config):
    """Kernels of unit gain, embeddings of variance 1/D, norm scales that are not all 1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
        fan_in = leaf.shape[-2] if linear_kernel(path) else config.width
        return rng.normal(scale=fan_in**-0.5, size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(config))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def untied_params():
    return random_params(UNTIED)


def with_kernel(params, group, name, factor):
    """The parameters with one stacked kernel multiplied."""
    kernels = params["blocks"][group]
    kernels = kernels | {name: {"kernel": factor * kernels[name]["kernel"]}}
    return params | {"blocks": params["blocks"] | {group: kernels}}


@pytest.fixture(scope="module")
def wide_arms():
    """Every arm's initial parameters from one seed, large enough for statistics."""
    config = dataclasses.replace(UNTIED, vocab_size=512, width=128, ff_width=256, kv_heads=4)

    @jax.jit
    def init(key):
        return {name: init_params(config, arm, key) for name, arm in PRECISIONS.items()}

    return init(SEED), init(jax.random.key(1))


def test_every_arm_starts_from_the_same_float32_parameters(wide_arms):
    arms, others = wide_arms
    reference = arms["fp32"]
    assert {leaf.dtype for leaf in jax.tree.leaves(reference)} == {jnp.dtype(jnp.float32)}
    for params in arms.values():
        assert jax.tree.structure(params) == jax.tree.structure(reference)
        jax.tree.map(np.testing.assert_array_equal, params, reference)
    assert (np.asarray(others["fp32"]["embedding"]) != np.asarray(reference["embedding"])).all()


def test_parameter_tree():
    """Stacked over layers; grouped-query shapes; no biases; head and norms where they belong."""
    params = shapes_of(UNTIED)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert shapes == {
        "embedding": (19, 32),
        "head": (19, 32),
        "final_norm/scale": (32,),
        "blocks/attention_norm/scale": (3, 32),
        "blocks/mlp_norm/scale": (3, 32),
        "blocks/attention/q/kernel": (3, 32, 32),
        "blocks/attention/k/kernel": (3, 32, 16),
        "blocks/attention/v/kernel": (3, 32, 16),
        "blocks/attention/out/kernel": (3, 32, 32),
        "blocks/attention/sub_norm/scale": (3, 32),
        "blocks/mlp/gate/kernel": (3, 32, 48),
        "blocks/mlp/up/kernel": (3, 32, 48),
        "blocks/mlp/down/kernel": (3, 48, 32),
        "blocks/mlp/sub_norm/scale": (3, 48),
    }
    kernels = [p for p, _ in jax.tree_util.tree_leaves_with_path(params) if linear_kernel(p)]
    assert len(kernels) == 7


def test_options_remove_parameters():
    tied = shapes_of(CONFIG)
    assert set(shapes_of(UNTIED)) - set(tied) == {"head"}
    bare = shapes_of(dataclasses.replace(CONFIG, sub_norms=False))
    for group in ("attention", "mlp"):
        removed = set(tied["blocks"][group]) - set(bare["blocks"][group])
        assert removed == {"sub_norm"}


def test_initial_variances(wide_arms):
    """1/fan_in, over 2L for the two projections into the residual stream; layers differ."""
    params = wide_arms[0]["fp32"]
    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    expected = [(attention[name], 1 / 128) for name in "qkv"]
    expected += [(mlp["gate"], 1 / 128), (mlp["up"], 1 / 128)]
    expected += [(attention["out"], 1 / 128 / 6), (mlp["down"], 1 / 256 / 6)]
    expected = [(module["kernel"], variance) for module, variance in expected]
    expected += [(params["embedding"], 1 / 128), (params["head"], 1 / 128)]
    for kernel, variance in expected:  # 5 standard errors of the smallest, 49k samples
        assert np.var(kernel) == pytest.approx(variance, rel=0.03)
    q = np.asarray(attention["q"]["kernel"])
    assert (q[0] != q[1]).all()


@pytest.mark.parametrize("arm", PRECISIONS)
def test_logits_are_float32_and_near_those_of_fp32(arm, params):
    """Random parameters give logits of order 1; 16 bits move them little, trits much."""
    logits = logits_of(params, precision=get_precision(arm))
    assert logits.dtype == np.float32 and logits.shape == (2, 8, 19)
    error = np.abs(logits - logits_of(params)).max()
    # Of some forty roundings in a row, in the compute dtype.
    bounds = {"fp32": (0, 0), "fp16": (0, 40 * 2**-11), "bf16": (0, 40 * 2**-8)}
    low, high = bounds.get(arm, (0.2, 10))
    assert low <= error <= high


@pytest.mark.parametrize("precision", [TERNARY, FP32], ids=["ternary", "fp32"])
def test_later_tokens_leave_earlier_logits_equal_to_the_bit(precision, params):
    """In the ternary arm too: an activation scale shared by tokens would leak the future."""
    sizes = np.arange(1, 20, dtype=np.float32)[:, None]
    params = params | {"embedding": params["embedding"] * sizes}
    before = logits_of(params, precision=precision)
    after = logits_of(params, precision=precision, tokens=(TOKENS + np.eye(8, dtype=int)[5]) % 19)
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    assert (after[:, 5:] != before[:, 5:]).any(-1).all()


def test_gradients_are_causal(untied_params):
    """Logits at t have a gradient in the embeddings of tokens 0..t, exactly those."""

    @jax.jit
    def embedding_gradient(t):
        def picked(embedding):
            changed = untied_params | {"embedding": embedding}
            return Transformer(UNTIED, FP32).apply({"params": changed}, TOKENS[:1])[0, t, 3]

        return jax.grad(picked)(untied_params["embedding"])

    for t in (0, 3, 7):
        touched = (np.asarray(embedding_gradient(t)) != 0).any(-1)
        assert set(np.flatnonzero(touched)) == set(TOKENS[0, : t + 1])


def reference_logits(params, c, tokens):
    """The whole model in float64 numpy, from the papers' formulas."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    embedding, size = params["embedding"], c.width // c.heads

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_epsilon) * scale["scale"]

    def rotated(x):  # complex numbers: first half real, second half imaginary
        frequencies = c.rope_theta ** (-2 * np.arange(size // 2) / size)
        turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
        turned = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    def attention(p, x):
        q, k, v = ((x @ p[n]["kernel"]).reshape(len(x), -1, size) for n in "qkv")
        k, v = (np.repeat(a, c.heads // c.kv_heads, axis=1) for a in (rotated(k), v))
        scores = np.einsum("tnh,snh->nts", rotated(q), k) / np.sqrt(size)
        weights = np.where(np.tri(len(x), dtype=bool), np.exp(scores), 0)
        y = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
        return norm(y.reshape(x.shape), p["sub_norm"]) @ p["out"]["kernel"]

    def mlp(p, x):
        y = np.maximum(x @ p["gate"]["kernel"], 0) ** 2 * (x @ p["up"]["kernel"])
        return norm(y, p["sub_norm"]) @ p["down"]["kernel"]

    def forward(x):
        for i in range(c.layers):
            p = jax.tree.map(operator.itemgetter(i), params["blocks"])
            x = x + attention(p["attention"], norm(x, p["attention_norm"]))
            x = x + mlp(p["mlp"], norm(x, p["mlp_norm"]))
        return norm(x, params["final_norm"]) @ embedding.T

    return np.stack([forward(embedding[row]) for row in tokens])


def test_fp32_logits_against_numpy(params):
    expected = reference_logits(params, CONFIG, TOKENS)
    np.testing.assert_allclose(logits_of(params), expected, atol=2e-5)  # logits of order 1


@pytest.mark.parametrize("precision", [TERNARY, FP32], ids=["ternary", "fp32"])
def test_scan_equals_a_loop_over_blocks(precision, params):
    """Layers of very different sizes: in the ternary arm a scale for the stack would show."""
    for group, name in [("attention", "q"), ("attention", "out"), ("mlp", "down")]:
        params = with_kernel(params, group, name, np.array([3, 0.2, 1], np.float32)[:, None, None])
    block = jax.jit(lambda layer, x: Block(CONFIG, precision).apply({"params": layer}, x)[0])
    x = params["embedding"][TOKENS]
    for i in range(CONFIG.layers):
        x = block(jax.tree.map(operator.itemgetter(i), params["blocks"]), x)

    @jax.jit
    def head(x):
        x = RMSNorm(CONFIG.norm_epsilon).apply({"params": params["final_norm"]}, x)
        return quantized_dot(x, params["embedding"], unquantized(precision), True)

    looped = head(x)
    scanned = logits_of(params, precision=precision)
    if precision is FP32:
        np.testing.assert_allclose(scanned, looped, atol=1e-5)  # logits of order 1
    else:  # where another order of summation moves a value across a step, a code differs
        assert np.abs(scanned - looped.astype(jnp.float32)).max() < 0.05


def primitives(jaxpr):
    """Names of all primitives of a jaxpr, those of inner ones included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def test_remat_changes_what_is_saved_and_nothing_else(untied_params):
    remat = dataclasses.replace(UNTIED, remat=True)
    plain, again = (loss_and_gradient(untied_params, c, FP32) for c in (UNTIED, remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        a, b = np.asarray(a), np.asarray(b)  # fused differently: float32 rounding, three layers
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * np.abs(a).max())


@pytest.mark.parametrize("remat", [False, True])
def test_only_remat_rematerializes(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    jaxpr = jax.make_jaxpr(jax.grad(loss), static_argnums=(1, 2))(
        shapes_of(config), config, TERNARY
    )
    names = set(primitives(jaxpr.jaxpr))
    assert "scan" in names and bool(names & {"checkpoint", "remat", "remat2"}) == remat


@pytest.mark.parametrize("config, precision", [(CONFIG, TERNARY), (UNTIED, FP32)])
def test_every_parameter_has_a_gradient(config, precision, params, untied_params):
    """Tied: rows of the embedding that no token reads still get the head's gradient."""
    params = params if config.tied_embeddings else untied_params
    _, gradient = loss_and_gradient(params, config, precision)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        leaf = np.asarray(leaf)
        assert leaf.dtype == np.float32 and np.isfinite(leaf).all()
        layers = leaf if path[0].key == "blocks" else leaf[None]
        assert (np.abs(layers).max(axis=tuple(range(1, layers.ndim))) > 0).all(), path
    unread = np.asarray(gradient["embedding"])[[10, 11, 12]]
    assert unread.any() == config.tied_embeddings


def test_tied_head_is_the_embedding(params):
    """An untied model whose head is a copy of its embedding gives the tied model's logits."""
    copied = params | {"head": params["embedding"]}
    np.testing.assert_array_equal(logits_of(copied, UNTIED), logits_of(params, CONFIG))
    moved = params | {"head": 2 * params["embedding"]}
    np.testing.assert_allclose(logits_of(moved, UNTIED), 2 * logits_of(params), rtol=1e-6)


@pytest.mark.parametrize("group, name", [("attention", "v"), ("mlp", "up"), ("mlp", "gate")])
def test_ternary_logits_ignore_the_scale_of_kernels_before_a_sub_norm(group, name, params):
    """To the bit, with powers of two (exact in every dtype) and no epsilon in the norms."""
    config = dataclasses.replace(CONFIG, norm_epsilon=0.0)
    factor = np.array([4, 0.25, 64], np.float32)[:, None, None]
    changed = logits_of(with_kernel(params, group, name, factor), config, TERNARY)
    np.testing.assert_array_equal(changed, logits_of(params, config, TERNARY))


@pytest.mark.parametrize("group, name", [("attention", "out"), ("mlp", "down"), ("attention", "q")])
def test_ternary_logits_do_depend_on_the_scale_of_other_kernels(group, name, params):
    changed = logits_of(with_kernel(params, group, name, 4.0), precision=TERNARY)
    assert np.abs(changed - logits_of(params, precision=TERNARY)).max() > 0.01


def mlp_kernels():
    rng = np.random.default_rng(0)
    shapes = {"gate": (32, 48), "up": (32, 48), "down": (48, 32)}
    return {n: {"kernel": rng.normal(size=s).astype(np.float32) / 6} for n, s in shapes.items()}


def test_squared_gates_beyond_float16_stay_finite():
    """gate = 300, whose square is 90000: more than float16's 65504."""
    x = np.ones((1, 2, 32), np.float32)
    params = mlp_kernels() | {"sub_norm": {"scale": np.ones(48, np.float32)}}
    params["gate"] = {"kernel": np.full((32, 48), 300 / 32, np.float32)}

    @jax.jit
    @jax.value_and_grad
    def total(params):
        return Mlp(CONFIG, FP16).apply({"params": params}, x).astype(jnp.float32).sum()

    value, gradient = total(params)
    assert np.isfinite(value) and value != 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_activations_and_the_gate():
    """down(act(gate(x)) * up(x)), and not with gate and up exchanged."""
    x = np.array([-2.0, 0.0, 3.0], np.float32)
    np.testing.assert_array_equal(ACTIVATIONS["relu2"](x), [0, 0, 9])
    np.testing.assert_allclose(ACTIVATIONS["silu"](x), x / (1 + np.exp(-x)), rtol=1e-6)
    config = dataclasses.replace(CONFIG, sub_norms=False)
    x = np.random.default_rng(1).normal(size=(1, 4, 32)).astype(np.float32)
    params = mlp_kernels()
    gate, up, down = (params[name]["kernel"].astype(np.float64) for name in params)
    expected = (np.maximum(x @ gate, 0) ** 2 * (x @ up)) @ down
    y = jax.jit(Mlp(config, FP32).apply)({"params": params}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)  # values of order 1


def test_unquantized_keeps_the_dtype_alone():
    arm = unquantized(TERNARY)
    assert not arm.quantized and arm.compute_dtype == jnp.bfloat16
    assert isinstance(Transformer(CONFIG, arm), nn.Module)
