"""Intervals: resampled runs, the sandwich against a textbook case, profiles against a formula."""

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize

from analysis.fitting import fit
from analysis.intervals import covariance, resamples
from analysis.laws import LAWS
from analysis.solver import OBJECTIVES, Problem, solve

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def sweep(sizes=8, budgets=6, run_noise=0.0, noise=2e-3, seed=0):
    """Inputs, losses and the run of each point; endpoints of a run share its luck."""
    n, d = np.meshgrid(np.geomspace(1e6, 3e9, sizes), np.geomspace(1e8, 3e11, budgets))
    run = np.tile(np.arange(sizes), budgets)
    x = {"n": n.ravel(), "d": d.ravel()}
    rng = np.random.default_rng(seed)
    luck = run_noise * rng.normal(size=sizes)[run] + noise * rng.normal(size=run.size)
    return x, LAWS["chinchilla"](TRUTH, x) * np.exp(luck), run


def test_clusters_are_drawn_whole():
    runs = np.array(["a", "b", "b", "c", "c", "c"])
    weights = resamples(6, 500, runs, seed=3)
    assert weights.shape == (500, 6)
    np.testing.assert_array_equal(weights[:, 1], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 3], weights[:, 5])
    drawn = weights[:, [0, 1, 3]].sum(axis=1)
    np.testing.assert_array_equal(drawn, 3)
    assert weights[:, 0].mean() == pytest.approx(1, abs=0.15)
    np.testing.assert_array_equal(weights, resamples(6, 500, runs, seed=3))


def test_no_arm_vanishes_from_a_resample():
    """Runs are drawn within their arm; pairs that lie in both arms are drawn as they are."""
    arms = np.repeat(["fp16", "ternary"], [9, 2])
    weights = resamples(11, 300, strata=arms)
    np.testing.assert_array_equal(weights[:, arms == "ternary"].sum(axis=1), 2)
    assert (resamples(11, 300)[:, arms == "ternary"].sum(axis=1) == 0).any()
    pairs = np.tile(np.arange(3), 2)
    paired = resamples(6, 300, pairs, strata=np.repeat(["fp16", "ternary"], 3))
    np.testing.assert_array_equal(paired[:, :3], paired[:, 3:])


def test_covariance_of_independent_points_is_that_of_least_squares():
    """Close to s^2 (J'J)^-1 of nonlinear regression where the scatter is even."""
    x, loss, _ = sweep(sizes=16, budgets=14)
    found = fit("chinchilla", x, loss, objective="log_mse", hold_out=False)
    theta = found.solution.theta
    r, jacobian = found.problem.jacobian(theta)
    textbook = r @ r / (r.size - 5) * np.linalg.inv(jacobian.T @ jacobian)
    outer = found.problem.natural_jacobian(theta)
    expected = np.sqrt(np.diag(outer @ textbook @ outer.T))
    errors = np.array([found.standard_errors[name] for name in found.law.names])
    np.testing.assert_allclose(errors, expected, rtol=0.25)


def test_covariance_of_repeated_points_knows_its_clusters():
    """Every point written four times, as endpoints of one run: nothing is learned from it."""
    x, loss, _ = sweep()
    once = Problem.of(LAWS["chinchilla"], x, loss, OBJECTIVES["log_mse"])
    four = {name: np.repeat(values, 4) for name, values in x.items()}
    often = Problem.of(LAWS["chinchilla"], four, np.repeat(loss, 4), OBJECTIVES["log_mse"])
    theta, size = solve(once).theta, loss.size
    alone = covariance(once, theta)
    clustered = covariance(often, theta, np.repeat(np.arange(size), 4))
    correction = (4 * size - 1) / (4 * size - 5) / ((size - 1) / (size - 5))
    np.testing.assert_allclose(clustered, alone * correction, rtol=1e-6)
    fooled = covariance(often, theta)
    assert fooled[0, 0] < 0.3 * alone[0, 0]


def test_covariance_agrees_with_the_bootstrap():
    x, loss, run = sweep(sizes=20, budgets=6, run_noise=4e-3)
    found = fit("chinchilla", x, loss, bootstrap=400, clusters=run, hold_out=False)
    for name in ("E", "alpha", "beta"):
        deviation = found.samples[name].std(ddof=1)
        assert found.standard_errors[name] == pytest.approx(deviation, rel=0.35)


def test_least_absolute_deviation_has_no_covariance():
    x, loss, _ = sweep()
    found = fit("chinchilla", x, loss, objective="lad", hold_out=False)
    assert found.covariance is None and found.standard_errors == {}
    assert found.to_json()["covariance"] is None


def test_profile_ends_where_the_objective_says():
    """With alpha fixed at an end, the best objective is worse by chi2's 95 % point."""
    x, loss, _ = sweep()
    found = fit("chinchilla", x, loss, objective="log_mse", hold_out=False)
    r = found.log_residuals
    scatter = r @ r / (r.size - 5)
    for end in found.profile("alpha"):
        others = [name for name in found.law.names if name != "alpha"]

        def rest(theta, end=end, others=others):
            values = dict(zip(others, np.exp(theta), strict=True)) | {"alpha": end}
            return np.sum(np.log(LAWS["chinchilla"](values, x) / loss) ** 2)

        start = np.log([found.params[name] for name in others])
        start[others.index("A")] += (end - found.params["alpha"]) * np.log(x["n"]).mean()
        best = minimize(
            rest,
            start,
            method="Nelder-Mead",
            options={"maxiter": 4000, "xatol": 1e-9, "fatol": 1e-14},
        )
        excess = (best.fun - r @ r) / scatter
        assert excess == pytest.approx(stats.chi2.ppf(0.95, 1), rel=0.05)


def test_a_profile_is_wider_than_the_curvature_where_a_law_bends():
    """Amplitudes trade off with exponents along a curve, which standard errors do not follow."""
    x, loss, _ = sweep(sizes=4, budgets=5, noise=5e-3)
    found = fit("chinchilla", x, loss, objective="log_mse", hold_out=False)
    low, high = found.profile("A")
    assert 0 < low < found.params["A"] < high
    assert high - found.params["A"] > found.params["A"] - low
