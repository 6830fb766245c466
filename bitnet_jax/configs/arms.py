"""The arm that a config describes: its quantizers, how they change along the way, and all the pairs
of choices that cannot work together."""

import dataclasses

from ml_collections import ConfigDict

from bitnet_jax import cost, hadamard
from bitnet_jax.errors import ConfigError, choose, require
from bitnet_jax.initializers import RESIDUAL_PROJECTIONS
from bitnet_jax.model import TransformerConfig
from bitnet_jax.optim import OptimizerConfig, Schedule
from bitnet_jax.phases import WARMUPS, Phases
from bitnet_jax.precision import Precision, get_precision, granularity
from bitnet_jax.quantize import TOKEN_QUANTIZERS, absmedian
from bitnet_jax.regularizers import REGULARIZERS

CHANGES = ("weights", "activations", "estimator", "activation_estimator", "rotate")


def resolve_precision(config: ConfigDict, model: TransformerConfig) -> Precision:
    """The arm, with the config's changes to it, checked against the model's shape.

    Raises:
      ConfigError: unknown names, or an arm that this shape cannot have.
    """
    q = config.quantization
    arm = get_precision(
        config.precision,
        config.matmul.carrier,
        config.matmul.wire,
        granularity=granularity(q.granularity, q.granularity_size),
        **{key: q[key] for key in CHANGES},
    )
    _check_shapes(arm, model)
    return arm


def _check_shapes(arm: Precision, model: TransformerConfig) -> None:
    for name, (inputs, outputs) in cost.linear_shapes(model).items():
        residual = name in RESIDUAL_PROJECTIONS
        why = arm.granularity.refusal(inputs, outputs, residual)
        if why:
            key, value = "quantization.granularity_size", arm.granularity.size
            raise ConfigError(f"{key}={value!r}: {why}; the model's widths are {_widths(model)}")
        if arm.rotate and residual:
            require(
                hadamard.supported(inputs),
                "quantization.rotate",
                True,
                f"no Hadamard matrix for the {inputs} inputs of a kernel: a width must be a power "
                "of two, times 12, 20, 44 or the like (bitnet_jax/hadamard.py)",
            )


def _widths(model: TransformerConfig) -> str:
    return f"width {model.width}, ff_width {model.ff_width}"


def resolve_phases(
    config: ConfigDict, arm: Precision, schedule: Schedule, ends: tuple[int, ...]
) -> tuple[Precision, Phases]:
    """The arm, named by its late switch if it has one, and the phases of its trajectory.

    Raises:
      ConfigError: phases that do not fit the schedule, or an arm that has nothing to warm up.
    """
    q = config.quantization
    choose("quantization.warmup", q.warmup, WARMUPS)
    share = "it must lie in (0, 1)"
    require(0 < q.warmup_fraction < 1, "quantization.warmup_fraction", q.warmup_fraction, share)
    require(0 < q.late_fraction < 1, "quantization.late_fraction", q.late_fraction, share)
    require(
        0.1 <= q.steepness <= 1000,
        "quantization.steepness",
        q.steepness,
        "it must lie in [0.1, 1000]; published ones are 4 to 100",
    )
    phases = Phases(steepness=q.steepness, late_fraction=q.late_fraction)
    if q.warmup != "none":
        phases = dataclasses.replace(
            phases, warmup=q.warmup, warmup_steps=max(1, round(q.warmup_fraction * ends[0]))
        )
        _check_warmup(q, arm, phases, schedule, ends)
    if q.late_activations is None:
        return arm, phases
    choose("quantization.late_activations", q.late_activations, TOKEN_QUANTIZERS)
    arm = dataclasses.replace(arm, name=f"{arm.name}+late={q.late_activations}")
    late = dataclasses.replace(arm, activations=q.late_activations)
    require(
        arm.activations != late.activations,
        "quantization.late_activations",
        q.late_activations,
        f"the arm's activations are {arm.activations} already",
    )
    phases = dataclasses.replace(phases, late=late)
    for end in ends:
        require(
            phases.late_start(end) >= schedule.decay_start(end),
            "quantization.late_fraction",
            q.late_fraction,
            f"the switch must come within the decay, the last {schedule.decay_fraction} of a "
            "budget: the trunk is shared",
        )
        require(
            phases.late_start(end) >= phases.warmup_steps,
            "quantization.late_fraction",
            q.late_fraction,
            "the switch must come after the warm-up of quantization",
        )
    return arm, phases


def _check_warmup(
    q: ConfigDict, arm: Precision, phases: Phases, schedule: Schedule, ends: tuple[int, ...]
) -> None:
    require(
        arm.quantized or arm.activations != "none",
        "quantization.warmup",
        q.warmup,
        f"the arm {arm.name} quantizes nothing, so there is nothing to warm up",
    )
    require(
        schedule.name != "wsd" or phases.warmup_steps <= schedule.decay_start(ends[0]),
        "quantization.warmup_fraction",
        q.warmup_fraction,
        f"quantization must be complete before the first decay of {schedule.decay_fraction} begins",
    )


def check_optimizer(o: OptimizerConfig, arm: Precision) -> None:
    """Refuse an optimizer that cannot train the arm.

    Raises:
      ConfigError: Bop without codes of neighbouring levels, or with what acts on its latents.
    """
    if o.name == "bop":
        _check_bop(o, arm)


def _check_bop(o: OptimizerConfig, arm: Precision) -> None:
    key, value = "optim.name", o.name
    q = arm.weight_quantizer
    require(
        arm.quantized and q.high == 1 and q.low == -1 and not q.learned,
        key,
        value,
        f"Bop flips trits or signs whose scale follows from them; the weights of {arm.name} are "
        f"{arm.weights}; take adamw, lion or muon",
    )
    require(
        q.reach is not absmedian,
        key,
        value,
        "a median is 0 once half of the codes are, and Bop's latents are the codes; take "
        "ternary_absmean, ternary_twn or ternary_optimal",
    )
    require(
        arm.granularity.kind == "tensor",
        key,
        value,
        f"Bop's flips know one scale a tensor, not {arm.granularity.kind}",
    )
    keeps = "Bop keeps codes, not latents, so there is nothing to round"
    require(o.latents == "float32", "optim.latents", o.latents, f"{keeps}; take float32")
    require(o.latent_clip == 0, "optim.latent_clip", o.latent_clip, f"{keeps} or clip; take 0")
    require(
        arm.estimator != "stochastic",
        "quantization.estimator",
        arm.estimator,
        f"{keeps} stochastically; take identity",
    )


def check_regularizer(config: ConfigDict, arm: Precision) -> None:
    """Refuse a regularizer that is unknown, has no effect, or has no levels to act on.

    Raises:
      ConfigError: as said.
    """
    name, weight = config.loss.regularizer, config.loss.regularizer_weight
    choose("loss.regularizer", name, ("none", *REGULARIZERS))
    key = "loss.regularizer_weight"
    if name == "none":
        require(weight == 0, key, weight, f"name one: {', '.join(REGULARIZERS)}")
        return
    require(weight < 0 or weight > 0, key, weight, "give it a coefficient, of either sign")
    require(
        arm.quantized,
        "loss.regularizer",
        name,
        f"the weights of {arm.name} are not quantized, so they have no levels",
    )
