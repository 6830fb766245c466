"""The laws' formulas, units and frontier."""

import numpy as np
import pytest

from analysis.fitting import bound, fit
from analysis.laws import LAWS, effective_multiplier, frontier, get_law
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


# ---- The zoo, each law against its formula written out with numpy ------------------------------

N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e6, 3e9, 6), np.geomspace(1e8, 3e11, 6)))
ARMS = ("bf16", "ternary", "binary")


def four_times(values):
    """Points [4 P] of the grid at four values each."""
    return np.tile(N, 4), np.tile(D, 4), np.repeat(np.asarray(values, float), N.size)


def power_case(of):
    x = np.geomspace(1e8, 1e15, 9)
    params = {"E": 1.76, "A": 185.0, "alpha": 0.26}
    return params, {of: x}, 1.76 + 185 * x**-0.26


KAPLAN = {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}


def kaplan(n, d):
    return ((8.8e13 / n) ** (0.076 / 0.095) + 5.4e13 / d) ** 0.095


def kaplan_case():
    return KAPLAN, {"n": N, "d": D}, kaplan(N, D)


def spectra_case():
    params = {"E": 2.19, "A": 4.73, "B": 5.18, "alpha": 0.32, "beta": 0.81}
    loss = 2.19 + 4.73 / (N / 1e6) ** 0.32 + 5.18 / (D / 1e9) ** 0.81
    return params, {"n": N, "d": D}, loss


def chinchilla(n, d):
    return 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28


def data_constrained_case():
    n, d, epochs = four_times([1, 4, 16, 64])
    unique = d / epochs
    fed = ((0.34 * 406.4) / (0.28 * 410.7)) ** (1 / 0.34) * unique ** (0.28 / 0.34)
    fed = np.minimum(fed, n)
    n_worth = fed + fed * 5.31 * (1 - np.exp(-(n / fed - 1) / 5.31))
    d_worth = unique + unique * 15.39 * (1 - np.exp(-(epochs - 1) / 15.39))
    params = HOFFMANN | {"R_N": 5.31, "R_D": 15.39}
    return params, {"n": n, "d": d, "u": unique}, chinchilla(n_worth, d_worth)


def kumar_case(activations):
    n, d, weight_bits = four_times([2, 3, 4, 16])
    activation_bits = np.tile([16.0, 8.0, 4.0, 3.0, 6.0], n.size)[: n.size]
    n_worth = n * (1 - np.exp(-weight_bits / 2.67))
    params, x = HOFFMANN | {"gamma_w": 2.67}, {"n": n, "d": d, "weight_bits": weight_bits}
    if not activations:
        return params, x, chinchilla(n_worth, d)
    n_worth = n_worth * (1 - np.exp(-activation_bits / 2.21))
    return (
        params | {"gamma_a": 2.21},
        x | {"activation_bits": activation_bits},
        chinchilla(n_worth, d),
    )


def qat_case():
    n, d, size = four_times([1, 32, 128, 256])
    error = 0.16 * d**0.08 * np.log2(size) ** 0.78 / n**0.22
    params = HOFFMANN | {"k": 0.16, "gamma_N": 0.22, "gamma_D": 0.08, "gamma_G": 0.78}
    return params, {"n": n, "d": d, "group_size": size}, chinchilla(n, d) + error


def unified_case():
    n, d, gmse = four_times([0, 0.0115, 0.119, 0.363])
    with np.errstate(divide="ignore"):
        capacity = np.tanh(0.4 * np.log(gmse) / np.log(0.25)) ** 1.2
    return (
        HOFFMANN | {"F": 0.4, "C": 1.2},
        {"n": n, "d": d, "gmse": gmse},
        chinchilla(n * capacity, d),
    )


def groups():
    """Arms of the grid [3 P], and a function from an arm's values to points."""
    arm = np.repeat(np.arange(3), N.size)
    return np.tile(N, 3), np.tile(D, 3), np.array(ARMS)[arm], lambda values: np.array(values)[arm]


