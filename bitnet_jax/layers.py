"""Pieces of a block: BitLinear, RMSNorm, rotary embedding. Axis legend in `model.py`."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bitnet_jax.granularity import initial_step
from bitnet_jax.hadamard import rotate_hadamard
from bitnet_jax.matmul import Context, Weights, quantized_dots
from bitnet_jax.packed_dot import deployed_dots
from bitnet_jax.precision import Precision


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in and out of float32 (arXiv:1910.07467, eq. 4)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        return x / jnp.sqrt(mean_square + self.epsilon) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


class BitLinear(nn.Module):
    """A linear layer without bias, computed through an arm's quantizers.

    The kernel [in, out] is a float32 master in every arm; quantization happens on every forward
    pass, inside the scanned body, so that a scale is one layer's and not the stack's. Where the
    collection `codes` holds the kernel's codes already, it is not quantized again; where it does
    and the parameters hold no kernel, the layer is one that is used and not trained.

    residual: whether the result is added to the residual stream. Such a layer's inputs are rotated
      where the arm says so, and tensor parallelism would cut its kernel along the inputs.
    norm_epsilon: of an RMSNorm of the layer's own input, which None leaves out.
    """

    inputs: int
    features: int
    precision: Precision
    kernel_init: Callable
    residual: bool = False
    norm_epsilon: float | None = None

    def setup(self) -> None:
        shape = (self.inputs, self.features)
        if not self.deployed:
            self.kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        if self.precision.weight_quantizer.learned and not self.deployed:
            # Not `self.param`, which would draw a key and so change the kernels drawn after it.
            self.step = self.variable("params", "step", self._initial_step)
        if self.norm_epsilon is not None:
            self.norm = RMSNorm(self.norm_epsilon)

    def __call__(
        self, x: Float[Array, "*B D"], strength: Float[Array, ""] | None = None
    ) -> Float[Array, "*B F"]:
        if self.norm_epsilon is not None:
            x = self.norm(x)
        if self.residual and self.precision.rotate:
            x = rotate_hadamard(x).astype(x.dtype)
        return _products([self], x, strength)[0]

    @property
    def deployed(self) -> bool:
        """Whether nothing but the kernel's codes is there."""
        has = self.has_variable
        return has("codes", "kernel") and not has("params", "kernel")

    @property
    def weights(self) -> Weights:
        known = self.has_variable("codes", "kernel")
        return Weights(
            self.kernel,
            self.step.value if self.precision.weight_quantizer.learned else None,
            self.get_variable("codes", "kernel") if known else None,
        )

    def _initial_step(self) -> Float[Array, "..."]:
        arm = self.precision
        return initial_step(arm.weight_quantizer, arm.granularity, self.kernel, self.residual)


def bit_linears(
    layers: Sequence[BitLinear],
    x: Float[Array, "*B D"],
    strength: Float[Array, ""] | None = None,
) -> list[Float[Array, "*B _"]]:
    """Layers of one arm and one input, which is quantized once for all of them."""
    if any(layer.residual or layer.norm_epsilon is not None for layer in layers):
        return [layer(x, strength) for layer in layers]  # each changes its input in its own way
    return list(_products(layers, x, strength))


def _products(layers: Sequence[BitLinear], x: Array, strength: Array | None) -> tuple[Array, ...]:
    first = layers[0]
    if first.deployed:
        kernels: list = [layer.get_variable("codes", "kernel") for layer in layers]
        return deployed_dots(x, tuple(kernels), first.precision)
    draws = first.precision.stochastic and first.has_rng("rounding")
    context = Context(strength, first.make_rng("rounding") if draws else None)
    weights = tuple(layer.weights for layer in layers)
    return quantized_dots(x, weights, context, first.precision, first.residual)


def rotary_angles(length: int, head_size: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position times frequency theta^(-2i/H) (RoFormer, arXiv:2104.09864, eq. 15).

    float32 [T, 2, H/2] each, for the two halves of a head (the first one's sine is negative), as
    constants: XLA would recompute them for every element they touch.
    """
    frequencies = theta ** (-np.arange(0, head_size, 2) / head_size)
    angles = np.arange(length)[:, None] * frequencies[None, :]
    cos = np.stack([np.cos(angles), np.cos(angles)], axis=1)
    sin = np.stack([-np.sin(angles), np.sin(angles)], axis=1)
    return cos.astype(np.float32), sin.astype(np.float32)


def rotate(
    x: Float[Array, "B T N H"], angles: tuple[np.ndarray | Array, np.ndarray | Array]
) -> Float[Array, "B T N H"]:
    """Rotate each head's vector by its position, first half against second, as LLaMA's clients do.

    Computed in float32 and returned in x's dtype. The other half is fetched by reversing an axis of
    two: slices and a concatenation take several times as long on a CPU.
    """
    cos, sin = (a[None, :, None] for a in angles)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    rotated = halves * cos + jnp.flip(halves, axis=-2) * sin
    return rotated.reshape(x.shape).astype(x.dtype)
