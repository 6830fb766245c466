"""What a run tells of its latent weights while it trains.

Codes are compared with snapshots of earlier ones: at the last log line, and one and two steps ago.
The loop takes those just before each log line (`remember`), so a step pays nothing for them, and
they travel in checkpoints, so that an interrupted run logs what an undisturbed one does. Trits are
kept in 2 bits: three snapshots of bytes would outweigh what int8 operands save in a step.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, UInt8

from bitnet_jax import packing
from bitnet_jax.latents import Latents, latent_codes, latents
from bitnet_jax.precision import Precision
from bitnet_jax.quantize import Quantizer

Codes = dict[str, Int8[Array, "L I d F"] | UInt8[Array, "L I d _"]]


class Snapshots(NamedTuple):
    """Codes at the last log line, two steps ago, and one step ago; packed where they fit."""

    logged: Codes
    before_last: Codes
    last: Codes


def first(params: dict, precision: Precision) -> Snapshots:
    """Before any step all are those of the initial values."""
    codes = _packed(latent_codes(params, precision), precision)
    return Snapshots(codes, codes, codes)


def _packed(codes: dict[str, Array], precision: Precision) -> Codes:
    quantizer = precision.weight_quantizer
    if not packing.fits(quantizer):
        return codes
    return {name: packing.pack(own, quantizer) for name, own in codes.items()}


def _unpacked(stored: Array, size: int, q: Quantizer) -> Int8[Array, "L I d F"]:
    return packing.unpack(stored, size, q) if packing.fits(q) else stored


@functools.partial(jax.jit, static_argnames="precision")
def remember(snapshots: Snapshots, params: dict, precision: Precision) -> Snapshots:
    """Before a step: its codes are the last, and the last the ones before."""
    codes = _packed(latent_codes(params, precision), precision)
    return Snapshots(snapshots.logged, snapshots.last, codes)


@functools.partial(jax.jit, static_argnames="precision")
def observe(
    snapshots: Snapshots, params: dict, precision: Precision
) -> tuple[Snapshots, dict[str, dict[str, Float[Array, "L"]]]]:
    """At a log line: statistics of every projection in every block, and what the next line needs.

    By names such as `attention/q`; shares of its weights unless said otherwise.
      negative, zero, positive: codes by sign. `zero` is a ternary grid's dead zone.
      entropy: of the codes, bits a weight
      flips: whose code the last step changed
      flips_since: whose code differs from that at the last log line
      oscillations: whose code the last step set back to what it was two steps ago
      distance: mean distance to the nearest threshold, in steps of the grid, taking thresholds half
        way between the levels
      near: within a tenth of a step of a threshold, where weights are said to be trapped
      beyond: more than half a step beyond the last level
    """
    quantizer, now = precision.weight_quantizer, latents(params, precision)
    stats = {}
    for name, latent in now.items():
        size = latent.codes.shape[-1]
        earlier = (_unpacked(codes[name], size, quantizer) for codes in snapshots)
        stats[name] = _statistics(quantizer, latent, *earlier)
    codes = _packed({name: latent.codes for name, latent in now.items()}, precision)
    return Snapshots(codes, snapshots.last, snapshots.last), stats


def _statistics(
    q: Quantizer, latent: Latents, logged: Array, before_last: Array, last: Array
) -> dict[str, Float[Array, "L"]]:
    def share(condition: Array) -> Float[Array, "L"]:
        return jnp.mean(condition, axis=(1, 2, 3), dtype=jnp.float32)

    codes, values = latent.codes, latent.values
    if q.centred:
        axes = (2, 3) if latent.scale.shape[3] == 1 else (2,)  # what shares a scale
        values = values - jnp.mean(values, axis=axes, keepdims=True)
    grid = values / latent.scale
    shares = jnp.stack([share(codes == code) for code in range(q.low, q.high + 1, q.gap)])
    lowest, highest = q.low + q.gap / 2, q.high - q.gap / 2
    nearest = q.gap * jnp.round((grid - lowest) / q.gap) + lowest
    distance = jnp.abs(grid - jnp.clip(nearest, lowest, highest)) / q.gap
    return {
        "negative": share(codes < 0),
        "zero": share(codes == 0),
        "positive": share(codes > 0),
        "entropy": -jnp.sum(shares * jnp.log2(jnp.where(shares > 0, shares, 1)), axis=0),
        "flips": share(codes != last),
        "flips_since": share(codes != logged),
        "oscillations": share((codes != last) & (codes == before_last)),
        "distance": share(distance),
        "near": share(distance < 0.1),
        "beyond": share((grid < q.low - q.gap / 2) | (grid > q.high + q.gap / 2)),
    }


def summarize(
    stats: dict[str, dict[str, Float[Array, "L"]]], sizes: dict[str, int]
) -> dict[str, float]:
    """Each statistic's mean over all quantized weights. sizes: weights of a projection's kernel."""
    total = sum(sizes[name] * len(values["zero"]) for name, values in stats.items())
    return {
        key: float(sum(sizes[n] * np.sum(stats[n][key], dtype=np.float64) for n in stats) / total)
        for key in next(iter(stats.values()))
    }
