"""What a file holds, computed in NumPy and float32 with the rounding of inputs that llama.cpp does.

Before a product llama.cpp rounds the inputs to fit the matrix's type: a TQ matrix's to int8 with a
scale for every 256 of them, where the model was trained with one a token. No arm computes so, and
what llama.cpp gives is checked against this.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Int32

from bitnet_jax.export.blocks import TQ_BLOCK
from bitnet_jax.export.model import TrainedModel
from bitnet_jax.export.parts import Stored
from bitnet_jax.layers import rotary_angles

Array = np.ndarray
Inputs = Callable[[Float32[Array, "*B D"]], Float32[Array, "*B D"]]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu2": lambda x: np.square(np.maximum(x, 0)),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def unchanged(x: Float32[Array, "*B D"]) -> Float32[Array, "*B D"]:
    """Inputs of F32 matrices."""
    return x


def as_float16(x: Float32[Array, "*B D"]) -> Float32[Array, "*B D"]:
    """Inputs of F16 matrices."""
    return x.astype(np.float16).astype(np.float32)


def int8_by_256(x: Float32[Array, "*B D"]) -> Float32[Array, "*B D"]:
    """Inputs of TQ matrices: codes to 127, and a float32 scale for every 256 (Q8_K)."""
    codes, scale = _int8_by_block(x, TQ_BLOCK)
    return (codes * scale).reshape(x.shape)


def int8_by_32(x: Float32[Array, "*B D"]) -> Float32[Array, "*B D"]:
    """Inputs of Q8_0 matrices: codes to 127, and a float16 scale for every 32."""
    codes, scale = _int8_by_block(x, 32)
    return (codes * as_float16(scale)).reshape(x.shape)


def _int8_by_block(x: Array, size: int) -> tuple[Array, Array]:
    blocks = x.reshape(*x.shape[:-1], -1, size)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.float32(127) / np.where(largest > 0, largest, 1)
    return np.rint(blocks * inverse), 1 / inverse


def forward(
    model: TrainedModel,
    stored: Stored,
    tokens: Int32[Array, "B T"],
    inputs: Inputs = unchanged,
    head_inputs: Inputs = unchanged,
) -> Float32[Array, "B T V"]:
    """Logits of a gated model with norms `sub` or `pre`.

    inputs, head_inputs: what becomes of the inputs of the projections, and of the head.
    """
    c, parts = model.config, stored.parts
    matrices = {
        key: matrix.numbers.astype(np.float32).T * np.float32(matrix.scale or 1)
        for key, matrix in stored.matrices.items()
    }
    angles = rotary_angles(tokens.shape[1], c.head_size, c.rope_theta)

    def norm(x: Array, block: int | None, name: str) -> Array:
        if (block, name) not in parts:  # there are no sub-norms
            return x
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + np.float32(c.norm_epsilon)) * parts[block, name]

    x = parts[None, "embedding"][tokens]
    for block in range(c.layers):
        y = inputs(norm(x, block, "attention_norm"))
        q, k, v = (
            (y @ matrices[block, f"attention/{name}"]).reshape(*tokens.shape, -1, c.head_size)
            for name in "qkv"
        )
        y = _attention(_rotate(q, angles), _rotate(k, angles), v).reshape(x.shape)
        y = inputs(norm(y, block, "attention/sub_norm"))
        x = x + y @ matrices[block, "attention/out"]
        y = inputs(norm(x, block, "mlp_norm"))
        gate, up = (y @ matrices[block, f"mlp/{name}"] for name in ("gate", "up"))
        y = inputs(norm(ACTIVATIONS[c.activation](gate) * up, block, "mlp/sub_norm"))
        x = x + y @ matrices[block, "mlp/down"]
    head = parts[None, "embedding" if c.tied_embeddings else "head"]
    return head_inputs(norm(x, None, "final_norm")) @ head.T


def _rotate(x: Float32[Array, "B T N H"], angles: tuple[Array, Array]) -> Array:
    cos, sin = (a[:, None] for a in angles)
    halves = x.reshape(*x.shape[:-1], 2, -1)
    return (halves * cos + halves[..., ::-1, :] * sin).reshape(x.shape)


def _attention(
    q: Float32[Array, "B T N H"], k: Float32[Array, "B T K H"], v: Float32[Array, "B T K H"]
) -> Float32[Array, "B T N H"]:
    shared = q.shape[2] // k.shape[2]
    k, v = (np.repeat(a, shared, axis=2) for a in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) * np.float32(q.shape[-1] ** -0.5)
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(axis=-1, keepdims=True), v)
