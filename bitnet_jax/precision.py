"""The arms of a comparison. An arm is a pair of quantizers, how gradients pass them, and a dtype.

Every arm is the same module with the same parameter tree, initial values and data order. (A learned
scale adds a parameter beside its kernel; the kernels are the same.) The residual stream, norms,
softmax and loss are float32 in all of them, so that what differs between two arms is the product's
operands and not, say, the rounding of the residual stream.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from bitnet_jax.carriers import CARRIERS
from bitnet_jax.errors import ConfigError, choose
from bitnet_jax.estimators import ESTIMATORS
from bitnet_jax.granularity import GRANULARITIES, Granularity
from bitnet_jax.quantize import QUANTIZERS, TOKEN_QUANTIZERS, Quantizer

WIRES = ("int8", "packed")


@dataclasses.dataclass(frozen=True)
class Precision:
    """How the linear layers of a model compute.

    name: the arm's name in configs, result tables and figures; a changed arm says what changed.
    weights, activations: names in the table of quantizers. Activations have a scale a token.
    granularity: which weights share a scale.
    estimator, activation_estimator: how gradients pass the two quantizers (`estimators.py`).
    rotate: a Hadamard rotation of the inputs of the two projections that add to the residual
      stream, before they are quantized (BitNet v2, arXiv:2504.18415).
    compute_dtype: of unquantized operands, of every product's result and of the backward products.
    loss_scaling: dynamic, as float16's narrow exponent needs.
    carrier: in what dtype int8 codes enter the forward product; the choices are equal bit for bit
      (`carriers.py`).
    wire: in what form codes of weights travel between devices, int8 or packed in 2 bits; equal bit
      for bit (`sharding.py`).
    """

    name: str
    weights: str = "none"
    activations: str = "none"
    granularity: Granularity = Granularity()
    estimator: str = "identity"
    activation_estimator: str = "identity"
    rotate: bool = False
    compute_dtype: Any = jnp.bfloat16
    loss_scaling: bool = False
    carrier: str = "auto"
    wire: str = "int8"

    @property
    def weight_quantizer(self) -> Quantizer:
        return QUANTIZERS[self.weights]

    @property
    def activation_quantizer(self) -> Quantizer:
        return QUANTIZERS[self.activations]

    @property
    def quantized(self) -> bool:
        """Whether the weights of the linear layers are stored as codes."""
        return self.weights != "none"

    @property
    def stochastic(self) -> bool:
        """Whether the forward pass of training draws random numbers."""
        return "stochastic" in (self.estimator, self.activation_estimator)

    @property
    def float_bits(self) -> int:
        """Bits of an unquantized parameter as it is stored for use."""
        return 8 * jnp.dtype(self.compute_dtype).itemsize

    @property
    def weight_bits(self) -> float:
        """Information that a weight of a linear layer carries: log2 3 for a trit."""
        return math.log2(self.weight_quantizer.levels) if self.quantized else self.float_bits


PRECISIONS = {
    p.name: p
    for p in (
        Precision("ternary", "ternary_absmean", "int8_absmax"),
        Precision("binary", "binary", "int8_absmax"),
        Precision("fp16", compute_dtype=jnp.float16, loss_scaling=True),
        Precision("bf16", compute_dtype=jnp.bfloat16),
        Precision("fp32", compute_dtype=jnp.float32),
    )
}


def get_precision(
    name: str, carrier: str = "auto", wire: str = "int8", **changes: Any
) -> Precision:
    """The arm called `name`, with fields changed; None leaves a field as it is.

    What is changed becomes part of the name, as in `ternary+weights=ternary_twn`.

    Raises:
      ConfigError: no such arm, quantizer, estimator, granularity or carrier; or a change that an
        arm without quantized weights cannot have.
    """
    choose("precision", name, PRECISIONS)
    choose("matmul.carrier", carrier, CARRIERS)
    choose("matmul.wire", wire, WIRES)
    base = PRECISIONS[name]
    changes = {k: v for k, v in changes.items() if v is not None and v != getattr(base, k)}
    known = {
        "weights": QUANTIZERS,
        "activations": QUANTIZERS,
        "estimator": ESTIMATORS,
        "activation_estimator": ESTIMATORS,
    }
    for key in known.keys() & changes.keys():
        choose(f"quantization.{key}", changes[key], known[key])
    said = [f"{key}={_say(value)}" for key, value in changes.items()]
    arm = dataclasses.replace(
        base, name="+".join([name, *said]), carrier=carrier, wire=wire, **changes
    )
    _check(arm)
    return arm


def without_activation_quantization(arm: Precision) -> Precision:
    """The arm with its inputs as they are: no last bit of one that flips a code.

    For holding two engines against each other, which round floats in orders of their own. Weights
    stay as they are quantized.
    """
    if arm.activations == "none":
        return arm
    said = [word for word in arm.name.split("+") if not word.startswith("activation")]
    return dataclasses.replace(
        arm,
        name="+".join([*said, "activations=none"]),
        activations="none",
        activation_estimator="identity",
    )


def _check(arm: Precision) -> None:
    """Refuse what an arm cannot be."""
    if arm.activation_quantizer.learned:
        raise ConfigError(
            f"quantization.activations={arm.activations!r}: a learned scale is a weight's, "
            f"not a token's; choose from {', '.join(TOKEN_QUANTIZERS)}"
        )
    for field, quantizer in (("estimator", "weights"), ("activation_estimator", "activations")):
        if getattr(arm, field) != "identity" and getattr(arm, quantizer) == "none":
            raise ConfigError(
                f"quantization.{field}={getattr(arm, field)!r}: the arm's {quantizer} are not "
                f"quantized, so there is nothing to estimate; set quantization.{quantizer}"
            )
    if arm.granularity.kind != "tensor" and not arm.quantized:
        raise ConfigError(
            f"quantization.granularity={arm.granularity.kind!r}: the arm's weights are not "
            "quantized, so they have no scales; set quantization.weights"
        )


def granularity(kind: str | None, size: int | None) -> Granularity | None:
    """From config values: what shares a scale; None for the arm's own.

    Raises:
      ConfigError: unknown, or a size missing, too small or without a use.
    """
    if kind is None and size is None:
        return None
    kind = "tensor" if kind is None else kind
    choose("quantization.granularity", kind, GRANULARITIES)
    needs_size = kind in ("group", "shard")
    if needs_size and (size is None or size < 1):
        raise ConfigError(
            f"quantization.granularity_size={size!r}: {kind} needs a positive size: weights in a "
            "group, or shards"
        )
    if size is not None and not needs_size:
        raise ConfigError(
            f"quantization.granularity_size={size!r}: only group and shard have a size, not {kind}"
        )
    return Granularity(kind, size or 1)


def _say(value: Any) -> str:
    if isinstance(value, Granularity):
        return value.kind + (str(value.size) if value.size > 1 else "")
    return str(value).lower() if isinstance(value, bool) else str(value)
