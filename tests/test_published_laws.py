"""Published fits, found again from published data.

The data are other people's and not part of this repository: these tests look for them in the
directory that BITNET_JAX_LAW_DATA names, and are skipped without it.

epoch_chinchilla.csv: `data/svg_extracted_data.csv` of Epoch AI's analyzing-chinchilla (Besiroglu et
al. 2024, arXiv:2404.10102): 245 points read off a figure of Hoffmann et al., of which the five
highest losses are left out.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.fitting import fit
from analysis.laws import LAWS
from analysis.solver import OBJECTIVES, Problem, refit, solve


@pytest.fixture(scope="module")
def chinchilla():
    """Inputs and losses of the 240 points, in the order of the file."""
    path = Path(os.environ.get("BITNET_JAX_LAW_DATA", "")) / "epoch_chinchilla.csv"
    if "BITNET_JAX_LAW_DATA" not in os.environ or not path.is_file():
        pytest.skip("BITNET_JAX_LAW_DATA names no directory with epoch_chinchilla.csv")
    frame = pd.read_csv(path).dropna(subset=["Model Size", "Training FLOP", "loss"])
    frame = frame[frame["loss"] < frame["loss"].nlargest(5).min()]
    n, flops = frame["Model Size"].to_numpy(), frame["Training FLOP"].to_numpy()
    return {"n": n, "d": flops / (6 * n)}, frame["loss"].to_numpy(), flops


def test_huber_optimum(chinchilla):
    inputs, loss, _ = chinchilla
    found = fit("chinchilla", inputs, loss)
    assert found.n_points == 240 and found.objective_value <= 1.01827402e-3
    expected = {"A": 477.8259, "B": 2143.417, "E": 1.8172181, "alpha": 0.3473105, "beta": 0.3671724}
    assert found.params == pytest.approx(expected, rel=1e-6)
    assert found.share_of_starts == 1 and found.solution.gradient < 1e-6


def test_least_absolute_deviation(chinchilla):
    """The published parameters are those of this limit."""
    inputs, loss, _ = chinchilla
    found = fit("chinchilla", inputs, loss, objective="lad", hold_out=False)
    expected = {"A": 482.006, "B": 2085.43, "E": 1.81686, "alpha": 0.347813, "beta": 0.365854}
    assert found.params == pytest.approx(expected, rel=1e-5)


def test_bootstrap_standard_errors(chinchilla):
    """4,000 resamples, drawn as the paper's notebook draws them (seed 42)."""
    inputs, loss, _ = chinchilla
    problem = Problem.of(LAWS["chinchilla"], inputs, loss, OBJECTIVES["huber"])
    random = np.random.RandomState(42)
    drawn = [random.choice(240, size=240, replace=True) for _ in range(4000)]
    weights = np.stack([np.bincount(row, minlength=240) for row in drawn]).astype(float)
    samples = problem.natural(refit(problem, solve(problem).theta, weights))
    expected = {"A": 124.5, "B": 1293, "E": 0.02566, "alpha": 0.01540, "beta": 0.02060}
    for name, error in expected.items():
        assert samples[name].std(ddof=1) == pytest.approx(error, rel=5e-3)


def test_extrapolation(chinchilla):
    """From the 217 points below 1e21 FLOPs to the 23 above."""
    inputs, loss, flops = chinchilla
    small = flops < 1e21
    assert small.sum() == 217
    found = fit("chinchilla", {k: x[small] for k, x in inputs.items()}, loss[small])
    predicted = found.predict({k: x[~small] for k, x in inputs.items()})
    assert np.abs(predicted / loss[~small] - 1).mean() <= 0.01055  # 1.05 %
