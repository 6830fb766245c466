"""Text from a model, a token at a time, with the keys and values of what is there in a cache.

Everything here is a pure function. A `Decoder` is the model laid out for it: a block an entry, so
that no program copies a block's weights out of a stack, and kernels as `packed_dot.py` wants them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from bitnet_jax.attention import Cache
from bitnet_jax.deployed import Deployed
from bitnet_jax.layers import RMSNorm
from bitnet_jax.matmul import code_dot
from bitnet_jax.model import Block, TransformerConfig
from bitnet_jax.packed_dot import Kernel, RowKernel, chosen_products, pack_kernel
from bitnet_jax.packing import fits
from bitnet_jax.precision import Precision, get_precision
from bitnet_jax.quantize import Quantized

PACKING = "2bit"  # of kernels whose codes fit


class Decoder(NamedTuple):
    """head: in float32, its values rounded as the arm's products round them.

    blocks: the variables of each `model.Block`, its kernels in the collection `codes`.
    """

    embedding: Float[Array, "V D"]
    head: Float[Array, "V D"]
    final_norm: dict
    blocks: tuple[dict, ...]


class Sampling(NamedTuple):
    """How a token is drawn. temperature: 0 takes the likeliest. top_k: of so many likeliest alone.

    top_p: then of the fewest likeliest that have this share of the rest's probability together.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0


LIKELIEST = Sampling(temperature=0.0)


def decoder(
    config: TransformerConfig,
    precision: Precision,
    model: Deployed,
    packing: str | None = PACKING,
    products: str = "auto",
) -> Decoder:
    """packing: of the kernels whose codes fit, a name in `packing.PACKINGS`; None leaves int8.

    products: how packed codes are multiplied, a name in `packed_dot.PRODUCTS`.

    Raises:
      ConfigError: what `packed_dot.chosen_products` refuses.
    """
    products = chosen_products(products)

    def lay_out(kernel: Quantized) -> Kernel:
        if not precision.quantized:
            return RowKernel(jnp.asarray(kernel.codes[0].T))
        if packing is None or not fits(precision.weight_quantizer):
            return jax.tree.map(jnp.asarray, kernel)
        kernel = Quantized(*(jnp.asarray(a) for a in kernel))
        return pack_kernel(kernel, precision.weight_quantizer, packing, products)

    def block(index: int) -> dict:
        own: dict = jax.tree.map(
            lambda a: a[index], (model.params["blocks"], model.codes["blocks"])
        )
        laid_out = jax.tree.map(lay_out, own[1], is_leaf=lambda x: isinstance(x, Quantized))
        return {"params": jax.tree.map(jnp.asarray, own[0]), "codes": laid_out}

    embedding = jnp.asarray(model.params["embedding"])
    head = jnp.asarray(model.params.get("head", embedding))
    return Decoder(
        embedding,
        head.astype(precision.compute_dtype).astype(jnp.float32),
        jax.tree.map(jnp.asarray, model.params["final_norm"]),
        tuple(block(index) for index in range(config.layers)),
    )


def prefill(
    config: TransformerConfig,
    precision: Precision,
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: int,
) -> tuple[tuple[Cache, ...], Float[Array, "B V"]]:
    """(a cache a block, with room for so many positions; the logits of what comes next)."""
    shape = (tokens.shape[0], config.kv_heads, positions, config.head_size)
    empty = jnp.zeros(shape, precision.compute_dtype)
    caches = tuple(Cache(empty, empty, jnp.int32(0)) for _ in range(config.layers))
    return _forward(config, precision, model, caches, tokens)


def decode_step(
    config: TransformerConfig,
    precision: Precision,
    model: Decoder,
    caches: tuple[Cache, ...],
    tokens: Int[Array, "B"],
) -> tuple[tuple[Cache, ...], Float[Array, "B V"]]:
    """The next token of each text: the caches with it, and the logits of the one after it."""
    return _forward(config, precision, model, caches, tokens[:, None])


