"""Costs against the parameter tree, against products counted in a jaxpr, and by hand."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import cost
from bitnet_jax.granularity import Granularity
from bitnet_jax.latents import latents
from bitnet_jax.loss import cross_entropy
from bitnet_jax.model import NORMS, TransformerConfig, apply_model, init_params
from bitnet_jax.precision import get_precision

CONFIG = TransformerConfig(vocab_size=24, layers=3, width=32, ff_width=80, heads=4, kv_heads=4)
GROUPED = dataclasses.replace(CONFIG, kv_heads=2, layers=2)
CONFIGS = {
    "plain": CONFIG,
    "grouped": GROUPED,
    "one_kv_head_untied": dataclasses.replace(CONFIG, kv_heads=1, tied_embeddings=False),
    "pre": dataclasses.replace(GROUPED, norms="pre"),
    "inside_ungated": dataclasses.replace(GROUPED, norms="inside", gated=False),
}
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# Small enough for a pencil: head size 2.
HAND = TransformerConfig(vocab_size=10, layers=2, width=4, ff_width=6, heads=2, kv_heads=1)
ARMS = {name: get_precision(name) for name in ("ternary", "fp16", "fp32")}


def parameter_shapes(config, arm=ARMS["ternary"]):
    return jax.eval_shape(lambda: init_params(config, arm, jax.random.key(0)))


@pytest.mark.parametrize(
    "norms, gated, kv_heads, tied",
    list(itertools.product(NORMS, (True, False), (1, 4), (True, False))),
)
def test_parameter_groups_are_the_real_tree(norms, gated, kv_heads, tied):
    config = dataclasses.replace(
        CONFIG, norms=norms, gated=gated, kv_heads=kv_heads, tied_embeddings=tied
    )
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


@EACH_CONFIG
def test_linear_shapes_are_those_of_the_real_kernels(config):
    blocks = parameter_shapes(config)["blocks"]
    names = [("attention", n) for n in ("q", "k", "v", "out")]
    names += [("mlp", n) for n in ("gate", "up", "down") if n in blocks["mlp"]]
    assert len(names) == (7 if config.gated else 6)
    kernels = [blocks[group][name]["kernel"].shape for group, name in names]
    assert [(config.layers, *shape) for shape in cost.linear_shapes(config).values()] == kernels


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
        ("plain", get_precision("ternary")),
        ("grouped", get_precision("ternary")),
        ("grouped", get_precision("fp16")),
        ("grouped", get_precision("ternary", granularity=Granularity("group", 4))),
        ("one_kv_head_untied", get_precision("ternary")),
        ("inside_ungated", get_precision("ternary")),
        ("inside_ungated", get_precision("fp32")),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_flops_are_those_of_the_traced_program(name, arm):
    """Exactly, forward and backward: all arms spend the same."""
    config, batch, length = CONFIGS[name], 2, 8
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def forward(params, tokens):
        return apply_model(config, arm, params, tokens)

    def loss(params, tokens):
        return cross_entropy(forward(params, tokens), tokens)[0].mean()

    for function, flops_per_token in [
        (forward, cost.forward_flops_per_token),
        (jax.value_and_grad(loss), cost.training_flops_per_token),
    ]:
        jaxpr = jax.make_jaxpr(function)(parameter_shapes(config, arm), tokens).jaxpr
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


@pytest.mark.parametrize(
    "changes, weight_bits, scales",
    [
        ({"weights": "binary"}, 1, 14),
        ({"weights": "int2_stretched"}, 2, 14),
        ({"weights": "int3_absmax"}, 3, 14),
        ({"weights": "int4_absmax"}, 4, 14),
        ({"weights": "int8_absmax", "activations": "none"}, 8, 14),
        # A block has 4 + 2 + 2 + 4 + 6 + 6 + 4 outputs, 120 weights and 7 kernels.
        ({"granularity": Granularity("channel")}, math.log2(3), 2 * 28),
        ({"granularity": Granularity("group", 2)}, math.log2(3), 2 * 60),
        ({"granularity": Granularity("shard", 2)}, math.log2(3), 2 * 14),
        ({"weights": "int4_absmax", "granularity": Granularity("channel")}, 4, 2 * 28),
    ],
    ids=str,
)
def test_model_bits_of_other_grids_and_granularities_by_hand(changes, weight_bits, scales):
    """Embedding and norms weigh 80 x 16 as before."""
    bits = cost.model_bits(HAND, get_precision("ternary", **changes))
    assert bits == pytest.approx(240 * weight_bits + 80 * 16 + scales * 16, rel=1e-12)


def test_what_options_of_the_model_weigh():
    """Ungated: 2 x 24 weights and 2 scales less. Inside: a block's inputs, 6 x 4 + 6, are norms."""
    ternary = ARMS["ternary"]
    bits = cost.model_bits(HAND, ternary)
    ungated = cost.model_bits(dataclasses.replace(HAND, gated=False), ternary)
    assert bits - ungated == pytest.approx(48 * math.log2(3) + 2 * 16)
    inside = cost.model_bits(dataclasses.replace(HAND, norms="inside"), ternary)
    assert inside - bits == (2 * 30 - 2 * (4 + 4 + 4 + 6)) * 16
    pre = cost.model_bits(dataclasses.replace(HAND, norms="pre"), ternary)
    assert bits - pre == 2 * (4 + 6) * 16


