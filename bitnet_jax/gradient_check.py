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
from jaxtyping import Array, Float, Int

from bitnet_jax.latents import latents
from bitnet_jax.model import linear_layers, with_linear_layers
from bitnet_jax.train_step import StepConfig, eval_step


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
    tokens = jnp.asarray(tokens)
    gradients, steps = jax.device_get(_gradients_and_steps(config, params, tokens))
    places = _draw({name: step.size for name, step in steps.items()}, sample, seed)
    estimated = np.array([gradients[name].flat[index] for name, index in places])
    step = np.array([steps[name].flat[index] for name, index in places])
    up = [_moved_loss(config, params, tokens, *p, by) for p, by in zip(places, step, strict=True)]
    down = [
        _moved_loss(config, params, tokens, *p, -by) for p, by in zip(places, step, strict=True)
    ]
    measured = (np.array(up) - np.array(down)) / (2 * step)
    norms = np.linalg.norm(estimated) * np.linalg.norm(measured)
    return float(np.vdot(estimated, measured) / norms)


def _draw(sizes: dict[str, int], sample: int, seed: int) -> list[tuple[str, int]]:
    """Distinct weights, uniformly from all: (projection, index in its flattened stack)."""
    ends = np.cumsum(list(sizes.values()))
    drawn = np.random.default_rng(seed).choice(ends[-1], size=min(sample, ends[-1]), replace=False)
    which = np.searchsorted(ends, drawn, side="right")
    starts = ends - np.array(list(sizes.values()))
    names = list(sizes)
    return [(names[w], int(i - starts[w])) for w, i in zip(which, drawn, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _gradients_and_steps(
    config: StepConfig, params: dict, tokens: Array
) -> tuple[dict[str, Float[Array, "..."]], dict[str, Float[Array, "..."]]]:
    """The estimator's gradient of every kernel, and the step of the grid under every weight."""
    gap = config.precision.weight_quantizer.gap
    steps = {
        name: jnp.broadcast_to(gap * latent.scale, latent.codes.shape)
        for name, latent in latents(params, config.precision).items()
    }
    kernels = {n: w["kernel"].astype(jnp.float32) for n, w in linear_layers(params).items()}
    return jax.grad(lambda kernels: _loss(config, params, kernels, tokens))(kernels), steps


def _moved_loss(
    config: StepConfig, params: dict, tokens: Array, name: str, index: int, by: float
) -> float:
    """The loss with one weight moved."""
    sizes = {n: layer["kernel"].size for n, layer in linear_layers(params).items()}
    places = {n: np.int32(index if n == name else size) for n, size in sizes.items()}
    return float(_loss_at(config, params, tokens, places, np.float32(by)))


@functools.partial(jax.jit, static_argnums=0)
def _loss_at(
    config: StepConfig,
    params: dict,
    tokens: Array,
    places: dict[str, Int[Array, ""]],
    by: Float[Array, ""],
) -> Float[Array, ""]:
    """The loss with the weight at each projection's place moved; a place past the end is none."""

    def moved(name: str, kernel: Array) -> Array:
        flat = kernel.astype(jnp.float32).reshape(-1)
        return flat.at[places[name]].add(by, mode="drop").reshape(kernel.shape)

    layers = linear_layers(params)
    return _loss(config, params, {n: moved(n, w["kernel"]) for n, w in layers.items()}, tokens)


def _loss(
    config: StepConfig, params: dict, kernels: dict[str, Array], tokens: Int[Array, "B T1"]
) -> Float[Array, ""]:
    """Mean nats a token with other kernels."""
    moved = with_linear_layers(params, {name: {"kernel": k} for name, k in kernels.items()})
    return eval_step(config, moved, tokens).mean()
