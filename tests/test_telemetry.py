"""What a run tells of its weights."""

import numpy as np
import pytest

from bitnet_jax.precision import get_precision
from bitnet_jax.telemetry import zero_fraction

TERNARY = get_precision("ternary")


def params_of(kernel, *others):
    """A tree of blocks around stacked kernels; scales and embedding must not be counted."""
    kernels = {str(i): {"kernel": k.astype(np.float32)} for i, k in enumerate((kernel, *others))}
    norm = {"scale": np.zeros((2, 64), np.float32)}
    return {"blocks": kernels | {"norm": norm}, "embedding": np.zeros((9, 9), np.float32)}


def test_known_weights():
    """8 zeros of 32 and 6 of 8: weights count, not kernels."""
    first = np.array([0, 1, 1, -1] * 8).reshape(2, 4, 4)
    second = np.array([0, 0, 0, 5] * 2).reshape(2, 2, 2)
    assert float(zero_fraction(params_of(first), TERNARY)) == 8 / 32
    both = float(zero_fraction(params_of(first, second), TERNARY))
    assert both == pytest.approx(14 / 40, rel=1e-6)


def test_each_layer_has_its_own_scale():
    """One layer a thousand times the other's size: with a common scale the small one were zeros."""
    kernel = np.random.default_rng(0).normal(size=(2, 256, 256))
    fraction = float(zero_fraction(params_of(kernel), TERNARY))
    assert fraction == pytest.approx(0.310, abs=5e-3)  # four standard errors
    scaled = kernel * np.array([1, 1000])[:, None, None]
    assert float(zero_fraction(params_of(scaled), TERNARY)) == pytest.approx(fraction, abs=2e-5)
