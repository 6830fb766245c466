"""What a run tells of its latents, on latents small enough for a pencil."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import packing, telemetry
from bitnet_jax.latents import latent_codes
from bitnet_jax.precision import Precision
from bitnet_jax.telemetry import Snapshots, observe, remember, summarize

TERNARY = Precision("arm", "ternary_absmean")


def tree(q, down=None, step=None):
    """A parameter tree around stacked kernels; what else is in it must not be counted."""
    attention = {
        "q": {"kernel": jnp.asarray(q, jnp.float32)},
        "sub_norm": {"scale": jnp.zeros((2, 4))},
    }
    if step is not None:
        attention["q"]["step"] = jnp.asarray(step, jnp.float32)
    mlp = {} if down is None else {"down": {"kernel": jnp.asarray(down, jnp.float32)}}
    return {"embedding": jnp.zeros((9, 4)), "blocks": {"attention": attention, "mlp": mlp}}


def snapshots_of(*codes, precision=TERNARY):
    """Snapshots of `attention/q`, in arrays of their own, since they are donated."""
    quantizer = precision.weight_quantizer

    def stored(c):
        c = jnp.array(c, jnp.int8, copy=True)
        return packing.pack(c, quantizer) if quantizer.levels <= 4 else c

    return Snapshots(*({"attention/q": stored(c)} for c in codes))


def statistics(params, precision, *codes):
    """Of q. codes: at the last log line, two steps ago and one step ago; else those of now."""
    now = latent_codes(params, precision)["attention/q"]
    codes = [np.reshape(c, now.shape) for c in codes] if codes else [now] * 3
    _, stats = observe(snapshots_of(*codes, precision=precision), params, precision)
    assert set(stats) == {"attention/q"}
    return {key: np.asarray(value) for key, value in stats["attention/q"].items()}


def assert_statistics(found, **expected):
    """Equal in every block."""
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=1e-6, err_msg=key)


# Six latents of mean magnitude 1, so that they are in units of the scale. Their codes are
# -1, 1, 1, 1, 0, 1. The second block is ten times the first.
SIX = np.array([-1.45, 0.55, 2.0, 1.25, 0.05, 0.7]).reshape(2, 3)
TWO_BLOCKS = np.stack([SIX, 10 * SIX])


def test_ternary_latents_by_hand():
    """Distances to the thresholds at +-1/2: .95, .05, 1.5, .75, .45, .2. One lies beyond 1.5."""
    found = statistics(tree(TWO_BLOCKS), TERNARY)
    assert found["zero"].shape == (2,)
    assert_statistics(
        found,
        negative=1 / 6,
        zero=1 / 6,
        positive=4 / 6,
        entropy=2 / 6 * math.log2(6) + 4 / 6 * math.log2(6 / 4),
        distance=3.9 / 6,
        near=1 / 6,
        beyond=1 / 6,
        flips=0,
        flips_since=0,
        oscillations=0,
    )


def test_binary_latents_by_hand():
    """Mean 0 and mean magnitude 1; the threshold is 0, a step is 2, and beyond is beyond 2."""
    six = np.array([-2.5, -0.1, -0.4, 0.1, 0.6, 2.3]).reshape(3, 2)
    assert_statistics(
        statistics(tree(np.stack([six, six / 8])), Precision("arm", "binary")),
        negative=1 / 2,
        zero=0,
        positive=1 / 2,
        entropy=1,
        distance=(1.25 + 0.05 + 0.2 + 0.05 + 0.3 + 1.15) / 6,
        near=2 / 6,
        beyond=2 / 6,
    )


def test_two_bit_latents_by_hand():
    """Learned steps of 1/2 and 5; thresholds at -2, 0 and 2 of them, 2 apart."""
    five = np.array([-4.2, -0.6, 1.9, 3.5, 2.3]).reshape(5, 1)
    params = tree(np.stack([0.5 * five, 5 * five]), step=np.reshape([0.5, 5], (2, 1, 1, 1)))
    assert_statistics(
        statistics(params, Precision("arm", "int2_stretched")),
        negative=2 / 5,
        zero=0,
        positive=3 / 5,
        entropy=3 / 5 * math.log2(5) + 2 / 5 * math.log2(5 / 2),
        distance=(1.1 + 0.3 + 0.05 + 0.75 + 0.15) / 5,
        near=1 / 5,
        beyond=1 / 5,
    )


def test_four_bit_latents_by_hand():
    """The largest is 7, so the scale is 1; the last thresholds are -7.5 and 6.5."""
    four = np.array([[7.0, 2.45, -6.95, 0.3]])
    assert_statistics(
        statistics(tree(four[None]), Precision("arm", "int4_absmax")),
        negative=1 / 4,
        zero=1 / 4,
        positive=2 / 4,
        entropy=2,
        distance=(0.5 + 0.05 + 0.45 + 0.2) / 4,
        near=1 / 4,
        beyond=0,
    )


@pytest.mark.parametrize(
    "latents, entropy", [([-1.5, 0, 1.5], math.log2(3)), ([1, 1, 1], 0), ([0, -1, 0], None)]
)
def test_entropy(latents, entropy):
    """A third each: log2 3, all that a trit holds. A code that no weight has adds nothing."""
    entropy = math.log2(3) - 2 / 3 if entropy is None else entropy
    found = statistics(tree(np.reshape(latents, (1, 3, 1))), TERNARY)
    assert_statistics(found, entropy=entropy)


def test_flips_by_hand():
    """Two of six weights have changed since the last step; one of them back to its code before."""
    logged = [[0, 0, 0, 0, 0, 0], [-1, 1, 1, 1, 0, 1]]
    before_last = [[-1, 1, 1, 0, 1, 1], [1, -1, -1, -1, -1, -1]]
    last = [[-1, 0, 1, -1, 0, 1], [-1, 1, 1, 1, 0, 1]]
    found = statistics(tree(TWO_BLOCKS), TERNARY, logged, before_last, last)
    assert_statistics(
        found, flips=[2 / 6, 0], flips_since=[5 / 6, 0], oscillations=[1 / 6, 0], zero=1 / 6
    )


def test_each_block_has_its_own_scale():
    """One block a thousand times the other's size: with a common scale the small one were zeros."""
    kernel = np.random.default_rng(0).normal(size=(2, 256, 256)) * np.reshape([1, 1000], (2, 1, 1))
    found = statistics(tree(kernel), TERNARY)
    np.testing.assert_allclose(found["zero"], 0.310, atol=0.008)  # four standard errors


