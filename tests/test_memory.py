"""The planner's bytes: state to the byte, the total against XLA's own count of a compiled step."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from bitnet_jax import cost, programs
from bitnet_jax.ladder import get_shape
from bitnet_jax.memory import TOLERANCE, Batch, optimizer_bytes, parameter_bytes, step_memory
from bitnet_jax.model import NORMS, TransformerConfig
from bitnet_jax.optim import LATENTS, OPTIMIZERS, OptimizerConfig
from bitnet_jax.precision import get_precision
from bitnet_jax.train_step import StepConfig, init_state

TINY = TransformerConfig(vocab_size=33, layers=2, width=24, ff_width=40, heads=4, kv_heads=2)


def step_of(size, arm, vocabulary=256, optimizer="adamw", microbatches=1, **changes):
    model = TransformerConfig(vocabulary, **get_shape(size)._asdict(), **changes)
    config = OptimizerConfig(name=optimizer)
    return StepConfig(model, get_precision(arm), config, microbatches=microbatches)


def tree_bytes(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def xla_bytes(step, rows, length, corpus=1000):
    """Of the program that trains: arguments, results and temporaries, what is shared once."""
    state = jax.eval_shape(programs.compiled_init(step, 1), jax.ShapeDtypeStruct((1,), jnp.int32))
    number = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    remember = jax.ShapeDtypeStruct((1,), jnp.bool_)
    compiled = (
        programs.compiled_steps(step, 1, length)
        .lower(
            programs.place(state, 1),
            jax.ShapeDtypeStruct((corpus,), jnp.uint8),
            jax.ShapeDtypeStruct((1, 1, rows), jnp.int32),
            programs.Schedule(number(1, 1), number(1, 1), number(1), remember),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        .compile()
        .memory_analysis()
    )
    return (
        compiled.argument_size_in_bytes
        + compiled.output_size_in_bytes
        + compiled.temp_size_in_bytes
        - compiled.alias_size_in_bytes
    )


ARMS = {
    "ternary": get_precision("ternary"),
    "fp32": get_precision("fp32"),
    "learned": get_precision("ternary", weights="ternary_lsq"),
    "bytes": get_precision("ternary", weights="int8_absmax"),
}


@pytest.mark.parametrize(("arm", "norms"), list(itertools.product(ARMS, NORMS)))
def test_the_state_is_counted_to_the_byte(arm, norms):
    """Every optimizer and every way of keeping latents, against the real tree."""
    kinds = [(name, "float32", True) for name in OPTIMIZERS]
    kinds += [("adamw", latents, False) for latents in LATENTS]
    for optimizer, latents, tied in kinds:
        if optimizer == "bop" and not ARMS[arm].quantized:
            continue
        model = dataclasses.replace(TINY, norms=norms, tied_embeddings=tied)
        config = OptimizerConfig(name=optimizer, latents=latents)
        step = StepConfig(model, ARMS[arm], config)
        state = jax.eval_shape(lambda step=step: init_state(step, 0))
        assert parameter_bytes(step) == tree_bytes(state.params)
        assert optimizer_bytes(step) == tree_bytes(state.opt_state)
        assert step_memory(step, Batch(4, 16)).state == tree_bytes(state)


@pytest.mark.parametrize(
    ("arguments", "rows", "length"),
    [
        (("27k", "ternary"), 16, 64),
        (("95k", "fp16"), 16, 64),
        pytest.param(("95k", "ternary"), 4, 256, marks=pytest.mark.slow),
        pytest.param(("330k", "bf16"), 8, 128, marks=pytest.mark.slow),
        pytest.param(("95k", "fp32"), 16, 64, marks=pytest.mark.slow),
        pytest.param(("2.7m", "ternary"), 16, 256, marks=pytest.mark.slow),
        pytest.param(("7m", "fp16"), 4, 512, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_total_is_xlas(arguments, rows, length):
    step = step_of(*arguments)
    ours, xla = step_memory(step, Batch(rows, length), 1000).total, xla_bytes(step, rows, length)
    assert ours == pytest.approx(xla, rel=TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": True},
        pytest.param({"microbatches": 4}, marks=pytest.mark.slow),
        pytest.param({"vocabulary": 8192}, marks=pytest.mark.slow),
        pytest.param({"norms": "pre", "gated": False}, marks=pytest.mark.slow),
        pytest.param({"norms": "inside"}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "lion"}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "muon"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_total_is_xlas_where_one_thing_changes(changes):
    step = step_of("95k", "ternary", **changes)
    rows = 16 // step.microbatches
    ours, xla = step_memory(step, Batch(rows, 64), 1000).total, xla_bytes(step, 16, 64)
    assert ours == pytest.approx(xla, rel=TOLERANCE)


def test_what_a_block_saves_counted_by_hand():
    """95k, 1024 tokens, a token and block: input 4 D; q, k, v, y and attention's result 2 D each;
    gate and up 2 F each; probabilities 2 N T; four operands, int8 with a float32 or 16 bits."""
    d, f, heads, length = 64, 160, 2, 64
    shared = 4 * d + 5 * 2 * d + 2 * 2 * f + 2 * heads * length
    operands = {"ternary": 3 * d + f + 4 * 4, "bf16": 2 * (3 * d + f)}
    for arm, kept in operands.items():
        memory = step_memory(step_of("95k", arm), Batch(16, length))
        assert memory.activations == 2 * 1024 * (shared + kept)
        remat = step_memory(step_of("95k", arm, remat=True), Batch(16, length))
        assert remat.activations == 2 * 1024 * 4 * d
        assert remat.total < memory.total


def test_a_mesh_divides_what_it_should():
    step = step_of("7m", "ternary")
    one, eight, both = (
        step_memory(step, Batch(16, 256), **mesh)
        for mesh in ({}, {"data": 8}, {"data": 4, "tensor": 2})
    )
    # Embedding and norms are on every device.
    shapes = cost.linear_shapes(step.model).values()
    others = one.parameters // 4 - step.model.layers * sum(map(math.prod, shapes))
    assert 256**2 < others < 1.2 * 256**2
    each = {"parameters": 4, "gradients": 4, "optimizer": 8, "snapshots": 0}
    for part, size in each.items():
        apart = size * others
        divided = (getattr(one, part) - apart) / 8 + apart
        assert divided <= getattr(eight, part) <= divided + 64
        assert getattr(both, part) == getattr(eight, part)
    assert eight.activations == one.activations // 8
    assert one.activations / 8 < both.activations < one.activations / 4
    assert one.gathered == 0 < both.gathered < eight.gathered == 4 * 256**2 + 3 * 256 * 768
    assert step_memory(step_of("7m", "bf16"), Batch(16, 256), data=8).gathered == 2 * eight.gathered
    assert eight.total < one.total / 4


def test_what_is_sure_is_never_more_than_the_estimate():
    for arm, size, rows in itertools.product(("ternary", "fp16"), ("27k", "7b"), (1, 64)):
        memory = step_memory(step_of(size, arm), Batch(rows, 256), 10**6)
        for on_cpu in (True, False):
            assert memory.lower_bound <= memory.at_least(on_cpu) <= memory.total
        assert memory.at_least(on_cpu=False) <= memory.at_least(on_cpu=True)
