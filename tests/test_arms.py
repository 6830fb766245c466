"""The arm of a config: what is built, and every choice or pair of choices that is refused."""

import dataclasses

import jax.numpy as jnp
import pytest

from bitnet_jax import hadamard
from bitnet_jax.configs.resolve import resolve
from bitnet_jax.errors import ConfigError
from bitnet_jax.estimators import ESTIMATORS
from bitnet_jax.granularity import GRANULARITIES, Granularity
from bitnet_jax.phases import WARMUPS, Phases
from bitnet_jax.precision import PRECISIONS
from bitnet_jax.quantize import QUANTIZERS
from bitnet_jax.regularizers import REGULARIZERS

NAN = float("nan")
LEARNED = [name for name, q in QUANTIZERS.items() if q.learned]
COARSE = [name for name, q in QUANTIZERS.items() if q.reach and (q.low, q.high) != (-1, 1)]


def q(precision="ternary", /, **keys):
    """Overrides of an arm."""
    return {"precision": precision, **{f"quantization.{key}": v for key, v in keys.items()}}


def bop(precision="ternary", /, **keys):
    return {**q(precision, **keys), "optim.name": "bop"}


def regularized(precision="ternary", name="sin2", weight=1.0):
    return {"precision": precision, "loss.regularizer": name, "loss.regularizer_weight": weight}


GROUPS = {"granularity": "group", "granularity_size": 8}
SHARDS = {"granularity": "shard", "granularity_size": 4}
INT4 = "int4_absmean"

# Overrides of the tiny run (ternary, width 16, ff_width 32, 2 heads and 1 key-value head of 8;
# budgets of 20 and 40 steps that decay from 16 and 32), what the message begins with, and parts of
# what it says would be right.
UNKNOWN = [
    (q(weights="ternary"), "quantization.weights='ternary'", QUANTIZERS),
    (q(activations="int8"), "quantization.activations='int8'", QUANTIZERS),
    (q(estimator="ste"), "quantization.estimator='ste'", ESTIMATORS),
    (q(activation_estimator="ste"), "quantization.activation_estimator='ste'", ESTIMATORS),
    (q(granularity="row"), "quantization.granularity='row'", GRANULARITIES),
    (q(warmup="cosine"), "quantization.warmup='cosine'", WARMUPS),
    (regularized(name="l2"), "loss.regularizer='l2'", ["none", *REGULARIZERS]),
]
# fmt: off
BAD = [
    # Values
    *((q(**{key: v}), f"quantization.{key}={v}", ["(0, 1)"])
      for key in ("warmup_fraction", "late_fraction") for v in (0.0, 1.0, -0.5, 2.0, NAN)),
    *((q(steepness=v), f"quantization.steepness={v}", ["0.1"]) for v in (0.0, -1.0, NAN, 2e3)),
    *((q(activations=name), f"quantization.activations={name!r}", ["weight's", "int8_absmax"])
      for name in LEARNED),
    # Estimators without a quantizer
    (q("fp32", estimator="trust"), "quantization.estimator='trust'", ["quantization.weights"]),
    (q(weights="none", estimator="clipped"), "quantization.estimator='clipped'",
     ["quantization.weights"]),
    (q("fp16", activation_estimator="stochastic"),
     "quantization.activation_estimator='stochastic'", ["quantization.activations"]),
    (q(activations="none", activation_estimator="clipped"),
     "quantization.activation_estimator='clipped'", ["quantization.activations"]),
    # Granularity
    *((q("bf16", granularity=kind, granularity_size=size), f"quantization.granularity={kind!r}",
       ["not quantized", "quantization.weights"])
      for kind, size in (("channel", None), ("group", 8), ("shard", 2))),
    *((q(granularity=kind, granularity_size=size), f"quantization.granularity_size={size}",
       [kind, "positive size"]) for kind in ("group", "shard") for size in (None, 0, -4)),
    *((q(granularity=kind, granularity_size=2), "quantization.granularity_size=2",
       ["only group and shard"]) for kind in ("tensor", "channel", None)),
    (q(granularity="group", granularity_size=12), "quantization.granularity_size=12",
     ["do not divide the 16 inputs", "width 16, ff_width 32"]),
    (q(granularity="group", granularity_size=32), "quantization.granularity_size=32",
     ["do not divide the 16 inputs"]),
    ({**q(**GROUPS), "model.ff_width": 36}, "quantization.granularity_size=8",
     ["do not divide the 36 inputs", "ff_width 36"]),
    (q(granularity="shard", granularity_size=16), "quantization.granularity_size=16",
     ["16 shards do not divide the 8 outputs"]),
    ({**q(granularity="shard", granularity_size=3), "model.ff_width": 33},
     "quantization.granularity_size=3", ["3 shards do not divide the 16 outputs"]),
    ({**q(**SHARDS), "model.ff_width": 34}, "quantization.granularity_size=4",
     ["4 shards do not divide the 34 outputs"]),
    # Rotation, of the inputs of out (width) and down (ff_width)
    ({**q(rotate=True), "model.width": 36}, "quantization.rotate=True", ["36 inputs", "power of"]),
    ({**q(rotate=True), "model.ff_width": 52}, "quantization.rotate=True", ["52 inputs"]),
    # Warm-up
    *((q(name, warmup="linear"), "quantization.warmup='linear'", [name, "nothing to warm up"])
      for name in ("fp16", "bf16", "fp32")),
    (q(weights="none", activations="none", warmup="sigmoid"), "quantization.warmup='sigmoid'",
     ["nothing to warm up"]),
    (q(warmup="linear", warmup_fraction=0.85), "quantization.warmup_fraction=0.85",
     ["before the first decay of 0.2"]),
    # A late switch
    (q(late_activations="int8_absmax"), "quantization.late_activations='int8_absmax'",
     ["int8_absmax already"]),
    (q(late_activations=INT4, activations=INT4), f"quantization.late_activations={INT4!r}",
     ["already"]),
    (q("fp16", late_activations="none"), "quantization.late_activations='none'", ["already"]),
    (q(late_activations=INT4, late_fraction=0.3), "quantization.late_fraction=0.3",
     ["within the decay", "0.2"]),
    ({**q(late_activations=INT4, late_fraction=0.15), "schedule.decay_fraction": 0.1},
     "quantization.late_fraction=0.15", ["within the decay", "0.1"]),
    # Bop
    *((bop(name), "optim.name='bop'", ["none", "adamw, lion or muon"])
      for name in ("fp16", "bf16", "fp32")),
    (bop(weights="none"), "optim.name='bop'", ["adamw, lion or muon"]),
    *((bop(weights=name), "optim.name='bop'", [name, "trits or signs"])
      for name in sorted({*LEARNED, *COARSE})),
    (bop(granularity="channel"), "optim.name='bop'", ["one scale a tensor", "channel"]),
    (bop(**GROUPS), "optim.name='bop'", ["one scale a tensor", "group"]),
    (bop(**SHARDS), "optim.name='bop'", ["one scale a tensor", "shard"]),
    *(({**bop(), "optim.latents": v}, f"optim.latents={v!r}", ["float32"])
      for v in ("bfloat16", "bfloat16_stochastic")),
    ({**bop(), "optim.latent_clip": 2.0}, "optim.latent_clip=2.0", ["take 0"]),
    (bop(estimator="stochastic"), "quantization.estimator='stochastic'", ["take identity"]),
    # Regularizers
    *((regularized(name), "loss.regularizer='sin2'", [name, "no levels"])
      for name in ("fp16", "bf16", "fp32")),
    ({**regularized(), "quantization.weights": "none"}, "loss.regularizer='sin2'", ["no levels"]),
    *((regularized(weight=v), f"loss.regularizer_weight={v}", ["either sign"])
      for v in (0.0, NAN)),
    *((regularized(name="none", weight=v), f"loss.regularizer_weight={v}", ["sin2, dampening"])
      for v in (1.0, -1.0, NAN)),
]
# fmt: on


