"""Losses on the latent weights that pull them to the levels of their grid, or push them away.

Both are means over all quantized weights in units of the grid's step, so that a coefficient means
the same at every size and scale, and neither moves the scale: it is a constant to them. (The papers
write sums; a sum's coefficient is this one's divided by the number of weights.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.latents import Latents, latents
from bitnet_jax.precision import Precision
from bitnet_jax.quantize import Quantizer


def sin2(latent: Latents, quantizer: Quantizer) -> Float[Array, "..."]:
    """sin^2(pi w / scale): 0 at every multiple of the scale, inside the grid and beyond it.

    The form of WaveQ (arXiv:2003.00146), whose period is learned; here it is the quantizer's. On
    grids without a zero the waves are shifted, so that the odd codes are the minima.
    """
    phase = latent.values / jax.lax.stop_gradient(latent.scale) / quantizer.gap
    return jnp.square(jnp.sin(jnp.pi * (phase - (quantizer.low / quantizer.gap) % 1)))


def dampening(latent: Latents, quantizer: Quantizer) -> Float[Array, "..."]:
    """((q(w) - clip(w)) / scale)^2, w clipped to the grid (Nagel et al. 2022, arXiv:2203.11086,
    section 4.2: oscillation dampening). q(w) is a constant to it; beyond the grid nothing pulls."""
    grid = latent.values / jax.lax.stop_gradient(latent.scale)
    return jnp.square(latent.codes - jnp.clip(grid, quantizer.low, quantizer.high))


REGULARIZERS: dict[str, Callable[[Latents, Quantizer], Array]] = {
    "sin2": sin2,
    "dampening": dampening,
}


def regularizer(name: str, params: dict, precision: Precision) -> Float[Array, ""]:
    """The mean over all quantized weights; multiply it by a coefficient of either sign."""
    total, count = jnp.float32(0), 0
    for latent in latents(params, precision).values():
        total += (
            jnp.mean(REGULARIZERS[name](latent, precision.weight_quantizer)) * latent.codes.size
        )
        count += latent.codes.size
    return total / count
