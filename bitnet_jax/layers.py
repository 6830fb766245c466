"""Pieces of a block: BitLinear, RMSNorm, rotary embedding. Axis legend in `model.py`."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bitnet_jax.granularity import initial_step
from bitnet_jax.hadamard import rotate_hadamard
from bitnet_jax.matmul import Context, quantized_dot
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
    pass, inside the scanned body, so that a scale is one layer's and not the stack's.

    residual: whether the result is added to the residual stream. Such a layer's inputs are rotated
      where the arm says so, and tensor parallelism would cut its kernel along the inputs.
    norm_epsilon: of an RMSNorm of the layer's own input, which None leaves out.
    """

    features: int
    precision: Precision
    kernel_init: Callable
    residual: bool = False
    norm_epsilon: float | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B D"], strength: Float[Array, ""] | None = None
    ) -> Float[Array, "*B F"]:
        arm = self.precision
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        step = None
        if arm.weight_quantizer.learned:
            # Not `self.param`, which would draw a key and so change the kernels drawn after it.
            step = self.variable("params", "step", self._initial_step, kernel).value
        if self.norm_epsilon is not None:
            x = RMSNorm(self.norm_epsilon, name="norm")(x)
        if self.residual and arm.rotate:
            x = rotate_hadamard(x).astype(x.dtype)
        draws = arm.stochastic and self.has_rng("rounding")
        context = Context(strength, self.make_rng("rounding") if draws else None)
        return quantized_dot(x, kernel, step, context, arm, self.residual)

    def _initial_step(self, kernel: Float[Array, "D F"]) -> Float[Array, "..."]:
        arm = self.precision
        return initial_step(arm.weight_quantizer, arm.granularity, kernel, self.residual)


def rotary_angles(length: int, head_size: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position times frequency theta^(-2i/H) (RoFormer, arXiv:2104.09864, eq. 15).

    float32 [T, H/2] each, as constants: XLA would recompute them for every element they touch.
    """
    frequencies = theta ** (-np.arange(0, head_size, 2) / head_size)
    angles = np.arange(length)[:, None] * frequencies[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(
    x: Float[Array, "B T N H"], angles: tuple[np.ndarray, np.ndarray]
) -> Float[Array, "B T N H"]:
    """Rotate each head's vector by its position, first half against second, as LLaMA's clients do.

    Computed in float32 and returned in x's dtype.
    """
    cos, sin = (a[None, :, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
