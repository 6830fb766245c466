"""The arms, how they are named, and what an arm cannot be."""

import dataclasses
import math
import re

import jax.numpy as jnp
import pytest

from bitnet_jax.errors import ConfigError
from bitnet_jax.estimators import ESTIMATORS
from bitnet_jax.granularity import GRANULARITIES, Granularity
from bitnet_jax.precision import PRECISIONS, get_precision, granularity
from bitnet_jax.quantize import QUANTIZERS


@pytest.mark.parametrize(
    "name, weights, activations, dtype, bits, loss_scaling",
    [
        ("ternary", "ternary_absmean", "int8_absmax", jnp.bfloat16, math.log2(3), False),
        ("binary", "binary", "int8_absmax", jnp.bfloat16, 1, False),
        ("fp16", "none", "none", jnp.float16, 16, True),
        ("bf16", "none", "none", jnp.bfloat16, 16, False),
        ("fp32", "none", "none", jnp.float32, 32, False),
    ],
)
def test_arms(name, weights, activations, dtype, bits, loss_scaling):
    arm = get_precision(name)
    assert (arm.name, arm.weights, arm.activations) == (name, weights, activations)
    assert arm.weight_quantizer is QUANTIZERS[weights]
    assert arm.activation_quantizer is QUANTIZERS[activations]
    assert arm.compute_dtype == dtype and arm.loss_scaling == loss_scaling
    assert arm.weight_bits == pytest.approx(bits, rel=1e-15)
    assert arm.float_bits == (32 if name == "fp32" else 16)
    assert arm.quantized == (name in ("ternary", "binary"))
    assert arm.granularity.kind == "tensor" and not arm.rotate and not arm.stochastic
    assert arm.estimator == arm.activation_estimator == "identity"


def test_every_arm_has_its_own_name_and_hashes():
    """Arms are static arguments of compiled programs."""
    assert all(name == arm.name for name, arm in PRECISIONS.items())
    assert len({hash(arm) for arm in PRECISIONS.values()}) == len(PRECISIONS)
    changed = [get_precision("ternary", weights="ternary_twn") for _ in range(2)]
    assert changed[0] == changed[1] and hash(changed[0]) == hash(changed[1])
    assert changed[0] != get_precision("ternary")


@pytest.mark.parametrize(
    "weights, bits",
    [(name, math.log2(3)) for name in QUANTIZERS if name.startswith("ternary")]
    + [("none", 16), ("binary", 1), ("int2_absmax", 2), ("int2_stretched", 2)]
    + [("int3_absmax", 3), ("int4_absmax", 4), ("int4_absmean", 4), ("int8_absmax", 8)],
)
def test_weight_bits(weights, bits):
    arm = get_precision("ternary", weights=weights)
    assert arm.weight_bits == pytest.approx(bits, rel=1e-15)
    assert arm.quantized == (weights != "none") and arm.float_bits == 16


# ---- Changes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arm, changes, name",
    [
        ("ternary", {}, "ternary"),
        ("ternary", {"weights": None, "rotate": None, "granularity": None}, "ternary"),
        ("ternary", {"weights": "ternary_twn"}, "ternary+weights=ternary_twn"),
        ("ternary", {"weights": "ternary_absmean", "rotate": False}, "ternary"),
        ("ternary", {"granularity": Granularity()}, "ternary"),
        ("ternary", {"granularity": Granularity("channel")}, "ternary+granularity=channel"),
        ("ternary", {"granularity": Granularity("group", 64)}, "ternary+granularity=group64"),
        ("ternary", {"rotate": True}, "ternary+rotate=true"),
        (
            "binary",
            {"activations": "int4_absmean", "estimator": "trust"},
            "binary+activations=int4_absmean+estimator=trust",
        ),
        ("fp32", {"weights": "binary"}, "fp32+weights=binary"),
    ],
)
def test_a_changed_arm_says_what_changed(arm, changes, name):
    """What is None, or what the arm has anyway, is no change."""
    changed = get_precision(arm, **changes)
    assert changed.name == name
    real = {key: value for key, value in changes.items() if value is not None}
    assert changed == dataclasses.replace(PRECISIONS[arm], name=name, **real)


def test_the_carrier_is_all_that_it_changes():
    arm = get_precision("ternary", carrier="int8")
    assert arm.carrier == "int8" and get_precision("ternary").carrier == "auto"
    assert dataclasses.replace(arm, carrier="auto") == get_precision("ternary")


