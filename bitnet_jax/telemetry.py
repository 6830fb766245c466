"""What a run tells of its weights while it trains."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.model import linear_kernel
from bitnet_jax.precision import Precision


@functools.partial(jax.jit, static_argnames="precision")
def zero_fraction(params: dict, precision: Precision) -> Float[Array, ""]:
    """Share of zero codes among all quantized weights: .31 for Gaussian weights under absmean."""
    zeros, count = jnp.float32(0), 0
    for path, kernel in jax.tree_util.tree_leaves_with_path(params["blocks"]):
        if linear_kernel(path):
            # Kernels are stacked over layers; each layer has a scale of its own.
            codes = jax.vmap(precision.weight_quantizer)(kernel).codes
            zeros += jnp.mean(codes == 0) * codes.size  # a sum would overflow int32
            count += codes.size
    return zeros / count
