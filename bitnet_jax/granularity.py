"""Which weights of a kernel share a scale.

A quantized kernel [D, F] is kept as I slices of its input dimension: codes [I, D/I, F] and scales
[I, 1, 1] or [I, 1, F]. One slice is the usual case, and the product of the codes is then a single
integer product; with more, each slice is a product of its own that is scaled before they are added.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from bitnet_jax.estimators import step_gradient
from bitnet_jax.quantize import SCALE_FLOOR, Quantized, Quantizer, quantize

GRANULARITIES = ("tensor", "channel", "group", "shard")


@dataclasses.dataclass(frozen=True)
class Granularity:
    """What shares a scale.

    kind: `tensor`, the whole kernel (BitNet); `channel`, an output channel; `group`, `size`
      consecutive inputs of an output channel; `shard`, one of `size` equal parts of the kernel,
      cut as tensor parallelism cuts it (TriLM, arXiv:2407.12327, section 3: a scale for each shard
      spares a reduction over devices): along the outputs, or along the inputs of the projections
      that add to the residual stream.
    """

    kind: str = "tensor"
    size: int = 1

    def slices(self, inputs: int, row_parallel: bool) -> int:
        """Into how many parts the inputs are cut."""
        if self.kind == "group":
            return inputs // self.size
        return self.size if self.kind == "shard" and row_parallel else 1

    def refusal(self, inputs: int, outputs: int, row_parallel: bool) -> str | None:
        """Why a kernel of this shape cannot be cut so; None if it can."""
        if self.kind == "group" and inputs % self.size:
            return f"groups of {self.size} do not divide the {inputs} inputs of a kernel"
        cut, what = (inputs, "inputs") if row_parallel else (outputs, "outputs")
        if self.kind == "shard" and cut % self.size:
            return f"{self.size} shards do not divide the {cut} {what} of a kernel"
        return None


def quantize_kernel(
    quantizer: Quantizer,
    granularity: Granularity,
    kernel: Float[Array, "D F"],
    row_parallel: bool = False,
    step: Float[Array, "..."] | None = None,
    noise: Float[Array, "D F"] | None = None,
) -> Quantized:
    """Codes [I, D/I, F] and scales [I, 1, 1] or [I, 1, F] of a kernel.

    row_parallel: for shards, cut along the inputs.
    step: learned scales, of the shape of `initial_step`. noise: uniform, for stochastic rounding.
    """
    blocks, axes = _blocks(granularity, kernel, row_parallel)
    noise = None if noise is None else noise.reshape(blocks.shape)
    q = quantize(quantizer, blocks, axes, step, noise)
    slices = granularity.slices(kernel.shape[0], row_parallel)
    codes = q.codes.reshape(slices, -1, kernel.shape[1])
    if blocks.ndim == 4:  # shards of the outputs: [1, 1, shards, 1] to [1, 1, F]
        return Quantized(codes, jnp.repeat(q.scale, blocks.shape[3], axis=2).reshape(1, 1, -1))
    return Quantized(codes, q.scale)


def initial_step(
    quantizer: Quantizer,
    granularity: Granularity,
    kernel: Float[Array, "D F"],
    row_parallel: bool = False,
) -> Float[Array, "..."]:
    """The scales that the quantizer's rule gives, where a learned scale starts."""
    assert quantizer.reach
    blocks, axes = _blocks(granularity, kernel, row_parallel)
    return quantizer.reach(blocks, axes) / quantizer.high


def kernel_values(q: Quantized) -> Float[Array, "D F"]:
    """The float32 kernel that codes [I, D/I, F] and their scales stand for."""
    return (q.codes.astype(jnp.float32) * q.scale).reshape(-1, q.codes.shape[2])


def kernel_step_gradient(
    quantizer: Quantizer,
    granularity: Granularity,
    kernel: Float[Array, "D F"],
    codes: Int8[Array, "I d F"],
    step: Float[Array, "..."],
    g: Float[Array, "D F"],
    row_parallel: bool = False,
) -> Float[Array, "..."]:
    """Gradient of a kernel's learned scales, from that of its dequantized values."""
    blocks, _ = _blocks(granularity, kernel, row_parallel)
    q = Quantized(codes.reshape(blocks.shape), jnp.maximum(step, SCALE_FLOOR))
    return step_gradient(quantizer, blocks, q, step, g.reshape(blocks.shape))


def _blocks(
    granularity: Granularity, kernel: Array, row_parallel: bool
) -> tuple[Array, tuple[int, ...]]:
    """The kernel with its blocks as dimensions, and the axes along which a block extends."""
    inputs, outputs = kernel.shape
    if granularity.kind == "shard" and not row_parallel:
        shards = granularity.size
        return kernel.reshape(1, inputs, shards, outputs // shards), (0, 1, 3)
    slices = granularity.slices(inputs, row_parallel)
    blocks = kernel.reshape(slices, inputs // slices, outputs)
    axes = {"tensor": (0, 1, 2), "shard": (1, 2)}.get(granularity.kind, (1,))
    return blocks, axes