@pytest.fixture(scope="module")
def spec_of(tiny_config, tiny_corpus):
    return lambda overrides: resolve(tiny_config(overrides), tiny_corpus)


def refusal(spec_of, overrides):
    with pytest.raises(ConfigError) as error:
        spec_of(overrides)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(("overrides", "key", "right"), BAD, ids=lambda value: str(value)[:70])
def test_mistakes_are_named(spec_of, overrides, key, right):
    message = refusal(spec_of, overrides)
    assert message.startswith(f"{key}: ")
    assert all(part in message[len(key) :] for part in right), message


@pytest.mark.parametrize(("overrides", "key", "known"), UNKNOWN, ids=lambda value: str(value)[:70])
def test_unknown_names_list_the_known_ones(spec_of, overrides, key, known):
    assert refusal(spec_of, overrides) == f"{key} is unknown; choose from {', '.join(known)}"


@pytest.mark.parametrize("name", ["int5", *LEARNED])
def test_a_late_arm_that_cannot_be_is_named_by_its_own_key(spec_of, name):
    """Not by that of the activations, which are fine."""
    message = refusal(spec_of, q(late_activations=name))
    assert message.startswith(f"quantization.late_activations={name!r}")
    assert "int8_absmax, " in message or "int4_absmean, " in message


# What is built


def test_without_a_change_the_arms_are_the_tables(spec_of):
    for name, arm in PRECISIONS.items():
        spec = spec_of({"precision": name})
        assert spec.step.precision == arm and spec.phases == Phases()


def test_changes_reach_the_arm_and_its_name(spec_of):
    changes = {
        "weights": "ternary_twn", "activations": INT4, "estimator": "trust",
        "activation_estimator": "clipped", "rotate": True,
    }  # fmt: skip
    arm = spec_of(q(**changes, **GROUPS)).step.precision
    assert {key: getattr(arm, key) for key in changes} == changes
    assert arm.granularity == Granularity("group", 8)
    name, *said = arm.name.split("+")
    assert name == "ternary" and set(said) == {
        "weights=ternary_twn", f"activations={INT4}", "estimator=trust",
        "activation_estimator=clipped", "rotate=true", "granularity=group8",
    }  # fmt: skip
    assert (arm.compute_dtype, arm.loss_scaling) == (jnp.bfloat16, False)


