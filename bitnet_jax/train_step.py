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
from bitnet_jax import optim, sharding, telemetry
from bitnet_jax.latents import known_codes
from bitnet_jax.matmul import DEPLOYED, Context
from bitnet_jax.model import TransformerConfig, apply_hidden, init_params, linear_kernel
from bitnet_jax.precision import Precision
from bitnet_jax.regularizers import regularizer
from bitnet_jax.telemetry import Snapshots

# float16 gradients below 6e-8 vanish, so the loss is scaled up until they overflow: start at 2^15,
# halve at an overflow, double after so many good steps (Micikevicius et al., arXiv:1710.03740).
INITIAL_LOSS_SCALE = 2.0**15
LOSS_SCALE_GROWTH_INTERVAL = 500


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Everything that a compiled step depends on. Equal configs share one program.

    regularizer: a name in `regularizers.py`, or none; its coefficient may be negative.
    mesh: of the devices that a run's arrays are cut over.
    warming: whether quantization has a strength below 1 (`matmul.Context`), which is then traced.
    """

    model: TransformerConfig
    precision: Precision
    optimizer: optim.OptimizerConfig
    z_loss: float = 0.0
    regularizer: str = "none"
    regularizer_weight: float = 0.0
    microbatches: int = 1
    warming: bool = False
    mesh: sharding.MeshShape = sharding.ONE_DEVICE

    @property
    def draws(self) -> bool:
        """Whether a step needs random numbers."""
        return self.precision.stochastic or self.optimizer.latents == "bfloat16_stochastic"


class TrainState(flax.struct.PyTreeNode):
    """What a step changes.

    skips: the non-finite steps in a row, which changed nothing. steps: made, skipped ones included.
    seed: of what is random in a step. snapshots: codes of the latents that telemetry compares with
      (`telemetry.py`); a step leaves them alone. None where nothing is quantized.
    """

    params: dict
    opt_state: optax.OptState
    loss_scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    skips: Int[Array, ""]
    steps: Int[Array, ""]
    seed: Int[Array, ""]
    snapshots: Snapshots | None


def init_state(config: StepConfig, seed: int | Int[Array, ""]) -> TrainState:
    """The state before the first step. The same parameters in every arm at the same seed."""
    params = init_params(config.model, config.precision, jax.random.key(seed))
    stored = jax.tree_util.tree_map_with_path(
        lambda path, w: (
            w.astype(jnp.bfloat16)
            if linear_kernel(path) and config.optimizer.latents != "float32"
            else w
        ),
        params,
    )
    quantized = config.precision.quantized
    return TrainState(
        params=stored,
        opt_state=optim.direction(config.optimizer).init(params),
        loss_scale=jnp.float32(INITIAL_LOSS_SCALE if config.precision.loss_scaling else 1.0),
        good_steps=jnp.int32(0),
        skips=jnp.int32(0),
        steps=jnp.int32(0),
        seed=jnp.int32(seed),
        snapshots=telemetry.first(stored, config.precision) if quantized else None,
    )


def train_step(
    config: StepConfig,
    state: TrainState,
    tokens: Int[Array, "B T1"],
    learning_rate: Float[Array, ""],
    weight_decay: Float[Array, ""],
    strength: Float[Array, ""] | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer step on tokens [B, T+1]; a non-finite gradient skips the update.

    strength: of quantization, where the config is warming.
    Returns the new state and the step's metrics: loss (nats a token, without z-loss and
    regularizer), grad_norm (before clipping), loss_scale, skips; regularizer, where there is one.
    """
    model_key, store_key = _keys(config, state)
    context = Context(strength if config.warming else None, model_key)
    # Latents may be stored in bfloat16; all that is computed with them is float32.
    params = jax.tree.map(lambda w: w.astype(jnp.float32), state.params)
    parts, grads = _gradients(config, params, tokens, state.loss_scale, context)
    grads = sharding.constrain_tree(grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(parts["loss"]) & jnp.isfinite(grad_norm)
    updates, opt_state = optim.direction(config.optimizer).update(
        grads, state.opt_state, params, learning_rate=learning_rate
    )
    params = optim.apply_direction(
        config.optimizer, config.precision, params, updates, learning_rate, weight_decay, store_key
    )
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    params, opt_state = sharding.constrain_tree((params, opt_state))
    loss_scale, good_steps = state.loss_scale, state.good_steps
    if config.precision.loss_scaling:
        loss_scale, good_steps = _next_loss_scale(loss_scale, good_steps, finite)
    skips = jnp.where(finite, 0, state.skips + 1)
    metrics = {**parts, "grad_norm": grad_norm, "loss_scale": loss_scale, "skips": skips}
    new = state.replace(
        params=params,
        opt_state=opt_state,
        loss_scale=loss_scale,
        good_steps=good_steps,
        skips=skips,
        steps=state.steps + 1,
    )
    return new, metrics


def _keys(config: StepConfig, state: TrainState) -> tuple[Array | None, Array | None]:
    """Keys for the forward pass and for storing latents: a pure function of seed and step."""
    if not config.draws:
        return None, None
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), state.seed), state.steps)
    model_key, store_key = jax.random.split(key)
    return (model_key if config.precision.stochastic else None), store_key


