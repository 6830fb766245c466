"""Suite `parts`: where a step's time goes.

Each part is compiled alone and timed in turn with the whole step. Alone it reads its operands from
memory and writes its results there, and XLA can fuse it with nothing: the sum of the parts says how
far that is from what happens inside the step, where also lie the embedding, the gate and additions.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bitnet_jax import cost, optim
from bitnet_jax.attention import causal_attention
from bitnet_jax.granularity import quantize_kernel
from bitnet_jax.layers import RMSNorm, rotary_angles, rotate
from bitnet_jax.loss import cross_entropy
from bitnet_jax.matmul import DEPLOYED, Weights, plain_dot, quantized_dots
from bitnet_jax.model import TransformerConfig
from bitnet_jax.precision import Precision
from bitnet_jax.quantize import quantize
from bitnet_jax.train_step import StepConfig
from experiments.benchmark.compilation import no_compilation_cache
from experiments.benchmark.peak import peak
from experiments.benchmark.result import Result
from experiments.benchmark.step import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    Say,
    Training,
    compile_step,
    initial_state,
)
from experiments.benchmark.timing import Case, interleave, ratio
from experiments.benchmark.workload import Workload

AT_LEAST = 0.02  # seconds a part and round
WHOLE = "whole step"

# Projections that have one input, which is quantized once.
GROUPS = (("q", "k", "v"), ("out",), ("gate", "up"), ("down",))


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a step.

    calls: how often a step does it. flops: of its products, a call; 0 where it has none.
    within: the part that it is a piece of, so that it does not enter the sum.
    """

    name: str
    case: Case
    calls: int
    flops: int = 0
    within: str | None = None


def run(workload: Workload, say: Say) -> Result:
    """Every size and arm."""
    result = Result(notes=[f"share of peak: of {peak().flops_per_s:.3g} FLOP/s, {peak().source}"])
    for size in workload.sizes:
        for arm in workload.arms:
            result.add(_measure(workload, size, arm, say))
    return result


def _measure(workload: Workload, size: str, arm: str, say: Say) -> Result:
    say(f"{size} {arm}: compiling")
    config = workload.step(size, arm)
    with no_compilation_cache():
        parts = list_parts(workload, config)
        whole = Training(config, compile_step(config, workload.batch_shape()), workload.batch())
        cases: dict[str, Case] = {part.name: part.case for part in parts}
        say(f"{size} {arm}: {workload.repeats} rounds of {len(parts)} parts")
        seconds = interleave({**cases, WHOLE: whole}, workload.repeats, AT_LEAST)
    a_step = {part.name: [part.calls * s for s in seconds[part.name]] for part in parts}
    summed = [a_step[part.name] for part in parts if part.within is None]
    total = [sum(turn) for turn in zip(*summed, strict=True)]
    rows = [_row(size, arm, part, a_step[part.name], seconds[WHOLE]) for part in parts]
    rows += [
        _row(size, arm, Part(name, lambda: None, 1), values, seconds[WHOLE])
        for name, values in (("sum of the parts", total), (WHOLE, seconds[WHOLE]))
    ]
    name = f"step_time/parts/{arm}{workload.suffix(size)}"
    return Result({name: ratio(total, seconds[WHOLE])}, rows)


def _row(
    size: str, arm: str, part: Part, seconds: list[float], whole: list[float]
) -> dict[str, Any]:
    median = statistics.median(seconds)
    rate = part.flops * part.calls / median if part.flops else None
    return {
        "suite": "parts",
        "size": size,
        "case": arm,
        "part": part.name,
        "within": part.within,
        "calls": part.calls,
        "step_seconds": median,
        "step_share": ratio(seconds, whole).median,
        "flops_per_s": rate,
        "peak_share": rate / peak().flops_per_s if rate else None,
        "rounds_seconds": seconds,
    }


# ---- The parts ---------------------------------------------------------------------------------


