"""Suite `sweep`: runs side by side against one by one, steps a call, and what branching saves."""

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from bitnet_jax import cost, ladder, programs
from bitnet_jax.member import LoopOptions
from bitnet_jax.model import TransformerConfig
from bitnet_jax.optim import Schedule
from bitnet_jax.trajectory import plan_segments, total_ticks
from experiments.benchmark.result import Result
from experiments.benchmark.step import Say
from experiments.benchmark.timing import Case, Ratio, interleave, ratio
from experiments.benchmark.workload import Workload
from sweeps import isoflop

RUNS = 8  # of a group
PROGRAMS = 2  # that train side by side, in threads
STEPS = 64  # of every run in a round
DISPATCHES = (1, 8, 64)  # steps a call
GROUPED_GOAL = 0.25  # on an accelerator, of the time of runs one after another
BRANCHED_GOAL = 0.6


def run(workload: Workload, say: Say) -> Result:
    """Every size of the workload in its first arm; the FLOPs of the isoFLOP sweep."""
    result = _branching()
    for size in workload.sizes:
        say(f"{size}: compiling, then {workload.repeats} rounds")
        result.add(_measure(workload, size))
    return result


def _measure(workload: Workload, size: str) -> Result:
    on_cpu = jax.default_backend() == "cpu"
    cases: dict[str, Case] = {"grouped": _Runs(workload, size, RUNS, DISPATCHES[-1])}
    for dispatch in DISPATCHES:
        cases[f"dispatch{dispatch}"] = _Runs(workload, size, 1, dispatch)
    if on_cpu:
        cases["side_by_side"] = _at_once([_Runs(workload, size, 1, 1) for _ in range(PROGRAMS)])
    seconds = interleave(cases, workload.repeats)
    suffix = workload.suffix(size)
    one_by_one = [RUNS * s for s in seconds[f"dispatch{DISPATCHES[-1]}"]]
    goal = None if on_cpu else GROUPED_GOAL
    ratios = {f"sweep_time/grouped/sequential{suffix}": ratio(seconds["grouped"], one_by_one, goal)}
    for dispatch in DISPATCHES[1:]:
        name = f"sweep_time/dispatch{dispatch}/dispatch1{suffix}"
        ratios[name] = ratio(seconds[f"dispatch{dispatch}"], seconds["dispatch1"])
    notes = [f"{STEPS} steps of each run a round; sequential: {RUNS} times a lone run's time"]
    if on_cpu:
        one_by_one = [PROGRAMS * s for s in seconds["dispatch1"]]
        name = f"sweep_time/side_by_side/sequential{suffix}"
        ratios[name] = ratio(seconds["side_by_side"], one_by_one)
        notes.append(f"side_by_side: {PROGRAMS} lone runs of dispatch1, each in its own thread")
    return Result(ratios, _rows(workload, size, seconds), notes)


def _rows(workload: Workload, size: str, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        runs = {"grouped": RUNS, "side_by_side": PROGRAMS}.get(name, 1)
        median = statistics.median(times)
        tokens = runs * STEPS * workload.batch_tokens
        rows.append(
            {
                "suite": "sweep",
                "size": size,
                "case": name,
                "runs": runs,
                "seconds": median,
                "tokens_per_s": tokens / median,
                "rounds_seconds": times,
            }
        )
    return rows


def _at_once(cases: Sequence[Case]) -> Case:
    """A case that calls each of these in a thread of its own and waits for all."""

    def call() -> None:
        with ThreadPoolExecutor(len(cases)) as threads:
            for each in [threads.submit(case) for case in cases]:
                each.result()

    return call


class _Runs:
    """Runs that train as one program: a call makes STEPS steps of each and waits for them."""

    def __init__(self, workload: Workload, size: str, runs: int, dispatch: int):
        config = workload.step(size, workload.arms[0])
        self._dispatch = dispatch
        self._steps = programs.compiled_steps(config, runs, workload.sequence_length)
        self._state = programs.compiled_init(config, runs)(np.arange(runs, dtype=np.int32))
        random, tokens = np.random.default_rng(0), 1 << 20
        text = random.integers(0, workload.vocab, tokens, np.min_scalar_type(workload.vocab - 1))
        self._text = jax.device_put(text)
        slots = LoopOptions(dispatch=dispatch).slots  # as the training loop has them
        starts = (runs, slots, workload.rows)
        last = tokens - workload.sequence_length - 1
        self._starts = random.integers(0, last, starts, np.int32)
        rate = np.full((runs, slots), 1e-3, np.float32)
        ones = np.ones(slots, np.float32)
        self._schedule = programs.Schedule(rate, 100 * rate, ones, np.zeros(slots, bool))

    def __call__(self) -> None:
        for _ in range(STEPS // self._dispatch):
            self._state, _ = self._steps(
                self._state, self._text, self._starts, self._schedule, np.int32(self._dispatch)
            )
        jax.block_until_ready(self._state)


def _branching() -> Result:
    """FLOPs of the isoFLOP sweep, over those of a run for each of its endpoints."""
    config = isoflop.get_config()
    schedule = Schedule("wsd", 0, decay_fraction=config.schedule.decay_fraction)
    branched = independent = 0
    for size in config.sweep.sizes:
        shape = ladder.get_shape(size)._asdict()
        model = TransformerConfig(vocab_size=config.sweep.vocab_size, **shape)
        a_token = cost.training_flops_per_token(model, config.data.sequence_length)
        a_step = config.train.batch_tokens * a_token
        ends = [t // config.train.batch_tokens for t in isoflop.budgets_in_tokens(config, size)]
        branched += a_step * total_ticks(plan_segments(schedule, tuple(ends)))
        independent += a_step * sum(ends)
    value = branched / independent
    note = f"flops/branched/independent: of the sweep {config.name}, by the exact count"
    ratios = {"flops/branched/independent": Ratio(value, value, value, BRANCHED_GOAL)}
    return Result(ratios, [], [note])
