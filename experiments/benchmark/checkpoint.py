"""Suite `checkpoint`: what a checkpoint takes from training, at the interval that runs have.

So many steps with one save in their middle, until that is on disk, against the same steps without.
The difference is all that a save costs: what the loop waits for, and what writing in the background
takes from the steps that follow. A save is the training loop's own (`Member.save`): the state and,
as in any run that may go back, that of the last anchor, each with its fingerprint.
"""

import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitnet_jax import programs
from bitnet_jax.configs import default
from bitnet_jax.data import Corpus
from bitnet_jax.disk import Patience
from bitnet_jax.member import TRAIN_LOSS_STEPS, Job, LoopOptions, Member
from bitnet_jax.optim import Schedule
from bitnet_jax.spec import DataSpec, RunSpec
from experiments.benchmark.result import Result
from experiments.benchmark.step import Say
from experiments.benchmark.timing import interleave, spread
from experiments.benchmark.workload import Workload

GOAL = 0.02
WARM_SAVES = 3  # so that every save that counts removes an older checkpoint, too
WARM_STEPS = 10
STEPS_PER_WRITE = 2.0  # as long as a save takes alone, the steps before and after take so often


def run(workload: Workload, say: Say) -> Result:
    """Every size in every arm."""
    interval = default.get_config().checkpoint.seconds
    result = Result(
        notes=[
            f"checkpoint_share: seconds that a save costs over the {interval:g} s between saves",
            "blocking_seconds: of it, until training goes on; alone_seconds: where nothing trains",
        ]
    )
    for size in workload.sizes:
        for arm in workload.arms:
            say(f"{size} {arm}: compiling, then {workload.repeats} rounds")
            with tempfile.TemporaryDirectory() as name:
                training = _Training(workload, size, arm, Path(name))
                try:
                    row = _measure(training, workload.repeats)
                finally:
                    training.close()
            result.measurements.append({"suite": "checkpoint", "size": size, "case": arm, **row})
            shares = [seconds / interval for seconds in row["rounds_seconds"]]
            result.ratios[f"checkpoint_share/{size}/{arm}"] = spread(shares, GOAL)
    return result


def _measure(training: "_Training", repeats: int) -> dict[str, Any]:
    """seconds: that a save costs, round by round the difference of the two cases."""
    alone = min(_seconds(training.save_and_wait) for _ in range(WARM_SAVES))
    training.steps(WARM_STEPS)
    step = _seconds(lambda: training.steps(WARM_STEPS)) / WARM_STEPS
    count = max(WARM_STEPS, math.ceil(STEPS_PER_WRITE * alone / step))
    blocking: list[float] = []

    def without() -> None:
        training.steps(count)
        training.steps(count)

    def saved() -> None:
        training.steps(count)
        blocking.append(_seconds(training.save))
        training.steps(count)
        training.wait()

    seconds = interleave({"without": without, "saved": saved}, repeats)
    costs = [a - b for a, b in zip(seconds["saved"], seconds["without"], strict=True)]
    return {
        "steps": 2 * count,
        "without_seconds": statistics.median(seconds["without"]),
        "saved_seconds": statistics.median(seconds["saved"]),
        "seconds": statistics.median(costs),
        "blocking_seconds": statistics.median(blocking[1:]),  # the first round does not count
        "alone_seconds": alone,
        "checkpoint_bytes": training.checkpoint_bytes,
        "rounds_seconds": costs,
    }


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class _Training:
    """A run in training, as the loop has it: program, state, anchor, and files in a directory."""

    def __init__(self, workload: Workload, size: str, arm: str, directory: Path):
        spec = _spec(workload, size, arm)
        options = LoopOptions(wandb_mode="disabled")
        self._slots, self._segment = options.slots, spec.segments[0]
        corpus = _corpus(workload)
        never_full = Patience(lambda: False)
        self._member = Member(Job(spec, directory, {}), corpus, options, never_full)
        self._member.open([spec.run_id])
        self._program = programs.compiled_steps(spec.step, 1, workload.sequence_length)
        self._state = programs.compiled_init(spec.step, 1)(np.zeros(1, np.int32))
        self._tokens = programs.replicate(corpus.train, 1)
        rate, ones = np.full((1, self._slots), spec.peak_lr, np.float32), np.ones(self._slots)
        forget = np.zeros(self._slots, bool)
        self._schedule = programs.Schedule(rate, rate, ones.astype(np.float32), forget)
        self._anchor = programs.copied(self._state)
        progress = self._member.progress
        progress.window, progress.tail = [5.0] * options.log_every, [5.0] * TRAIN_LOSS_STEPS
        self._member.anchor()

    def steps(self, count: int) -> None:
        """So many steps, awaited, and a line of the log: one interval of it."""
        first = self._member.progress.tick
        for step in range(first, first + count):
            starts = np.zeros((1, self._slots, self._member.spec.batch_size), np.int32)
            starts[0, 0] = self._member.starts(step, 1)[0]
            self._state, _ = self._program(
                self._state, self._tokens, starts, self._schedule, np.int32(1)
            )
        jax.block_until_ready(self._state)
        self._member.progress.tick += count
        self._member.write("train", self._segment, self._member.progress.tick, loss=5.0)

    def save(self) -> None:
        """Until training may go on."""
        self._member.progress.tick += 1  # no tick is saved twice
        self._member.save(*programs.part((self._state, self._anchor), 0))

    def wait(self) -> None:
        """Until it is on disk."""
        self._member.checkpointer.wait()

    def save_and_wait(self) -> None:
        self.save()
        self.wait()

    @property
    def checkpoint_bytes(self) -> int:
        """Of the arrays in a checkpoint."""
        return sum(x.nbytes for x in jax.tree.leaves((self._state, self._anchor)))

    def close(self) -> None:
        self._member.close()


def _spec(workload: Workload, size: str, arm: str) -> RunSpec:
    """A run without an end in sight."""
    return RunSpec(
        size=size,
        seed_init=0,
        seed_data=0,
        step=workload.step(size, arm),
        data=DataSpec("random", "", workload.sequence_length, 0),
        batch_size=workload.rows,
        ends=(10**9,),
        schedule=Schedule("wsd", 0),
        peak_lr=1e-3,
        weight_decay=0.1,
    )


def _corpus(workload: Workload) -> Corpus:
    """A million tokens at random."""
    dtype = np.min_scalar_type(workload.vocab - 1)
    tokens = np.random.default_rng(0).integers(0, workload.vocab, 1 << 20, dtype)
    none = np.zeros(0, np.int64)
    return Corpus("random", workload.vocab, tokens, tokens[:0], none, 1.0, {}, Path())
