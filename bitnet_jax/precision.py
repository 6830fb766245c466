"""The arms of a comparison. An arm is a pair of quantizers and a compute dtype, and nothing else.

Every arm is the same module with the same parameter tree, initial values and data order. The
residual stream, norms, softmax and loss are float32 in all of them, so that what differs between
two arms is the product's operands and not, say, the rounding of the residual stream.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from bitnet_jax.errors import ConfigError
from bitnet_jax.quantize import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, Quantizer


@dataclasses.dataclass(frozen=True)
class Precision:
    """How the linear layers of a model compute.

    name: the arm's name in configs, result tables and figures.
    weights, activations: names in the quantizer tables.
    compute_dtype: of unquantized operands, of every product's result and of the backward products.
    loss_scaling: dynamic, as float16's narrow exponent needs.
    weight_bits: information a quantized weight carries, for `cost.py`.
    carrier: in what dtype int8 codes enter the forward product. bfloat16 holds them exactly and
      accumulates in float32, which is exact below 2^24: the result equals the integer product.
    """

    name: str
    weights: str = "none"
    activations: str = "none"
    compute_dtype: Any = jnp.bfloat16
    loss_scaling: bool = False
    weight_bits: float = 16.0
    carrier: str = "bfloat16"

    @property
    def weight_quantizer(self) -> Quantizer:
        return WEIGHT_QUANTIZERS[self.weights]

    @property
    def activation_quantizer(self) -> Quantizer:
        return ACTIVATION_QUANTIZERS[self.activations]

    @property
    def quantized(self) -> bool:
        """Whether the weights of the linear layers are stored as codes."""
        return self.weights != "none"


LOG2_3 = 1.584962500721156  # bits of a trit

PRECISIONS = {
    p.name: p
    for p in (
        Precision("ternary", "ternary_absmean", "int8_absmax", jnp.bfloat16, weight_bits=LOG2_3),
        Precision("fp16", compute_dtype=jnp.float16, loss_scaling=True),
        Precision("bf16", compute_dtype=jnp.bfloat16),
        Precision("fp32", compute_dtype=jnp.float32, weight_bits=32.0),
    )
}


def get_precision(name: str, carrier: str = "bfloat16") -> Precision:
    """The arm called `name`.

    Raises:
      ConfigError: no such arm, or no such carrier.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"precision={name!r} is unknown; choose from {', '.join(PRECISIONS)}")
    if carrier not in ("bfloat16", "int8"):
        raise ConfigError(f"matmul.carrier={carrier!r} is unknown; choose from bfloat16, int8")
    return dataclasses.replace(PRECISIONS[name], carrier=carrier)
