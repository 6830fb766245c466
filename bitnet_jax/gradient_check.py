"""How far an estimator's gradient is from what moving a weight really does to the loss.

The loss is a step function of the latents: its derivative is zero almost everywhere, and what an
estimator returns is a guess at its slope on the scale of a quantization step. That slope is
measured here by moving single weights one step up and one step down.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from bitnet_jax import loss as losses
from bitnet_jax.latents import latents
from bitnet_jax.matmul import DEPLOYED
from bitnet_jax.model import apply_model, linear_layers, with_linear_layers
from bitnet_jax.train_step import StepConfig


def estimator_cosine(
    config: StepConfig,
    sample: int,
    params: dict,
    tokens: Int[Array | np.ndarray, "B T1"],
    seed: int,
) -> float:
    """Cosine between the estimator's gradient and central differences, over a sample of weights.

    The weights are drawn uniformly from all quantized ones; each is moved by one step of its grid
    to either side. Products run in float32, since the differences are smaller than what 16 bits
    round away. Costs 2 * sample forward passes and a backward one.
    """
    precision = dataclasses.replace(config.precision, compute_dtype=jnp.float32)
    config = dataclasses.replace(config, precision=precision, warming=False)
    count = sum(layer["kernel"].size for layer in linear_layers(params).values())
    drawn = np.random.default_rng(seed).choice(count, size=min(sample, count), replace=False)
    estimated, measured = _gradients(config, params, jnp.asarray(tokens), jnp.asarray(drawn))
    norms = jnp.linalg.norm(estimated) * jnp.linalg.norm(measured)
    return float(jnp.vdot(estimated, measured) / norms)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    config: StepConfig, params: dict, tokens: Array, drawn: Int[Array, "S"]
) -> tuple[Float[Array, "S"], Float[Array, "S"]]:
    """The estimator's gradient and the central difference at the drawn weights."""
    layers = linear_layers(params)
    kernels = {name: layer["kernel"].astype(jnp.float32) for name, layer in layers.items()}
    flat, unravel = ravel_pytree(kernels)
    gap = config.precision.weight_quantizer.gap
    steps = {
        name: jnp.broadcast_to(gap * latent.scale, latent.codes.shape)
        for name, latent in latents(params, config.precision).items()
    }

    def loss(flat):
        kernels = {name: {"kernel": kernel} for name, kernel in unravel(flat).items()}
        moved = with_linear_layers(params, kernels)
        logits = apply_model(config.model, config.precision, moved, tokens[:, :-1], DEPLOYED)
        return losses.cross_entropy(logits, tokens[:, 1:])[0].mean()

    def difference(index, step):
        up, down = loss(flat.at[index].add(step)), loss(flat.at[index].add(-step))
        return (up - down) / (2 * step)

    measured = jax.lax.map(lambda args: difference(*args), (drawn, ravel_pytree(steps)[0][drawn]))
    return jax.grad(loss)(flat)[drawn], measured
