"""Losses, in nats: next-token cross entropy and the z-loss."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """-log p(target) of every position, and the log normaliser that the z-loss reads. Float32."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_z - target_logits, log_z


def z_loss(log_z: Float[Array, "B T"]) -> Float[Array, ""]:
    """mean(log^2 Z), which keeps logits from drifting (PaLM, arXiv:2204.02311, section 5)."""
    return jnp.mean(jnp.square(log_z))


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """The tokenizer-free unit: nats a token / ln 2 / (UTF-8 bytes a token)."""
    return nats_per_token / math.log(2) / bytes_per_token
