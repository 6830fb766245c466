"""A trained model's matrices as clients keep them."""

import functools

import jax
import numpy as np
import pytest

from bitnet_jax.export.model import TrainedModel, linears
from bitnet_jax.granularity import Granularity, kernel_values, quantize_kernel
from bitnet_jax.initializers import RESIDUAL_PROJECTIONS
from bitnet_jax.model import TransformerConfig, init_params, linear_layers
from bitnet_jax.precision import get_precision

CONFIG = TransformerConfig(
    vocab_size=11, layers=2, width=8, ff_width=12, heads=4, kv_heads=2, norms="pre"
)


PARAMS = functools.cache(lambda: init_params(CONFIG, get_precision("fp32"), jax.random.key(0)))


def trained(precision):
    return TrainedModel(CONFIG, precision, PARAMS(), 16, None, 0, {})


@pytest.mark.parametrize("kind,size", [("tensor", 1), ("channel", 1), ("group", 4), ("shard", 2)])
@pytest.mark.parametrize("precision", ["ternary", "binary"])
def test_codes_times_scale_is_what_the_model_multiplies_with(precision, kind, size):
    arm = get_precision(precision, granularity=Granularity(kind, size))
    model = trained(arm)
    found = list(linears(model))
    assert len(found) == CONFIG.layers * 7
    for linear in found:
        kernel = linear_layers(model.params)[linear.name]["kernel"][linear.block]
        np.testing.assert_array_equal(linear.master, kernel.T)
        residual = linear.name.split("/")[1] in RESIDUAL_PROJECTIONS
        q = quantize_kernel(arm.weight_quantizer, arm.granularity, kernel, residual)
        np.testing.assert_array_equal(linear.codes * linear.scale, kernel_values(q).T)
        assert linear.codes.dtype == np.int8 and linear.codes.shape == kernel.T.shape
        assert kind != "tensor" or linear.scale.shape == (1, 1)


def test_blocks_are_in_order_and_16_bit_arms_have_no_codes():
    found = list(linears(trained(get_precision("fp16"))))
    assert [linear.block for linear in found] == [0] * 7 + [1] * 7
    assert all(linear.codes is None and linear.scale is None for linear in found)
    assert found[0].master.dtype == np.float32