def test_a_change_to_what_the_arm_has_is_none(spec_of):
    same = q(weights="ternary_absmean", activations="int8_absmax", rotate=False,
             granularity="tensor", estimator="identity")  # fmt: skip
    assert spec_of(same).step.precision == PRECISIONS["ternary"]


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
def test_float_arms_may_be_quantized(spec_of, name):
    arm = spec_of(q(name, weights="ternary_absmean", granularity="channel")).step.precision
    assert arm.quantized and arm.granularity == Granularity("channel")
    assert arm.compute_dtype == PRECISIONS[name].compute_dtype
    assert arm.loss_scaling == PRECISIONS[name].loss_scaling


@pytest.mark.parametrize(
    "overrides",
    [
        q(granularity="group", granularity_size=16),
        q(granularity="group", granularity_size=1),
        q(granularity="shard", granularity_size=8),
        {**q(granularity="shard", granularity_size=3), "model.width": 48, "model.heads": 4,
         "model.kv_heads": 2, "model.ff_width": 96},
        {**q(rotate=True), "model.width": 88, "model.heads": 4, "model.ff_width": 48},
        q("bf16", activations="int8_absmax", activation_estimator="trust"),
        q(weights="ternary_lsq", **GROUPS),
        bop("binary"),
        bop("bf16", weights="ternary_twn"),
        bop(activation_estimator="stochastic", estimator="trust"),
        {**bop(), "optim.latents": "float32", "optim.latent_clip": 0.0},
        regularized("binary", "dampening", -1e-3),
        {**regularized("fp16"), "quantization.weights": "int4_absmax"},
        q(warmup="linear", warmup_fraction=0.8),
        q("fp32", activations="int8_absmax", warmup="linear"),
        {**q(warmup="linear", warmup_fraction=0.9), "schedule.name": "cosine",
         "train.tokens": (2560,)},
        q(late_activations=INT4, late_fraction=0.2),
        {**q(late_activations=INT4, late_fraction=0.5), "schedule.name": "two_stage",
         "train.tokens": (2560,)},
        q("fp16", late_activations="int8_absmax"),
        q(late_activations="none"),
    ],
    ids=str,
)  # fmt: skip
def test_what_fits_is_not_refused(spec_of, overrides):
    """The other side of each bound."""
    spec_of(overrides)


def test_widths_of_the_rotation_are_those_with_a_hadamard_matrix(spec_of):
    """The out projection's inputs are the width, down's the feed-forward width; no others count."""
    for width in range(4, 100, 4):
        overrides = {**q(rotate=True), "model.width": width, "model.ff_width": 32}
        swapped = {**q(rotate=True), "model.width": 16, "model.ff_width": width}
        for case in (overrides, swapped):
            if hadamard.supported(width):
                assert spec_of(case).step.precision.rotate
            else:
                assert f"the {width} inputs" in refusal(spec_of, case)
    assert not hadamard.supported(36) and not hadamard.supported(52), "so that some were refused"
    spec_of({**q(rotate=False), "model.width": 36})


# Phases


@pytest.mark.parametrize("name", WARMUPS[1:])
def test_warm_up_is_a_share_of_the_smallest_budget(spec_of, name):
    spec = spec_of(q(warmup=name, warmup_fraction=0.3, steepness=4.0))
    assert spec.phases == Phases(name, 6, 4.0), "of 20 steps, not of 40"
    assert spec.step.precision == PRECISIONS["ternary"] and not spec.step.warming
    assert spec_of(q(warmup=name, warmup_fraction=0.001)).phases.warmup_steps == 1


def test_a_late_arm_differs_in_its_activations_alone(spec_of):
    """Whatever else was changed stays so, and the run's arm says what it will become."""
    changes = dict(weights="ternary_twn", estimator="trust", rotate=True, **GROUPS)
    spec = spec_of({**q(late_activations=INT4, late_fraction=0.15, **changes),
                    "matmul.carrier": "int8"})  # fmt: skip
    arm, late = spec.step.precision, spec.phases.late
    assert spec.phases == Phases(late=late, late_fraction=0.15)
    assert late == dataclasses.replace(arm, activations=INT4) == spec.deployed.precision
    assert arm.activations == "int8_absmax" and late.carrier == "int8"
    assert arm.name.endswith(f"+late={INT4}") and "weights=ternary_twn" in arm.name
    plain = spec_of({**q(**changes), "matmul.carrier": "int8"}).step.precision
    assert dataclasses.replace(arm, name=plain.name) == plain


def test_late_activations_of_the_base_arm_may_follow_others(spec_of):
    """The arm's table value is a change where the config has set another."""
    spec = spec_of(q(activations=INT4, late_activations="int8_absmax"))
    assert spec.step.precision.activations == INT4
    assert spec.deployed.precision.activations == "int8_absmax"
