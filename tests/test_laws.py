"""The laws' formulas, units and frontier."""

import numpy as np
import pytest

from analysis.laws import LAWS, frontier, get_law
from analysis.tables import AnalysisError

HOFFMANN = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def test_chinchilla_at_its_own_model():
    """Chinchilla (70B parameters, 1.4T tokens) as its paper's law has it: 1.936 nats a token."""
    loss = LAWS["chinchilla"](HOFFMANN, {"n": 70e9, "d": 1.4e12})
    assert loss == pytest.approx(1.69 + 406.4 / 70e9**0.34 + 410.7 / 1.4e12**0.28, rel=1e-14)
    assert loss == pytest.approx(1.936, abs=1e-3)


def test_power_law():
    params = {"E": 2.0, "A": 1e3, "alpha": 0.2}
    assert LAWS["power"](params, {"c": 1e15}) == pytest.approx(2.0 + 1e3 / 1e3)


def test_equation_in_symbols_and_numbers():
    law = LAWS["chinchilla"]
    assert law.write() == "L = E + A / N^alpha + B / D^beta"
    assert law.write(HOFFMANN) == "L = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28"


def test_every_law_names_its_source_and_parameters():
    for name, law in LAWS.items():
        assert law.name == name and law.source
        assert all(
            low < min(p.starts) <= max(p.starts) < high
            for p in law.parameters
            for low, high in [p.bounds]
        )


def test_unknown_law_names_the_known_ones():
    with pytest.raises(AnalysisError, match="unknown law 'caplan': choose one of chinch"):
        get_law("caplan")


@pytest.mark.parametrize("k", [6.0, 7.3])
def test_frontier_is_the_minimum_over_sizes(k):
    compute = np.geomspace(1e18, 1e24, 4)
    best = frontier(HOFFMANN, compute, flops_per_parameter_token=k)
    for i, c in enumerate(compute):
        n = best.n[i] * np.exp(np.linspace(-1, 1, 200_001))
        losses = LAWS["chinchilla"](HOFFMANN, {"n": n, "d": c / (k * n)})
        assert best.n[i] == pytest.approx(n[losses.argmin()], rel=1e-4)
        assert best.loss[i] == pytest.approx(losses.min(), rel=1e-12)
    np.testing.assert_allclose(k * best.n * best.d, compute, rtol=1e-12)
    assert best.measured.all()


def test_restricted_frontier_stays_in_range_and_says_where_it_left():
    compute = np.geomspace(1e18, 1e24, 50)
    free = frontier(HOFFMANN, compute)
    n_range = (free.n[10], free.n[40])
    best = frontier(HOFFMANN, compute, n_range=n_range)
    assert best.n.min() == n_range[0] and best.n.max() == n_range[1]
    assert np.all(best.loss >= free.loss)
    assert best.measured[10:41].all() and not best.measured[:10].any()
    narrow = frontier(HOFFMANN, compute, n_range=n_range, d_range=(free.d[20], free.d[30]))
    assert np.flatnonzero(narrow.measured).tolist() == pytest.approx(range(20, 31), abs=1)
