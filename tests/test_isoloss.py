"""Equal loss and equal cost of two laws, against closed forms; costs as functions of size."""

import numpy as np
import pytest

from analysis import isoloss
from analysis.costs import REACH, Cost
from analysis.estimates import Estimate
from analysis.laws import LAWS
from analysis.tables import AnalysisError

LAW = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def column(params):
    """Parameters of one resample, [1, 1] each."""
    return {name: np.array([[value]]) for name, value in params.items()}


def test_multiplier_has_the_same_loss():
    other = {"E": 1.7, "A": 300.0, "B": 500.0, "alpha": 0.30, "beta": 0.29}
    n, d = np.array([1e6, 1e8]), np.array([1e9, 1e10])
    found = isoloss.multiplier(LAW, other, n, d)
    same = LAWS["chinchilla"](LAW, {"n": found * n, "d": d})
    np.testing.assert_allclose(same, LAWS["chinchilla"](other, {"n": n, "d": d}), rtol=1e-12)


def test_multiplier_of_what_no_baseline_reaches_is_infinite():
    assert isoloss.multiplier(LAW, LAW | {"E": 0.5}, 1e9, 1e9) == np.inf


def test_optimal_models_have_the_loss_and_lie_on_the_frontier():
    losses = np.array([2.0, 2.5, 4.0])
    best = isoloss.optimal(column(LAW), losses, 7.0)
    np.testing.assert_allclose(best.loss[0], losses, rtol=1e-10)
    np.testing.assert_allclose(7.0 * best.n * best.d, best.compute, rtol=1e-10)
    for factor in (0.9, 1.1):  # no other split of the same compute is as good
        moved = {"n": best.n * factor, "d": best.d / factor}
        assert np.all(LAWS["chinchilla"](LAW, moved) > best.loss)
    assert isoloss.optimal(column(LAW), np.array([1.6]), 6.0).compute.item() == np.inf


def gap_of(treatment, tokens=1e9):
    def gap(x):
        one, other = (LAWS["chinchilla"](p, {"n": x, "d": tokens}) for p in (LAW, treatment))
        return np.broadcast_to(other - one, np.broadcast_shapes((1, 1), other.shape))

    return gap


def test_crossover_in_closed_form():
    """A and alpha alone differ: the terms meet where N^(alpha' - alpha) = A' / A."""
    treatment = column(LAW | {"A": 800.0, "alpha": 0.38})
    expected = (800.0 / 406.4) ** (1 / (0.38 - 0.34))
    found = isoloss.crossover(gap_of(treatment), 1e4, 1e10)
    assert found.item() == pytest.approx(expected, rel=1e-9)
    assert isoloss.crossover(gap_of(treatment), 1e4, 0.9 * expected).item() == np.inf
    assert isoloss.crossover(gap_of(treatment), 2 * expected, 1e10).item() == 2 * expected


def test_a_treatment_that_is_better_only_below_has_no_crossover():
    assert isoloss.crossover(gap_of(column(LAW | {"A": 200.0, "alpha": 0.30})), 1e4, 1e12) == np.inf


def test_the_last_crossing_counts():
    def gap(x):
        return -np.cos(np.log10(np.asarray(x)) * np.pi)[None].reshape(1, -1)

    # Positive between 10^.5 and 10^1.5 and between 10^2.5 and 10^3.5, and never after.
    assert isoloss.crossover(gap, 1.0, 10**4.2).item() == pytest.approx(10**3.5, rel=1e-9)


def test_cost_is_a_power_law_between_sizes_and_not_told_far_beyond():
    n = np.array([1e6, 1e6, 1e7, 1e8])
    cost = Cost.of("bits", "ternary", n, np.array([20.0, 20.0, 100.0, 1000.0]))
    assert cost(np.array([1e6, 1e7, 1e8])) == pytest.approx([20.0, 100.0, 1000.0])
    assert cost(np.array([10**7.5])) == pytest.approx([100 * 10**0.5])
    assert cost(np.array([1e5, 1e9])) == pytest.approx([4.0, 10000.0])
    beyond = np.array([1e6 / REACH / 1.01, 1e8 * REACH * 1.01, np.inf])
    assert np.isnan(cost(beyond)).all()
    assert cost.reach == pytest.approx((20 / 5**2, 1000 * 100))
    assert cost.size(cost(np.array([3e6, 2e9]))) == pytest.approx([3e6, 2e9])


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ([1.0, 2.0, 3.0], "'bits' is no function of size: at 1e\\+06 parameters it lies between 1"),
        ([1.0, 1.0, 1.0], "'bits' does not rise with size"),
        ([2.0, 2.0, 1.0], "'bits' does not rise with size"),
    ],
)
def test_refuses_what_is_no_cost_of_size(costs, message):
    with pytest.raises(AnalysisError, match=message):
        Cost.of("bits", "fp16", np.array([1e6, 1e6, 1e7]), np.array(costs))


def test_estimates_of_draws_that_cannot_be_told():
    draws = np.concatenate([np.linspace(0, 1, 99), [np.nan]])
    found = Estimate.of(0.5, draws)
    assert (found.low, found.high) == pytest.approx((0.025, 0.975), abs=0.02)
    assert np.isnan(Estimate.of(0.5, np.where(draws < 0.1, np.nan, draws)).low)
    assert Estimate.of(0.5, np.where(draws > 0.9, np.inf, draws)).to_json()["high"] is None
