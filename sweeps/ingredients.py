"""Every ingredient of 1.58-bit training, one at a time, at one small size and three seeds.

    python -m experiments.run --sweep --config=sweeps/ingredients.py
    python -m analysis.ingredients results/ingredients/endpoints.parquet

Two base recipes. `full` is BitNet b1.58 2B4T as this project trains it; from it one ingredient is
left out ("without"), or an alternative put in its place ("instead"). `minimal` is ternary weights
in a LLaMA and nothing else; to it one ingredient is added ("with"). A seed fixes initial values and
data order, so each variant is compared with its base seed by seed.

Every run has the learning rate tuned for the base recipe at this size and budget, save where arm
or optimizer is another: each has the best of its rates in `sweeps/optimizers.py`, at a seed of its
own. So a variant that would want another rate is undersold.
"""

from typing import Any

from ml_collections import ConfigDict

from bitnet_jax import ladder
from bitnet_jax.configs import default
from bitnet_jax.errors import choose
from bitnet_jax.quantize import QUANTIZERS
from sweeps.grid import Point, axis, chain, parse_arg, product, tags

Overrides = dict[str, Any]

MINIMAL: Overrides = {
    "quantization.activations": "none",
    "model.norms": "pre",
    "model.activation": "silu",
    "model.init": "flax",
    "optim.weight_decay": 0.0,
}

# change: (factor, keys). The factor is the knob that is turned.
WITHOUT: dict[str, tuple[str, Overrides]] = {
    "ternary weights": ("weights", {"quantization.weights": "none"}),
    "int8 activations": ("activations", {"quantization.activations": "none"}),
    "sub-norms": ("norms", {"model.norms": "pre"}),
    "squared ReLU": ("activation function", {"model.activation": "silu"}),
    "gate": ("activation function", {"model.gated": False}),
    "residual init": ("init", {"model.init": "flax"}),
    "float32 latents": ("latents", {"optim.latents": "bfloat16"}),
    "weight decay": ("weight decay", {"optim.weight_decay": 0.0}),
}

INSTEAD: dict[str, tuple[str, Overrides]] = {
    "fp16": ("arm", {"precision": "fp16", "_optimizer": "float"}),
    "bf16": ("arm", {"precision": "bf16", "_optimizer": "float"}),
    **{
        f"weights {name}": ("weights", {"quantization.weights": name})
        for name in QUANTIZERS
        if name not in ("none", "ternary_absmean")
    },
    "scale a channel": ("granularity", {"quantization.granularity": "channel"}),
    "scale a group of 16": (
        "granularity",
        {"quantization.granularity": "group", "quantization.granularity_size": 16},
    ),
    "scale a shard of 4": (
        "granularity",
        {"quantization.granularity": "shard", "quantization.granularity_size": 4},
    ),
    **{
        f"activations {name}": ("activations", {"quantization.activations": name})
        for name in ("int4_absmean", "int4_absmax", "ternary_absmean", "ternary_twn")
    },
    "activations int4_absmean, rotated": (
        "activations",
        {"quantization.activations": "int4_absmean", "quantization.rotate": True},
    ),
    "activations ternary_twn, rotated": (
        "activations",
        {"quantization.activations": "ternary_twn", "quantization.rotate": True},
    ),
    "int8, late int4_absmean": ("activations", {"quantization.late_activations": "int4_absmean"}),
    "estimator clipped": ("estimator", {"quantization.estimator": "clipped"}),
    "estimator trust": ("estimator", {"quantization.estimator": "trust"}),
    "estimator stochastic": ("estimator", {"quantization.estimator": "stochastic"}),
    "warm-up linear": ("warm-up", {"quantization.warmup": "linear"}),
    "warm-up exponential": ("warm-up", {"quantization.warmup": "exponential"}),
    "warm-up sigmoid": ("warm-up", {"quantization.warmup": "sigmoid"}),
    "sin^2 toward levels": ("regularizer", {"loss.regularizer": "sin2", "_weight": 1.0}),
    "sin^2 away from levels": ("regularizer", {"loss.regularizer": "sin2", "_weight": -1.0}),
    "dampening": ("regularizer", {"loss.regularizer": "dampening", "_weight": 1.0}),
    "dampening reversed": ("regularizer", {"loss.regularizer": "dampening", "_weight": -1.0}),
    "sin^2 toward levels, weak": ("regularizer", {"loss.regularizer": "sin2", "_weight": 0.1}),
    "sin^2 away from levels, weak": ("regularizer", {"loss.regularizer": "sin2", "_weight": -0.1}),
    "dampening, weak": ("regularizer", {"loss.regularizer": "dampening", "_weight": 0.1}),
    "dampening reversed, weak": ("regularizer", {"loss.regularizer": "dampening", "_weight": -0.1}),
    "Lion": ("optimizer", {"optim.name": "lion", "_optimizer": "lion"}),
    "Muon": ("optimizer", {"optim.name": "muon", "_optimizer": "muon"}),
    "Bop": ("optimizer", {"optim.name": "bop", "_optimizer": "bop"}),
    "clipped latents": ("latents", {"optim.latent_clip": 2.0}),
    "bfloat16 latents, stochastic": ("latents", {"optim.latents": "bfloat16_stochastic"}),
    "schedule cosine": ("schedule", {"schedule.name": "cosine"}),
    "schedule two-stage": ("schedule", {"schedule.name": "two_stage"}),
    "schedule TriLM": ("schedule", {"schedule.name": "trilm"}),
    "init nanotron": ("init", {"model.init": "nanotron"}),
    "init SubLN": ("init", {"model.init": "subln"}),
    "init quantizer": ("init", {"model.init": "quantizer"}),
    "norm in every linear": ("norms", {"model.norms": "inside"}),
}

