"""Schedules, decay masks and optimizers.

An optimizer here is an optax transformation that turns gradients into a direction. The learning
rate and the weight decay are applied to it once, in `apply_direction`, as traced scalars: they come
from a schedule computed on the host, so one compiled program serves every run of a shape and arm,
whatever its learning rate, decay or schedule.
"""

import dataclasses
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Key

from bitnet_jax.model import linear_kernel
from bitnet_jax.precision import Precision
from bitnet_jax.quantize import quantize

SCHEDULES = ("wsd", "cosine", "two_stage", "trilm")
OPTIMIZERS = ("adamw", "lion", "muon", "bop")
LATENTS = ("float32", "bfloat16", "bfloat16_stochastic")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over a trajectory; steps are optimizer steps.

    decay_fraction: of an endpoint's steps, spent in its final linear decay (wsd only).
    final_ratio: the last learning rate over the peak.
    second_peak: the two-stage schedules' drop, as a ratio of the first peak.
    """

    name: str
    warmup_steps: int
    decay_fraction: float = 0.2
    final_ratio: float = 0.0
    second_peak: float = 2 / 3

    def decay_start(self, end: int) -> int:
        """The step at which an endpoint at step `end` leaves the trunk, still at the full rate."""
        if self.name != "wsd":
            return 0
        return end - max(1, round(self.decay_fraction * end))

    def factors(self, step: int, decay: tuple[int, int] | None) -> tuple[float, float]:
        """What peak learning rate and weight decay are multiplied by at `step`.

        decay: (start, end) of the decay that the step belongs to, or None on a trunk.

        wsd: linear warm-up, constant, linear decay (Hu et al. 2024, arXiv:2404.06395).
        cosine: linear warm-up, then half a cosine to the end.
        two_stage: BitNet b1.58's ("Training Tips, Code and FAQ"): linear decay towards the end;
          half way, the peak drops to `second_peak` and weight decay to zero.
        trilm: the same, but weight decay goes to zero at two thirds (Spectra, arXiv:2407.12327).
        """
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if decay is None:
            return warmup, 1.0
        start, end = max(decay[0], self.warmup_steps if self.name != "wsd" else 0), decay[1]
        progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
        fall = 0.5 * (1 - math.cos(math.pi * progress)) if self.name == "cosine" else progress
        factor = warmup * (1 - (1 - self.final_ratio) * fall)
        if self.name in ("two_stage", "trilm") and step >= end / 2:
            undecayed = step >= end * (1 / 2 if self.name == "two_stage" else 2 / 3)
            return factor * self.second_peak, 0.0 if undecayed else 1.0
        return factor, 1.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What shapes an update. Learning rate and decay are traced, so not part of it.

    latents: how kernels are stored between steps. float32; bfloat16, each update rounded to the
      nearest; or bfloat16 rounded stochastically, so that small updates count on average.
    latent_clip: kernels are kept within +- this many standard deviations of the fan-in
      initialisation, latent_clip/sqrt(fan_in), as binarized networks clip theirs (Courbariaux et
      al. 2015, arXiv:1511.00363, section 2.4); 0 leaves them free.
    bop_ratio: Bop's adaptivity rate over the learning rate. bop_threshold: of its momentum.
    """

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    latents: str = "float32"
    latent_clip: float = 0.0
    bop_ratio: float = 0.2
    bop_threshold: float = 1e-5