@pytest.mark.parametrize(
    "granularity",
    [Granularity(), Granularity("channel"), Granularity("group", 4), Granularity("shard", 2)],
    ids=str,
)
def test_scales_are_counted_as_the_quantizer_makes_them(granularity):
    arm = get_precision("ternary", granularity=granularity)
    config = dataclasses.replace(GROUPED, gated=False)
    made = jax.eval_shape(lambda p: latents(p, arm), parameter_shapes(config))
    scales = sum(math.prod(latent.scale.shape) for latent in made.values())
    if granularity.kind == "shard":  # those of the outputs are stored repeated along them
        scales = config.layers * len(made) * granularity.size
    whole = cost.model_bits(config, ARMS["ternary"]) - 16 * config.layers * len(made)
    assert cost.model_bits(config, arm) - whole == pytest.approx(16 * scales)


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


@pytest.mark.parametrize(
    "changes, addition, multiplication",
    [
        ({"weights": "binary"}, 0.007, 0),
        ({"activations": "none"}, 0.16, 0),
        ({"activations": "int4_absmax"}, 0.007, 0),
        ({"weights": "int4_absmax"}, 0.007, 0.07),
        ({"weights": "int2_absmax"}, 0.007, 0.07),
        ({"weights": "int2_stretched"}, 0.007, 0.07),
        ({"weights": "int4_absmax", "activations": "none"}, 0.16, 0.34),
    ],
    ids=str,
)
def test_energy_of_other_grids_by_hand(changes, addition, multiplication):
    """The counts of the test above: 92 additions, 120 multiplications, 58 by scales, of which 28
    by those of the weights alone."""
    attention, head = 2 * (4 * 0.16 + 8 * 0.34), 30 * 0.16 + 40 * 0.34
    scalings = 28 if changes.get("activations") == "none" else 58
    linear = 92 * addition + 120 * multiplication + scalings * 0.34
    expected = 2 * (linear + attention) + head
    found = cost.energy_per_token(HAND, get_precision("ternary", **changes), 3)
    assert found == pytest.approx(expected, rel=1e-12)


def test_energy_of_weights_alone_in_float32():
    arm = dataclasses.replace(ARMS["ternary"], activations="none", compute_dtype=jnp.float32)
    attention, head = 2 * (4 * 0.38 + 8 * 1.31), 30 * 0.38 + 40 * 1.31
    expected = 2 * (92 * 0.38 + 28 * 1.31 + attention) + head
    assert cost.energy_per_token(HAND, arm, 3) == pytest.approx(expected, rel=1e-12)


def test_energy_at_45_nm_by_hand():
    """The counts of `test_energy_by_hand` at .4 and 1.1 (fp16), .9 and 3.7 (fp32), .03 (int8)."""
    attention, head = 2 * (4 * 0.4 + 8 * 1.1), 30 * 0.4 + 40 * 1.1
    dense = 2 * (92 * 0.4 + 120 * 1.1 + attention) + head
    ternary = 2 * (92 * 0.03 + 58 * 1.1 + attention) + head
    assert cost.energy_per_token(HAND, ARMS["fp16"], 3, "45nm") == pytest.approx(dense, rel=1e-12)
    found = cost.energy_per_token(HAND, ARMS["ternary"], 3, "45nm")
    assert found == pytest.approx(ternary, rel=1e-12)
    wide = 2 * (92 * 0.9 + 120 * 3.7 + 2 * (4 * 0.9 + 8 * 3.7)) + 30 * 0.9 + 40 * 3.7
    assert cost.energy_per_token(HAND, ARMS["fp32"], 3, "45nm") == pytest.approx(wide, rel=1e-12)


def test_one_large_product_saves_what_the_papers_formulas_say():
    """A row of 4096 by 4096 x 4096, at 7 nm: adds (n-1)p, multiplies np or n+p. In fp16 8.39
    microjoules, in ternary .12: 69.8 times. The paper's 71.4 is (.16 + .34) / .007, no scales."""
    n = 4096
    dense = (n - 1) * n * 0.16 + n * n * 0.34
    ternary = (n - 1) * n * 0.007 + 2 * n * 0.34
    units = cost.ENERGY_PJ["7nm"]
    assert cost._linear_energy(n, n, ARMS["fp16"], units) == pytest.approx(dense, rel=1e-12)
    assert cost._linear_energy(n, n, ARMS["ternary"], units) == pytest.approx(ternary, rel=1e-12)
    assert (dense / ternary, dense) == pytest.approx((69.8, 8.388e6), rel=1e-3)


@EACH_CONFIG
def test_energy_and_bits_order_the_arms(config):
    energies = [cost.energy_per_token(config, arm, 64) for arm in ARMS.values()]
    bits = [cost.model_bits(config, arm) for arm in ARMS.values()]
    assert energies == sorted(energies) and bits == sorted(bits)
    assert energies[0] < energies[1] < energies[2]
    assert bits[0] < bits[1] < bits[2]