WITH: dict[str, tuple[str, Overrides]] = {
    "int8 activations": ("activations", {"quantization.activations": "int8_absmax"}),
    "ternary activations": ("activations", {"quantization.activations": "ternary_twn"}),
    "sub-norms": ("norms", {"model.norms": "sub"}),
    "norm in every linear": ("norms", {"model.norms": "inside"}),
    "squared ReLU": ("activation function", {"model.activation": "relu2"}),
    "residual init": ("init", {"model.init": "fan_in"}),
    "SubLN init": ("init", {"model.init": "subln"}),
    "quantizer init": ("init", {"model.init": "quantizer"}),
    "weight decay": ("weight decay", {"optim.weight_decay": 0.1}),
    "two-stage schedule": ("schedule", {"schedule.name": "two_stage"}),
    "linear warm-up": ("warm-up", {"quantization.warmup": "linear"}),
    "sin^2 toward levels": ("regularizer", {"loss.regularizer": "sin2", "_weight": 1.0}),
    "trust estimator": ("estimator", {"quantization.estimator": "trust"}),
    "learned scales": ("weights", {"quantization.weights": "ternary_lsq"}),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The base of every run, and the axes."""
    parse_arg(arg)
    c = default.get_config()
    c.name = "ingredients"
    c.model.size = "95k"
    c.train.tokens = (400_000,)
    c.eval.tokens = 131_072
    c.log.layers = False
    c.checkpoint.keep_model = False
    c.tags.base = c.tags.kind = c.tags.change = c.tags.factor = ""
    c.sweep.seeds = (0, 1, 2)
    c.sweep.bases = ("full", "minimal")
    c.sweep.regularizer_weight = 1.0
    # The best of sweeps/optimizers.py (results/cpu-2core/optimizers); AdamW's is flat in the
    # ternary arm, from 2.5e-3 to 1e-2 within seed noise.
    c.optim.peak_lr = 7.5e-3
    c.sweep.float_lr = 2.5e-3
    c.sweep.lion_lr = 1.2e-3
    c.sweep.muon_lr = 1e-2
    c.sweep.bop_lr = 2.5e-3
    c.sweep.bop_threshold = 3e-6
    return c


def sweep(config: ConfigDict) -> list[Point]:
    """Each base, then its variants; the seeds of one follow each other and share a program."""
    full = variants(config, "full", {}, [("without", WITHOUT), ("instead", INSTEAD)])
    minimal = variants(config, "minimal", MINIMAL, [("with", WITH)])
    known = {"full": full, "minimal": minimal}
    for name in config.sweep.bases:
        choose("sweep.bases", name, known)
    chosen = [known[name] for name in config.sweep.bases]
    return product(chain(*chosen), axis("seed", config.sweep.seeds))


def variants(
    config: ConfigDict,
    base: str,
    recipe: Overrides,
    kinds: list[tuple[str, dict[str, tuple[str, Overrides]]]],
) -> list[Point]:
    """A base recipe, and what each kind of change makes of it, tagged."""
    points = [{**recipe, **tags(base=base, kind="base", change="", factor="")}]
    for kind, changes in kinds:
        for change, (factor, keys) in changes.items():
            words = tags(base=base, kind=kind, change=change, factor=factor)
            points.append({**recipe, **_filled_in(config, keys), **words})
    return points


def as_wide(config: ConfigDict, keys: Overrides) -> Overrides:
    """A recipe without a gate gets its matrix's parameters in the other two."""
    if keys.get("model.gated", True):
        return keys
    return {**keys, "model.ff_width": 3 * ladder.get_shape(config.model.size).ff_width // 2}


def _filled_in(config: ConfigDict, keys: Overrides) -> Overrides:
    """Values that the sweep's own axes decide in place of the keys that begin with _."""
    filled = {k: v for k, v in as_wide(config, keys).items() if not k.startswith("_")}
    if "_weight" in keys:
        filled["loss.regularizer_weight"] = keys["_weight"] * config.sweep.regularizer_weight
    if "_optimizer" in keys:
        filled["optim.peak_lr"] = config.sweep[f"{keys['_optimizer']}_lr"]
    if keys.get("_optimizer") == "bop":
        filled["optim.bop_threshold"] = config.sweep.bop_threshold
    return filled
