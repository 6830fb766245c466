"""The transformer: one module, the same parameters and the same causality in every arm."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.granularity import Granularity
from bitnet_jax.hadamard import factors, hadamard_matrix
from bitnet_jax.layers import RMSNorm
from bitnet_jax.matmul import Context, plain_dot
from bitnet_jax.model import (
    ACTIVATIONS,
    Block,
    Mlp,
    TransformerConfig,
    apply_model,
    init_params,
    linear_kernel,
    linear_layers,
)
from bitnet_jax.precision import PRECISIONS, Precision, get_precision

CONFIG = TransformerConfig(vocab_size=19, layers=3, width=32, ff_width=48, heads=4, kv_heads=2)
UNTIED = dataclasses.replace(CONFIG, tied_embeddings=False)
TOKENS = np.array([[3, 1, 4, 0, 5, 9, 2, 6], [8, 7, 18, 17, 16, 15, 14, 13]])  # none comes twice
TERNARY, FP16, FP32 = (get_precision(name) for name in ("ternary", "fp16", "fp32"))
# Computed in float32, whose rounding does not hide what a quantizer does.
WIDE = Precision("wide", "ternary_absmean", "int8_absmax", compute_dtype=jnp.float32)
LEARNED = Precision("learned", "ternary_lsq", compute_dtype=jnp.float32)
CHANNEL_STEPS = dataclasses.replace(LEARNED, granularity=Granularity("channel"))
SEED = jax.random.key(0)
# Compiling takes longer than running these models: half as long without LLVM's optimizations.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def shapes_of(config, precision=FP32):
    return jax.eval_shape(lambda: init_params(config, precision, SEED))


@functools.partial(jit, static_argnums=(2, 3))
def apply(params, tokens, config, precision, strength=None, key=None):
    return apply_model(config, precision, params, tokens, Context(strength, key))


def logits_of(params, config=CONFIG, precision=FP32, tokens=TOKENS, strength=None, key=None):
    strength = None if strength is None else np.float32(strength)
    return np.asarray(apply(params, tokens, config, precision, strength, key))


def loss(params, config, precision):
    logits = apply_model(config, precision, params, TOKENS)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])


loss_and_gradient = jit(jax.value_and_grad(loss), static_argnums=(1, 2))


def random_params(config, precision=FP32):
    """Kernels of unit gain, embeddings of variance 1/D, norm scales that are not all 1.

    Learned steps are near a kernel's size and not what its rule would give.
    """
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "step"):
            size = 1 if path[-1].key == "scale" else config.width**-0.5
            return size * rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
        fan_in = leaf.shape[-2] if linear_kernel(path) else config.width
        return rng.normal(scale=fan_in**-0.5, size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(config, precision))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def untied_params():
    return random_params(UNTIED)


def with_kernel(params, group, name, factor):
    """The parameters with one stacked kernel multiplied."""
    kernels = params["blocks"][group]
    kernels = kernels | {name: kernels[name] | {"kernel": factor * kernels[name]["kernel"]}}
    return params | {"blocks": params["blocks"] | {group: kernels}}


@pytest.fixture(scope="module")
def wide_arms():
    """Every arm's initial parameters from one seed, large enough for statistics; and a learned."""
    config = dataclasses.replace(UNTIED, vocab_size=512, width=128, ff_width=256, kv_heads=4)

    @jit
    def init(key):
        arms = PRECISIONS | {"learned": CHANNEL_STEPS}
        return {name: init_params(config, arm, key) for name, arm in arms.items()}

    return init(SEED), init(jax.random.key(1))


def test_every_arm_starts_from_the_same_float32_parameters(wide_arms):
    arms, others = wide_arms
    reference = arms["fp32"]
    assert {leaf.dtype for leaf in jax.tree.leaves(reference)} == {jnp.dtype(jnp.float32)}
    for name in PRECISIONS:
        params = arms[name]
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


def paths_of(config, precision=FP32):
    leaves = jax.tree_util.tree_leaves_with_path(shapes_of(config, precision))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}


