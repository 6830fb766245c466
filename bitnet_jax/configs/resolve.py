"""From a config to a run: every check that can be made before anything trains.

Each failure is a ConfigError of one line that names the key, its value and what would be right.
"""

import dataclasses
import hashlib
import os
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bitnet_jax import cost, ladder, sharding
from bitnet_jax.attention import IMPLEMENTATIONS
from bitnet_jax.configs import arms
from bitnet_jax.configs.check import check_keys
from bitnet_jax.data import Corpus
from bitnet_jax.errors import choose, require
from bitnet_jax.initializers import INITIALIZERS
from bitnet_jax.member import LoopOptions
from bitnet_jax.model import ACTIVATIONS, NORMS, TransformerConfig
from bitnet_jax.optim import (
    LATENTS,
    OPTIMIZERS,
    SCHEDULES,
    OptimizerConfig,
    Schedule,
    tuned_peak_lr,
)
from bitnet_jax.precision import Precision
from bitnet_jax.sharding import MeshShape
from bitnet_jax.spec import DataSpec, RunSpec
from bitnet_jax.train_step import StepConfig


def resolve(config: ConfigDict, corpus: Corpus) -> RunSpec:
    """The run that a config describes on a corpus.

    Raises:
      ConfigError: a value that cannot work, or two that cannot work together.
    """
    check_keys(config)
    model = _model(config, corpus.vocab_size)
    precision = arms.resolve_precision(config, model)
    _check_attention(model, precision)
    batch_size = _batch_size(config)
    ends = _ends(config)
    schedule = _schedule(config, ends)
    precision, phases = arms.resolve_phases(config, precision, schedule, ends)
    optimizer = _optimizer(config)
    arms.check_optimizer(optimizer, precision)
    arms.check_regularizer(config, precision)
    peak_lr = config.optim.peak_lr
    if peak_lr is None:
        peak_lr = tuned_peak_lr(precision, cost.count_parameters(model).non_embedding)
    require(peak_lr > 0, "optim.peak_lr", peak_lr, "it must be positive")
    require(
        config.optim.weight_decay >= 0,
        "optim.weight_decay",
        config.optim.weight_decay,
        "it must not be negative",
    )
    require(config.loss.z_loss >= 0, "loss.z_loss", config.loss.z_loss, "it must not be negative")
    seeds = {
        key: config.seed if config.seeds[key] is None else config.seeds[key]
        for key in ("init", "data")
    }
    for key, seed in seeds.items():
        require(0 <= seed < 2**31, f"seeds.{key}", seed, "it must lie in [0, 2^31)")
    return RunSpec(
        size=_size_name(config),
        seed_init=seeds["init"],
        seed_data=seeds["data"],
        step=StepConfig(
            model,
            precision,
            optimizer,
            float(config.loss.z_loss),
            config.loss.regularizer,
            float(config.loss.regularizer_weight),
            config.train.microbatches,
            mesh=_mesh(config, model, batch_size),
        ),
        data=_data(config, corpus),
        batch_size=batch_size,
        ends=ends,
        schedule=schedule,
        peak_lr=float(peak_lr),
        weight_decay=float(config.optim.weight_decay),
        phases=phases,
        rollbacks=_rollbacks(config),
        tags=tuple((key, str(value)) for key, value in sorted(config.tags.items())),
    )


def loop_options(config: ConfigDict) -> LoopOptions:
    """The part of a config that cannot change a result.

    Raises:
      ConfigError: a value that cannot work.
    """
    require(config.log.every >= 1, "log.every", config.log.every, "it must be at least 1")
    require(config.eval.every >= 0, "eval.every", config.eval.every, "it must not be negative")
    seconds = config.checkpoint.seconds
    require(seconds >= 0, "checkpoint.seconds", seconds, "it must not be negative")
    sample = config.log.gradient_sample
    require(
        sample == 0 or 2 <= sample <= 4096,
        "log.gradient_sample",
        sample,
        "0 for none, or 2 to 4096: each weight costs two forward passes",
    )
    resident = config.launch.resident_bytes
    require(resident >= 0, "launch.resident_bytes", resident, "it must not be negative")
    dispatch = _launch(config, "dispatch", on_cpu=1, elsewhere=16)
    right = "it must be at most 65536: a call has room for so many steps, taken or not"
    require(dispatch <= 2**16, "launch.dispatch", dispatch, right)
    modes = (None, "online", "offline", "disabled")
    wandb = config.tracking.wandb
    require(wandb in modes, "tracking.wandb", wandb, "choose from online, offline, disabled")
    project = config.tracking.project
    require(
        0 < len(project) <= 128 and project.isprintable() and not set(project) & set("/\\#?%:"),
        "tracking.project",
        project,
        "a name of 1 to 128 characters without / \\ # ? % :, as Weights & Biases demands",
    )
    return LoopOptions(
        log_every=config.log.every,
        eval_every=config.eval.every,
        parallel=parallel(config),
        checkpoint_seconds=seconds,
        log_layers=config.log.layers,
        gradient_sample=config.log.gradient_sample,
        keep_model=config.checkpoint.keep_model,
        dispatch=dispatch,
        resident_bytes=config.launch.resident_bytes,
        wandb_mode=wandb,
        wandb_project=config.tracking.project,
    )


