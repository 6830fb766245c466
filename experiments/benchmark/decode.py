"""Suite `decode`: tokens a second of one text, and the bytes of weights that each token reads.

Every token of a lone text reads all weights once, so that memory's bandwidth is a floor; weights
that stay in a cache may lie below it.
"""

import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from bitnet_jax.deployed import deploy
from bitnet_jax.generate import LIKELIEST, Decoder, continued, decoder, prefill
from bitnet_jax.model import TransformerConfig, init_params
from bitnet_jax.precision import get_precision
from experiments.benchmark import peers
from experiments.benchmark.result import Result
from experiments.benchmark.timing import Case, Ratio, interleave, ratio, spread
from experiments.benchmark.workload import Workload


class Held(NamedTuple):
    """The arm and, of trits, how they are packed and multiplied."""

    arm: str
    packing: str | None = None
    products: str = "xla"


# The first is what the others are compared with.
CASES = {
    "float32": Held("fp32"),
    "bfloat16": Held("bf16"),
    "2bit": Held("ternary", "2bit"),
    "base3": Held("ternary", "base3"),
}
ON_GPU = {
    "2bit_pallas": Held("ternary", "2bit", "pallas"),
    "base3_pallas": Held("ternary", "base3", "pallas"),
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


def cases() -> dict[str, Held]:
    """Those of the device."""
    return CASES | ON_GPU if jax.default_backend() == "gpu" else CASES


def run(workload: Workload, say: Callable[[str], None]) -> Result:
    """Every size; greedy, one text, a cache of sequence_length positions."""
    result = Result(
        notes=[
            "floor: bytes of weights over the bandwidth that one float32 product of "
            f"{BANDWIDTH_BYTES / 2**20:g} MiB with a vector reached in the same rounds; what stays "
            "in a cache may be faster"
        ]
    )
    if peers.of_suite("decode", workload.peers):
        result.notes.append("every case: a SiLU gate and a tied head, which the peer has built in")
    for size in workload.sizes:
        result.add(_measure(workload, size, say))
    return result


def model_config(workload: Workload, size: str) -> TransformerConfig:
    """The size's model; beside a peer, one that the peer computes too."""
    config = workload.model(size)
    if peers.of_suite("decode", workload.peers):
        config = dataclasses.replace(config, activation="silu", tied_embeddings=True)
    return config


def initial_params(config: TransformerConfig, arm: str) -> dict:
    """What every measurement of a config starts from, of an arm."""
    return jax.jit(partial(init_params, config, get_precision(arm)))(jax.random.key(0))


def prompt(vocab_size: int) -> Int32[np.ndarray, "T"]:
    """What the tokens that are measured go on from."""
    return np.arange(PROMPT, dtype=np.int32) % vocab_size


def positions(workload: Workload) -> int:
    """That a cache has room for."""
    return max(workload.sequence_length, PROMPT + STEPS)


def _measure(workload: Workload, size: str, say: Callable[[str], None]) -> Result:
    decodings, rivals = {}, dict[str, peers.Rival]()
    for name, held in cases().items():
        say(f"{size} {name}: compiling")
        decodings[name] = _decoding(workload, size, held)
    for peer in peers.of_suite("decode", workload.peers):
        say(f"{size} {peer}: loading")
        rivals.update(peers.load_decoding(peer, workload)(workload, size))
    decodings |= {name: Decoding(own.call, own.weight_bytes) for name, own in rivals.items()}
    say(f"{size}: {workload.repeats} rounds")
    calls = {name: decoding.call for name, decoding in decodings.items()}
    seconds = interleave({**calls, "bandwidth": _reading()}, workload.repeats, AT_LEAST)
    rates = [BANDWIDTH_BYTES / each for each in seconds.pop("bandwidth")]
    tokens = {name: [each / STEPS for each in turns] for name, turns in seconds.items()}
    rows = [
        _row(size, name, tokens[name], decoding.weight_bytes, statistics.median(rates))
        for name, decoding in decodings.items()
    ]
    ratios = _ratios(workload, size, tokens, decodings, rates)
    ratios |= {
        f"decode_time/{own.case}/{name}{workload.suffix(size)}": ratio(
            tokens[own.case], tokens[name], own.goal
        )
        for name, own in rivals.items()
    }
    notes = dict.fromkeys(note for own in rivals.values() for note in own.notes)
    return Result(ratios, rows, list(notes))


def _decoding(workload: Workload, size: str, held: Held) -> Decoding:
    config, precision = model_config(workload, size), get_precision(held.arm)
    deployed = deploy(initial_params(config, held.arm), precision)
    model = decoder(config, precision, deployed, held.packing, held.products)
    caches, logits = jax.jit(partial(prefill, config, precision), static_argnums=2)(
        model, jnp.asarray(prompt(config.vocab_size)[None]), positions(workload)
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
    suffix, (base, *others) = workload.suffix(size), cases()
    wide = workload.model(size).width >= GOAL_WIDTH and jax.default_backend() == "cpu"
    ratios = {}
    for name in others:
        goal = GOAL if wide and CASES[name].packing else None
        ratios[f"decode_time/{name}/{base}{suffix}"] = ratio(seconds[name], seconds[base], goal)
    for name, decoding in decodings.items():
        floors = [decoding.weight_bytes / rate for rate in rates]
        shares = [floor / own for floor, own in zip(floors, seconds[name], strict=True)]
        ratios[f"decode_floor/{name}{suffix}"] = spread(shares)
    return ratios
