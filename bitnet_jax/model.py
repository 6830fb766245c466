"""The transformer, one module for every arm.

Axes: B batch, T query and S key length, D embed, F feed-forward, N query heads, K key-value heads,
H head size, V vocabulary, L layers.

The default block is BitNet b1.58's (2B4T report, arXiv:2504.12285): RMSNorm before attention and
MLP, a further one before the attention's output projection and before the MLP's down projection
(SubLN), rotary positions, squared ReLU gate, no biases. Embedding, head and norms are never
quantized. The residual stream is float32 in every arm (see `precision.py`).
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitnet_jax import sharding
from bitnet_jax.attention import Cache, causal_attention, continued_attention
from bitnet_jax.initializers import INITIALIZERS, RESIDUAL_PROJECTIONS
from bitnet_jax.layers import BitLinear, RMSNorm, bit_linears, rotary_angles, rotate
from bitnet_jax.matmul import DEPLOYED, Context, plain_dot
from bitnet_jax.precision import Precision
from bitnet_jax.saving import SAVED, save

NORMS = ("sub", "pre", "inside")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer. `ladder.py` holds the named ones.

    activation, gated: the MLP is act(gate x) * (up x), or act(up x) without a gate.
    norms: where RMSNorm stands. `pre`: before attention and MLP (TriLM, LLaMA). `sub`: and before
      the two projections that add to the residual stream (BitNet b1.58 2B4T). `inside`: in every
      linear layer and nowhere else in the block (BitNet b1.58's FAQ).
    init: of the kernels, a name in `initializers.py`.
    attention: how it is computed, a name in `attention.py`; they differ by rounding alone.
    """

    vocab_size: int
    layers: int
    width: int
    ff_width: int
    heads: int
    kv_heads: int
    activation: str = "relu2"
    gated: bool = True
    norms: str = "sub"
    init: str = "fan_in"
    tied_embeddings: bool = True
    rope_theta: float = 500_000.0
    norm_epsilon: float = 1e-5
    remat: bool = False
    attention: str = "blocks"

    @property
    def head_size(self) -> int:
        return self.width // self.heads


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: TransformerConfig
    precision: Precision

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], strength: Float[Array, ""] | None
    ) -> Float[Array, "B T D"]:
        c = self.config
        batch, length, _ = x.shape

        layers = [
            linear(c, self.precision, name, c.width, heads * c.head_size)
            for name, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads))
        ]
        q, k, v = (
            y.reshape(batch, length, -1, c.head_size) for y in bit_linears(layers, x, strength)
        )
        if self.has_variable("cache", "past"):
            y = self._continued(q, k, v)
        else:
            angles = rotary_angles(length, c.head_size, c.rope_theta)
            y = causal_attention(rotate(q, angles), rotate(k, angles), v, c.attention)
        y = y.reshape(batch, length, c.width)
        if c.norms == "sub":
            y = RMSNorm(c.norm_epsilon, name="sub_norm")(y)
        return linear(c, self.precision, "out", c.width, c.width)(y, strength)

    def _continued(self, q: Array, k: Array, v: Array) -> Array:
        """After what the cache holds, which these keys and values join."""
        past: Cache = self.get_variable("cache", "past")
        tables = rotary_angles(past.keys.shape[2], self.config.head_size, self.config.rope_theta)
        cos, sin = (
            jax.lax.dynamic_slice_in_dim(jnp.asarray(a), past.length, q.shape[1]) for a in tables
        )
        y, now = continued_attention(rotate(q, (cos, sin)), rotate(k, (cos, sin)), v, past)
        self.put_variable("cache", "past", now)
        return y


class Mlp(nn.Module):
    """Feed-forward layer: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    config: TransformerConfig
    precision: Precision

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], strength: Float[Array, ""] | None
    ) -> Float[Array, "B T D"]:
        c = self.config
        activation = ACTIVATIONS[c.activation]
        names = ("up", "gate") if c.gated else ("up",)
        layers = [linear(c, self.precision, name, c.width, c.ff_width) for name in names]
        products = save(bit_linears(layers, x, strength), "product")
        # In float32: a squared ReLU passes float16's 65504 already at 256.
        y, *gate = (y.astype(jnp.float32) for y in products)
        y = activation(gate[0]) * y if c.gated else activation(y)
        if c.norms == "sub":
            y = RMSNorm(c.norm_epsilon, name="sub_norm")(y)
        return linear(c, self.precision, "down", c.ff_width, c.width)(y, strength)


def linear(
    c: TransformerConfig, precision: Precision, name: str, inputs: int, features: int
) -> BitLinear:
    """The block's projection called `name`. Called inside a module, which it becomes part of."""
    return BitLinear(
        inputs,
        features,
        precision,
        INITIALIZERS[c.init](name, c.layers, precision),
        residual=name in RESIDUAL_PROJECTIONS,
        norm_epsilon=c.norm_epsilon if c.norms == "inside" else None,
        name=name,
    )