def group_size(config: ConfigDict) -> int:
    """How many runs of one shape and arm may train as one program.

    Raises:
      ConfigError: fewer than one.
    """
    cut = max(config.mesh.data, config.mesh.tensor) > 1
    size = _launch(config, "group", on_cpu=1, elsewhere=1 if cut else 8 * jax.device_count())
    right = "a run on a mesh of several devices is alone in its program"
    require(size == 1 or not cut, "launch.group", size, right)
    return size


def parallel(config: ConfigDict) -> int:
    """How many groups train side by side, each a program of its own.

    Raises:
      ConfigError: fewer than one.
    """
    return _launch(config, "parallel", on_cpu=min(2, _cores()), elsewhere=1)


def _cores() -> int:
    """That this process may use, which a cluster may have bound to some of the machine's."""
    bound = getattr(os, "sched_getaffinity", None)
    return len(bound(0)) if bound else os.cpu_count() or 1


def failures_allowed(config: ConfigDict) -> int:
    """How often a run may fail without getting on until workers give it up.

    Raises:
      ConfigError: fewer than one.
    """
    count = config.launch.failures
    require(count >= 1, "launch.failures", count, "it must be at least 1")
    return count


def _launch(config: ConfigDict, name: str, on_cpu: int, elsewhere: int) -> int:
    value = config.launch[name]
    if value is None:
        return on_cpu if jax.default_backend() == "cpu" else elsewhere
    require(value >= 1, f"launch.{name}", value, "it must be at least 1")
    return value


