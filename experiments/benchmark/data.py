"""Suite `data`: whether batches are made faster than the smallest model can use them."""

import itertools
import statistics

import numpy as np

from bitnet_jax import ladder
from bitnet_jax.data import train_batches
from experiments.benchmark.result import Result
from experiments.benchmark.step import Say, Training, compile_step
from experiments.benchmark.timing import Case, interleave, ratio
from experiments.benchmark.workload import Workload

TOKENS = 8_000_000  # of the text that batches are drawn from
FACTORS = (0.25, 1, 4, 16)  # batch sizes, as multiples of the workload's
AT_LEAST = 0.05  # seconds a case and round


def run(workload: Workload, say: Say) -> Result:
    """Batches of several sizes, and steps of the smallest model on the workload's."""
    smallest, arm = next(iter(ladder.LADDER)), workload.arms[0]
    say(f"{smallest} {arm}: compiling")
    config = workload.step(smallest, arm)
    step = compile_step(config, workload.batch_shape())
    rows = sorted({max(1, int(factor * workload.rows)) for factor in FACTORS})
    cases: dict[str, Case] = {str(count): _batches(workload, count) for count in rows}
    training = f"training {smallest} {arm}"
    cases[training] = Training(config, step, workload.batch())
    say(f"{workload.repeats} rounds")
    seconds = interleave(cases, workload.repeats, AT_LEAST)
    # Of batches of the size that is trained on; above 1, the model waits for its data.
    batch = seconds[str(workload.rows)]
    trained = workload.batch_tokens / statistics.median(seconds[training])
    measurements = []
    for name in cases:
        tokens = workload.batch_tokens if name == training else int(name) * workload.sequence_length
        rate = tokens / statistics.median(seconds[name])
        measurements.append(
            {
                "suite": "data",
                "case": name if name == training else "batches",
                "batch_tokens": tokens,
                "seconds": statistics.median(seconds[name]),
                "batches_per_s": 1 / statistics.median(seconds[name]),
                "tokens_per_s": rate,
                "rate_over_training": rate / trained,
                "rounds_seconds": seconds[name],
            }
        )
    name = f"batch_time/data/{smallest}"
    note = f"{name}: seconds a batch over seconds a step; its inverse is the ratio of the rates"
    return Result({name: ratio(batch, seconds[training])}, measurements, [note])


def _batches(workload: Workload, rows: int) -> Case:
    """Each call makes the next batch, of random tokens in the dtype that a corpus has."""
    dtype = np.min_scalar_type(workload.vocab - 1)
    tokens = np.random.default_rng(0).integers(0, workload.vocab, TOKENS, dtype)
    batches = train_batches(tokens, workload.sequence_length, rows, seed=0)
    steps = itertools.count()
    return lambda: batches[next(steps)]
