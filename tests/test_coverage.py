"""The coverage study: its simulated sweeps, its arithmetic, and what it finds."""

import json

import numpy as np
import pytest

from analysis import coverage
from analysis.coverage import Design, main, study

DESIGN = Design((1e5, 3e5, 1e6, 3e6), (10.0, 20.0, 40.0, 80.0), 3, 3e-3, 1e-3)


def test_a_simulated_sweep():
    """Endpoints of a run share its luck; scatter is what the design says."""
    inputs, runs = DESIGN.points()
    assert inputs["n"].size == 2 * 4 * 3 * 4 and len(np.unique(runs)) == 2 * 4 * 3
    for run in np.unique(runs):
        own = runs == run
        assert len(np.unique(inputs["n"][own])) == len(np.unique(inputs["group"][own])) == 1
        np.testing.assert_allclose(inputs["d"][own] / inputs["n"][own], DESIGN.ratios)
    exact = np.ones(runs.size)
    logs = np.log(DESIGN.losses(exact, runs, 4000, seed=0))
    assert logs.std() == pytest.approx(np.hypot(3e-3, 1e-3), rel=0.02)
    same_run = np.mean(logs[:, 0] * logs[:, 1]) / logs.var()
    assert same_run == pytest.approx(9 / 10, abs=0.03)
    other_run = np.mean(logs[:, 0] * logs[:, 4]) / logs.var()
    assert abs(other_run) < 0.05


def test_the_share_of_intervals_by_hand():
    """Intervals of [2.5, 97.5] percentiles around 0, .5 and 3: two of three hold 0."""
    samples = np.linspace(-1, 1, 201)[None] + np.array([[0.0], [0.5], [3.0]])
    found = coverage._coverage(0.0, np.array([0.0, 0.5, 3.0]), samples)
    assert found.share == pytest.approx(2 / 3)
    assert found.bias == pytest.approx(3.5 / 3) and 0 < found.low < 2 / 3 < found.high < 1


@pytest.mark.slow
def test_intervals_cover():
    """95 % intervals hold the truth in about 95 of 100 sweeps: within 92 and 98, and sampling."""
    found = study(DESIGN, objective="huber", replicates=300, bootstrap=200)
    for row in found.values():
        assert row.high >= 0.92 and row.low <= 0.98
        assert abs(row.bias) < row.standard_deviation / 3


@pytest.mark.slow
def test_intervals_that_take_endpoints_for_independent_do_not(monkeypatch):
    """The same sweeps, resampled point by point: the intervals are far too narrow."""
    pointwise = coverage.resamples
    monkeypatch.setattr(
        coverage, "resamples", lambda points, count, runs, seed: pointwise(points, count, seed=seed)
    )
    found = study(DESIGN, objective="huber", replicates=150, bootstrap=100)
    assert found["rho"].high < 0.92


def test_command(capsys):
    assert main(["--replicates=20", "--bootstrap=20", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["coverage"]) == {"rho", "E", "a", "prediction"}
    assert document["coverage"]["rho"]["truth"] == pytest.approx(0.6)
    assert main(["--replicates=20", "--bootstrap=20"]) == 0
    assert "held 0.6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--objective=l2", "choose one of huber"),
        ("--replicates=3", "at least 20"),
        ("--seeds=0", "at least 1"),
        ("--sizes=1e5,1e6", "three or more positive"),
        ("--sizes=1e5,big", "invalid"),
        ("--run_noise=-1", "not negative"),
        ("--run_noise=nan", "not negative"),
        ("--point_noise=inf", "below 1"),
        ("--run_noise=1e300", "below 1"),
        ("--sizes=nan,1e5,1e6", "--sizes: three or more positive numbers, all different"),
        ("--sizes=1e5,nan,1e6", "--sizes: three"),
        ("--ratios=inf,10,20", "--ratios: three"),
        ("--ratios=20,20,20", "--ratios: three"),
        ("--sizes=1e5,1e5,1e6,1e7", "--sizes: three"),
        ("--seeds=100000000", "more than 2e+08 losses"),
        ("--replicates=1000000000", "more than 2e+08 losses"),
        ("--bootstrap=1000000000", "more than 2e+08 losses"),
    ],
)
def test_mistakes(capsys, argument, message):
    assert main([argument]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