def _gradients(
    config: StepConfig,
    params: dict,
    tokens: Int[Array, "B T1"],
    loss_scale: Float[Array, ""],
    context: Context,
) -> tuple[dict[str, Float[Array, ""]], dict]:
    """Mean losses and gradients over the batch, accumulated in float32 over equal microbatches."""

    arm, codes = config.precision, None
    if config.microbatches > 1 and arm.quantized and arm.estimator != "stochastic":
        codes = known_codes(params, arm)  # once for all microbatches

    def scaled_loss(params, tokens):
        hidden = apply_hidden(config.model, arm, params, tokens[:, :-1], context, codes)
        nats, log_z = losses.head_cross_entropy(*hidden, tokens[:, 1:], arm)
        parts = {"loss": nats.mean()}
        total = parts["loss"] + config.z_loss * losses.z_loss(log_z)
        if config.regularizer != "none":
            parts["regularizer"] = regularizer(config.regularizer, params, arm)
            total += config.regularizer_weight * parts["regularizer"]
        return total * loss_scale, parts

    gradient = jax.grad(scaled_loss, has_aux=True)
    if config.microbatches == 1:
        grads, parts = gradient(params, tokens)
    else:
        microbatches = tokens.reshape(config.microbatches, -1, tokens.shape[1])

        def accumulate(total, microbatch):
            return jax.tree.map(jnp.add, total, gradient(params, microbatch)), None

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, microbatches[0]))
        (grads, parts), _ = jax.lax.scan(accumulate, zeros, microbatches)
        grads, parts = jax.tree.map(lambda x: x / config.microbatches, (grads, parts))
    return parts, jax.tree.map(lambda g: g / loss_scale, grads)


def _next_loss_scale(
    scale: Float[Array, ""], good_steps: Int[Array, ""], finite: Bool[Array, ""]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Halve at an overflow, down to 1; double after a run of good steps."""
    good_steps = jnp.where(finite, good_steps + 1, 0)
    grow = good_steps >= LOSS_SCALE_GROWTH_INTERVAL
    scale = jnp.where(finite, jnp.where(grow, scale * 2, scale), jnp.maximum(scale / 2, 1.0))
    return scale, jnp.where(grow, 0, good_steps)


def eval_step(config: StepConfig, params: dict, tokens: Int[Array, "B T1"]) -> Float[Array, "B"]:
    """Mean nats a token of each row of tokens [B, T+1], fully quantized, rounded to nearest."""
    hidden = apply_hidden(config.model, config.precision, params, tokens[:, :-1], DEPLOYED)
    return losses.head_cross_entropy(*hidden, tokens[:, 1:], config.precision)[0].mean(axis=-1)


@functools.lru_cache(16)
def compiled_train_step(config: StepConfig) -> Callable:
    """`train_step` under jit with its state donated: for a single step of a single run.

    The training loop uses `programs.py`.
    """
    return jax.jit(functools.partial(train_step, config), donate_argnums=0)


@functools.lru_cache(16)
def compiled_eval_step(config: StepConfig) -> Callable:
    """`eval_step` under jit."""
    return jax.jit(functools.partial(eval_step, config))


@functools.lru_cache(16)
def compiled_init(config: StepConfig) -> Callable:
    """`init_state` under jit, the seed traced."""
    return jax.jit(functools.partial(init_state, config))
