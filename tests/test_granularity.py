"""Blocks of a kernel that share a scale, against slow loops over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient

from bitnet_jax.granularity import (
    GRANULARITIES,
    Granularity,
    initial_step,
    kernel_step_gradient,
    kernel_values,
    quantize_kernel,
)
from bitnet_jax.quantize import QUANTIZERS, SCALE_FLOOR, quantize

D, F = 24, 20
CASES = {  # granularity, cut along the inputs, slices, shape of a learned step
    "tensor": (Granularity(), False, 1, (1, 1, 1)),
    "tensor, row parallel": (Granularity(), True, 1, (1, 1, 1)),
    "channel": (Granularity("channel"), False, 1, (1, 1, F)),
    "channel, row parallel": (Granularity("channel"), True, 1, (1, 1, F)),
    "group of 6": (Granularity("group", 6), False, 4, (4, 1, F)),
    "group of 6, row parallel": (Granularity("group", 6), True, 4, (4, 1, F)),
    "group of all": (Granularity("group", D), False, 1, (1, 1, F)),
    "group of one": (Granularity("group", 1), False, D, (D, 1, F)),
    "5 shards": (Granularity("shard", 5), False, 1, (1, 1, 5, 1)),
    "3 shards, row parallel": (Granularity("shard", 3), True, 3, (3, 1, 1)),
    "1 shard": (Granularity("shard", 1), False, 1, (1, 1, 1, 1)),
}
DISTINCT = ["tensor", "channel", "group of 6", "5 shards", "3 shards, row parallel"]


def kernel(seed=0):
    """Columns and rows differ in size, so that no two blocks have one scale."""
    rng = np.random.default_rng(seed)
    sizes = np.linspace(0.3, 3, D)[:, None] * np.linspace(1, 4, F)
    return (sizes * rng.normal(size=(D, F))).astype(np.float32)


def blocks(granularity, row_parallel):
    """Index of every block, in the order of a learned step's entries."""
    everything = slice(None)
    if granularity.kind == "tensor":
        return [(everything, everything)]
    if granularity.kind == "channel":
        return [(everything, slice(j, j + 1)) for j in range(F)]
    if granularity.kind == "group":
        size = granularity.size
        starts = range(0, D, size)
        return [(slice(i, i + size), slice(j, j + 1)) for i in starts for j in range(F)]
    size = (D if row_parallel else F) // granularity.size
    cuts = [slice(k * size, (k + 1) * size) for k in range(granularity.size)]
    return [(cut, everything) if row_parallel else (everything, cut) for cut in cuts]


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def run(row, granularity, w, row_parallel, step=None, noise=None):
    return quantize_kernel(QUANTIZERS[row], granularity, w, row_parallel, step, noise)


def flat(q):
    """Codes and scales as float32 [D, F], each weight's own."""
    scale = np.broadcast_to(q.scale, q.codes.shape)
    return np.asarray(q.codes).reshape(D, F), scale.reshape(D, F)


def test_every_kind_has_a_case():
    assert {granularity.kind for granularity, *_ in CASES.values()} == set(GRANULARITIES)