def direction(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Clip by the global norm, then the optimizer's direction, to be subtracted.

    adamw: Adam's (arXiv:1412.6980, algorithm 1).
    lion: the sign of an interpolated momentum (arXiv:2302.06675, algorithm 2). Its authors use a
      learning rate 3 to 10 times smaller than AdamW's, and as much more weight decay.
    muon: kernels' momentum orthogonalised, and scaled by .2 sqrt(max(fan_in, fan_out)) to the size
      of Adam's updates, so that Adam's rates serve (arXiv:2502.16982); Adam for the rest.
    bop: kernels' momentum alone, see `_flip`; Adam for the rest. Its update takes learning_rate.
    """
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
    rules = {
        "adamw": lambda: adam,
        "lion": lambda: optax.scale_by_lion(b1=config.b1, b2=config.b2),
        "muon": lambda: optax.partition({True: _muon(), False: adam}, _is_kernel),
        "bop": lambda: optax.partition({True: _momentum(config), False: adam}, _is_kernel),
    }
    clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.with_extra_args_support(optax.chain(clip, rules[config.name]()))


def _is_kernel(params: dict) -> dict:
    return jax.tree_util.tree_map_with_path(lambda path, _: linear_kernel(path), params)


def _muon() -> optax.GradientTransformation:
    def matrices(params: dict) -> dict:
        """Kernels are [L, in, out]: a batch of matrices."""
        spec = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map(lambda _: spec, params)

    def rescale(u: Float[Array, "L D F"], _: Any) -> Float[Array, "L D F"]:
        return 0.2 * math.sqrt(max(u.shape[1:])) * u

    orthogonal = optax.contrib.scale_by_muon(weight_dimension_numbers=matrices)
    return optax.chain(orthogonal, optax.stateless_with_tree_map(rescale))


class _Momentum(NamedTuple):
    m: Any


def _momentum(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """m <- (1 - g) m + g grad, with g = bop_ratio * learning rate (Helwegen et al. 2019, eq. 1)."""

    def init(params):
        return _Momentum(jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None, *, learning_rate, **unused):
        del params, unused
        rate = config.bop_ratio * learning_rate
        m = jax.tree.map(lambda m, g: m + rate * (g - m), state.m, grads)
        return m, _Momentum(m)

    return optax.GradientTransformationExtraArgs(init, update)


# Every parameter is named here, or `decay_mask` refuses it: a new one must choose.
_DECAYED = {"kernel": 1.0, "embedding": 1.0, "head": 1.0, "scale": 0.0, "step": 0.0}


def decay_mask(params: dict) -> dict:
    """1.0 where weight decay acts (matrices), 0.0 where not (scales), by parameter name."""

    def lookup(path, _):
        name = path[-1].key
        if name not in _DECAYED:
            raise ValueError(f"decide whether parameter {jax.tree_util.keystr(path)} decays")
        return _DECAYED[name]

    return jax.tree_util.tree_map_with_path(lookup, params)


def apply_direction(
    config: OptimizerConfig,
    precision: Precision,
    params: dict,
    updates: dict,
    learning_rate: Float[Array, ""],
    weight_decay: Float[Array, ""],
    key: Key[Array, ""] | None = None,
) -> dict:
    """w - lr (u + decay w): decoupled weight decay (AdamW, arXiv:1711.05101, algorithm 2).

    Kernels then go through what the config says of latents; under Bop they take its flips instead.
    key: for stochastic rounding of the latents. Returns what is stored until the next step.
    """

    def step(path, w, u, mask):
        if not linear_kernel(path):
            return w - learning_rate * (u + weight_decay * mask * w)
        if config.name == "bop":
            return _flip(config, precision, w, u)
        w = w - learning_rate * (u + weight_decay * mask * w)
        if config.latent_clip:
            bound = config.latent_clip / math.sqrt(w.shape[-2])
            w = jnp.clip(w, -bound, bound)
        return store(config, w, _fold(key, path))

    return jax.tree_util.tree_map_with_path(step, params, updates, decay_mask(params))


def _flip(
    config: OptimizerConfig,
    precision: Precision,
    w: Float[Array, "L D F"],
    m: Float[Array, "L D F"],
) -> Float[Array, "L D F"]:
    """A code moves one level against its momentum where that is large (Helwegen et al. 2019,
    arXiv:1906.02107, algorithm 1, stated there for two levels: flip where |m| > threshold and m has
    the weight's sign). Latents are then the codes themselves, times 1/sqrt(fan_in)."""
    q = precision.weight_quantizer
    codes = quantize(q, w, (1, 2)).codes.astype(jnp.float32)
    move = jnp.where(jnp.abs(m) > config.bop_threshold, jnp.sign(m), 0)
    return jnp.clip(codes - q.gap * move, q.low, q.high) / math.sqrt(w.shape[-2])


def store(config: OptimizerConfig, w: Float[Array, "..."], key: Key[Array, ""] | None) -> Array:
    """A kernel as it is kept between steps."""
    if config.latents == "float32":
        return w
    if config.latents == "bfloat16":
        return w.astype(jnp.bfloat16)
    # The bits that bfloat16 drops, plus 16 random ones, carry into those it keeps as often as the
    # value is near the upper neighbour. Truncated, so rounded up with exactly that probability.
    assert key is not None
    bits = jax.lax.bitcast_convert_type(w, jnp.uint32)
    noise = jax.random.bits(key, w.shape, jnp.uint16).astype(jnp.uint32)
    kept = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.float32)
    return jnp.where(jnp.isfinite(w), rounded, w).astype(jnp.bfloat16)


def _fold(key: Array | None, path: tuple) -> Array | None:
    """A key of its own for every parameter, by name, so that adding one moves no other."""
    if key is None:
        return None
    return jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))


def tuned_peak_lr(precision: Precision, non_embedding: int) -> float:
    """The peak learning rate used where a config names none: a power law in N, one for each arm.

    Fitted to the optima of `sweeps/learning_rate.py` at 27k, 95k and 330k parameters, 600k tokens
    in batches of 1024 (results/cpu-2core/learning_rate), with one exponent for both arms: alone
    they gave -.52 and -.45. Outside that range this extrapolates: sweep the rate.
    """
    coefficient = 5.2e-3 if precision.quantized else 4.1e-3
    return coefficient * (non_embedding / 1e5) ** -0.49
