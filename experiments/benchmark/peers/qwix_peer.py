"""Quantized training by Qwix, a library for it in JAX: int8 weights and activations.

A plain Flax transformer of the same shape, made of `nn.Dense` in bfloat16, whose dense layers Qwix
is told to quantize: absmax of each output channel and of each token, an int8 product, and backward
products of the unquantized operands, as its QtProvider does when no type is named for them.
It has no trits; with int4 weights its product is one of int32, so int8 is its fastest and what is
closest in work. Norms, rotation, attention and head are our own functions: what differs is linear.
"""

import functools
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import qwix
from jaxtyping import Array, Float, Int

from bitnet_jax.attention import causal_attention
from bitnet_jax.layers import RMSNorm, rotary_angles, rotate
from bitnet_jax.loss import cross_entropy
from bitnet_jax.matmul import plain_dot
from bitnet_jax.model import TransformerConfig
from bitnet_jax.optim import OptimizerConfig, decay_mask
from bitnet_jax.precision import get_precision
from experiments.benchmark.compilation import no_compilation_cache, peak_bytes
from experiments.benchmark.peers import Contender
from experiments.benchmark.workload import Workload

ARMS = ("ternary",)
PROJECTIONS = r".*/(q|k|v|out|gate|up|down)"
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1


def contenders(workload: Workload, size: str, tokens: Int[Array, "B T1"]) -> dict[str, Contender]:
    """`qwix_int8`, beside our ternary arm."""
    training = Training(workload, size, tokens)
    note = f"qwix_int8: Qwix {qwix.__version__}, int8 weights and activations"
    return {
        "qwix_int8": Contender(
            "ternary", training, training.compile_seconds, training.peak_bytes, notes=(note,)
        )
    }


class Training:
    """A model in training: each call makes one step and waits for it."""

    def __init__(self, workload: Workload, size: str, tokens: Int[Array, "B T1"]):
        model = quantized(workload.model(size))
        optimizer = adamw(OptimizerConfig())
        params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :2])["params"]
        self._state = params, jax.jit(optimizer.init)(params)
        self._tokens = tokens.reshape(workload.microbatches, -1, tokens.shape[1])
        step = jax.jit(functools.partial(train_step, model, optimizer), donate_argnums=0)
        began = time.perf_counter()
        with no_compilation_cache():
            self._program = step.lower(self._state, self._tokens).compile()
        self.compile_seconds = time.perf_counter() - began
        self.peak_bytes = peak_bytes(self._program)

    def __call__(self) -> None:
        self._state, _ = self._program(self._state, self._tokens)
        jax.block_until_ready(self._state)


def quantized(config: TransformerConfig) -> nn.Module:
    """The transformer, with its projections quantized by Qwix and no other product."""
    rule = qwix.QtRule(module_path=PROJECTIONS, weight_qtype=jnp.int8, act_qtype=jnp.int8)
    return qwix.quantize_model(Transformer(config), qwix.QtProvider([rule]))


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Optax's, after clipping by the global norm; matrices decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            LEARNING_RATE,
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=WEIGHT_DECAY,
            mask=lambda params: jax.tree.map(lambda decays: decays > 0, decay_mask(params)),
        ),
    )


def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    state: tuple[Any, Any],
    tokens: Int[Array, "M B T1"],
) -> tuple[tuple[Any, Any], Float[Array, ""]]:
    """One step on M microbatches; the new state and the mean loss."""
    params, opt_state = state

    def loss(params: Any, part: Int[Array, "B T1"]) -> Float[Array, ""]:
        logits = model.apply({"params": params}, part[:, :-1])
        return cross_entropy(logits, part[:, 1:])[0].mean()  # type: ignore[arg-type]

    def accumulate(total: Any, part: Int[Array, "B T1"]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

    if len(tokens) == 1:
        value, grads = jax.value_and_grad(loss)(params, tokens[0])
    else:
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(accumulate, zeros, tokens)
        value, grads = jax.tree.map(lambda x: x / len(tokens), sums)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value


class Block(nn.Module):
    """The default block of `bitnet_jax/model.py`, of dense layers. The body that is scanned."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], None]:
        c = self.config
        batch, length, _ = x.shape
        angles = rotary_angles(length, c.head_size, c.rope_theta)

        def dense(name: str, width: int, x: Array) -> Array:
            return nn.Dense(width, use_bias=False, dtype=jnp.bfloat16, name=name)(x)

        def norm(name: str, x: Array) -> Array:
            return RMSNorm(c.norm_epsilon, name=name)(x)

        def heads(name: str, count: int, x: Array) -> Array:
            return dense(name, count * c.head_size, x).reshape(batch, length, count, c.head_size)

        y = norm("attention_norm", x)
        q, k, v = heads("q", c.heads, y), heads("k", c.kv_heads, y), heads("v", c.kv_heads, y)
        y = causal_attention(rotate(q, angles), rotate(k, angles), v)
        x = x + dense("out", c.width, norm("attention_sub_norm", y.reshape(batch, length, -1)))
        y = norm("mlp_norm", x)
        gate = dense("gate", c.ff_width, y).astype(jnp.float32)
        y = jnp.square(jax.nn.relu(gate)) * dense("up", c.ff_width, y).astype(jnp.float32)
        return x + dense("down", c.width, norm("mlp_sub_norm", y)), None


class Transformer(nn.Module):
    """Token ids to next-token logits in float32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        c = self.config
        shape = (c.vocab_size, c.width)
        embedding = self.param("embedding", nn.initializers.normal(c.width**-0.5), shape)
        x = jnp.take(embedding, tokens, axis=0)
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers
        )
        x, _ = blocks(c, name="blocks")(x)
        x = RMSNorm(c.norm_epsilon, name="final_norm")(x)
        return plain_dot(x, embedding, get_precision("bf16")).astype(jnp.float32)
