"""The suite `checkpoint`: what is timed against what, and that a save is a run's own."""

import dataclasses

import jax
import numpy as np
import pytest

from bitnet_jax import ladder
from bitnet_jax.configs import default
from bitnet_jax.fingerprint import fingerprint
from bitnet_jax.programs import part
from experiments.benchmark import checkpoint, timing
from experiments.benchmark.workload import Workload

TINY = Workload(
    sizes=("27k",), arms=("ternary", "fp16"), sequence_length=16, batch_tokens=64, vocab=32,
    repeats=3,
)  # fmt: skip


def silent(text):
    del text


class Scripted:
    """A run by a clock of its own: a step takes 0.1 s; a save holds training up for 0.4 s and, from
    then on, slows the next steps by `slowed` seconds in all; `late` s after them it is on disk."""

    now, slowed, late = 0.0, 0.2, 0.0
    built: list = []
    checkpoint_bytes = 1000

    def __init__(self, workload, size, arm, directory):
        self.what, self.writing, self.done, self.closed = (size, arm), False, [], False
        assert directory.is_dir()
        Scripted.built.append(self)

    def steps(self, count):
        Scripted.now += 0.1 * count + (self.slowed if self.writing else 0.0)
        self.done.append(count)

    def save(self):
        assert not self.writing, "the one before is on disk"
        Scripted.now += 0.4
        self.writing = True
        self.done.append("save")

    def wait(self):
        Scripted.now += self.late
        self.writing = False
        self.done.append("wait")

    def save_and_wait(self):
        self.save()
        Scripted.now += 1.0
        self.wait()

    def close(self):
        self.closed = True


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(Scripted, "built", [])
    monkeypatch.setattr(checkpoint, "_Training", Scripted)
    for module in (checkpoint, timing):
        monkeypatch.setattr(module.time, "perf_counter", lambda: Scripted.now)
    return Scripted.built


def test_the_cost_of_a_save_is_all_that_it_delays(scripted):
    """0.4 s of waiting and 0.2 s of slower steps, over the 60 s between two saves."""
    result = checkpoint.run(TINY, silent)
    assert [built.what for built in scripted] == [("27k", "ternary"), ("27k", "fp16")]
    assert all(built.closed for built in scripted)
    assert default.get_config().checkpoint.seconds == 60
    for arm in TINY.arms:
        ratio = result.ratios[f"checkpoint_share/27k/{arm}"]
        assert ratio == pytest.approx((0.01, 0.01, 0.01, 0.02)) and ratio.met
    row = result.measurements[0]
    # A save takes 1.4 s alone: twice that of steps before it and after it.
    assert row["steps"] == 2 * 28 and row["alone_seconds"] == pytest.approx(1.4)
    assert row["seconds"] == pytest.approx(0.6) and row["blocking_seconds"] == pytest.approx(0.4)
    assert row["without_seconds"] == pytest.approx(5.6)
    assert row["saved_seconds"] == pytest.approx(6.2)
    assert row["rounds_seconds"] == pytest.approx([0.6] * 3)
    assert (row["size"], row["case"], row["checkpoint_bytes"]) == ("27k", "ternary", 1000)


def test_a_write_that_outlasts_the_steps_counts_whole(scripted, monkeypatch):
    monkeypatch.setattr(Scripted, "late", 2.0)
    row = checkpoint.run(TINY, silent).measurements[0]
    assert row["seconds"] == pytest.approx(0.4 + 0.2 + 2.0)


def test_rounds_alternate_and_the_steps_around_a_save_are_equal(scripted):
    checkpoint.run(dataclasses.replace(TINY, arms=("fp16",), repeats=2), silent)
    (training,) = scripted
    warm = ["save", "wait"] * checkpoint.WARM_SAVES + [checkpoint.WARM_STEPS] * 2
    without, saved = [28, 28], [28, "save", 28, "wait"]
    rounds = [without, saved, without, saved, saved, without]  # the first two do not count
    assert training.done == warm + [each for one in rounds for each in one]


def test_a_run_is_closed_whatever_happens(scripted, monkeypatch):
    monkeypatch.setattr(Scripted, "wait", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.run(TINY, silent)
    assert [built.closed for built in scripted] == [True]


@pytest.fixture(scope="module")
def quick_compiler():
    """Half the time to compile; nothing here is about speed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def training(tmp_path, monkeypatch, quick_compiler):
    monkeypatch.setattr(ladder, "LADDER", {"27k": ladder.Shape(1, 16, 32, 2, 1)})
    training = checkpoint._Training(TINY, "27k", "fp16", tmp_path)
    yield training
    training.close()


def test_a_save_is_that_of_a_run_which_may_go_back(training):
    """The state after the steps that were made, the anchor beside it, and the run's progress."""
    start = fingerprint(part(training._anchor, 0).params)
    training.steps(3)
    training.save_and_wait()
    like = part(training._state, 0)
    state, anchor, progress = training._member.checkpointer.restore_latest(like)
    assert fingerprint(state) == fingerprint(like) and np.asarray(state.steps) == 3
    assert fingerprint(anchor.params) == start != fingerprint(state.params)
    assert len(progress["window"]) == len(progress["tail"]) == 50 and progress["anchor"]
    arrays = sum(x.nbytes for x in jax.tree.leaves((state, anchor)))
    assert training.checkpoint_bytes == arrays


def test_every_save_is_a_new_one_and_two_are_kept(training, tmp_path):
    for _ in range(3):
        training.save_and_wait()
    assert training._member.checkpointer.ticks() == [2, 3]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