def _forward(config, precision, model, caches, tokens):
    x, now = jnp.take(model.embedding, tokens, axis=0), []
    for variables, past in zip(model.blocks, caches, strict=True):
        block = Block(config, precision)
        inputs: Any = {**variables, "cache": {"attention": {"past": past}}}
        (x, _), changed = block.apply(inputs, x, None, mutable=["cache"])
        now.append(changed["cache"]["attention"]["past"])
    norm = RMSNorm(config.norm_epsilon)
    x: Any = norm.apply({"params": model.final_norm}, x[:, -1])
    # Rounded operands of float32, since XLA's CPU backend has no fast 16-bit product of a vector.
    x = x.astype(precision.compute_dtype).astype(jnp.float32)
    logits = code_dot(x, model.head, get_precision("fp32"), ((1,), (1,)))
    return tuple(now), logits.astype(precision.compute_dtype).astype(jnp.float32)


def sample(logits: Float[Array, "V"], key: Key[Array, ""], sampling: Sampling) -> Int[Array, ""]:
    """A token. Among equally likely ones at the edge of top_k or top_p the lower ids stay."""
    if sampling.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    order = jnp.argsort(-logits, stable=True)
    ranks = jnp.arange(len(logits))
    ordered = logits[order] / sampling.temperature
    ordered = jnp.where(ranks < (sampling.top_k or len(logits)), ordered, -jnp.inf)
    shares = jax.nn.softmax(ordered)
    kept = (jnp.cumsum(shares) - shares < sampling.top_p) | (ranks == 0)
    return order[jax.random.categorical(key, jnp.where(kept, ordered, -jnp.inf))].astype(jnp.int32)


def _draw(logits, keys, position, sampling):
    own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)
    return jax.vmap(partial(sample, sampling=sampling))(logits, own)


@partial(jax.jit, static_argnames=("config", "precision", "positions", "count", "sampling"))
def _begin(config, precision, model, prompt, seed, positions, count, sampling):
    """(caches and first token of each text, their keys). The prompt is read once."""
    caches, logits = prefill(config, precision, model, prompt[None], positions)
    caches, logits = jax.tree.map(
        lambda x: jnp.repeat(x, count, axis=0) if x.ndim else x, (caches, logits)
    )
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = fold(jax.random.key(seed), jnp.arange(count))
    return caches, _draw(logits, keys, len(prompt), sampling), keys


@partial(jax.jit, static_argnames=("config", "precision", "sampling"), donate_argnames=("caches",))
def _continue(config, precision, model, caches, tokens, keys, sampling, end_of_text):
    """(caches, the tokens after these); after an end of text comes nothing else."""
    caches, logits = decode_step(config, precision, model, caches, tokens)
    following = _draw(logits, keys, caches[0].length, sampling)
    return caches, jnp.where(tokens == end_of_text, end_of_text, following)


def continued(
    config: TransformerConfig,
    precision: Precision,
    model: Decoder,
    caches: tuple[Cache, ...],
    first: Int[Array, "B"],
    keys: Key[Array, "B"],
    steps: int,
    sampling: Sampling,
    end_of_text: int,
) -> Int[np.ndarray, "B steps"]:
    """The tokens after `first`, so many for each text; it stops where all have ended.

    keys: of each text; a token's own is its text's with its position folded in.
    A program a step and not one with a loop in it, within which XLA's CPU backend makes slower
    code of the packed products: 3.4 times as slow, measured at width 768. Uses the caches up.
    """
    tokens, found = first, np.full((len(first), steps), end_of_text, np.int32)
    for step in range(steps):
        caches, tokens = _continue(
            config, precision, model, caches, tokens, keys, sampling, np.int32(end_of_text)
        )
        found[:, step] = tokens
        if (found[:, step] == end_of_text).all():
            break
    return found


def generate(
    config: TransformerConfig,
    precision: Precision,
    model: Decoder,
    prompt: Int[Array, "T"] | Int[np.ndarray, "T"],
    seed: int,
    tokens: int,
    count: int = 1,
    sampling: Sampling = LIKELIEST,
    end_of_text: int = 0,
) -> Int[np.ndarray, "count tokens"]:
    """So many texts that go on from a prompt of one token or more, filled up with ends of text.

    A text's draws depend on the seed and on which of the texts it is, not on how many there are.
    """
    caches, first, keys = _begin(
        config, precision, model, prompt, np.int32(seed), len(prompt) + tokens, count, sampling
    )
    rest = continued(
        config, precision, model, caches, first, keys, tokens - 1, sampling, end_of_text
    )
    return np.concatenate([np.asarray(first)[:, None], rest], axis=1)
