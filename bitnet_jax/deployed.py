"""A model as it is used: the codes and scales that its arm makes of the kernels, in their place."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitnet_jax.latents import known_codes
from bitnet_jax.matmul import plain_dot
from bitnet_jax.model import TransformerConfig, apply_hidden, linear_layers
from bitnet_jax.precision import Precision

KERNEL = ("kernel", "step")  # what codes and scales are made of


class Deployed(NamedTuple):
    """params: those that nothing quantizes, embedding, norms and head; float32.

    codes: of the kernels, as the model's collection `codes` holds them, [L, I, d, F]; of an arm
      that quantizes nothing their values, in its compute dtype, with scales of 1.
    """

    params: dict
    codes: dict


def deploy(params: dict, precision: Precision) -> Deployed:
    """What the arm makes of trained parameters.

    Not for the inside of a program: XLA adds up the mean that a scale is in an order of the
    program's own, so that scales of channels differ in the last bit from program to program. Here
    they are those of `export.model.linears`.
    """
    codes = known_codes(params, precision)
    if not precision.quantized:
        codes = jax.tree.map(
            lambda q: q._replace(codes=jnp.asarray(q.codes, precision.compute_dtype)),
            codes,
            is_leaf=lambda x: hasattr(x, "codes"),
        )
    return Deployed(without_kernels(params), codes)


def without_kernels(params: dict) -> dict:
    """All parameters but those of the quantized products."""
    blocks = {group: dict(layers) for group, layers in params["blocks"].items()}
    for name in linear_layers(params):
        group, projection = name.split("/")
        own = blocks[group][projection]
        blocks[group][projection] = {k: v for k, v in own.items() if k not in KERNEL}
    return {**params, "blocks": blocks}


@partial(jax.jit, static_argnames=("config", "precision"))
def deployed_logits(
    config: TransformerConfig, precision: Precision, model: Deployed, tokens: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """`apply_model` with the kernels known: to the bit, where its own scales are these."""
    x, head = apply_hidden(config, precision, model.params, tokens, codes=model.codes)
    return plain_dot(x, head, precision).astype(jnp.float32)
