"""The suites `sweep` and `carriers`: what is compared with what, and what is computed."""

import collections
import threading

import jax
import numpy as np
import pytest

from bitnet_jax import ladder
from bitnet_jax.errors import ConfigError
from experiments.benchmark import carriers, sweep
from experiments.benchmark.workload import Workload

TINY = Workload(
    sizes=("27k",), arms=("ternary",), sequence_length=16, batch_tokens=64, vocab=32, repeats=2
)


def silent(text):
    del text


@pytest.fixture
def scripted(monkeypatch):
    """Cases that are not run, counted: the seconds of a round follow from their names."""
    built = collections.Counter()

    class Runs:
        def __init__(self, workload, size, runs, dispatch):
            built[(runs, dispatch)] += 1

    def interleave(cases, repeats, at_least=0.0):
        seconds = {"grouped": 4.0, "dispatch1": 3.0, "dispatch8": 1.5, "dispatch64": 1.0}
        seconds["side_by_side"] = 4.5
        return {name: [seconds[name]] * repeats for name in cases}

    monkeypatch.setattr(sweep, "_Runs", Runs)
    monkeypatch.setattr(sweep, "interleave", interleave)
    return built


def test_a_group_beside_as_many_lone_runs(scripted):
    """4 s for 8 runs together, 1 s for one of them: a half. Steps a call: 1.5 and 1 to 3 s."""
    result = sweep.run(TINY, silent)
    medians = {name: ratio.median for name, ratio in result.ratios.items()}
    assert medians["sweep_time/grouped/sequential"] == 0.5
    assert medians["sweep_time/dispatch8/dispatch1"] == 0.5
    assert medians["sweep_time/dispatch64/dispatch1"] == pytest.approx(1 / 3)
    assert set(scripted) == {(8, 64), (1, 1), (1, 8), (1, 64)}
    rates = {row["case"]: row["tokens_per_s"] for row in result.measurements}
    assert rates["grouped"] == 8 * 64 * 64 / 4 and rates["dispatch1"] == 64 * 64 / 3


def test_two_programs_beside_each_other(scripted, monkeypatch):
    """4.5 s for two at once, 3 s for one alone: three quarters. On a CPU only, and without goal."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    result = sweep.run(TINY, silent)
    assert scripted == {(8, 64): 1, (1, 1): 1 + 2, (1, 8): 1, (1, 64): 1}
    ratio = result.ratios["sweep_time/side_by_side/sequential"]
    assert ratio.median == 0.75 and ratio.goal is None
    rates = {row["case"]: row["tokens_per_s"] for row in result.measurements}
    assert rates["side_by_side"] == 2 * 64 * 64 / 4.5
    assert any("side_by_side" in note for note in result.notes)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    result = sweep.run(TINY, silent)
    assert not any("side_by_side" in text for text in (*result.ratios, *result.notes))


def test_cases_at_once_are_in_threads_of_their_own():
    """Each goes on only when all are there, and an error of one is not lost."""
    together, threads = threading.Barrier(2), set()

    def case():
        together.wait(20)
        threads.add(threading.get_ident())

    sweep._at_once([case, case])()
    assert len(threads) == 2
    with pytest.raises(ZeroDivisionError):
        sweep._at_once([lambda: None, lambda: 1 / 0])()


@pytest.mark.parametrize("platform, goal", [("cpu", None), ("gpu", 0.25)])
def test_groups_are_for_accelerators(scripted, monkeypatch, platform, goal):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert sweep.run(TINY, silent).ratios["sweep_time/grouped/sequential"].goal == goal


def test_flops_that_branching_saves():
    """Budgets .5, .8, 1.25 and 2: (.8 * 2 + .2 * 4.55) / 4.55, but for whole steps."""
    ratio = sweep._branching().ratios["flops/branched/independent"]
    assert ratio.median == pytest.approx((0.8 * 2 + 0.2 * 4.55) / 4.55, rel=0.01)
    assert ratio.goal == 0.6 and ratio.met


@pytest.mark.slow
def test_runs_make_the_steps_they_are_timed_for(monkeypatch):
    """However many a call makes: 4 of each run, and the same parameters after them."""
    monkeypatch.setattr(ladder, "LADDER", {"27k": ladder.Shape(1, 16, 32, 2, 1)})
    monkeypatch.setattr(sweep, "STEPS", 4)
    states = {}
    for dispatch in (1, 4):
        runs = sweep._Runs(TINY, "27k", 2, dispatch)
        assert runs._starts.shape[1] == max(2, dispatch), "a program as training has it"
        runs._starts = np.zeros_like(runs._starts)
        runs()
        states[dispatch] = runs._state
        np.testing.assert_array_equal(states[dispatch].steps, [4, 4])
    for a, b in zip(*(jax.tree.leaves(s.params) for s in states.values()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_both_carriers_of_every_shape_of_a_block(monkeypatch):
    """Of 1 s and 2 s a product the ratio is a half, and shapes count as often as a block has."""
    monkeypatch.setattr(ladder, "LADDER", {"27k": ladder.Shape(1, 16, 32, 2, 1)})
    cases = {}

    def interleave(found, repeats, at_least):
        cases.update(found)
        return {name: [1.0 if "int8" in name else 2.0] * repeats for name in found}

    monkeypatch.setattr(carriers, "interleave", interleave)
    result = carriers.run(TINY, silent)
    assert result.ratios["carrier_time/int8/bfloat16"].median == 0.5
    shapes = {"16 x 16", "16 x 8", "16 x 32", "32 x 16"}
    assert set(cases) == {f"{s} {way}" for s in shapes for way in ("int8", "bfloat16")}
    for shape in shapes:
        np.testing.assert_array_equal(cases[f"{shape} int8"](), cases[f"{shape} bfloat16"]())


@pytest.mark.parametrize("name, right", [("flash", "blocks, cudnn"), ("cudnn", "NVIDIA")])
def test_attention_that_cannot_be(name, right):
    with pytest.raises(ConfigError, match=right):
        Workload(attention=name)