@pytest.mark.parametrize(
    "changes, stochastic",
    [
        ({"estimator": "stochastic"}, True),
        ({"activation_estimator": "stochastic"}, True),
        ({"estimator": "trust", "activation_estimator": "clipped"}, False),
    ],
)
def test_what_draws_random_numbers(changes, stochastic):
    assert get_precision("ternary", **changes).stochastic == stochastic


# ---- Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, key, value, known",
    [
        ({"name": "fp8"}, "precision", "fp8", PRECISIONS),
        ({"carrier": "int4"}, "matmul.carrier", "int4", ("auto", "bfloat16", "int8")),
        ({"weights": "trits"}, "quantization.weights", "trits", QUANTIZERS),
        ({"activations": "int5"}, "quantization.activations", "int5", QUANTIZERS),
        ({"estimator": "tanh"}, "quantization.estimator", "tanh", ESTIMATORS),
        (
            {"activation_estimator": "tanh"},
            "quantization.activation_estimator",
            "tanh",
            ESTIMATORS,
        ),
    ],
)
def test_unknown_names_list_the_known_ones(arguments, key, value, known):
    message = f"{key}={value!r} is unknown; choose from {', '.join(known)}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        get_precision(**{"name": "ternary", **arguments})


@pytest.mark.parametrize("name", [name for name, q in QUANTIZERS.items() if q.learned])
def test_activations_have_no_learned_scale(name):
    with pytest.raises(ConfigError, match=f"activations='{name}': a learned scale") as error:
        get_precision("ternary", activations=name)
    offered = str(error.value).split("choose from ")[1].split(", ")
    assert offered == [key for key, q in QUANTIZERS.items() if not q.learned]
    assert get_precision("ternary", weights=name).weight_quantizer.learned


@pytest.mark.parametrize(
    "arm, changes, field, quantizer",
    [
        ("bf16", {"estimator": "trust"}, "estimator", "weights"),
        ("bf16", {"activation_estimator": "clipped"}, "activation_estimator", "activations"),
        ("ternary", {"weights": "none", "estimator": "stochastic"}, "estimator", "weights"),
        (
            "ternary",
            {"activations": "none", "activation_estimator": "trust"},
            "activation_estimator",
            "activations",
        ),
    ],
)
def test_an_estimator_needs_a_quantizer(arm, changes, field, quantizer):
    message = f"quantization.{field}='{changes[field]}'.*{quantizer} are not.*{quantizer}$"
    with pytest.raises(ConfigError, match=message):
        get_precision(arm, **changes)
    # The other operand's quantizer is not the one it needs; its own is.
    own = "ternary_absmean" if quantizer == "weights" else "int8_absmax"
    assert getattr(get_precision(arm, **{**changes, quantizer: own}), field) == changes[field]


@pytest.mark.parametrize("kind", [kind for kind in GRANULARITIES if kind != "tensor"])
def test_a_granularity_needs_quantized_weights(kind):
    cut = Granularity(kind, 1 if kind == "channel" else 4)
    with pytest.raises(ConfigError, match=f"quantization.granularity='{kind}'.*weights"):
        get_precision("bf16", granularity=cut, activations="int8_absmax")
    assert get_precision("bf16", granularity=cut, weights="binary").granularity == cut


# ---- Granularity from config values ------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, size, expected",
    [
        (None, None, None),
        ("tensor", None, Granularity("tensor", 1)),
        ("channel", None, Granularity("channel", 1)),
        ("group", 64, Granularity("group", 64)),
        ("shard", 1, Granularity("shard", 1)),
    ],
)
def test_granularity(kind, size, expected):
    assert granularity(kind, size) == expected


@pytest.mark.parametrize(
    "kind, size, message",
    [
        ("block", None, "granularity='block' is unknown; choose from " + ", ".join(GRANULARITIES)),
        ("group", None, "granularity_size=None: group needs a positive size"),
        ("group", 0, "granularity_size=0: group needs a positive size"),
        ("shard", -2, "granularity_size=-2: shard needs a positive size"),
        ("shard", None, "granularity_size=None: shard needs a positive size"),
        ("channel", 4, "granularity_size=4: only group and shard have a size, not channel"),
        ("tensor", 1, "granularity_size=1: only group and shard have a size, not tensor"),
        (None, 4, "granularity_size=4: only group and shard have a size, not tensor"),
    ],
)
def test_granularities_without_a_meaning_are_refused(kind, size, message):
    with pytest.raises(ConfigError, match=f"^quantization.{re.escape(message)}"):
        granularity(kind, size)
