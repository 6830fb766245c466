"""Costs against the parameter tree, against products counted in a jaxpr, and by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import cost
from bitnet_jax.loss import cross_entropy
from bitnet_jax.model import Transformer, TransformerConfig, init_params
from bitnet_jax.precision import get_precision

CONFIG = TransformerConfig(vocab_size=24, layers=3, width=32, ff_width=80, heads=4, kv_heads=4)
GROUPED = dataclasses.replace(CONFIG, kv_heads=2, layers=2)
CONFIGS = {
    "plain": CONFIG,
    "grouped": GROUPED,
    "one_kv_head_untied": dataclasses.replace(CONFIG, kv_heads=1, tied_embeddings=False),
    "no_sub_norms": dataclasses.replace(GROUPED, sub_norms=False),
}
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# Small enough for a pencil: head size 2.
HAND = TransformerConfig(vocab_size=10, layers=2, width=4, ff_width=6, heads=2, kv_heads=1)
ARMS = {name: get_precision(name) for name in ("ternary", "fp16", "fp32")}


def parameter_shapes(config):
    return jax.eval_shape(lambda: init_params(config, get_precision("ternary"), jax.random.key(0)))


@EACH_CONFIG
def test_parameter_groups_are_the_real_tree(config):
    counted = {"embedding": 0, "quantized": 0, "norms": 0}
    groups = {"embedding": "embedding", "head": "embedding", "kernel": "quantized"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameter_shapes(config)):
        counted[groups.get(path[-1].key, "norms")] += math.prod(leaf.shape)
    parameters = cost.count_parameters(config)
    assert dataclasses.asdict(parameters) == counted
    assert parameters.total == sum(counted.values())
    assert parameters.non_embedding == counted["quantized"] + counted["norms"]


def product_flops(jaxpr):
    """Two for each multiply-add of each dot_general; a scan's body times its length."""
    flops = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            flops += 2 * terms * math.prod(equation.outvars[0].aval.shape)
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                flops += repeats * product_flops(inner)
    return flops


def test_the_counter_itself():
    """Three turns of [2,5]x[5,7] inside a jit, and one outside."""

    def function(x, w):
        body = jax.jit(lambda x, w: jnp.tanh(x @ w @ w.T))
        return jax.lax.scan(lambda x, _: (body(x, w), None), x, length=3)[0] @ w

    jaxpr = jax.make_jaxpr(function)(np.zeros((2, 5)), np.zeros((5, 7)))
    assert product_flops(jaxpr.jaxpr) == (3 * 2 + 1) * 2 * 2 * 5 * 7


@pytest.mark.parametrize(
    "name, arm",
    [
        ("plain", "ternary"),
        ("grouped", "ternary"),
        ("grouped", "fp16"),
        ("one_kv_head_untied", "ternary"),
    ],
)
def test_flops_are_those_of_the_traced_program(name, arm):
    """Exactly, forward and backward: both arms spend the same."""
    config, batch, length = CONFIGS[name], 2, 8
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def forward(params, tokens):
        return Transformer(config, get_precision(arm)).apply({"params": params}, tokens)

    def loss(params, tokens):
        return cross_entropy(forward(params, tokens), tokens)[0].mean()

    for function, flops_per_token in [
        (forward, cost.forward_flops_per_token),
        (jax.value_and_grad(loss), cost.training_flops_per_token),
    ]:
        jaxpr = jax.make_jaxpr(function)(parameter_shapes(config), tokens).jaxpr
        assert flops_per_token(config, length) * batch * length == product_flops(jaxpr)


def test_flops_approach_six_n():
    """Of a wide model on short sequences, 6 N and the head are all there is."""
    config = dataclasses.replace(CONFIG, width=4096, ff_width=11008, heads=32, kv_heads=32)
    parameters = cost.count_parameters(config)
    six_n = 6 * (parameters.non_embedding + parameters.embedding)
    assert cost.training_flops_per_token(config, 16) == pytest.approx(six_n, rel=1e-3)


def test_model_bits_by_hand():
    """240 kernel entries (2 x (48 attention + 72 MLP)), 40 of embedding, 40 of norms, 14 scales."""
    assert dataclasses.astuple(cost.count_parameters(HAND)) == (40, 240, 40)
    trits = 240 * math.log2(3)
    assert cost.model_bits(HAND, ARMS["ternary"]) == pytest.approx(trits + 80 * 16 + 14 * 16)
    assert cost.model_bits(HAND, ARMS["fp16"]) == 320 * 16
    assert cost.model_bits(HAND, ARMS["fp32"]) == 320 * 32


def test_energy_by_hand():
    """A layer's products: 4x4 twice, 4x2 twice, 4x6 twice, 6x4 once; three tokens, so two keys.

    Additions (n-1)p: 12+12+6+6+18+18+20 = 92. Multiplications np: 120; as scales n+p: 58.
    A head's two attention products are 2x2 each: 4 additions, 8 multiplications; two heads.
    The output head, 4x10: 30 additions, 40 multiplications.
    """
    attention = 2 * (4 * 0.16 + 8 * 0.34)
    head = 30 * 0.16 + 40 * 0.34
    dense = 2 * (92 * 0.16 + 120 * 0.34 + attention) + head
    ternary = 2 * (92 * 0.007 + 58 * 0.34 + attention) + head
    assert cost.energy_per_token(HAND, ARMS["fp16"], 3) == pytest.approx(dense, rel=1e-12)
    assert cost.energy_per_token(HAND, ARMS["ternary"], 3) == pytest.approx(ternary, rel=1e-12)


@EACH_CONFIG
def test_energy_and_bits_order_the_arms(config):
    energies = [cost.energy_per_token(config, arm, 64) for arm in ARMS.values()]
    bits = [cost.model_bits(config, arm) for arm in ARMS.values()]
    assert energies == sorted(energies) and bits == sorted(bits)
    assert energies[0] < energies[1] < energies[2]
    assert bits[0] < bits[1] < bits[2]


def test_memory_estimate():
    """Grows with the batch, shrinks under remat, and never lacks weights, gradient and moments."""

    def memory(batch_tokens, arm="ternary", **changes):
        config = dataclasses.replace(CONFIG, **changes)
        return cost.training_memory(config, ARMS[arm], batch_tokens, 64)

    assert memory(4096) > memory(1024) > memory(0)
    assert memory(4096) - memory(1024) == 3 * (memory(1024) - memory(0))
    assert memory(0) >= 4 * 4 * cost.count_parameters(CONFIG).total
    assert memory(4096, remat=True, layers=12) < memory(4096, layers=12)
    assert memory(4096, "fp32") > memory(4096, "fp16")
