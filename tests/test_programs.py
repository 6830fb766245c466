"""Compiled programs: several steps a call, shared by runs, and the same bytes however cut."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import PHASED, SHORT

from bitnet_jax import programs
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.programs import Schedule, compiled_init, compiled_steps
from bitnet_jax.train import Interrupted, train_and_evaluate

T, B, STEPS = 16, 8, 5
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 256, 400).astype(np.uint8)
STARTS = RNG.integers(0, 400 - T, (2, STEPS, B)).astype(np.int32)
# Of two runs: rates of their own, and codes to be remembered before the second and fourth step.
RATES = Schedule(
    np.float32(np.array([[0.01], [0.003]]) * np.linspace(0.2, 1, STEPS)),
    np.float32(np.array([[0.1], [0.5]]) * np.ones(STEPS)),
    np.ones(STEPS, np.float32),
    np.arange(STEPS) % 2 == 1,
)


@pytest.fixture(scope="module")
def config(tiny_config, tiny_corpus):
    return resolve(tiny_config({"precision": "ternary"}), tiny_corpus).step


def part(first, last, size):
    """Starts and schedule of steps [first, last), filled up to `size` with what must not matter."""

    def cut(values, axis):
        values = np.take(values, range(first, last), axis)
        more = [(0, size - (last - first)) if i == axis else (0, 0) for i in range(values.ndim)]
        return np.pad(values, more, constant_values=1)

    return cut(STARTS, 1), Schedule(
        cut(RATES.learning_rate, 1), cut(RATES.weight_decay, 1), cut(RATES.strength, 0),
        cut(RATES.remember, 0),
    )  # fmt: skip


def run_through(config, cuts, size):
    """States and metrics of two runs after all steps, made in calls that end at `cuts`."""
    state, metrics, first = compiled_init(config, 2)(np.array([0, 7], np.int32)), [], 0
    for last in cuts:
        starts, schedule = part(first, last, size)
        count = np.int32(last - first)
        state, found = compiled_steps(config, 2, T)(state, TOKENS, starts, schedule, count)
        found = jax.device_get(found)
        for values in found.values():
            assert values.shape == (2, size) and (values[:, last - first :] == 0).all()
        metrics.append({key: values[:, : last - first] for key, values in found.items()})
        first = last
    joined = {key: np.concatenate([m[key] for m in metrics], 1) for key in metrics[0]}
    return jax.device_get(state), joined


def assert_bitwise_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


def test_steps_of_one_call_are_those_of_several(config):
    """Bit for bit, snapshots included: calls of one step, one call, and calls that are not full."""
    each = run_through(config, range(1, STEPS + 1), 1)
    for cuts in ([5], [2, 5], [1, 4, 5]):
        assert_bitwise_equal(run_through(config, cuts, STEPS), each)
    state, metrics = each
    assert np.isfinite(metrics["loss"]).all() and len(np.unique(metrics["loss"])) == 2 * STEPS
    assert (state.steps == STEPS).all() and (state.seed == [0, 7]).all()
    for name, codes in state.snapshots.last.items():
        assert (codes != state.snapshots.logged[name]).any(), "remembered after the first step"


def test_no_steps_at_all_change_nothing(config):
    """A count of 0, though rates and rows are there."""
    state = compiled_init(config, 2)(np.array([0, 7], np.int32))
    before = jax.tree.map(jnp.copy, state)  # numpy's view of a buffer would keep it
    starts, schedule = part(0, 5, 5)
    after, metrics = compiled_steps(config, 2, T)(state, TOKENS, starts, schedule, np.int32(0))
    assert_bitwise_equal(after, before)
    assert all((value == 0).all() for value in metrics.values())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params)), "donated"


def test_runs_start_as_they_would_alone(config):
    """The same bits, whoever is beside them."""
    together = jax.device_get(compiled_init(config, 2)(np.array([3, 4], np.int32)))
    for run, seed in enumerate((3, 4)):
        alone = compiled_init(config, 1)(np.array([seed], np.int32))
        assert_bitwise_equal(
            jax.tree.map(lambda x, r=run: x[r], together), jax.tree.map(lambda x: x[0], alone)
        )


# Whole runs


@pytest.fixture(scope="module")
def launch(tiny_config, tiny_corpus):
    """Train, or go on, in a directory; stopped at the first call from a tick on, if one is given"""

    def run(directory, overrides=None, stop=10**6):
        config = tiny_config({**SHORT, **(overrides or {})})
        spec, options = resolve(config, tiny_corpus), loop_options(config)
        try:
            train_and_evaluate(
                spec, tiny_corpus, directory, options, config.to_dict(),
                should_stop=lambda tick: tick >= stop,
            )  # fmt: skip
        except Interrupted:
            return False
        return True

    return run


def assert_same_results(directory, expected):
    same = []
    for folder in (directory, expected):
        rows = json.loads((folder / "summary.json").read_text())["endpoints"]
        for row in rows:
            del row["wall_s"], row["git_commit"]
        same.append((rows, (folder / "metrics.jsonl").read_bytes()))
    assert same[0] == same[1]


@pytest.fixture(scope="module")
def plain(launch, tmp_path_factory):
    """The short run, a step a call."""
    directory = tmp_path_factory.mktemp("plain")
    launch(directory)
    return directory


def test_dispatch_changes_no_byte(launch, plain, tmp_path):
    """Neither 22 ticks, trunks of 8 steps nor log intervals of 3 divide by 8."""
    launch(tmp_path, {"launch.dispatch": 8})
    assert_same_results(tmp_path, plain)


def test_resumed_with_another_dispatch(launch, plain, tmp_path):
    """Begun three steps a call, stopped between two calls, and ended one by one."""
    assert not launch(tmp_path, {"launch.dispatch": 3}, 13)
    assert launch(tmp_path)
    assert_same_results(tmp_path, plain)


@pytest.mark.slow
def test_dispatch_changes_no_byte_of_phases_and_telemetry(launch, tmp_path):
    """Phases end within what a call could make, evaluations and snapshots lie between."""
    launch(tmp_path / "1", PHASED)
    launch(tmp_path / "8", {**PHASED, "launch.dispatch": 8})
    assert_same_results(tmp_path / "8", tmp_path / "1")
    launch(tmp_path / "again", {**PHASED, "launch.dispatch": 8}, 4)
    launch(tmp_path / "again", PHASED, 15)
    launch(tmp_path / "again", {**PHASED, "launch.dispatch": 8})
    assert_same_results(tmp_path / "again", tmp_path / "1")


def test_where_tokens_lie_changes_no_byte(launch, plain, tmp_path):
    launch(tmp_path, {"launch.resident_bytes": 0})
    assert_same_results(tmp_path, plain)


def test_runs_of_other_seeds_and_rates_share_the_programs(launch, plain, tmp_path, monkeypatch):
    """Nothing is compiled for them: neither init, steps, evaluation nor telemetry."""
    used = set()

    def remember(name):
        original = getattr(programs, name)

        def compiled(*key):
            used.add(original(*key))
            return original(*key)

        monkeypatch.setattr(programs, name, compiled)

    for name in ("compiled_init", "compiled_steps"):
        remember(name)
    launch(tmp_path / "first")
    sizes = {program: program._cache_size() for program in used}
    assert len(sizes) == 2
    other = {"seed": 5, "seeds.data": 9, "optim.peak_lr": 0.002, "optim.weight_decay": 0.0}
    launch(tmp_path / "other", other)
    assert {program: program._cache_size() for program in used} == sizes
    first, second = ((tmp_path / d / "metrics.jsonl").read_bytes() for d in ("first", "other"))
    assert first == (plain / "metrics.jsonl").read_bytes() != second


def test_over_how_many_devices_runs_are_spread(monkeypatch):
    """As many as divide them, so that each has as many runs; a lone run stays on one."""
    monkeypatch.setattr(programs.jax, "device_count", lambda: 8)
    assert [programs.devices(n) for n in (1, 2, 3, 4, 6, 8, 12, 16)] == [1, 2, 1, 4, 2, 8, 4, 8]
    monkeypatch.setattr(programs.jax, "device_count", lambda: 1)
    assert [programs.devices(n) for n in (1, 2, 8)] == [1, 1, 1]


@pytest.mark.parametrize("said", [None, "/somewhere"])
def test_programs_are_kept_on_disk_unless_the_user_said_where(monkeypatch, tmp_path, said):
    class Config:
        values = {"jax_compilation_cache_dir": said}
        update = values.__setitem__

    monkeypatch.setattr(programs.jax, "config", Config)
    programs.keep_programs(tmp_path)
    assert Config.values["jax_compilation_cache_dir"] == (said or str(tmp_path))
    assert Config.values.get("jax_compilation_cache_max_size") == (
        None if said else programs.CACHE_BYTES
    )
