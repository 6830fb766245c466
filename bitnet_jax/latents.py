"""The latent weights as their quantizer sees them: codes and scales of every linear layer."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int8

from bitnet_jax.granularity import quantize_kernel
from bitnet_jax.initializers import RESIDUAL_PROJECTIONS
from bitnet_jax.model import linear_layers
from bitnet_jax.precision import Precision
from bitnet_jax.quantize import Quantized


class Latents(NamedTuple):
    """The kernels of one projection in all L blocks, cut into I slices of their inputs.

    values: the float32 latents. codes and scale: what they are quantized to, rounded to nearest.
    """

    values: Float[Array, "L I d F"]
    codes: Int8[Array, "L I d F"]
    scale: Float[Array, "L I 1 _"]


def latents(params: dict, precision: Precision) -> dict[str, Latents]:
    """Latents of every projection, by names such as `attention/q`."""
    return {name: _latents(name, layer, precision) for name, layer in linear_layers(params).items()}


def latent_codes(params: dict, precision: Precision) -> dict[str, Int8[Array, "L I d F"]]:
    """The codes alone."""
    return {name: latent.codes for name, latent in latents(params, precision).items()}


def known_codes(params: dict, precision: Precision) -> dict:
    """Codes and scales of all kernels, as the model's collection `codes` holds them.

    For several forward passes with the same parameters, each of which would make them again.
    """
    codes: dict = {}
    for name, latent in latents(params, precision).items():
        group, projection = name.split("/")
        kernel = {"kernel": Quantized(latent.codes, latent.scale)}
        codes.setdefault(group, {})[projection] = kernel
    return {"blocks": codes}


def _latents(name: str, layer: dict, precision: Precision) -> Latents:
    residual = name.split("/")[1] in RESIDUAL_PROJECTIONS

    def quantize_one(kernel, step):
        quantizer, granularity = precision.weight_quantizer, precision.granularity
        return quantize_kernel(quantizer, granularity, kernel, residual, step)

    # Kernels are stacked over blocks; each block has scales of its own.
    kernel = layer["kernel"]
    q = jax.vmap(quantize_one)(kernel, layer.get("step"))
    return Latents(kernel.astype("float32").reshape(q.codes.shape), *q)
