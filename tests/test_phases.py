"""How an arm changes along a trajectory: strengths by hand, the late switch, and each step's
program."""

import dataclasses
import math

import numpy as np
import pytest

from bitnet_jax.model import TransformerConfig
from bitnet_jax.optim import OptimizerConfig
from bitnet_jax.phases import WARMUPS, Phases
from bitnet_jax.precision import get_precision
from bitnet_jax.train_step import StepConfig

ARM = get_precision("ternary")
LATE = get_precision("ternary", activations="int4_absmean")
MODEL = TransformerConfig(vocab_size=256, layers=1, width=16, ff_width=32, heads=2, kv_heads=1)
BASE = StepConfig(MODEL, ARM, OptimizerConfig(), microbatches=2)


@pytest.mark.parametrize(
    "warmup, steepness, expected",
    [
        ("linear", 8.0, [0, 0.25, 0.5, 0.75]),
        ("exponential", 2.0, [0, 1 - 0.75**2, 0.75, 1 - 0.25**2]),
        ("exponential", 8.0, [0, 1 - 0.75**8, 1 - 0.5**8, 1 - 0.25**8]),
        ("sigmoid", 8.0, [1 / (1 + math.e**4), 1 / (1 + math.e**2), 0.5, 1 / (1 + math.e**-2)]),
        ("sigmoid", 4.0, [1 / (1 + math.e**2), 1 / (1 + math.e), 0.5, 1 / (1 + 1 / math.e)]),
    ],
)
def test_strength_at_the_quarters_of_a_warm_up(warmup, steepness, expected):
    phases = Phases(warmup, warmup_steps=100, steepness=steepness)
    found = [phases.strength(step) for step in (0, 25, 50, 75)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("warmup", WARMUPS[1:])
def test_strength_grows_and_is_whole_from_the_end_on(warmup):
    phases = Phases(warmup, warmup_steps=10)
    found = [phases.strength(step) for step in range(10)]
    assert found == sorted(set(found)) and 0 <= found[0] < 0.02 and 0.89 < found[-1] < 1
    assert {phases.strength(step) for step in (10, 11, 1000)} == {1.0}


def test_without_a_warm_up_quantization_is_whole_from_the_start():
    assert WARMUPS == ("none", "linear", "exponential", "sigmoid")
    assert {Phases().strength(step) for step in (0, 1, 100)} == {1.0}
    assert {Phases(warmup_steps=50).strength(step) for step in (0, 49)} == {1.0}


@pytest.mark.parametrize(
    "fraction, end, start",
    [(0.05, 1000, 950), (0.05, 10, 9), (0.05, 1, 0), (0.1, 20, 18), (0.25, 103, 77), (0.5, 7, 3)],
)
def test_late_start(fraction, end, start):
    """That share of an endpoint's steps, rounded, and at least one."""
    assert Phases(late=LATE, late_fraction=fraction).late_start(end) == start
    assert Phases(late_fraction=fraction).late_start(end) == end, "never, without a late arm"


def test_program_along_a_trunk_and_its_decays():
    """Ends 20 and 40 with warm-up to 8, decays from 16 and 32, and a switch at 18 and 36."""
    phases = Phases("linear", 8, late=LATE, late_fraction=0.1)
    warming = dataclasses.replace(BASE, warming=True)
    late = dataclasses.replace(BASE, precision=LATE)
    trunk = [phases.program(BASE, step, None) for step in range(32)]
    assert trunk == [(warming, step / 8) for step in range(8)] + [(BASE, 1.0)] * 24
    first = [phases.program(BASE, step, (16, 20)) for step in range(16, 20)]
    assert first == [(BASE, 1.0)] * 2 + [(late, 1.0)] * 2
    second = [phases.program(BASE, step, (32, 40)) for step in range(32, 40)]
    assert second == [(BASE, 1.0)] * 4 + [(late, 1.0)] * 4


def test_program_of_one_decay_from_the_start():
    """Schedules without a trunk warm up within their decay."""
    phases = Phases("linear", 4, late=LATE, late_fraction=0.2)
    warming = dataclasses.replace(BASE, warming=True)
    late = dataclasses.replace(BASE, precision=LATE)
    found = [phases.program(BASE, step, (0, 10)) for step in range(10)]
    expected = [(warming, step / 4) for step in range(4)] + [(BASE, 1.0)] * 4 + [(late, 1.0)] * 2
    assert found == expected


def test_without_phases_every_step_has_the_base_program():
    """The very config, so that ordinary runs share one compiled program."""
    for step, decay in ((0, None), (16, (16, 20)), (19, (16, 20)), (10**6, None)):
        assert Phases().program(BASE, step, decay) == (BASE, 1.0)


def test_deployed():
    assert Phases("linear", 8).deployed(BASE) == BASE
    deployed = Phases(late=LATE).deployed(BASE)
    assert deployed == dataclasses.replace(BASE, precision=LATE) and not deployed.warming
