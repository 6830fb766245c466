"""Suite `decode`: tokens a second of one text, and the bytes of weights that each token reads.

Every token of a lone text reads all weights once, so that memory's bandwidth is a floor; weights
that stay in a cache may lie below it.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.deployed import deploy
from bitnet_jax.generate import LIKELIEST, Decoder, continued, decoder, prefill
from bitnet_jax.model import init_params
from bitnet_jax.precision import get_precision
from experiments.benchmark.result import Result
from experiments.benchmark.timing import Case, Ratio, interleave, ratio, spread
from experiments.benchmark.workload import Workload

# The arm and, of trits, how they are packed; the first is what the others are compared with.
CASES = {
    "float32": ("fp32", None),
    "bfloat16": ("bf16", None),
    "2bit": ("ternary", "2bit"),
    "base3": ("ternary", "base3"),
}
PROMPT = 8  # tokens
STEPS = 16  # a call
AT_LEAST = 0.1  # seconds a round
BANDWIDTH_BYTES = 2**28  # read at a time: far more than a cache holds
GOAL = 0.5  # of float32's time, where weights do not fit in a cache
GOAL_WIDTH = 768


class Decoding(NamedTuple):
    """A call decodes STEPS tokens. weight_bytes: that each of them reads."""

    call: Case
    weight_bytes: int


def run(workload: Workload, say: Callable[[str], None]) -> Result:
    """Every size; greedy, one text, a cache of sequence_length positions."""
    result = Result(
        notes=[
            "floor: bytes of weights over the bandwidth that one float32 product of "
            f"{BANDWIDTH_BYTES / 2**20:g} MiB with a vector reached in the same rounds; what stays "
            "in a cache may be faster"
        ]
    )
    for size in workload.sizes:
        result.add(_measure(workload, size, say))
    return result


def _measure(workload: Workload, size: str, say: Callable[[str], None]) -> Result:
    decodings = {}
    for name, (arm, packing) in CASES.items():
        say(f"{size} {name}: compiling")
        decodings[name] = _decoding(workload, size, arm, packing)
    say(f"{size}: {workload.repeats} rounds")
    cases = {name: decoding.call for name, decoding in decodings.items()}
    seconds = interleave({**cases, "bandwidth": _reading()}, workload.repeats, AT_LEAST)
    rates = [BANDWIDTH_BYTES / each for each in seconds.pop("bandwidth")]
    tokens = {name: [each / STEPS for each in turns] for name, turns in seconds.items()}
    rows = [
        _row(size, name, tokens[name], decoding.weight_bytes, statistics.median(rates))
        for name, decoding in decodings.items()
    ]
    return Result(_ratios(workload, size, tokens, decodings, rates), rows, [])


def _decoding(workload: Workload, size: str, arm: str, packing: str | None) -> Decoding:
    config, precision = workload.model(size), get_precision(arm)
    params = jax.jit(partial(init_params, config, precision))(jax.random.key(0))
    model = decoder(config, precision, deploy(params, precision), packing)
    prompt = jnp.asarray(np.arange(PROMPT, dtype=np.int32)[None] % config.vocab_size)
    caches, logits = jax.jit(partial(prefill, config, precision), static_argnums=2)(
        model, prompt, max(workload.sequence_length, PROMPT + STEPS)
    )
    first, keys = jnp.argmax(logits, axis=1).astype(jnp.int32), jax.random.split(jax.random.key(0))

    def call() -> object:
        own = jax.tree.map(jnp.copy, caches)  # a step uses up what it is given
        return continued(
            config, precision, model, own, first, keys[:1], STEPS, LIKELIEST, end_of_text=-1
        )

    return Decoding(call, read_bytes(model))


def read_bytes(model: Decoder) -> int:
    """Of all but the embedding, of which a token reads a row."""
    read = (model.head, model.final_norm, model.blocks)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(read))


def _reading() -> Case:
    side = 4096
    matrix = jnp.ones((BANDWIDTH_BYTES // 4 // side, side), jnp.float32)
    product = jax.jit(lambda matrix, vector: matrix @ vector)
    vector = jnp.ones(side, jnp.float32)
    return lambda: jax.block_until_ready(product(matrix, vector))


def _row(
    size: str, name: str, seconds: list[float], weight_bytes: int, bandwidth: float
) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "suite": "decode",
        "size": size,
        "case": name,
        "seconds": median,
        "tokens_per_s": 1 / median,
        "weight_bytes": weight_bytes,
        "bytes_per_s": weight_bytes / median,
        "bandwidth_per_s": bandwidth,
        "floor_seconds": weight_bytes / bandwidth,
        "floor_share": weight_bytes / bandwidth / median,
        "rounds_seconds": seconds,
    }


def _ratios(
    workload: Workload,
    size: str,
    seconds: dict[str, list[float]],
    decodings: dict[str, Decoding],
    rates: list[float],
) -> dict[str, Ratio]:
    """Times over float32's, and each one's floor over its time."""
    suffix, (base, *others) = workload.suffix(size), CASES
    wide = workload.model(size).width >= GOAL_WIDTH and jax.default_backend() == "cpu"
    ratios = {}
    for name in others:
        goal = GOAL if wide and CASES[name][1] else None
        ratios[f"decode_time/{name}/{base}{suffix}"] = ratio(seconds[name], seconds[base], goal)
    for name, decoding in decodings.items():
        floors = [decoding.weight_bytes / rate for rate in rates]
        shares = [floor / own for floor, own in zip(floors, seconds[name], strict=True)]
        ratios[f"decode_floor/{name}{suffix}"] = spread(shares)
    return ratios