def _mesh(config: ConfigDict, model: TransformerConfig, batch_size: int) -> MeshShape:
    shape = MeshShape(config.mesh.data, config.mesh.tensor)
    sizes = {key: getattr(model, key) for key in ("width", "ff_width", "kv_heads")}
    sharding.check(shape, sizes, batch_size // config.train.microbatches)
    return shape


SHAPE_KEYS = ladder.Shape._fields


def _size_name(config: ConfigDict) -> str:
    """The ladder's name, marked where the config overrides its shape."""
    changed = [f"{key}{config.model[key]}" for key in SHAPE_KEYS if config.model[key] is not None]
    return "-".join([config.model.size, *changed])


def _model(config: ConfigDict, vocab_size: int) -> TransformerConfig:
    m = config.model
    shape = ladder.get_shape(m.size)._asdict()
    shape.update({key: m[key] for key in SHAPE_KEYS if m[key] is not None})
    for key, value in shape.items():
        require(value >= 1, f"model.{key}", value, "it must be at least 1")
    width, heads, kv_heads = shape["width"], shape["heads"], shape["kv_heads"]
    require(width % heads == 0, "model.width", width, f"it must divide by model.heads={heads}")
    require(
        width // heads % 2 == 0,
        "model.width",
        width,
        f"width / heads = {width // heads} must be even for rotary positions",
    )
    require(
        heads % kv_heads == 0, "model.kv_heads", kv_heads, f"it must divide model.heads={heads}"
    )
    choose("model.activation", m.activation, ACTIVATIONS)
    choose("model.norms", m.norms, NORMS)
    choose("model.init", m.init, INITIALIZERS)
    choose("model.attention", m.attention, IMPLEMENTATIONS)
    require(m.norm_epsilon > 0, "model.norm_epsilon", m.norm_epsilon, "it must be positive")
    require(m.rope_theta > 1, "model.rope_theta", m.rope_theta, "it must be above 1")
    model = TransformerConfig(
        vocab_size=vocab_size,
        activation=m.activation,
        gated=m.gated,
        norms=m.norms,
        init=m.init,
        tied_embeddings=m.tied_embeddings,
        rope_theta=m.rope_theta,
        norm_epsilon=m.norm_epsilon,
        remat=m.remat,
        attention=m.attention,
        **shape,
    )
    _check_size(model)
    return model


MOST_PARAMETERS = 10**13


def _check_size(model: TransformerConfig) -> None:
    """Refuse a slip of some zeros, before its sizes overflow what shows them."""
    parameters = cost.count_parameters(model).total
    if parameters > MOST_PARAMETERS:
        key = max(SHAPE_KEYS, key=lambda key: getattr(model, key))
        right = f"the model has {parameters:.0e} parameters; at most {MOST_PARAMETERS:.0e}"
        require(False, f"model.{key}", getattr(model, key), right)


def _check_attention(model: TransformerConfig, precision: Precision) -> None:
    possible = (
        jax.default_backend() == "gpu"
        and precision.float_bits == 16
        and model.head_size % 8 == 0
        and model.head_size <= 128
    )
    right = "it needs an NVIDIA GPU, a 16-bit arm and heads of up to 128 in multiples of 8"
    require(model.attention != "cudnn" or possible, "model.attention", model.attention, right)


def _batch_size(config: ConfigDict) -> int:
    tokens, length = config.train.batch_tokens, config.data.sequence_length
    require(length >= 2, "data.sequence_length", length, "it must be at least 2")
    require(
        tokens >= length and tokens % length == 0,
        "train.batch_tokens",
        tokens,
        f"it must be a multiple of data.sequence_length={length}",
    )
    require(tokens < 2**31, "train.batch_tokens", tokens, "it must lie below 2^31")
    parts = config.train.microbatches
    require(
        parts >= 1 and tokens // length % parts == 0,
        "train.microbatches",
        parts,
        f"it must divide the batch of {tokens // length} sequences",
    )
    return tokens // length


def _rollbacks(config: ConfigDict) -> int:
    count = config.train.rollbacks
    require(0 <= count <= 100, "train.rollbacks", count, "it must lie in [0, 100]")
    return count


def _ends(config: ConfigDict) -> tuple[int, ...]:
    """Optimizer steps of the endpoints: each budget to the nearest whole batch."""
    budgets = config.train.tokens
    numbers = all(_is_count(b) for b in budgets)
    require(len(budgets) > 0 and numbers, "train.tokens", budgets, "positive whole numbers")
    require(budgets[-1] < 2**63, "train.tokens", budgets, "a budget must lie below 2^63")
    require(
        list(budgets) == sorted(set(budgets)), "train.tokens", budgets, "budgets must be increasing"
    )
    ends = tuple(round(b / config.train.batch_tokens) for b in budgets)
    require(
        ends[0] >= 1 and len(set(ends)) == len(ends),
        "train.tokens",
        budgets,
        f"each must hold a further batch of {config.train.batch_tokens} tokens",
    )
    require(
        ends[-1] < 2**31,
        "train.tokens",
        budgets,
        f"{ends[-1]:.1e} steps; at most 2^31, so give train.batch_tokens more than "
        f"{config.train.batch_tokens}",
    )
    return ends


def _is_count(value: Any) -> bool:
    """Whether a value is a positive whole number; 1e6 is one, and True is none."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and value > 0


def _schedule(config: ConfigDict, ends: tuple[int, ...]) -> Schedule:
    s = config.schedule
    choose("schedule.name", s.name, SCHEDULES)
    require(
        len(ends) == 1 or s.name == "wsd",
        "train.tokens",
        config.train.tokens,
        f"schedule.name={s.name!r} has one endpoint, so give one budget",
    )
    require(
        0 <= s.warmup_fraction < 1,
        "schedule.warmup_fraction",
        s.warmup_fraction,
        "it must lie in [0, 1)",
    )
    require(
        0 < s.decay_fraction <= 1,
        "schedule.decay_fraction",
        s.decay_fraction,
        "it must lie in (0, 1]",
    )
    require(0 <= s.final_ratio <= 1, "schedule.final_ratio", s.final_ratio, "it must lie in [0, 1]")
    require(0 < s.second_peak <= 1, "schedule.second_peak", s.second_peak, "it must lie in (0, 1]")
    warmup = round(s.warmup_fraction * ends[0])
    schedule = Schedule(s.name, warmup, s.decay_fraction, s.final_ratio, s.second_peak)
    overlap = s.name == "wsd" and schedule.warmup_steps > schedule.decay_start(ends[0])
    require(
        not overlap,
        "schedule.warmup_fraction",
        s.warmup_fraction,
        f"warm-up must end before the first decay of {s.decay_fraction} begins",
    )
    return schedule


def _optimizer(config: ConfigDict) -> OptimizerConfig:
    o = config.optim
    choose("optim.name", o.name, OPTIMIZERS)
    choose("optim.latents", o.latents, LATENTS)
    for key in ("b1", "b2"):
        right = "it must lie in [0, 1), in float32"
        require(o[key] >= 0 and float(np.float32(o[key])) < 1, f"optim.{key}", o[key], right)
    for key in ("epsilon", "clip_norm", "bop_ratio", "bop_threshold"):
        require(o[key] > 0, f"optim.{key}", o[key], "it must be positive")
    require(
        o.latent_clip == 0 or 0.01 <= o.latent_clip <= 1000,
        "optim.latent_clip",
        o.latent_clip,
        "0 for none, or 0.01 to 1000 standard deviations",
    )
    require(o.bop_ratio <= 10, "optim.bop_ratio", o.bop_ratio, "it must be at most 10")
    return OptimizerConfig(**{f.name: o[f.name] for f in dataclasses.fields(OptimizerConfig)})


def _data(config: ConfigDict, corpus: Corpus) -> DataSpec:
    length, tokens = config.data.sequence_length, config.eval.tokens
    for split in ("train", "valid"):
        have = len(getattr(corpus, split))
        require(
            have > length,
            "data.sequence_length",
            length,
            f"the {split} split of {corpus.name} has only {have} tokens",
        )
    require(
        tokens == 0 or tokens >= length,
        "eval.tokens",
        tokens,
        f"give 0 for all, or at least data.sequence_length={length}",
    )
    digests = "".join(corpus.manifest["splits"][split]["sha256"] for split in ("train", "valid"))
    digest = hashlib.sha256(digests.encode()).hexdigest()
    return DataSpec(corpus.name, digest, length, tokens)
