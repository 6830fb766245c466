"""The suite `fit`: both sides search the same objective, from the same starts."""

import numpy as np
import pytest

from analysis.solver import descend, solve
from experiments.benchmark import fit
from experiments.benchmark.workload import Workload


def test_the_grid_is_hoffmanns():
    grid = fit._grid()
    assert grid.shape == (4500, 5)
    assert set(grid[:, 0]) == {0, 5, 10, 15, 20, 25} and set(grid[:, 4]) == {0, 0.5, 1, 1.5, 2}


def test_scipy_searches_the_same_objective(monkeypatch):
    """Its value at our optimum is ours; its gradient is the derivative; from there it gains nil."""
    problem = fit._problem()
    best = solve(problem).theta
    at = fit._from_coordinates(problem, best)
    seen = {}

    def minimize(objective, start, args, jac, method):
        seen["objective"] = objective
        assert method == "L-BFGS-B" and jac

    monkeypatch.setattr(fit, "minimize", minimize)
    weights = np.ones(fit.POINTS)
    fit._loop(problem, [(at, weights)], gradient=True)()
    value, gradient = seen["objective"](at, weights)
    assert value == pytest.approx(descend(problem, best[None]).value[0], rel=1e-9)
    moved = at + [0.3, -0.2, 0.1, 0.01, -0.02]
    slope = seen["objective"](moved, weights)[1]
    for k in range(5):
        step = 1e-6 * np.eye(5)[k]
        up, down = (seen["objective"](moved + s, weights)[0] for s in (step, -step))
        assert slope[k] == pytest.approx((up - down) / 2e-6, rel=1e-4)
    assert np.abs(gradient).max() < 1e-6


def test_starts_are_translated():
    problem = fit._problem()
    theta = solve(problem).theta[None]
    there = fit._from_coordinates(problem, theta[0])[None]
    np.testing.assert_allclose(fit._coordinates(problem, there), theta, rtol=1e-9)


def test_samples_are_scaled_and_goals_named(monkeypatch):
    """1 s for a sample of 24 searches is 187.5 s for 4,500 and 166.7 s for 4,000."""

    def interleave(cases, repeats):
        return {name: [1.0] * repeats for name in cases}

    monkeypatch.setattr(fit, "interleave", interleave)
    result = fit.run(Workload(repeats=2), lambda text: None)
    medians = {name: ratio.median for name, ratio in result.ratios.items()}
    assert medians["fit_time/ours/grid/scipy_gradient"] == pytest.approx(24 / 4500)
    assert medians["fit_time/ours/bootstrap/scipy_differences"] == pytest.approx(24 / 4000)
    assert result.ratios["fit_time/ours/grid/scipy_differences"].goal == pytest.approx(1 / 60)
    assert result.ratios[fit.BOOTSTRAP_SECONDS].goal == 10
