"""What the forward pass of a block saves for its backward pass, by name.

Everything else is made again from it (`jax.checkpoint`): the operands of products, the products
that norms and activation functions start from, and what attention wants are saved, in 8 or 16 bits;
the float32 values in between are not, since moving them takes longer than making them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED = jax.checkpoint_policies.save_only_these_names("operand", "product", "attention")


def mark(values: Any, name: str) -> Any:
    """The same values, marked to be saved; for a forward rule, where nothing is differentiated.

    16-bit floats are saved as the integers of their bits: XLA's CPU backend would keep a stack of
    bfloat16 over the layers as float32, and convert all of it twice.
    """

    def one(x: jax.Array) -> jax.Array:
        if x.dtype not in (jnp.bfloat16, jnp.float16):
            return checkpoint_name(x, name)
        bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
        return jax.lax.bitcast_convert_type(bits, x.dtype)

    return jax.tree.map(one, values)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def save(values: Any, name: str) -> Any:
    """`mark` as an identity with its derivative, which the bits alone would not have."""
    return mark(values, name)


@save.defjvp
def _save_jvp(name: str, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    # Not `save`: the policy does not look into a function with a rule of its own.
    return mark(primals[0], name), tangents[0]
