"""Schedules, decay masks and optimizers.

An optimizer here is an optax transformation that turns gradients into a direction. The learning
rate and the weight decay are applied to it once, in `apply_direction`, as traced scalars: they come
from a schedule computed on the host, so one compiled program serves every run of a shape and arm,
whatever its learning rate, decay or schedule.
"""

import dataclasses
import math

import jax
import optax
from jaxtyping import Array, Float

from bitnet_jax.errors import ConfigError
from bitnet_jax.precision import Precision

SCHEDULES = ("wsd", "cosine", "two_stage")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over a trajectory; steps are optimizer steps.

    decay_fraction: of an endpoint's steps, spent in its final linear decay (wsd only).
    final_ratio: the last learning rate over the peak.
    second_peak: the two-stage schedule's drop, as a ratio of the first peak.
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
        """
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if decay is None:
            return warmup, 1.0
        start, end = max(decay[0], self.warmup_steps if self.name != "wsd" else 0), decay[1]
        progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
        fall = 0.5 * (1 - math.cos(math.pi * progress)) if self.name == "cosine" else progress
        factor = warmup * (1 - (1 - self.final_ratio) * fall)
        if self.name == "two_stage" and step >= end / 2:
            return factor * self.second_peak, 0.0
        return factor, 1.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What shapes an update's direction. Learning rate and decay are traced, so not part of it."""

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0


def direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by the global norm, then Adam's direction (arXiv:1412.6980, algorithm 1)."""
    if config.name != "adamw":
        raise ConfigError(f"optim.name={config.name!r} is unknown; choose from adamw")
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
    )


# Every parameter is named here, or `decay_mask` refuses it: a new one must choose.
_DECAYED = {"kernel": 1.0, "embedding": 1.0, "head": 1.0, "scale": 0.0}


def decay_mask(params: dict) -> dict:
    """1.0 where weight decay acts (matrices), 0.0 where not (norm scales), by parameter name."""

    def lookup(path, _):
        name = path[-1].key
        if name not in _DECAYED:
            raise ValueError(f"decide whether parameter {jax.tree_util.keystr(path)} decays")
        return _DECAYED[name]

    return jax.tree_util.tree_map_with_path(lookup, params)


def apply_direction(
    params: dict,
    updates: dict,
    learning_rate: Float[Array, ""],
    weight_decay: Float[Array, ""],
) -> dict:
    """w - lr (u + decay w): decoupled weight decay (AdamW, arXiv:1711.05101, algorithm 2)."""

    def step(w, u, mask):
        return w - learning_rate * (u + weight_decay * mask * w)

    return jax.tree.map(step, params, updates, decay_mask(params))


def tuned_peak_lr(precision: Precision, non_embedding: int) -> float:
    """The peak learning rate used where a config names none: a power law in N, one for each arm.

    Fitted to the optima of `sweeps/learning_rate.py` at 27k, 95k and 330k parameters, 600k tokens
    in batches of 1024 (results/cpu-2core/learning_rate), with one exponent for both arms: alone
    they gave -.52 and -.45. Outside that range this extrapolates: sweep the rate.
    """
    coefficient = 5.2e-3 if precision.quantized else 4.1e-3
    return coefficient * (non_embedding / 1e5) ** -0.49
