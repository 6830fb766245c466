"""QuEST's effective parameters (Panferov et al. 2025, arXiv:2502.05003) from its authors' runs.

BITNET_JAX_LAW_DATA names a folder with quest_precision.csv, the runs with quantized weights and
activations, or runs_for_scaling.json of their repository (folder for_plots), all runs that their
fit is of. The tests that miss their file are skipped.
"""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.fitting import INTERVAL, fit
from analysis.intervals import resamples
from analysis.laws import LAWS
from analysis.solver import refit

# As their notebook prints them: A, alpha, B, beta and E, and the multiplier of each arm.
LAW = {"A": 8.134031, "alpha": 0.062726522, "B": 86.411906, "beta": 0.241288351, "E": 0.00142328979}
INTEGERS = {
    "1": 0.0205046859, "2": 0.151870911, "3": 0.433126203, "4": 0.691831718, "8": 1.01619263,
}  # fmt: skip
OTHERS = {
    "fp4": 0.629639028, "2.5": 0.381222089, "1NOH": 0.0155770373, "2NOH": 0.0784119072,
    "3NOH": 0.322107861, "4NOH": 0.603270679, "8NOH": 0.937628722,
    "1WO": 0.138419575, "2WO": 0.413717453, "3WO": 0.653058816, "4WO": 0.840434222, "16": 1.0,
}  # fmt: skip
EFFECTIVE = INTEGERS | OTHERS


def path_of(name):
    folder = os.environ.get("BITNET_JAX_LAW_DATA")
    if folder is None or not (Path(folder) / name).is_file():
        pytest.skip(f"BITNET_JAX_LAW_DATA names no folder with {name}")
    return Path(folder) / name


def label(run):
    """The arm of a run, as their notebook groups them."""
    weights, activations, bits = run["w_quant"], run["a_quant"], run["w_bits"]
    if weights == "NoQuantizer":
        return "16"
    if "FourEight" in weights:
        return "2.5"
    if "FP4" in weights:
        return "fp4"
    if activations == "NoQuantizer":
        return f"{bits}WO"
    return f"{bits}" if "Hadamard" in weights else f"{bits}NOH"


def fitted(n, d, loss, arms):
    inputs = {"n": n, "d": d, "group": arms}
    return fit("rho", inputs, loss, objective="log_mse", baseline="16", hold_out=False)


def published_objective(n, d, loss, arms):
    worth = np.array([EFFECTIVE[arm] for arm in arms])
    return np.mean(np.log(LAWS["chinchilla"](LAW, {"n": n * worth, "d": d}) / loss) ** 2)


def test_published_effective_parameters_to_three_digits():
    runs = json.loads(path_of("runs_for_scaling.json").read_text())
    n = np.array([run["non_embedding_parameters"] for run in runs], float)
    d = np.array([run["tokens"] for run in runs], float)
    loss = np.array([run["loss"] for run in runs])
    arms = np.array([label(run) for run in runs])
    # Their cost is half the sum of squares of log residuals times 10^-3.
    published = published_objective(n, d, loss, arms)
    assert 0.5e-6 * published * loss.size == pytest.approx(7.38431448e-10, rel=1e-5)
    found = fitted(n, d, loss, arms)
    assert found.objective_value < published
    for arm, worth in INTEGERS.items():
        assert found.params[f"rho[{arm}]"] == pytest.approx(worth, abs=1e-4)
    assert "E is indistinguishable from 0" in found.warnings


def test_published_effective_parameters_lie_in_intervals_of_most_runs():
    """Without the weight-only runs multipliers move by up to 2 %; a bootstrap says by how much.

    Every run is a cluster, drawn within its arm: arms of three runs would vanish from some draws.
    """
    frame = pd.read_csv(path_of("quest_precision.csv"))
    n, d, loss = (frame[name].to_numpy(float) for name in ("N_nonemb", "D", "loss"))
    arms = frame["P"].astype(str).to_numpy()
    found = fitted(n, d, loss, arms)
    assert found.objective_value < published_objective(n, d, loss, arms)
    weights = resamples(loss.size, 200, strata=arms)
    thetas = refit(found.problem, found.solution.theta, weights)
    drawn = found.problem.natural(thetas)
    for arm, worth in INTEGERS.items():
        low, high = np.percentile(drawn[f"rho[{arm}]"], INTERVAL)
        assert low < worth < high
        assert found.params[f"rho[{arm}]"] == pytest.approx(worth, rel=0.02)
