"""Suite `carriers`: the two equal ways to multiply int8 codes, for `bitnet_jax.carriers`."""

import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import carriers, cost
from bitnet_jax.matmul import code_dot
from bitnet_jax.precision import get_precision
from experiments.benchmark.result import Result
from experiments.benchmark.step import Say
from experiments.benchmark.timing import Case, interleave, ratio
from experiments.benchmark.workload import Workload

WAYS = ("int8", "bfloat16")
AT_LEAST = 0.02  # seconds a case and round


def run(workload: Workload, say: Say) -> Result:
    """The forward product of every shape that the sizes' blocks have."""
    result = Result(
        notes=[f"this device is called {carriers.device()!r} in bitnet_jax/carriers.py"]
    )
    for size in workload.sizes:
        say(f"{size}: {workload.repeats} rounds")
        result.add(_measure(workload, size))
    return result


def _measure(workload: Workload, size: str) -> Result:
    shapes = list(cost.linear_shapes(workload.model(size)).values())
    kinds = [(shape, carrier) for shape in dict.fromkeys(shapes) for carrier in WAYS]
    cases: dict[str, Case] = {
        _name(shape, carrier): _product(workload, shape, carrier) for shape, carrier in kinds
    }
    seconds = interleave(cases, workload.repeats, AT_LEAST)
    # A block's products: each shape as often as the block has it.
    block = {
        carrier: [
            sum(turn) for turn in zip(*(seconds[_name(s, carrier)] for s in shapes), strict=True)
        ]
        for carrier in WAYS
    }
    rows = [
        _row(workload, size, shape, carrier, seconds[_name(shape, carrier)])
        for shape, carrier in kinds
    ]
    name = f"carrier_time/int8/bfloat16{workload.suffix(size)}"
    return Result({name: ratio(block["int8"], block["bfloat16"])}, rows, [])


def _row(
    workload: Workload, size: str, shape: tuple[int, int], carrier: str, seconds: list[float]
) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "suite": "carriers",
        "size": size,
        "case": _name(shape, carrier),
        "seconds": median,
        "flops_per_s": 2 * workload.batch_tokens * math.prod(shape) / median,
        "rounds_seconds": seconds,
    }


def _name(shape: tuple[int, int], carrier: str) -> str:
    return f"{shape[0]} x {shape[1]} {carrier}"


def _product(workload: Workload, shape: tuple[int, int], carrier: str) -> Case:
    """A call multiplies random codes [batch_tokens, in] and trits [in, out]."""
    random, precision = np.random.default_rng(0), get_precision("ternary", carrier)
    x = jnp.asarray(random.integers(-127, 128, (workload.batch_tokens, shape[0]), np.int8))
    w = jnp.asarray(random.integers(-1, 2, shape, np.int8))
    dot = jax.jit(lambda x, w: code_dot(x, w, precision, ((1,), (0,))))
    return lambda: jax.block_until_ready(dot(x, w))
