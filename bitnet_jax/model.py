"""The transformer, one module for every arm.

Axes: B batch, T query and S key length, D embed, F feed-forward, N query heads, K key-value heads,
H head size, V vocabulary, L layers.

The block is BitNet b1.58's (2B4T report, arXiv:2504.12285): RMSNorm before attention and MLP, a
further one before the attention's output projection and before the MLP's down projection (SubLN),
rotary positions, squared ReLU gate, no biases. Embedding, head and norms are never quantized.
The residual stream is float32 in every arm (see `precision.py`).
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitnet_jax.attention import causal_attention
from bitnet_jax.layers import BitLinear, RMSNorm, rotary_angles, rotate
from bitnet_jax.matmul import quantized_dot
from bitnet_jax.precision import Precision


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer. `ladder.py` holds the named ones."""

    vocab_size: int
    layers: int
    width: int
    ff_width: int
    heads: int
    kv_heads: int
    activation: str = "relu2"
    sub_norms: bool = True
    tied_embeddings: bool = True
    rope_theta: float = 500_000.0
    norm_epsilon: float = 1e-5
    remat: bool = False

    @property
    def head_size(self) -> int:
        return self.width // self.heads


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}

# Variance 1/fan_in keeps a unit-RMS input at unit variance. The two projections that add to the
# residual stream are scaled by 1/sqrt(2L), so that its variance does not grow with depth (GPT-2).
_fan_in_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def _residual_init(layers: int) -> Callable:
    return nn.initializers.variance_scaling(1.0 / (2 * layers), "fan_in", "normal")


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: TransformerConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        batch, length, _ = x.shape

        def project(name: str, heads: int) -> Float[Array, "B T N H"]:
            y = BitLinear(heads * c.head_size, self.precision, _fan_in_init, name=name)(x)
            return y.reshape(batch, length, heads, c.head_size)

        q, k, v = project("q", c.heads), project("k", c.kv_heads), project("v", c.kv_heads)
        angles = rotary_angles(length, c.head_size, c.rope_theta)
        q, k = rotate(q, angles), rotate(k, angles)
        y = causal_attention(q, k, v).reshape(batch, length, c.width)
        if c.sub_norms:
            y = RMSNorm(c.norm_epsilon, name="sub_norm")(y)
        return BitLinear(c.width, self.precision, _residual_init(c.layers), name="out")(y)


class Mlp(nn.Module):
    """Gated feed-forward layer: down(act(gate(x)) * up(x))."""

    config: TransformerConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        gate = BitLinear(c.ff_width, self.precision, _fan_in_init, name="gate")(x)
        up = BitLinear(c.ff_width, self.precision, _fan_in_init, name="up")(x)
        # In float32: a squared ReLU passes float16's 65504 already at 256.
        y = ACTIVATIONS[c.activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
        if c.sub_norms:
            y = RMSNorm(c.norm_epsilon, name="sub_norm")(y)
        return BitLinear(c.width, self.precision, _residual_init(c.layers), name="down")(y)


class Block(nn.Module):
    """Attention and MLP, each added to a float32 residual stream. The body that is scanned."""

    config: TransformerConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], None]:
        c = self.config
        y = RMSNorm(c.norm_epsilon, name="attention_norm")(x)
        x = x + Attention(c, self.precision, name="attention")(y).astype(jnp.float32)
        y = RMSNorm(c.norm_epsilon, name="mlp_norm")(x)
        return x + Mlp(c, self.precision, name="mlp")(y).astype(jnp.float32), None


class Transformer(nn.Module):
    """Token ids to next-token logits.

    The parameters of the L blocks are stacked on a leading axis under `blocks`, so that the
    program's size does not grow with depth.
    """

    config: TransformerConfig
    precision: Precision

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        c = self.config
        embedding = self.param(
            "embedding", nn.initializers.normal(c.width**-0.5), (c.vocab_size, c.width), jnp.float32
        )
        x = jnp.take(embedding, tokens, axis=0)
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers
        )
        x, _ = blocks(c, self.precision, name="blocks")(x)
        x = RMSNorm(c.norm_epsilon, name="final_norm")(x)
        head = embedding
        if not c.tied_embeddings:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
            head = self.param("head", init, (c.vocab_size, c.width), jnp.float32)
        return quantized_dot(x, head, unquantized(self.precision), True).astype(jnp.float32)


def unquantized(precision: Precision) -> Precision:
    """The arm's compute dtype without its quantizers, as embedding and head use it."""
    return dataclasses.replace(precision, weights="none", activations="none")


def init_params(config: TransformerConfig, precision: Precision, key: Array) -> dict:
    """Float32 master parameters: the same tree and the same values in every arm."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Transformer(config, precision).init(key, tokens)["params"]


def linear_kernel(path: tuple) -> bool:
    """Whether a parameter's tree path names a kernel that the arm quantizes."""
    return getattr(path[-1], "key", path[-1]) == "kernel"