def test_options_change_the_tree_where_they_should():
    sub = paths_of(CONFIG)
    assert paths_of(UNTIED).keys() - sub.keys() == {"head"}
    pre = paths_of(dataclasses.replace(CONFIG, norms="pre"))
    assert sub.keys() - pre.keys() == {
        "blocks/attention/sub_norm/scale",
        "blocks/mlp/sub_norm/scale",
    }
    inside = paths_of(dataclasses.replace(CONFIG, norms="inside"))
    kernels = {path: shape for path, shape in sub.items() if path.endswith("kernel")}
    norms = {path.replace("kernel", "norm/scale"): s[:2] for path, s in kernels.items()}
    rest = {path: sub[path] for path in ("embedding", "final_norm/scale")}
    assert inside == kernels | norms | rest
    ungated = paths_of(dataclasses.replace(CONFIG, gated=False))
    assert ungated == {path: s for path, s in sub.items() if path != "blocks/mlp/gate/kernel"}


def test_learned_steps_are_added_beside_equal_kernels(wide_arms):
    """One for each scale, stacked over blocks; and the initial kernels do not notice."""
    plain = paths_of(CONFIG)
    steps = {
        path.replace("kernel", "step"): (3, 1, 1, shape[2])
        for path, shape in plain.items()
        if path.endswith("kernel")
    }
    assert len(steps) == 7 and paths_of(CONFIG, CHANNEL_STEPS) == plain | steps
    found, expected = wide_arms[0]["learned"], wide_arms[0]["fp32"]
    for name, layer in linear_layers(expected).items():
        learned = linear_layers(found)[name]
        np.testing.assert_array_equal(learned["kernel"], layer["kernel"])
        rule = 2 * np.abs(layer["kernel"]).mean(1)[:, None, None]
        np.testing.assert_allclose(learned["step"], rule, rtol=1e-6)
    np.testing.assert_array_equal(found["embedding"], expected["embedding"])


def test_linear_layers_are_the_kernels_by_name(params):
    layers = linear_layers(params)
    attention = [f"attention/{name}" for name in ("q", "k", "v", "out")]
    assert sorted(layers) == sorted(attention + ["mlp/gate", "mlp/up", "mlp/down"])
    assert layers["mlp/up"] is params["blocks"]["mlp"]["up"]
    inside = random_params(dataclasses.replace(CONFIG, norms="inside"))
    assert sorted(linear_layers(inside)) == sorted(layers)
    assert set(linear_layers(inside)["mlp/up"]) == {"kernel", "norm"}


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

    @jit
    def embedding_gradient(t):
        def picked(embedding):
            changed = untied_params | {"embedding": embedding}
            return apply_model(UNTIED, FP32, changed, TOKENS[:1])[0, t, 3]

        return jax.grad(picked)(untied_params["embedding"])

    for t in (0, 3, 7):
        touched = (np.asarray(embedding_gradient(t)) != 0).any(-1)
        assert set(np.flatnonzero(touched)) == set(TOKENS[0, : t + 1])