# Snapshots


STEPS = [tree(np.random.default_rng(i).normal(size=(2, 6, 4))) for i in range(5)]
CODES = [np.asarray(latent_codes(params, TERNARY)["attention/q"]) for params in STEPS]


def assert_snapshots(snapshots, *steps):
    """They are the codes of these steps."""
    for found, step in zip(snapshots, steps, strict=True):
        packed = found["attention/q"]
        codes = packing.unpack(packed, CODES[step].shape[-1], TERNARY.weight_quantizer)
        np.testing.assert_array_equal(codes, CODES[step])
        assert packed.dtype == jnp.uint8 and 4 * packed.nbytes == CODES[step].nbytes


def test_snapshots_move_as_documented():
    """Two steps are remembered before a log line; then a line after a single further step."""
    assert len({codes.tobytes() for codes in CODES}) == len(CODES)
    snapshots = remember(snapshots_of(*[CODES[0]] * 3), STEPS[1], TERNARY)
    assert_snapshots(snapshots, 0, 0, 1)
    snapshots = remember(snapshots, STEPS[2], TERNARY)
    assert_snapshots(snapshots, 0, 1, 2)

    snapshots, stats = observe(snapshots, STEPS[3], TERNARY)
    now, stats = CODES[3], stats["attention/q"]
    changed = now != CODES[2]
    expected = {
        "flips": changed,
        "flips_since": now != CODES[0],
        "oscillations": changed & (now == CODES[1]),
    }
    for key, where in expected.items():
        np.testing.assert_allclose(stats[key], where.mean((1, 2, 3)), rtol=1e-6, err_msg=key)
        assert (np.asarray(stats[key]) > 0).all()
    assert_snapshots(snapshots, 3, 2, 2)

    snapshots = remember(snapshots, STEPS[3], TERNARY)
    assert_snapshots(snapshots, 3, 2, 3)
    _, stats = observe(snapshots, STEPS[4], TERNARY)
    stats, changed = stats["attention/q"], CODES[4] != CODES[3]
    np.testing.assert_array_equal(stats["flips"], stats["flips_since"])
    back = (changed & (CODES[4] == CODES[2])).mean((1, 2, 3))
    np.testing.assert_allclose(stats["oscillations"], back, rtol=1e-6)


# Summaries


def test_summaries_weigh_blocks_and_kernels_by_their_weights():
    """Two blocks of a 10-weight kernel and of a 30-weight one: (10 (1 + 0) + 30 (.5 + .3)) / 80."""
    stats = {
        "attention/q": {"zero": np.array([1.0, 0.0]), "entropy": np.array([1.5, 1.5])},
        "mlp/up": {"zero": np.array([0.5, 0.3]), "entropy": np.array([0.7, 0.3])},
    }
    means = summarize(stats, {"attention/q": 10, "mlp/up": 30})
    assert means == pytest.approx({"zero": 34 / 80, "entropy": 60 / 80})
    assert all(type(value) is float for value in means.values())


def test_known_weights():
    """8 zeros of 32 and 6 of 8: weights count, not kernels."""
    first = np.array([0, 1, 1, -1] * 8).reshape(2, 4, 4)
    second = np.array([0, 0, 0, 5] * 2).reshape(2, 2, 2)
    params = tree(first, second)
    _, stats = observe(telemetry.first(params, TERNARY), params, TERNARY)
    means = summarize(jax.device_get(stats), {"attention/q": 16, "mlp/down": 4})
    assert means["zero"] == pytest.approx(14 / 40, rel=1e-6)
