"""A parameter's worth read off losses: a known one comes back, and nothing beyond the data."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis.equal_loss import equal_loss, main
from analysis.tables import AnalysisError

SIZES = {f"{n}k": n * 1e3 for n in (25, 50, 100, 200, 400, 800)}
BITS = {"fp16": 16.0, "ternary": 2.0}


def loss(n, d):
    """No law of this project: the terms are coupled."""
    return 1.0 + (40 * n**-0.7 + 90 * d**-0.6) ** 0.45


def table(rho=0.3, noise=0.0, seeds=2, seed=0, ratios=(5, 10, 20, 40, 80)):
    rng, rows = np.random.default_rng(seed), []
    for arm, worth in (("fp16", 1.0), ("ternary", rho)):
        for size, n in SIZES.items():
            for at in range(seeds):
                luck = noise * rng.normal()
                rows += [{"run_id": f"{size}-{arm}-{at}", "precision": arm, "size": size,
                          "seed": at, "params_non_embedding": n, "tokens": ratio * n,
                          "loss": loss(worth * n, ratio * n) + luck, "status": "ok",
                          "model_bits": BITS[arm] * n} for ratio in ratios]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("rho", [0.3, 0.5, 1.0, 1.7])
def test_a_multiplier_comes_back(rho):
    """And with it the bits, 2 for 16. Coarsest where two sizes alone saw as many tokens."""
    found = equal_loss(table(rho), "fp16", "ternary", noise=1e-9)
    assert len(found) >= 8
    np.testing.assert_allclose(found["rho"], rho, rtol=0.03)
    assert found["rho"].median() == pytest.approx(rho, rel=0.005)
    np.testing.assert_allclose(found["model_bits"], 2 / 16 / found["rho"], rtol=1e-6)
    np.testing.assert_allclose(found["ratio"], found["tokens"] / found["size"].map(SIZES))


def test_nothing_is_extrapolated():
    """The baseline's size lies between trained ones, of which each saw as many tokens."""
    found = equal_loss(table(0.3), "fp16", "ternary", noise=1e-9)
    parameters = found["size"].map(SIZES)
    for n, d in zip(parameters * found["rho"], found["tokens"], strict=True):
        seen = [m for m in SIZES.values() if 5 * m <= d * 1.001 and d <= 80 * m * 1.001]
        assert min(seen) * 0.999 <= n <= max(seen) * 1.001
    assert not (parameters < 50e3).any(), "0.3 of 25k was not trained"


def test_intervals_hold_the_truth():
    inside = []
    for seed in range(20):
        found = equal_loss(table(0.4, noise=0.004, seed=seed), "fp16", "ternary", noise=0.004)
        inside += ((found["rho_low"] <= 0.4) & (found["rho_high"] >= 0.4)).tolist()
    assert 0.9 <= np.mean(inside) <= 0.99


def test_noise_is_that_of_repeated_seeds():
    frame = table(0.4, noise=0.01, seeds=3)
    own = equal_loss(frame, "fp16", "ternary")
    width = (own["rho_high"] - own["rho_low"]).median()
    given = equal_loss(frame, "fp16", "ternary", noise=0.01)
    assert width == pytest.approx((given["rho_high"] - given["rho_low"]).median(), rel=0.5)


def test_refuses():
    with pytest.raises(AnalysisError, match="differ in their seed alone: .*; give --noise"):
        equal_loss(table(seeds=1), "fp16", "ternary")
    with pytest.raises(AnalysisError, match="no loss of 'ternary' lies between"):
        equal_loss(table(1e-3), "fp16", "ternary", noise=0.01)
    with pytest.raises(AnalysisError, match="no column 'seed'"):
        equal_loss(table().drop(columns="seed"), "fp16", "ternary", noise=0.01)


def test_command(tmp_path, capsys):
    path = str(tmp_path / "endpoints.csv")
    table(0.4, noise=0.004).to_csv(path, index=False)
    assert main([path]) == 0
    out = capsys.readouterr().out
    assert out.split()[:6] == ["size", "tokens", "ratio", "loss", "rho", "bits"]
    assert main([path, "--json", "--noise=0.004"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(row["rho_low"] < row["rho"] for row in found)
    assert main([path, "--treatment=binary"]) == 2
    assert main([path, "--noise=0"]) == 2
    assert "--noise=0.0: it must lie" in capsys.readouterr().err