def reference_logits(params, c, tokens, arm=FP32, strength=1.0):
    """The whole model in float64 numpy, from the papers' formulas; activations unquantized."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    embedding, size = params["embedding"], c.width // c.heads

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_epsilon) * scale["scale"]

    def cut(w, residual):
        """The parts of a kernel that share a scale."""
        kind, parts = arm.granularity.kind, arm.granularity.size
        return np.split(w, parts, axis=0 if residual else 1) if kind == "shard" else [w]

    def kernel_of(layer, residual):
        w = layer["kernel"]
        if arm.weights == "none":
            return w
        if arm.weights == "ternary_lsq":
            step = layer["step"].item()
            hat = step * np.clip(np.round(w / step), -1, 1)
        else:
            assert arm.weights == "ternary_absmean"
            parts = [(part, np.abs(part).mean()) for part in cut(w, residual)]
            hat = [s * np.clip(np.round(part / s), -1, 1) for part, s in parts]
            hat = np.concatenate(hat, axis=0 if residual else 1)
        return w + strength * (hat - w)

    def linear(p, name, x):
        residual = name in ("out", "down")
        if c.norms == "inside":
            x = norm(x, p[name]["norm"])
        if residual and arm.rotate:
            dense = functools.reduce(np.kron, map(hadamard_matrix, factors(x.shape[-1])))
            x = x @ dense / np.sqrt(x.shape[-1])
        return x @ kernel_of(p[name], residual)

    def rotated(x):  # complex numbers: first half real, second half imaginary
        frequencies = c.rope_theta ** (-2 * np.arange(size // 2) / size)
        turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
        turned = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    def activation(x):
        return np.maximum(x, 0) ** 2 if c.activation == "relu2" else x / (1 + np.exp(-x))

    def attention(p, x):
        q, k, v = (linear(p, n, x).reshape(len(x), -1, size) for n in "qkv")
        k, v = (np.repeat(a, c.heads // c.kv_heads, axis=1) for a in (rotated(k), v))
        scores = np.einsum("tnh,snh->nts", rotated(q), k) / np.sqrt(size)
        weights = np.where(np.tri(len(x), dtype=bool), np.exp(scores), 0)
        y = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
        y = y.reshape(x.shape)
        return linear(p, "out", norm(y, p["sub_norm"]) if c.norms == "sub" else y)

    def mlp(p, x):
        y = linear(p, "up", x)
        y = activation(linear(p, "gate", x)) * y if c.gated else activation(y)
        return linear(p, "down", norm(y, p["sub_norm"]) if c.norms == "sub" else y)

    def forward(x):
        for i in range(c.layers):
            p = jax.tree.map(operator.itemgetter(i), params["blocks"])
            for group, function in (("attention", attention), ("mlp", mlp)):
                normed = x if c.norms == "inside" else norm(x, p[group + "_norm"])
                x = x + function(p[group], normed)
        head = embedding if c.tied_embeddings else params["head"]
        return norm(x, params["final_norm"]) @ head.T

    return np.stack([forward(embedding[row]) for row in tokens])


SHARDS = dataclasses.replace(
    WIDE, name="shards", activations="none", granularity=Granularity("shard", 2)
)
# Each option in two company: a model's shape and an arm that computes in float32.
VARIANTS = {
    "sub": ({}, FP32),
    "pre-silu-untied": (
        {"norms": "pre", "activation": "silu", "tied_embeddings": False},
        FP32,
    ),
    "inside": ({"norms": "inside"}, FP32),
    "sub-ungated-silu": ({"gated": False, "activation": "silu"}, FP32),
    "pre-ungated": ({"norms": "pre", "gated": False}, FP32),
    "inside-ungated-silu": (
        {"norms": "inside", "gated": False, "activation": "silu"},
        FP32,
    ),
    "sub-rotated": ({}, dataclasses.replace(FP32, rotate=True)),
    "inside-rotated-learned": ({"norms": "inside"}, dataclasses.replace(LEARNED, rotate=True)),
    "pre-learned": ({"norms": "pre"}, LEARNED),
    "sub-shards": ({}, SHARDS),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_against_numpy(name):
    changes, arm = VARIANTS[name]
    config = dataclasses.replace(CONFIG, **changes)
    params = random_params(config, arm)
    expected = reference_logits(params, config, TOKENS, arm)
    assert 0.3 < expected.std() < 5
    np.testing.assert_allclose(logits_of(params, config, arm), expected, atol=1e-4)


@pytest.mark.parametrize("arm", [LEARNED, SHARDS], ids=lambda arm: arm.name)
def test_half_the_strength_is_half_the_way_in_every_layer(arm):
    params = random_params(CONFIG, arm)
    for strength in (0.5, 1.0):
        expected = reference_logits(params, CONFIG, TOKENS, arm, strength)
        found = logits_of(params, CONFIG, arm, strength=strength)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"norms": "inside", "gated": False}])
def test_without_strength_the_model_is_the_unquantized_one(changes):
    """Also the activations; a layer that did not hear of it would be off by its trits."""
    config = dataclasses.replace(CONFIG, **changes)
    arm = dataclasses.replace(WIDE, rotate=True)
    params = random_params(config)
    plain = logits_of(params, config, dataclasses.replace(FP32, rotate=True))
    np.testing.assert_allclose(logits_of(params, config, arm, strength=0), plain, atol=1e-5)
    assert np.abs(logits_of(params, config, arm, strength=1) - plain).max() > 0.2


@pytest.mark.parametrize("precision", [TERNARY, FP32, LEARNED], ids=lambda arm: arm.name)
def test_scan_equals_a_loop_over_blocks(precision):
    """Layers of very different sizes: in the ternary arm a scale for the stack would show."""
    params = random_params(CONFIG, precision)
    for group, name in [("attention", "q"), ("attention", "out"), ("mlp", "down")]:
        params = with_kernel(params, group, name, np.array([3, 0.2, 1], np.float32)[:, None, None])
    block = jit(lambda layer, x: Block(CONFIG, precision).apply({"params": layer}, x, None)[0])
    x = params["embedding"][TOKENS]
    for i in range(CONFIG.layers):
        x = block(jax.tree.map(operator.itemgetter(i), params["blocks"]), x)

    @jit
    def head(x):
        x = RMSNorm(CONFIG.norm_epsilon).apply({"params": params["final_norm"]}, x)
        return plain_dot(x, params["embedding"], precision)

    looped = head(x)
    scanned = logits_of(params, precision=precision)
    if precision is not TERNARY:
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
@pytest.mark.parametrize("arm", [TERNARY, FP32])
def test_no_product_is_made_twice_but_under_remat(arm, remat):
    """A block has 7 linear layers of 3 products each; attention has 2 forward and 4 backward; the
    head has 3. Norms and activations are made again from what is saved, products are not."""
    config = dataclasses.replace(CONFIG, remat=remat)
    jaxpr = jax.make_jaxpr(jax.grad(loss), static_argnums=(1, 2))(shapes_of(config), config, arm)
    products = sum(name == "dot_general" for name in primitives(jaxpr.jaxpr))
    assert products > 30 if remat else products == 30


@pytest.mark.parametrize(
    "changes, precision",
    [
        ({}, TERNARY),
        ({"tied_embeddings": False}, FP32),
        ({"norms": "inside", "gated": False}, LEARNED),
    ],
    ids=["ternary", "untied-fp32", "inside-ungated-learned"],
)
def test_every_parameter_has_a_gradient(changes, precision):
    """Tied: rows of the embedding that no token reads still get the head's gradient."""
    config = dataclasses.replace(CONFIG, **changes)
    params = random_params(config, precision)
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

    @jit
    @jax.value_and_grad
    def total(params):
        return Mlp(CONFIG, FP16).apply({"params": params}, x, None).astype(jnp.float32).sum()

    value, gradient = total(params)
    assert np.isfinite(value) and value != 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_activations():
    x = np.array([-2.0, 0.0, 3.0], np.float32)
    np.testing.assert_array_equal(ACTIVATIONS["relu2"](x), [0, 0, 9])
    np.testing.assert_allclose(ACTIVATIONS["silu"](x), x / (1 + np.exp(-x)), rtol=1e-6)


