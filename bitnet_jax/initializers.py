"""Initial values of the kernels. Each entry: (projection, layers, precision) -> an initializer.

A kernel's quantized values hardly depend on its scale, which the quantizer takes out and puts back;
what the initial scale decides is how large a layer's output is, and how many optimizer steps it
takes to move a weight to another level. `projection` is one of q, k, v, out, gate, up, down.
"""

import math
from collections.abc import Callable

from flax.linen.initializers import lecun_normal, normal, variance_scaling

from bitnet_jax.precision import Precision
from bitnet_jax.quantize import normal_gain

Initializer = Callable
RESIDUAL_PROJECTIONS = ("out", "down")  # those that add to the residual stream


def fan_in(projection: str, layers: int, precision: Precision) -> Initializer:
    """Variance 1/fan_in, which keeps a unit-RMS input at unit variance; 1/(2L) of it on the two
    projections that add to the residual stream, so that it does not grow with depth (GPT-2)."""
    del precision
    residual = projection in RESIDUAL_PROJECTIONS
    return variance_scaling(1 / (2 * layers) if residual else 1, "fan_in", "normal")


def flax_default(projection: str, layers: int, precision: Precision) -> Initializer:
    """Flax's Dense: variance 1/fan_in, truncated at two standard deviations, in every layer."""
    del projection, layers, precision
    return lecun_normal()


def nanotron(projection: str, layers: int, precision: Precision) -> Initializer:
    """.025 whatever the width, and .025/sqrt(2L) on the residual projections (nanotron's LLaMA)."""
    del precision
    return normal(0.025 / math.sqrt(2 * layers) if projection in RESIDUAL_PROJECTIONS else 0.025)


def subln(projection: str, layers: int, precision: Precision) -> Initializer:
    """Xavier, with v, out and the MLP's matrices times sqrt(ln 2L) (Magneto, arXiv:2210.06423,
    section 3.3, decoder-only), which BitNet's SubLN comes from."""
    del precision
    gain = 1.0 if projection in ("q", "k") else math.sqrt(math.log(2 * layers))
    return variance_scaling(gain**2, "fan_avg", "normal")


def quantizer(projection: str, layers: int, precision: Precision) -> Initializer:
    """Such that the QUANTIZED layer's output has variance 1 for a normal input of variance 1.

    The quantized operands of a product have gains k_w and k_x, their mean squares for standard
    normal values; the variance is 1/(fan_in k_w k_x). It is the fan-in rule in an arm that does not
    quantize, without the residual projections' factor. This project's.
    """
    del projection, layers
    gain = normal_gain(precision.weight_quantizer) * normal_gain(precision.activation_quantizer)
    return variance_scaling(1 / gain, "fan_in", "normal")


INITIALIZERS: dict[str, Callable[[str, int, Precision], Initializer]] = {
    "fan_in": fan_in,
    "flax": flax_default,
    "nanotron": nanotron,
    "subln": subln,
    "quantizer": quantizer,
}
