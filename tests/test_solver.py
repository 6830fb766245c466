"""The search: optima against an independent optimizer, certificates, bounds, batches."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from analysis.laws import LAWS
from analysis.solver import CERTIFIED, OBJECTIVES, Problem, descend, refit, solve

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def grid():
    n, d = np.meshgrid(np.geomspace(1e6, 3e9, 6), np.geomspace(1e8, 1e11, 5))
    return {"n": n.ravel(), "d": d.ravel()}


def noisy(scale=5e-3, seed=0):
    x = grid()
    rng = np.random.default_rng(seed)
    return x, LAWS["chinchilla"](TRUTH, x) * np.exp(scale * rng.standard_t(2, size=x["n"].size))


def problem(objective, seed=0):
    return Problem.of(LAWS["chinchilla"], *noisy(seed=seed), OBJECTIVES[objective])


def total(objective, theta, at):
    """The objective by hand, for logarithms of centred amplitudes and exponents."""
    r = at.residuals(theta)
    if objective == "huber":
        size = np.abs(r)
        return np.where(size <= 1e-3, r**2 / 2, 1e-3 * (size - 5e-4)).sum()
    return (r**2 / 2).sum()


@pytest.mark.parametrize("objective", ["huber", "log_mse", "mse"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_optimizer_finds_better(objective, seed):
    """Nelder-Mead and BFGS, started at the optimum and beside it."""
    at = problem(objective, seed)
    found = solve(at)
    best = total(objective, found.theta, at)
    assert found.gradient < CERTIFIED and found.share_of_starts > 0.9
    for method, step in itertools.product(("Nelder-Mead", "BFGS"), (0, 0.05)):
        start = found.theta + step
        other = minimize(lambda theta: total(objective, theta, at), start, method=method)
        assert other.fun >= best * (1 - 1e-9)


def test_least_absolute_deviation_is_a_vertex():
    """As many points are met exactly as there are parameters, and a subgradient is zero.

    The certificate is a linear program: signs of the other residuals against multipliers in
    [-1, 1] of the points that are met.
    """
    at = problem("lad")
    theta = solve(at).theta
    r, jacobian = at.jacobian(theta)
    met = np.abs(r) < 1e-7
    assert met.sum() == theta.size
    pull = -np.sign(r[~met]) @ jacobian[~met]
    answer = linprog(np.zeros(theta.size), A_eq=jacobian[met].T, b_eq=pull, bounds=(-1, 1))
    assert answer.status == 0, "no multipliers within [-1, 1]: not a minimum"


def test_every_start_of_a_wide_grid_ends_at_the_optimum():
    """Hoffmann et al.'s grid in its own units, many of whose starts predict absurd losses."""
    at = problem("huber")
    log_n, log_d = (np.log(at.scales[name]) for name in ("n", "d"))
    starts = []
    for e, a, b, alpha, beta in itertools.product(
        (-1, 1), (0, 10, 25), (0, 10, 25), (0.005, 0.5, 2), (0.005, 0.5, 2)
    ):
        starts.append([e, a - alpha * log_n, b - beta * log_d, np.log(alpha), np.log(beta)])
    found = solve(at, np.array(starts))
    assert found.starts == len(starts) and found.share_of_starts > 0.95


def test_coordinates_and_units():
    """natural() of coordinates is what in_units() says; the Jacobian is its derivative."""
    at = problem("huber")
    theta = solve(at).theta
    params = at.natural(theta)
    assert params["A"] == pytest.approx(np.exp(theta[1]) * at.scales["n"] ** params["alpha"])
    jacobian = at.natural_jacobian(theta)
    for k in range(theta.size):
        step = 1e-6 * np.eye(theta.size)[k]
        up, down = at.natural(theta + step), at.natural(theta - step)
        slope = [(up[name] - down[name]) / 2e-6 for name in at.law.names]
        np.testing.assert_allclose(jacobian[:, k], slope, rtol=1e-5, atol=1e-6)


def test_residuals_jacobian():
    at = problem("mse")
    theta = solve(at).theta
    r, jacobian = at.jacobian(theta)
    np.testing.assert_allclose(r, at.residuals(theta), rtol=0, atol=1e-13)
    for k in range(theta.size):
        step = 1e-6 * np.eye(theta.size)[k]
        slope = (at.residuals(theta + step) - at.residuals(theta - step)) / 2e-6
        np.testing.assert_allclose(jacobian[:, k], slope, rtol=1e-4, atol=1e-8)


def test_a_parameter_whose_bounds_are_equal_stays():
    """And the others are the best that they can be with it there."""
    at = problem("log_mse")
    free = solve(at).theta
    low, high = (np.tile(bound, (1, 1)) for bound in at.bounds)
    low[0, 3] = high[0, 3] = fixed = free[3] + 0.2
    found = descend(at, free[None], bounds=(low, high))
    assert found.theta[0, 3] == fixed and found.gradient[0] < CERTIFIED

    def rest(theta):
        return total("log_mse", np.insert(theta, 3, fixed), at)

    others = np.delete(found.theta[0], 3)
    assert rest(others) == pytest.approx(found.value[0], rel=1e-12)
    assert minimize(rest, others, method="Nelder-Mead").fun >= found.value[0] * (1 - 1e-9)


def test_an_offset_at_its_bound_is_an_optimum_there():
    """Where only a negative offset would fit, E ends at its least value; that is no failure."""
    x = grid()
    loss = LAWS["chinchilla"](TRUTH | {"E": -0.1}, x)
    at = Problem.of(LAWS["chinchilla"], x, loss, OBJECTIVES["log_mse"])
    found = solve(at)
    assert found.theta[0] == pytest.approx(at.bounds[0][0]) and found.gradient < CERTIFIED


def test_a_search_does_not_depend_on_its_neighbours():
    """Alone, in a block with others, and in a batch of several blocks."""
    at = problem("huber")
    starts = at.starts()[:200]
    weights = np.random.default_rng(0).integers(3, size=(200, at.loss.size)).astype(float)
    together = descend(at, starts, weights)
    for i in (0, 63, 64, 199):
        alone = descend(at, starts[i : i + 1], weights[i : i + 1])
        np.testing.assert_allclose(alone.theta[0], together.theta[i], rtol=1e-7)


def test_a_weight_is_a_repetition_and_zero_is_absence():
    at = problem("log_mse")
    weights = np.arange(at.loss.size) % 3
    repeated = np.repeat(np.arange(at.loss.size), weights)
    inputs = {name: x[repeated] for name, x in at.inputs.items()}
    direct = Problem.of(at.law, inputs, at.loss[repeated], at.objective)
    for theta in (
        solve(at, weights=weights.astype(float)).theta,
        refit(at, solve(at).theta, weights[None].astype(float))[0],
    ):
        assert_same_law(at, theta, direct)


def assert_same_law(at, theta, other):
    """The parameters at `theta` are those of another problem's solution."""
    found, expected = at.natural(theta), other.natural(solve(other).theta)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_losses_of_their_own():
    """refit(loss=) fits each row of losses."""
    at, others = problem("log_mse"), [problem("log_mse", seed) for seed in (1, 2, 3)]
    found = refit(at, solve(at).theta, loss=np.stack([other.loss for other in others]))
    for theta, other in zip(found, others, strict=True):
        assert_same_law(at, theta, other)