class Block(nn.Module):
    """Attention and MLP, each added to a float32 residual stream. The body that is scanned."""

    config: TransformerConfig
    precision: Precision

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], strength: Float[Array, ""] | None
    ) -> tuple[Float[Array, "B T D"], None]:
        def normed(name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            c = self.config
            return x if c.norms == "inside" else RMSNorm(c.norm_epsilon, name=name)(x)

        attention = Attention(self.config, self.precision, name="attention")
        y = save(attention(normed("attention_norm", x), strength), "product")
        x = x + y.astype(jnp.float32)
        mlp = Mlp(self.config, self.precision, name="mlp")
        return x + mlp(normed("mlp_norm", x), strength).astype(jnp.float32), None


class Transformer(nn.Module):
    """Token ids to what the head multiplies: final hidden states, and the head's matrix [V, D].

    The head is left to the caller, which may want logits (`apply_model`) or, of a large vocabulary,
    the loss without them (`loss.head_cross_entropy`).

    The parameters of the L blocks are stacked on a leading axis under `blocks`, so that the
    program's size does not grow with depth.
    """

    config: TransformerConfig
    precision: Precision

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], strength: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
        c = self.config
        embedding = self.param(
            "embedding", nn.initializers.normal(c.width**-0.5), (c.vocab_size, c.width), jnp.float32
        )
        x = sharding.constrain(jnp.take(embedding, tokens, axis=0), "batch")
        block = nn.remat(Block, prevent_cse=False, policy=None if c.remat else SAVED)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "codes": 0},
            split_rngs={"params": True, "rounding": True},
            in_axes=nn.broadcast,
            length=c.layers,
        )
        x, _ = blocks(c, self.precision, name="blocks")(x, strength)
        x = RMSNorm(c.norm_epsilon, name="final_norm")(x)
        head = embedding
        if not c.tied_embeddings:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
            head = self.param("head", init, (c.vocab_size, c.width), jnp.float32)
        return x, head


def init_params(config: TransformerConfig, precision: Precision, key: Array) -> dict:
    """Float32 master parameters: the same tree and the same values in every arm.

    Exceptions that a config asks for: learned scales are further parameters, and the initialisation
    called `quantizer` depends on the arm.
    """
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Transformer(config, precision).init(key, tokens)["params"]


def apply_hidden(
    config: TransformerConfig,
    precision: Precision,
    params: dict,
    tokens: Int[Array, "B T"],
    context: Context = DEPLOYED,
    codes: dict | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
    """Final hidden states and the head, in the arm's precision; by default as deployed.

    codes: of the kernels, where they are known (`latents.known_codes`).
    """
    rngs = None if context.key is None else {"rounding": context.key}
    variables = {"params": params} if codes is None else {"params": params, "codes": codes}
    model = Transformer(config, precision)
    return model.apply(variables, tokens, context.strength, rngs=rngs)  # type: ignore


def apply_model(
    config: TransformerConfig,
    precision: Precision,
    params: dict,
    tokens: Int[Array, "B T"],
    context: Context = DEPLOYED,
) -> Float[Array, "B T V"]:
    """Logits, float32."""
    x, head = apply_hidden(config, precision, params, tokens, context)
    return plain_dot(x, head, precision).astype(jnp.float32)


def linear_kernel(path: tuple) -> bool:
    """Whether a parameter's tree path names a kernel that the arm quantizes."""
    return getattr(path[-1], "key", path[-1]) == "kernel"


def linear_layers(params: dict) -> dict[str, dict]:
    """Parameters of every linear layer, stacked over blocks, by names such as `attention/q`."""
    groups = params["blocks"]
    return {
        f"{group}/{name}": layer
        for group in ("attention", "mlp")
        for name, layer in groups[group].items()
        if "kernel" in layer
    }


def with_linear_layers(params: dict, changes: dict[str, dict]) -> dict:
    """The parameters with changed ones in some linear layers, by the names of `linear_layers`."""
    blocks = {group: dict(layers) for group, layers in params["blocks"].items()}
    for name, changed in changes.items():
        group, projection = name.split("/")
        blocks[group][projection] = {**blocks[group][projection], **changed}
    return {**params, "blocks": blocks}
