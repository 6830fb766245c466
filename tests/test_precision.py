"""The arms."""

import dataclasses
import math

import jax.numpy as jnp
import pytest

from bitnet_jax.errors import ConfigError
from bitnet_jax.precision import PRECISIONS, get_precision
from bitnet_jax.quantize import identity, int8_absmax, ternary_absmean


@pytest.mark.parametrize(
    "name, weights, activations, dtype, bits, loss_scaling",
    [
        ("ternary", ternary_absmean, int8_absmax, jnp.bfloat16, math.log2(3), False),
        ("fp16", identity, identity, jnp.float16, 16, True),
        ("bf16", identity, identity, jnp.bfloat16, 16, False),
        ("fp32", identity, identity, jnp.float32, 32, False),
    ],
)
def test_arms(name, weights, activations, dtype, bits, loss_scaling):
    arm = get_precision(name)
    assert (arm.name, arm.weight_quantizer, arm.activation_quantizer) == (
        name,
        weights,
        activations,
    )
    assert arm.compute_dtype == dtype and arm.loss_scaling == loss_scaling
    assert arm.weight_bits == pytest.approx(bits, rel=1e-15)
    assert arm.quantized == (name == "ternary")


def test_every_arm_has_its_own_name_and_hashes():
    """Arms are static arguments of compiled programs."""
    assert all(name == arm.name for name, arm in PRECISIONS.items())
    assert len({hash(arm) for arm in PRECISIONS.values()}) == len(PRECISIONS)


def test_the_carrier_is_all_that_it_changes():
    arm = get_precision("ternary", carrier="int8")
    assert arm.carrier == "int8" and get_precision("ternary").carrier == "bfloat16"
    assert dataclasses.replace(arm, carrier="bfloat16") == get_precision("ternary")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match="precision='fp8' is unknown.*ternary, fp16, bf16, fp32"):
        get_precision("fp8")
    with pytest.raises(ConfigError, match="matmul.carrier='int4' is unknown.*bfloat16, int8"):
        get_precision("ternary", carrier="int4")