def rho_case():
    n, d, label, each = groups()
    params = HOFFMANN | {"rho[ternary]": 0.6, "rho[binary]": 0.2}
    return params, {"n": n, "d": d, "group": label}, chinchilla(n * each([1, 0.6, 0.2]), d)


def frantar_case():
    _, x, loss = rho_case()
    params = {"a": 406.4, "b": 0.34, "c": 410.7, "d": 0.28, "e": 1.69}
    return params | {"eff[ternary]": 0.6, "eff[binary]": 0.2}, x, loss


def kaplan_rho_case():
    params, x, _ = rho_case()
    worth = np.select([x["group"] == "ternary", x["group"] == "binary"], [0.6, 0.2], 1.0)
    params = KAPLAN | {name: value for name, value in params.items() if "[" in name}
    return params, x, kaplan(worth * x["n"], x["d"])


def kaplan_epm_case():
    params, x, _ = epm_case()
    own = {name: value for name, value in params.items() if "[" in name}
    worth = np.ones_like(x["n"])
    for arm in ("ternary", "binary"):
        moved = (x["n"] / 1e6) ** own[f"mu[{arm}]"] * (x["d"] / 1e8) ** own[f"nu[{arm}]"]
        worth = np.where(x["group"] == arm, own[f"rho[{arm}]"] * moved, worth)
    return KAPLAN | own, x, kaplan(worth * x["n"], x["d"])


def epm_case():
    n, d, label, each = groups()
    worth = (
        each([1, 0.6, 0.2])
        * (n / 1e6) ** each([0, 0.1, -0.05])
        * (d / 1e8) ** each([0, -0.1, 0.02])
    )
    params = HOFFMANN | {"rho[ternary]": 0.6, "rho[binary]": 0.2, "mu[ternary]": 0.1}
    params |= {"mu[binary]": -0.05, "nu[ternary]": -0.1, "nu[binary]": 0.02}
    return params, {"n": n, "d": d, "group": label}, chinchilla(n * worth, d)


CASES = {
    "chinchilla": lambda: (HOFFMANN, {"n": N, "d": D}, chinchilla(N, D)),
    "power": lambda: power_case("c"),
    "power_n": lambda: power_case("n"),
    "power_d": lambda: power_case("d"),
    "spectra": spectra_case,
    "kaplan": kaplan_case,
    "data_constrained": data_constrained_case,
    "kumar": lambda: kumar_case(True),
    "kumar_weights": lambda: kumar_case(False),
    "frantar": frantar_case,
    "qat": qat_case,
    "unified": unified_case,
    "rho": rho_case,
    "epm": epm_case,
    "kaplan_rho": kaplan_rho_case,
    "kaplan_epm": kaplan_epm_case,
}


def test_every_law_of_the_zoo_is_here():
    assert set(CASES) <= set(LAWS)
    assert {"chinchilla", "kaplan", "spectra", "kumar", "frantar", "qat", "unified"} <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    params, inputs, expected = CASES[name]()
    law, x = bound(get_law(name), inputs, "bf16" if "group" in inputs else None)
    np.testing.assert_allclose(law(params, x), expected, rtol=1e-13)
    assert set(params) == set(law.names)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_recovered_from_losses_without_noise(name):
    """To 1e-8, from most starts; its units take part in this."""
    params, inputs, loss = CASES[name]()
    baseline = "bf16" if "group" in inputs else None
    found = fit(name, inputs, loss, baseline=baseline, hold_out=False)
    assert found.params == pytest.approx(params, rel=1e-8)
    assert found.share_of_starts > 0.9 and found.warnings == ()


def test_the_multiplier_is_what_the_law_uses():
    """EPM(N, D) times N parameters of the baseline have the treatment's loss."""
    params, x, loss = epm_case()
    own = x["group"] == "ternary"
    n, d = x["n"][own], x["d"][own]
    worth = effective_multiplier(params, {"n": n, "d": d}, "ternary")
    np.testing.assert_allclose(chinchilla(worth * n, d), loss[own], rtol=1e-13)
