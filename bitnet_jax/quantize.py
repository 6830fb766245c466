"""Codes and scales: what a tensor becomes before it enters a quantized product.

Every quantizer is a row of one table, `QUANTIZERS`: a grid of integer codes, and a rule that says
how far the grid reaches. `quantize` turns a row and a tensor into codes and a float32 scale, so
that `codes * scale` approximates the tensor. It reads the float32 master (quantizing after a
bfloat16 cast changes .17 % of the trits) and it does not know of gradients: `estimators.py` adds
those to any row, and `matmul.quantized_dot` builds the fused product on them.

The entries of a tensor along `axes` share a scale. A token's activations do (axes=(-1,)); for
weights, `granularity.py` cuts a kernel into the blocks that do.

Codes cannot hold NaN. A NaN or infinity in the input makes the SCALE NaN, so every value it covers
is NaN in turn; the codes beneath are 0. Nothing is ever silently rounded to a trit.

Adding a quantizer is one rule and one row.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Num

# Below this the published codes treat a tensor as zero: Microsoft's "Training Tips, Code and FAQ"
# (2024) clamps both mean|W| and max|x| at 1e-5.
SCALE_FLOOR = 1e-5

Axes = tuple[int, ...]


class Quantized(NamedTuple):
    """`codes * scale` approximates the input.

    codes: int8 for grids, or the input itself where nothing is quantized.
    scale: float32, broadcastable to codes.
    """

    codes: Num[Array, "..."]
    scale: Float[Array, "..."]


class Quantizer(NamedTuple):
    """A row of the table: codes low, low + gap, .., high, and the value that `high` stands for.

    reach: rule (x, axes) -> the positive value that the code `high` stands for, one for all the
      entries along `axes`, kept as dimensions of size 1. None: no quantization.
    gap: between neighbouring codes; 2 for grids without a zero, whose codes are odd.
    threshold: of trits, a rule for the largest magnitude that becomes 0, where it is not reach/2.
    epsilon: added to the reach where codes are made but not to the scale (the paper's placement).
    floor: the least reach.
    centred: the mean along `axes` is taken off before the codes are made.
    learned: the reach is a parameter of the layer (`high` times LSQ's step), which the rule
      initialises.
    """

    reach: Callable[[Array, Axes], Array] | None
    low: int = -1
    high: int = 1
    gap: int = 1
    threshold: Callable[[Array, Axes], Array] | None = None
    epsilon: float = 0.0
    floor: float = SCALE_FLOOR
    centred: bool = False
    learned: bool = False

    @property
    def levels(self) -> int:
        """How many codes the grid has; log2 of it is what one of them weighs in bits."""
        return (self.high - self.low) // self.gap + 1

    @property
    def ternary(self) -> bool:
        """Whether the codes are trits."""
        return self.reach is not None and (self.low, self.high, self.gap) == (-1, 1, 1)


def quantize(
    quantizer: Quantizer,
    x: Float[Array, "..."],
    axes: Axes,
    step: Float[Array, "..."] | None = None,
    noise: Float[Array, "..."] | None = None,
) -> Quantized:
    """Codes and scale of x; entries along `axes` share a scale.

    step: the scale, where it is learned; else the quantizer's rule gives it.
    noise: uniform on [0, 1), of x's shape: rounds stochastically, up with the probability that
      makes the rounded value's mean the value itself (inside the grid). None rounds to nearest.
    """
    if quantizer.reach is None:
        return Quantized(x, jnp.ones((1,) * x.ndim, jnp.float32))
    x = x.astype(jnp.float32)
    if step is None:
        reach = jnp.maximum(quantizer.reach(x, axes), quantizer.floor)
    else:
        reach = _poison(jnp.maximum(step, SCALE_FLOOR) * quantizer.high, x, axes)
    finite = jnp.isfinite(reach)
    if quantizer.centred:
        x = x - _mean(x, axes)
    codes = _codes(quantizer, x, axes, reach + quantizer.epsilon, noise)
    # Casting NaN to an integer is undefined, so those codes are set to 0. An infinite scale would
    # give 0 * inf here and inf there: it becomes NaN, so that all it covers is.
    codes = jnp.where(finite & ~jnp.isnan(codes), codes, 0).astype(jnp.int8)
    return Quantized(codes, jnp.where(finite, reach, jnp.nan) / quantizer.high)


def dequantize(q: Quantized) -> Float[Array, "..."]:
    """The float32 values that the codes stand for."""
    return q.codes.astype(jnp.float32) * q.scale


def _codes(q: Quantizer, x: Array, axes: Axes, reach: Array, noise: Array | None) -> Array:
    """The code nearest to each value, or one of its two neighbours by chance."""
    ratio = x * (q.high / reach)
    if noise is not None:
        steps = jnp.floor((ratio - q.low) / q.gap + noise)
        return jnp.clip(q.low + q.gap * steps, q.low, q.high)
    if q.gap == 2:
        # A value half way goes down: the sign of 0 is -1 (BitNet, arXiv:2310.11453, eq. 2).
        return jnp.clip(2 * jnp.ceil(ratio / 2) - 1, q.low, q.high)
    if q.ternary:
        # round(x / reach) is 0 up to reach/2, that included. Compared and not divided: XLA
        # multiplies by 1/reach, which is off by an ulp, and flushed to 0 above 8.5e37.
        threshold = q.threshold(x, axes) if q.threshold else reach / 2
        return jnp.where(jnp.abs(x) > threshold, jnp.sign(x), 0)
    return jnp.clip(jnp.round(ratio), q.low, q.high)


# ---- Rules: how far a grid reaches. Not finite where an entry is not. --------------------------


def _poison(reach: Array, x: Array, axes: Axes) -> Array:
    """For a reach that would not see a NaN or an infinity."""
    return jnp.where(jnp.isfinite(absmax(x, axes)), reach, jnp.nan)


def _mean(x: Array, axes: Axes) -> Array:
    """Dividing before the sum keeps the mean finite for values of up to 3e38."""
    count = math.prod(x.shape[axis] for axis in axes)
    return jnp.sum(x / count, axis=axes, keepdims=True)


def absmean(x: Array, axes: Axes) -> Array:
    """mean|w| (BitNet b1.58, arXiv:2402.17764, eq. 1-3)."""
    return _mean(jnp.abs(x), axes)


def absmean_plus(x: Array, axes: Axes) -> Array:
    """1e-5 + mean|w|, in the codes and the scale (TriLM, arXiv:2407.12327, table 1)."""
    return SCALE_FLOOR + absmean(x, axes)


def absmedian(x: Array, axes: Axes) -> Array:
    """median|w|, which outliers do not move."""
    return _poison(jnp.median(jnp.abs(x), axis=axes, keepdims=True), x, axes)


def twn_threshold(x: Array, axes: Axes) -> Array:
    """.7 mean|w| (Ternary Weight Networks, arXiv:1605.04711, eq. 6)."""
    return 0.7 * absmean(x, axes)


def twn(x: Array, axes: Axes) -> Array:
    """Mean of the magnitudes above the threshold (Ternary Weight Networks, eq. 5)."""
    above = jnp.abs(x) > twn_threshold(x, axes)
    count = jnp.maximum(jnp.sum(above, axis=axes, keepdims=True), 1)
    mean = jnp.sum(jnp.where(above, jnp.abs(x), 0) / count, axis=axes, keepdims=True)
    return _poison(mean, x, axes)


def gaussian_optimal(x: Array, axes: Axes) -> Array:
    """1.224 sigma, with the threshold at half of it: least squared error for normal weights.

    The three-level quantizer of Lloyd and Max (Max 1960, table I, N=3). sigma^2 is the mean square.
    """
    largest = jnp.maximum(absmax(x, axes), SCALE_FLOOR)
    return 1.2240 * largest * jnp.sqrt(_mean(jnp.square(x / largest), axes))


def absmax(x: Array, axes: Axes) -> Array:
    """max|x| (BitNet, arXiv:2310.11453, eq. 4-5)."""
    return jnp.max(jnp.abs(x), axis=axes, keepdims=True)


def int4_absmean(x: Array, axes: Axes) -> Array:
    """7 mean|x| / sqrt 7: the scale is mean|x| / sqrt 7 (BitNet a4.8, arXiv:2411.04965, eq. 5)."""
    return 7 / math.sqrt(7) * absmean(x, axes)


def lsq(x: Array, axes: Axes) -> Array:
    """2 mean|w|, where LSQ's learned step for trits starts (arXiv:1902.08153, section 2.1)."""
    return 2 * absmean(x, axes)


def stretched(share: float) -> Callable[[Array, Axes], Array]:
    """A grid that divides [-max|w|, max|w|] evenly, so that its last level lies at a share of it.

    ParetoQ's stretched elastic quantization (arXiv:2502.02631, eq. 4): 2/3 for three levels, 3/4
    for four, none of which is 0.
    """

    def reach(x: Array, axes: Axes) -> Array:
        return share * absmax(x, axes)

    return reach


# The paper writes W / (gamma + epsilon) and gamma times trits; Microsoft's FAQ clamps gamma from
# below; TriLM adds 1e-5 to it. They differ where mean|w| is near 1e-5, and there alone.
QUANTIZERS: dict[str, Quantizer] = {
    "none": Quantizer(None),
    "ternary_absmean": Quantizer(absmean),
    "ternary_absmean_paper": Quantizer(absmean, epsilon=SCALE_FLOOR, floor=0.0),
    "ternary_absmean_trilm": Quantizer(absmean_plus),
    "ternary_absmedian": Quantizer(absmedian),
    "ternary_twn": Quantizer(twn, threshold=twn_threshold, floor=0.0),
    "ternary_optimal": Quantizer(gaussian_optimal),
    "ternary_lsq": Quantizer(lsq, learned=True),
    "ternary_stretched": Quantizer(stretched(2 / 3), learned=True),
    "binary": Quantizer(absmean, gap=2, centred=True),
    "int2_absmax": Quantizer(absmax, low=-2),
    "int2_stretched": Quantizer(stretched(3 / 4), low=-3, high=3, gap=2, learned=True),
    "int3_absmax": Quantizer(absmax, low=-4, high=3),
    "int4_absmax": Quantizer(absmax, low=-8, high=7),
    "int4_absmean": Quantizer(int4_absmean, low=-8, high=7),
    "int8_absmax": Quantizer(absmax, low=-128, high=127),
}

# A learned scale is a weight's: activations have a scale a token.
TOKEN_QUANTIZERS = tuple(name for name, row in QUANTIZERS.items() if not row.learned)


def normal_values(count: int = 1 << 16) -> Float[Array, "N"]:
    """The standard normal's quantiles at the middles of `count` equal shares: no sampling noise."""
    return ndtri((jnp.arange(count, dtype=jnp.float32) + 0.5) / count)


@functools.cache
def normal_error(quantizer: Quantizer) -> float:
    """Mean squared error on standard normal values, all under one scale; 0 without quantization.

    Rules by the largest value depend on how many values there are: here 65536, up to 4.3 sigma.
    """
    with jax.ensure_compile_time_eval():
        x = normal_values()
        return float(jnp.mean(jnp.square(dequantize(quantize(quantizer, x, (0,))) - x)))


@functools.cache
def normal_gain(quantizer: Quantizer) -> float:
    """Mean square of what standard normal values become; 1 without quantization."""
    if quantizer.reach is None:
        return 1.0
    with jax.ensure_compile_time_eval():
        x = normal_values()
        return float(jnp.mean(jnp.square(dequantize(quantize(quantizer, x, (0,))))))