# Stochastic rounding


DRAWING = dataclasses.replace(WIDE, estimator="stochastic", activation_estimator="stochastic")
SHALLOW = dataclasses.replace(UNTIED, layers=2, gated=False)


def drawn(params, keys):
    """Logits under each of the keys."""
    return np.stack([logits_of(params, SHALLOW, DRAWING, key=key) for key in keys])


def test_stochastic_rounding_draws_by_the_key_and_only_with_one():
    """Without a key, as in evaluation, the arm is the one that rounds to nearest, to the bit."""
    params = random_params(SHALLOW)
    nearest = logits_of(params, SHALLOW, WIDE)
    np.testing.assert_array_equal(logits_of(params, SHALLOW, DRAWING), nearest)
    same, again, other = drawn(params, [jax.random.key(seed) for seed in (0, 0, 1)])
    np.testing.assert_array_equal(same, again)
    for a, b in [(same, nearest), (same, other)]:
        assert np.abs(a - b).max() > 0.05


def test_blocks_draw_independently():
    """Two equal blocks that hardly move the residual stream: their noises add as variances.

    The same draw in both would give four times a single block's variance, not twice.
    """
    params = random_params(SHALLOW)
    params["blocks"] = jax.tree.map(lambda w: np.stack([w[0], w[0]]), params["blocks"])

    def variance(first, second):
        sized = params
        for group, name in [("attention", "out"), ("mlp", "down")]:
            factor = np.array([first, second], np.float32)[:, None, None]
            sized = with_kernel(sized, group, name, factor)
        logits = drawn(sized, jax.random.split(SEED, 64)).astype(np.float64)
        return logits.var(axis=0, ddof=1).mean()

    assert variance(1e-3, 1e-3) / variance(1e-3, 0) == pytest.approx(2, abs=0.5)