@pytest.mark.parametrize("case", CASES)
def test_blocks_cover_each_weight_once(case):
    """Of the loops that the others compare with."""
    count = np.zeros((D, F))
    for index in blocks(*CASES[case][:2]):
        count[index] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_absmean_of_each_block(case):
    granularity, row_parallel, slices, step_shape = CASES[case]
    w = kernel()
    q = run("ternary_absmean", granularity, w, row_parallel)
    assert granularity.slices(D, row_parallel) == slices
    assert q.codes.shape == (slices, D // slices, F) and q.codes.dtype == jnp.int8
    per_output = step_shape == (1, 1, 1) or case == "3 shards, row parallel"
    assert q.scale.shape == (slices, 1, 1 if per_output else F) and q.scale.dtype == jnp.float32
    codes, scale = flat(q)
    for index in blocks(granularity, row_parallel):
        gamma = np.abs(w[index].astype(np.float64)).mean()
        np.testing.assert_allclose(scale[index], np.full_like(scale[index], gamma), rtol=5e-7)
        # A group of one is its own mean; dividing it by that in float64 would be a tie of 1.
        np.testing.assert_array_equal(codes[index], np.clip(np.rint(w[index] / gamma), -1, 1))


@pytest.mark.parametrize("row", ["binary", "ternary_twn", "int4_absmean"])
@pytest.mark.parametrize("case", DISTINCT)
def test_each_block_is_quantized_as_if_alone(case, row):
    granularity, row_parallel, _, _ = CASES[case]
    w = kernel()
    codes, scale = flat(run(row, granularity, w, row_parallel))
    for index in blocks(granularity, row_parallel):
        own_codes, own_scale = alone(row, w[index])
        np.testing.assert_array_equal(codes[index], own_codes)
        np.testing.assert_allclose(scale[index], np.full_like(w[index], own_scale), rtol=5e-7)


@functools.partial(jax.jit, static_argnums=0)
def alone(row, block):
    q = quantize(QUANTIZERS[row], block, (0, 1))
    return q.codes, q.scale[0, 0]


@pytest.mark.parametrize("case", DISTINCT)
def test_noise_and_steps_go_to_their_weights(case):
    """Each block's own learned step, each weight's own noise."""
    granularity, row_parallel, _, step_shape = CASES[case]
    w, noise = kernel(), np.random.default_rng(1).random((D, F), np.float32)
    step = np.linspace(0.2, 5, np.prod(step_shape), dtype=np.float32).reshape(step_shape)
    codes, scale = flat(run("ternary_lsq", granularity, w, row_parallel, step, noise))
    for index, own in zip(blocks(granularity, row_parallel), step.ravel(), strict=True):
        np.testing.assert_array_equal(scale[index], own)
        rounded = np.floor(w[index] / own.astype(np.float64) + noise[index])
        np.testing.assert_array_equal(codes[index], np.clip(rounded, -1, 1))


@pytest.mark.parametrize("row", ["ternary_absmean", "int2_stretched"])
@pytest.mark.parametrize("case", DISTINCT)
def test_kernel_values_round_trip(case, row):
    """[D, F] again, in its order; quantizing the trits once more changes nothing but a rounding."""
    granularity, row_parallel, _, _ = CASES[case]
    w = kernel()
    q = run(row, granularity, w, row_parallel)
    values = np.asarray(kernel_values(q))
    codes, scale = flat(q)
    assert values.shape == (D, F) and values.dtype == np.float32
    np.testing.assert_array_equal(values, codes * scale)
    # As close to the kernel as its grid lets it: half a step, where it does not clip.
    half = QUANTIZERS[row].gap / 2 * scale
    inside = np.abs(w) <= QUANTIZERS[row].high * scale
    assert (np.abs(values - w) <= 1.001 * half)[inside].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("case", DISTINCT)
def test_a_bad_weight_poisons_its_block_alone(case, bad):
    granularity, row_parallel, _, _ = CASES[case]
    w = kernel()
    w[7, 9] = bad
    poisoned = np.isnan(kernel_values(run("ternary_absmean", granularity, w, row_parallel)))
    for index in blocks(granularity, row_parallel):
        assert (poisoned[index] == (not np.isfinite(w[index]).all())).all()


@pytest.mark.parametrize("row", ["ternary_lsq", "ternary_stretched", "int2_stretched"])
@pytest.mark.parametrize("case", CASES)
def test_initial_step(case, row):
    """The rule's own scale, so that at first the learned quantizer is the plain one."""
    granularity, row_parallel, _, step_shape = CASES[case]
    w = kernel()
    step = np.asarray(initial_step(QUANTIZERS[row], granularity, w, row_parallel))
    assert step.shape == step_shape and step.dtype == np.float32
    rules = {
        "ternary_lsq": lambda block: 2 * np.abs(block).mean(dtype=np.float64),
        "ternary_stretched": lambda block: np.abs(block).max() / 1.5,
        "int2_stretched": lambda block: np.abs(block).max() / 4,
    }
    expected = [rules[row](w[index]) for index in blocks(granularity, row_parallel)]
    np.testing.assert_allclose(step.ravel(), expected, rtol=5e-7)


# ---- Gradient of learned scales ----------------------------------------------------------------


def round_pass(x):
    return x + stop_gradient(jnp.round(x) - x)


def lsq_values(row, w, step, count):
    """LSQ's forward pass as its authors publish it, with their scaled gradient of the step.

    Grids without a zero round to the nearest odd number.
    """
    grad_scale = 1 / np.sqrt(count * row.high)
    s = step * grad_scale + stop_gradient(step - step * grad_scale)
    ratio = jnp.clip(w / s, row.low, row.high)
    codes = round_pass(ratio) if row.gap == 1 else 2 * round_pass((ratio - 1) / 2) + 1
    return codes * s


@pytest.mark.parametrize("row", ["ternary_lsq", "int2_stretched"])
@pytest.mark.parametrize("case", DISTINCT)
def test_step_gradient_is_lsq_s_in_each_block(case, row):
    granularity, row_parallel, _, step_shape = CASES[case]
    quantizer = QUANTIZERS[row]
    w, g = kernel(), np.random.default_rng(2).normal(size=(D, F)).astype(np.float32)
    spread = np.random.default_rng(3).uniform(0.3, 1.5, step_shape)  # many weights clip
    step = np.asarray(initial_step(quantizer, granularity, w, row_parallel) * spread, np.float32)
    codes = run(row, granularity, w, row_parallel, step).codes
    gradient = kernel_step_gradient(quantizer, granularity, w, codes, step, g, row_parallel)
    assert gradient.shape == step.shape
    indices = blocks(granularity, row_parallel)
    w_blocks, g_blocks = (np.stack([a[index] for index in indices]) for a in (w, g))
    count = w_blocks[0].size

    def total(s, block, g):
        return jnp.sum(g * lsq_values(quantizer, block, s, count))

    expected = jax.jit(jax.vmap(jax.grad(total)))(step.ravel(), w_blocks, g_blocks)
    magnitude = np.abs(g_blocks).sum((1, 2)) * quantizer.high / np.sqrt(count * quantizer.high)
    assert (np.abs(np.ravel(gradient) - expected) <= 2e-6 * magnitude).all()
    assert np.abs(gradient).min() > 0


@pytest.mark.parametrize("step", [-0.5, 0.0, SCALE_FLOOR])
def test_a_step_at_the_floor_gets_no_gradient(step):
    """Where the forward pass does not depend on it."""
    quantizer, granularity, w = QUANTIZERS["ternary_lsq"], Granularity("channel"), kernel()
    steps = np.full((1, 1, F), 0.5, np.float32)
    steps[0, 0, 3] = step
    codes = run("ternary_lsq", granularity, w, False, steps).codes
    g = np.ones((D, F), np.float32)
    gradient = np.ravel(kernel_step_gradient(quantizer, granularity, w, codes, steps, g))
    assert gradient[3] == 0 and np.count_nonzero(gradient) == F - 1


# ---- What cannot be cut ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, size, row_parallel, message",
    [
        ("group", 5, False, "groups of 5 do not divide the 24 inputs of a kernel"),
        ("group", 48, True, "groups of 48 do not divide the 24 inputs of a kernel"),
        ("shard", 3, False, "3 shards do not divide the 20 outputs of a kernel"),
        ("shard", 5, True, "5 shards do not divide the 24 inputs of a kernel"),
    ],
)
def test_refusals(kind, size, row_parallel, message):
    assert Granularity(kind, size).refusal(D, F, row_parallel) == message


@pytest.mark.parametrize("case", CASES)
def test_what_can_be_cut_is_not_refused(case):
    granularity, row_parallel, _, _ = CASES[case]
    assert granularity.refusal(D, F, row_parallel) is None