def list_parts(workload: Workload, config: StepConfig) -> list[Part]:
    """All parts of a step, compiled, with random operands of one microbatch."""
    c, arm, times = config.model, config.precision, config.microbatches
    shape = (workload.rows // times, workload.sequence_length)
    parts = [
        *(part for group in GROUPS for part in _products(c, arm, group, shape)),
        *_attention(c, arm, shape),
        *_norms(c, shape),
        *_head(c, arm, shape),
    ]
    parts = [dataclasses.replace(part, calls=times * part.calls) for part in parts]
    return [*parts, _optimizer(config)]


def _random(*shape: int, dtype: Any = jnp.float32) -> Array:
    values = np.random.default_rng(math.prod(shape)).standard_normal(shape, np.float32)
    return jnp.asarray(values, dtype)


def _forward_and_backward(
    name: str, f: Callable, operands: tuple, calls: int, wanted: dict[str, Any], flops: int = 0
) -> list[Part]:
    """A forward pass with all that it saves, and from that each backward pass alone.

    wanted: by the name of a backward pass, what to take of the cotangents of the operands.
    """
    forward = jax.jit(functools.partial(jax.vjp, f))
    y, pullback = forward(*operands)
    g = jax.tree.map(lambda a: _random(*a.shape, dtype=a.dtype), y)
    parts = [Part(f"{name} forward", _waiting(forward, *operands), calls, flops)]
    for which, take in wanted.items():
        # XLA leaves out what the wanted cotangent does not need.
        backward = jax.jit(lambda pullback, g, take=take: take(pullback(g)))
        parts.append(Part(f"{name} {which}", _waiting(backward, pullback, g), calls, flops))
    return parts


def _waiting(f: Callable, *operands: Any) -> Case:
    return lambda: jax.block_until_ready(f(*operands))


def _products(
    c: TransformerConfig, arm: Precision, names: tuple[str, ...], shape: tuple[int, int]
) -> list[Part]:
    """The projections of one input: forward, dx, dw, and of the forward pass the quantizers."""
    shapes = cost.linear_shapes(c)
    names = tuple(name for name in names if name in shapes)
    inputs, outputs = shapes[names[0]][0], sum(shapes[name][1] for name in names)
    x = _random(*shape, inputs)
    weights = tuple(Weights(_random(*shapes[name]) / math.sqrt(inputs)) for name in names)

    def products(x: Array, weights: tuple[Weights, ...]) -> tuple[Array, ...]:
        return quantized_dots(x, weights, DEPLOYED, arm)

    label = f"{','.join(names)} {inputs}x{outputs}"
    wanted = {"dx": lambda cotangents: cotangents[0], "dw": lambda cotangents: cotangents[1]}
    flops = 2 * math.prod(shape) * inputs * outputs
    parts = _forward_and_backward(label, products, (x, weights), c.layers, wanted, flops)
    return parts + _quantizers(label, arm, x, tuple(w.kernel for w in weights), c.layers)


def _quantizers(
    label: str,
    arm: Precision,
    x: Float[Array, "B T D"],
    kernels: tuple[Float[Array, "D _"], ...],
    calls: int,
) -> list[Part]:
    within, parts = f"{label} forward", []
    if arm.activations != "none":
        codes = jax.jit(functools.partial(quantize, arm.activation_quantizer, axes=(x.ndim - 1,)))
        parts.append(Part(f"{label} quantize x", _waiting(codes, x), calls, within=within))
    if arm.quantized:
        quantize_one = functools.partial(quantize_kernel, arm.weight_quantizer, arm.granularity)
        codes = jax.jit(lambda kernels: [quantize_one(kernel) for kernel in kernels])
        parts.append(Part(f"{label} quantize w", _waiting(codes, kernels), calls, within=within))
    return parts


def _attention(c: TransformerConfig, arm: Precision, shape: tuple[int, int]) -> list[Part]:
    """Rotation, and the attention itself: its two products, and the four of its gradients."""
    q = _random(*shape, c.heads, c.head_size, dtype=arm.compute_dtype)
    k, v = (
        _random(*shape, c.kv_heads, c.head_size, dtype=arm.compute_dtype) * scale
        for scale in (1, 0.5)
    )
    angles = rotary_angles(shape[1], c.head_size, c.rope_theta)
    flops = 2 * 2 * math.prod(shape) * shape[1] * c.heads * c.head_size
    all_of_it = {"backward": lambda cotangents: cotangents}
    forward, backward = _forward_and_backward(
        "attention", causal_attention, (q, k, v), c.layers, all_of_it, flops
    )
    return [
        *_forward_and_backward(
            "rotary",
            lambda q, k: (rotate(q, angles), rotate(k, angles)),
            (q, k),
            c.layers,
            all_of_it,
        ),
        forward,
        dataclasses.replace(backward, flops=2 * flops),
    ]


def _norms(c: TransformerConfig, shape: tuple[int, int]) -> list[Part]:
    """RMSNorms by width: three of the stream's in a block and one after them, one of the MLP's."""
    counts = {c.width: 3 * c.layers + 1, c.ff_width: c.layers}
    norm = RMSNorm(c.norm_epsilon)
    return [
        part
        for width, calls in counts.items()
        for part in _forward_and_backward(
            f"norm {width}",
            lambda scale, x: norm.apply({"params": {"scale": scale}}, x),
            (jnp.ones(width), _random(*shape, width)),
            calls,
            {"backward": lambda cotangents: cotangents},
        )
    ]


def _head(c: TransformerConfig, arm: Precision, shape: tuple[int, int]) -> list[Part]:
    """Head and cross entropy, forward and backward in one."""
    x, embedding = _random(*shape, c.width), _random(c.vocab_size, c.width)
    targets = jnp.zeros(shape, jnp.int32)

    def loss(x: Array, embedding: Array) -> Array:
        logits = plain_dot(x, embedding, arm).astype(jnp.float32)
        return cross_entropy(logits, targets)[0].mean()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    flops = 3 * 2 * math.prod(shape) * c.width * c.vocab_size
    return [Part("head and loss, both ways", _waiting(gradient, x, embedding), 1, flops)]


def _optimizer(config: StepConfig) -> Part:
    """Clipping, AdamW's direction, decay and update of all parameters."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(
        params: dict, opt_state: Any, grads: dict, rate: Array, decay: Array
    ) -> tuple[dict, Any]:
        updates, opt_state = optim.direction(config.optimizer).update(
            grads, opt_state, params, learning_rate=rate
        )
        params = optim.apply_direction(
            config.optimizer, config.precision, params, updates, rate, decay
        )
        return params, opt_state

    state = initial_state(config)
    grads = jax.tree.map(jnp.copy, state.params)
    kept = [state.params, state.opt_state]

    def step() -> None:
        kept[:] = update(*kept, grads, LEARNING_RATE, WEIGHT_DECAY)
        jax.block_until_ready(kept)

    return Part("optimizer", step, 1)
