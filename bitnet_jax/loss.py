"""Losses, in nats: next-token cross entropy and the z-loss."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitnet_jax.matmul import plain_dot
from bitnet_jax.precision import Precision

MAX_LOGITS = 2**25  # 128 MB of float32: the default quickstart's batches have 2^18


def cross_entropy(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """-log p(target) of every position, and the log normaliser that the z-loss reads. Float32."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_z - target_logits, log_z


def head_cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    precision: Precision,
    max_logits: int = MAX_LOGITS,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`cross_entropy` of the head's logits, of which at most `max_logits` exist at a time.

    Beyond that, positions are taken in equal chunks, and the backward pass computes each chunk's
    logits again: a third more work for the head, and memory that does not grow with the batch.
    """
    positions, vocabulary = targets.size, head.shape[0]
    chunks = -(-positions * vocabulary // max_logits)
    if chunks == 1:
        return cross_entropy(plain_dot(x, head, precision), targets)
    size = -(-positions // chunks)
    padding = size * chunks - positions
    rows = jnp.pad(x.reshape(positions, -1), ((0, padding), (0, 0)))
    labels = jnp.pad(targets.reshape(-1), (0, padding))

    @jax.checkpoint
    def chunk(operands: tuple[Array, Array]) -> tuple[Array, Array]:
        return cross_entropy(plain_dot(operands[0], head, precision), operands[1])

    results = jax.lax.map(chunk, (rows.reshape(chunks, size, -1), labels.reshape(chunks, size)))
    nats, log_z = (r.reshape(-1)[:positions].reshape(targets.shape) for r in results)
    return nats, log_z


def z_loss(log_z: Float[Array, "B T"]) -> Float[Array, ""]:
    """mean(log^2 Z), which keeps logits from drifting (PaLM, arXiv:2204.02311, section 5)."""
    return jnp.mean(jnp.square(log_z))


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """The tokenizer-free unit: nats a token / ln 2 / (UTF-8 bytes a token)."""
    return nats_per_token / math.log(2) / bytes_per_token
