"""One optimizer step and one evaluation batch, as pure functions, and their compiled forms."""

import dataclasses
import functools
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from bitnet_jax import loss as losses
from bitnet_jax import optim
from bitnet_jax.model import Transformer, TransformerConfig, init_params
from bitnet_jax.precision import Precision

# float16 gradients below 6e-8 vanish, so the loss is scaled up until they overflow: start at 2^15,
# halve at an overflow, double after so many good steps (Micikevicius et al., arXiv:1710.03740).
INITIAL_LOSS_SCALE = 2.0**15
LOSS_SCALE_GROWTH_INTERVAL = 500


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Everything that a compiled step depends on. Equal configs share one program."""

    model: TransformerConfig
    precision: Precision
    optimizer: optim.OptimizerConfig
    z_loss: float = 0.0
    microbatches: int = 1


class TrainState(flax.struct.PyTreeNode):
    """What a step changes. `skips` counts the non-finite steps in a row, which changed nothing."""

    params: dict
    opt_state: optax.OptState
    loss_scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    skips: Int[Array, ""]


def init_state(config: StepConfig, seed: int) -> TrainState:
    """The state before the first step. The same parameters in every arm at the same seed."""
    params = init_params(config.model, config.precision, jax.random.key(seed))
    return TrainState(
        params=params,
        opt_state=optim.direction(config.optimizer).init(params),
        loss_scale=jnp.float32(INITIAL_LOSS_SCALE if config.precision.loss_scaling else 1.0),
        good_steps=jnp.int32(0),
        skips=jnp.int32(0),
    )


def train_step(
    config: StepConfig,
    state: TrainState,
    tokens: Int[Array, "B T1"],
    learning_rate: Float[Array, ""],
    weight_decay: Float[Array, ""],
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer step on tokens [B, T+1]; a non-finite gradient skips the update.

    Returns the new state and the step's metrics: loss (nats a token, without the z-loss),
    grad_norm (before clipping), loss_scale, skips.
    """
    nats, grads = _gradients(config, state.params, tokens, state.loss_scale)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(nats) & jnp.isfinite(grad_norm)
    updates, opt_state = optim.direction(config.optimizer).update(grads, state.opt_state)
    params = optim.apply_direction(state.params, updates, learning_rate, weight_decay)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    loss_scale, good_steps = state.loss_scale, state.good_steps
    if config.precision.loss_scaling:
        loss_scale, good_steps = _next_loss_scale(loss_scale, good_steps, finite)
    skips = jnp.where(finite, 0, state.skips + 1)
    metrics = {"loss": nats, "grad_norm": grad_norm, "loss_scale": loss_scale, "skips": skips}
    return TrainState(params, opt_state, loss_scale, good_steps, skips), metrics


def _gradients(
    config: StepConfig, params: dict, tokens: Int[Array, "B T1"], loss_scale: Float[Array, ""]
) -> tuple[Float[Array, ""], dict]:
    """Mean loss and gradients over the batch, accumulated in float32 over equal microbatches."""
    model = Transformer(config.model, config.precision)

    def scaled_loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        nats, log_z = losses.cross_entropy(logits, tokens[:, 1:])
        nats = nats.mean()
        return (nats + config.z_loss * losses.z_loss(log_z)) * loss_scale, nats

    gradient = jax.grad(scaled_loss, has_aux=True)
    if config.microbatches == 1:
        grads, nats = gradient(params, tokens)
    else:
        microbatches = tokens.reshape(config.microbatches, -1, tokens.shape[1])

        def accumulate(total, microbatch):
            return jax.tree.map(jnp.add, total, gradient(params, microbatch)), None

        zeros = jax.tree.map(jnp.zeros_like, params), jnp.float32(0)
        (grads, nats), _ = jax.lax.scan(accumulate, zeros, microbatches)
        grads, nats = jax.tree.map(lambda x: x / config.microbatches, (grads, nats))
    return nats, jax.tree.map(lambda g: g / loss_scale, grads)


def _next_loss_scale(
    scale: Float[Array, ""], good_steps: Int[Array, ""], finite: Bool[Array, ""]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Halve at an overflow, down to 1; double after a run of good steps."""
    good_steps = jnp.where(finite, good_steps + 1, 0)
    grow = good_steps >= LOSS_SCALE_GROWTH_INTERVAL
    scale = jnp.where(finite, jnp.where(grow, scale * 2, scale), jnp.maximum(scale / 2, 1.0))
    return scale, jnp.where(grow, 0, good_steps)


def eval_step(config: StepConfig, params: dict, tokens: Int[Array, "B T1"]) -> Float[Array, "B"]:
    """Mean nats a token of each row of tokens [B, T+1]."""
    model = Transformer(config.model, config.precision)
    logits: Array = model.apply({"params": params}, tokens[:, :-1])  # type: ignore[assignment]
    return losses.cross_entropy(logits, tokens[:, 1:])[0].mean(axis=-1)


@functools.cache
def compiled_train_step(config: StepConfig) -> Callable:
    """`train_step` under jit with its state donated; one program for all runs of this config."""
    return jax.jit(functools.partial(train_step, config), donate_argnums=0)


@functools.cache
def compiled_eval_step(config: StepConfig) -> Callable:
    """`eval_step` under jit."""
    return jax.jit(functools.partial(eval_step, config))


@functools.cache
def compiled_init(config: StepConfig) -> Callable:
    """`init_state` under jit, the seed traced."""
    return jax.jit(functools.partial(init_state, config))
