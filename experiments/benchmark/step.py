"""Suite `step`: what one optimizer step costs in each arm, and beside other people's code."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from bitnet_jax import cost
from bitnet_jax.train_step import StepConfig, TrainState, init_state, train_step
from experiments.benchmark import peers
from experiments.benchmark.compilation import no_compilation_cache, peak_bytes
from experiments.benchmark.peak import peak
from experiments.benchmark.result import Result
from experiments.benchmark.timing import Case, Ratio, interleave, ratio, spread
from experiments.benchmark.workload import Workload

Say = Callable[[str], None]

LEARNING_RATE, WEIGHT_DECAY = np.float32(1e-3), np.float32(0.1)
AT_LEAST = 0.1  # seconds a round, so that a small model's steps are many


class CompiledStep(NamedTuple):
    """A step's program, the seconds that tracing and compiling took, and its peak bytes."""

    program: Callable
    seconds: float
    peak_bytes: int


@functools.cache
def compile_step(config: StepConfig, batch: jax.ShapeDtypeStruct) -> CompiledStep:
    """The step of a config for batches of one shape; compiled from shapes alone, once a process."""
    state = jax.eval_shape(functools.partial(init_state, config), 0)
    began = time.perf_counter()
    with no_compilation_cache():
        step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
        program = step.lower(state, batch, LEARNING_RATE, WEIGHT_DECAY).compile()
    return CompiledStep(program, time.perf_counter() - began, peak_bytes(program))


def initial_state(config: StepConfig) -> TrainState:
    """What every measurement of a config starts from."""
    return _initialize(config)(0)


@functools.cache
def _initialize(config: StepConfig) -> Callable[[int], TrainState]:
    return jax.jit(functools.partial(init_state, config))


class Training:
    """A model in training: each call makes one step and waits for it."""

    def __init__(self, config: StepConfig, step: CompiledStep, tokens: Int[Array, "B T1"]):
        self._program, self._tokens = step.program, tokens
        self.state = initial_state(config)

    def __call__(self) -> None:
        self.state, _ = self._program(self.state, self._tokens, LEARNING_RATE, WEIGHT_DECAY)
        jax.block_until_ready(self.state)


def run(workload: Workload, say: Say) -> Result:
    """Every size, and in it all arms and peers by turns."""
    result = Result(notes=[f"share of peak: of {peak().flops_per_s:.3g} FLOP/s, {peak().source}"])
    for size in workload.sizes:
        result.add(_measure(workload, size, say))
    return result


def _measure(workload: Workload, size: str, say: Say) -> Result:
    tokens = workload.batch()
    programs, cases = {}, dict[str, Case]()
    for arm in workload.arms:
        say(f"{size} {arm}: compiling")
        config = workload.step(size, arm)
        programs[arm] = compile_step(config, workload.batch_shape())
        cases[arm] = Training(config, programs[arm], tokens)
    rivals = {}
    for name in peers.of_suite("step", workload.peers):
        say(f"{size} {name}: compiling")
        rivals.update(peers.load(name, workload)(workload, size, tokens))
    cases.update({name: rival.step for name, rival in rivals.items()})
    say(f"{size}: {workload.repeats} rounds of {', '.join(cases)}")
    seconds = interleave(cases, workload.repeats, AT_LEAST)
    rows = [
        _row(workload, size, name, seconds[name], program.seconds, program.peak_bytes)
        for name, program in programs.items()
    ] + [
        _row(workload, size, name, seconds[name], rival.compile_seconds, rival.peak_bytes)
        for name, rival in rivals.items()
    ]
    ratios = arm_ratios(workload, size, seconds, {row["case"]: row["peak_bytes"] for row in rows})
    ratios |= peer_ratios(workload, size, seconds, rivals)
    notes = [note for rival in rivals.values() for note in rival.notes]
    return Result(ratios, rows, notes)


def _row(
    workload: Workload,
    size: str,
    case: str,
    seconds: list[float],
    compile_seconds: float,
    peak_bytes: int | None,
) -> dict[str, Any]:
    model = workload.model(size)
    median = statistics.median(seconds)
    flops = workload.batch_tokens * cost.training_flops_per_token(model, workload.sequence_length)
    return {
        "suite": "step",
        "size": size,
        "width": model.width,
        "layers": model.layers,
        "case": case,
        "seconds": median,
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "tokens_per_s": workload.batch_tokens / median,
        "flops_per_s": flops / median,
        "peak_share": flops / median / peak().flops_per_s,
        "peak_bytes": peak_bytes,
        "compile_seconds": compile_seconds,
        "rounds_seconds": seconds,
    }


def arm_ratios(
    workload: Workload, size: str, seconds: dict[str, list[float]], memory: dict[str, int]
) -> dict[str, Ratio]:
    """Each arm's time and memory over the base's."""
    base, suffix = workload.base, workload.suffix(size)
    ratios = {}
    for arm in workload.arms:
        if arm != base:
            pair = f"{arm}/{base}"
            goal = time_goal(pair, workload.model(size).width)
            ratios[f"step_time/{pair}{suffix}"] = ratio(seconds[arm], seconds[base], goal)
            ratios[f"peak_memory/{pair}{suffix}"] = spread(
                [memory[arm] / memory[base]], 1.0 if pair == "ternary/bf16" else None
            )
    return ratios


def time_goal(pair: str, width: int) -> float | None:
    """What ternary's step should take of bf16's, where products are large enough to decide it."""
    if pair != "ternary/bf16":
        return None
    platform = jax.default_backend()
    if platform == "cpu":
        return 0.85 if width >= 256 else None
    return 1.0 if platform == "gpu" and width >= 1024 else None


def peer_ratios(
    workload: Workload,
    size: str,
    seconds: dict[str, list[float]],
    rivals: dict[str, peers.Contender],
) -> dict[str, Ratio]:
    """Our time over theirs, for each arm that a peer has a counterpart of."""
    return {
        f"step_time/{arm}/{name}{workload.suffix(size)}": ratio(
            seconds[arm], seconds[name], rival.goal if arm == rival.arm else None
        )
        for name, rival in rivals.items()
        for arm in workload.arms
        if arm.split(":")[0] == rival.arm
    }
