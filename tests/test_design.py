"""Information against closed forms, optimal designs that are known, simulation, the command."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from analysis.design import main
from analysis.designs import Design, choose, isoflop, rows, same_ratio
from analysis.exchange import Candidates, Criterion, Search, best_grid
from analysis.information import Knowledge, Noise, Run, Setting, points
from analysis.laws import LAWS, Law, Parameter
from analysis.solver import OBJECTIVES, Problem, refit, solve
from analysis.tables import AnalysisError

TRUTH = {"E": 1.2, "A": 22.0, "B": 60.0, "alpha": 0.3, "beta": 0.33, "rho[ternary]": 0.55}
RHO = LAWS["rho"].bind(["fp16", "ternary"])
SIZES = {"27k": 27040.0, "56k": 55888.0, "95k": 94976.0, "160k": 160960.0, "330k": 332000.0}
NOISE = Noise(0.004, 0.002)


def linear(*terms):
    """A law whose log loss is the sum of coefficients c0, c1 ... times terms of log n and log d."""
    names = [f"c{i}" for i in range(len(terms))]

    def formula(p, x):
        n, d = jnp.log(x["n"] / 1e6), jnp.log(x["d"] / 1e6)
        return jnp.exp(sum(p[name] * term(n, d) for name, term in zip(names, terms, strict=True)))

    parameters = tuple(Parameter(name, (0.0,), (-1.0, 1.0), domain="real") for name in names)
    return Law("linear", parameters, ("n", "d"), 2, formula, "", "")


def setting(law, noise=NOISE):
    return Setting(law, dict.fromkeys(law.names, 0.1), noise)


LINE = linear(lambda n, d: 1.0, lambda n, d: n, lambda n, d: d)


def test_jacobian_is_of_log_loss_by_log_parameters():
    n, d = np.array([3e4, 1e6]), np.array([2e6, 9e6])
    found = Setting(RHO, TRUTH, NOISE).jacobian(n, d)
    assert found.shape == (2, 2, 6)
    for arm, (k, name) in itertools.product((0, 1), enumerate(RHO.names)):
        inputs = {"n": n, "d": d, "group": np.full(2, arm)}
        ends = [RHO(TRUTH | {name: TRUTH[name] * np.exp(h)}, inputs) for h in (1e-5, -1e-5)]
        slope = (np.log(ends[0]) - np.log(ends[1])) / 2e-5
        assert found[arm, :, k] == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert np.all(found[0, :, 5] == 0) and np.all(found[1, :, 5] < 0)


def test_information_of_a_line_in_closed_form():
    """Ends of a run share its noise: J' V^-1 J with V = end^2 I + run^2 1 1', runs independent."""
    grid = (Run("a", 1e5, (1e6, 2e6, 4e6)), Run("b", 1e6, (3e6,)), Run("b", 1e6, (3e6,)))
    knowledge = Knowledge(setting(LINE), points(grid))
    n, d = np.log(np.array(points(grid)).T / 1e6)
    jacobian = np.stack([np.ones(5), n, d], axis=1)
    same = np.equal.outer([0, 0, 0, 1, 2], [0, 0, 0, 1, 2])
    v = NOISE.endpoint**2 * np.eye(5) + NOISE.run**2 * same
    expected = jacobian.T @ np.linalg.inv(v) @ jacobian
    assert knowledge.of_grid(grid) == pytest.approx(expected, rel=1e-6)
    bread = np.linalg.inv(jacobian.T @ jacobian)
    sandwich = bread @ jacobian.T @ v @ jacobian @ bread
    assert knowledge.least_squares(grid) == pytest.approx(sandwich, rel=1e-6)


def test_least_squares_is_efficient_where_ends_are_independent():
    grid = (Run("a", 1e5, (1e6, 2e6, 4e6)), Run("b", 1e6, (3e6, 9e6)))
    knowledge = Knowledge(setting(LINE, Noise(0.0, 0.003)), points(grid))
    assert knowledge.least_squares(grid) == pytest.approx(knowledge.bound(grid), rel=1e-6)


def test_cost_counts_the_trunk_once():
    law = Setting(RHO, TRUTH, NOISE)
    assert law.cost(Run("a", 1e5, (1e6,))) == pytest.approx(2 * 6 * 1e5 * 1e6)
    branched = law.cost(Run("a", 1e5, (1e6, 2e6, 4e6)))
    assert branched == pytest.approx(2 * 6 * 1e5 * (0.8 * 4e6 + 0.2 * 7e6))
    other = Setting(LAWS["chinchilla"], TRUTH, NOISE, 7.0, 1.0)
    assert other.cost(Run("a", 1e5, (1e6, 2e6))) == pytest.approx(7 * 1e5 * 3e6)


def equally_dear(exponents, budget, seeds=20):
    """Sizes e^x million parameters with one end each, all of one cost, and so many runs of them."""
    n = {f"x{x:+.1f}": 1e6 * np.exp(x) for x in exponents}
    tokens = {size: (1e12 / count,) for size, count in n.items()}
    return Candidates(tokens, n, seeds), budget * 6e12 * 1.001


def chosen(law, criterion, candidates, budget, noise=NOISE):
    knowledge = Knowledge(setting(law, noise), candidates.points)
    grid = best_grid(Search(knowledge, candidates, criterion, budget))
    return {size: sum(run.size == size for run in grid) for size in candidates.n}


def test_the_slope_of_a_line_is_found_at_its_ends():
    law = linear(lambda n, d: 1.0, lambda n, d: n)
    found = chosen(law, Criterion("A", (1,)), *equally_dear((-1.0, -0.5, 0.0, 0.5, 1.0), 8))
    assert found == {"x-1.0": 4, "x-0.5": 0, "x+0.0": 0, "x+0.5": 0, "x+1.0": 4}


def test_a_parabola_is_found_at_its_ends_and_middle():
    """D-optimal with equal weights at -1, 0 and 1; its curvature takes twice as many in the middle
    (Kiefer and Wolfowitz 1959)."""
    law = linear(lambda n, d: 1.0, lambda n, d: n, lambda n, d: n * n)
    candidates = equally_dear((-1.0, -0.5, 0.0, 0.5, 1.0), 12)
    found = chosen(law, Criterion("D", (0, 1, 2)), *candidates)
    assert found == {"x-1.0": 4, "x-0.5": 0, "x+0.0": 4, "x+0.5": 0, "x+1.0": 4}
    found = chosen(law, Criterion("A", (2,)), *candidates)
    assert found == {"x-1.0": 3, "x-0.5": 0, "x+0.0": 6, "x+0.5": 0, "x+1.0": 3}


@pytest.mark.parametrize("criterion", [Criterion("D", (0, 1, 2)), Criterion("A", (1,))], ids=str)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_nothing_better_among_all_grids(criterion, share):
    """Two sizes with up to three ends each at one seed: every subset is tried."""
    candidates = Candidates({"a": (1e6, 2e6, 4e6), "b": (3e6, 9e6, 3e7)}, {"a": 1e5, "b": 3e5}, 1)
    knowledge = Knowledge(setting(LINE), candidates.points)
    every = [
        [
            (),
            *(
                (Run(s, candidates.n[s], e),)
                for k in (1, 2, 3)
                for e in itertools.combinations(t, k)
            ),
        ]
        for s, t in candidates.tokens.items()
    ]
    grids = [first + second for first, second in itertools.product(*every)]
    dearest = max(sum(map(knowledge.setting.cost, grid)) for grid in grids)
    search = Search(knowledge, candidates, criterion, share * dearest)
    best = min((g for g in grids if search.cost(g) <= search.budget), key=search.log_value)
    found = best_grid(search)
    assert search.cost(found) <= search.budget
    assert search.log_value(found) == pytest.approx(search.log_value(best), abs=1e-9)


@pytest.fixture(scope="module")
def design():
    return choose(Setting(RHO, TRUTH, NOISE), SIZES, 1e13, Criterion("A", (5,)))


def simulated(design, count):
    """log rho [count] fitted by least squares to losses with the noise that was assumed."""
    law, noise = design.setting.law, design.setting.noise
    runs = [(run, arm) for arm in range(2) for run in design.grid]
    ends = [(run.n, d, arm, i) for i, (run, arm) in enumerate(runs) for d in run.tokens]
    n, d, group, membership = np.array(ends).T
    rng = np.random.default_rng(0)
    shared = noise.run * rng.normal(size=(count, len(runs)))[:, membership.astype(int)]
    inputs = {"n": n, "d": d, "group": group}
    clean = law(TRUTH, inputs)
    loss = clean * np.exp(shared + noise.endpoint * rng.normal(size=shared.shape))
    problem = Problem.of(law, inputs, clean, OBJECTIVES["log_mse"])
    return np.log(problem.natural(refit(problem, solve(problem).theta, loss=loss))["rho[ternary]"])


def test_predicted_errors_are_those_of_refits(design):
    """And an isoFLOP grid of the same cost is worse by what was predicted."""
    profile = isoflop(design, SIZES)
    assert profile.cost == pytest.approx(design.cost, rel=1e-9)
    errors = {}
    for name, other in (("chosen", design), ("isoflop", profile)):
        errors[name] = float(simulated(other, 400).std())
        assert errors[name] == pytest.approx(other.errors["rho[ternary]"], rel=0.15)
    assert errors["chosen"] < 0.7 * errors["isoflop"]
    assert design.efficiency(profile) < 0.5
    for name, least in design.least_errors.items():
        assert least <= design.errors[name]


def test_the_budget_is_kept_and_nearly_spent(design):
    assert 0.97e13 < design.cost <= 1e13
    assert design.refused is None and profile_ratios(design.grid) <= set(
        2.5 * 2.0 ** np.arange(1, 8)
    )
    counts = pd.DataFrame(rows(design.grid)).groupby("size")["seed"].nunique()
    assert counts.max() <= 5


def test_a_small_budget_is_spent_where_a_flop_tells_most(design):
    """By gains alone it is gone before three sizes are trained."""
    assert choose(design.setting, SIZES, 3e12, Criterion("A", (5,))).errors["rho[ternary]"] < 0.03


def profile_ratios(grid):
    return {round(d / n, 6) for n, d in points(grid)}


def test_one_ratio_is_refused_and_isoflop_grids_have_equal_budgets(design):
    naive = same_ratio(design, SIZES)
    assert profile_ratios(naive.grid) == {20.0}
    assert "d rises with n as n^1.00" in naive.refused
    profile = isoflop(design, SIZES)
    budgets = {tuple(round(run.n * d) for d in run.tokens) for run in profile.grid}
    assert len(budgets) == 1 and len({run.size for run in profile.grid}) >= 3
    ratios = profile_ratios(profile.grid)
    assert min(ratios) >= 5 and max(ratios) <= 320
    assert isoflop(design, {"27k": 27040.0, "56k": 55888.0}) is None


def test_what_else_is_wanted_is_found_better(design):
    exponents = choose(design.setting, SIZES, 1e13, Criterion("A", (3, 4)))
    both = [sum(d.least_errors[k] ** 2 for k in ("alpha", "beta")) for d in (exponents, design)]
    assert both[0] < both[1]
    assert exponents.least_errors["rho[ternary]"] > design.least_errors["rho[ternary]"]


def test_a_budget_that_is_too_small():
    with pytest.raises(AnalysisError, match="1B FLOPs of these candidates cannot identify"):
        choose(Setting(RHO, TRUTH, NOISE), SIZES, 1e9, Criterion("A", (5,)))
    alone = {"27k": 27040.0, "56k": 55888.0}
    with pytest.raises(AnalysisError, match="3 different values of n, these points have 2"):
        choose(Setting(RHO, TRUTH, NOISE), alone, 1e13, Criterion("A", (5,)))


def test_rows_number_the_seeds_of_each_size():
    grid = (Run("a", 1e5, (1e6, 2e6)), Run("b", 3e5, (4e6,)), Run("a", 1e5, (1e6,)))
    assert [(r["size"], r["seed"], r["tokens"]) for r in rows(grid)] == [
        ("a", 0, 1_000_000), ("a", 0, 2_000_000), ("b", 0, 4_000_000), ("a", 1, 1_000_000),
    ]  # fmt: skip


def test_figure(design):
    from analysis import plots

    axes = plots.design_grid(design).axes[0]
    assert axes.get_xlabel() == "training tokens"
    assert axes.get_ylabel() == "non-embedding parameters"
    drawn = [c for c in axes.collections if c.get_label().endswith(("seed", "seeds"))]
    offsets = np.concatenate([c.get_offsets() for c in drawn])
    assert {(n, d) for d, n in offsets.tolist()} == set(points(design.grid))
    areas = [c.get_sizes()[0] for c in drawn]
    assert areas == sorted(areas) and len(set(areas)) == len(areas)


# ---- The command ---------------------------------------------------------------------------------

LAW = ("--law=rho", "--params=" + ",".join(f"{k}={v}" for k, v in TRUTH.items()))
NAMED = "--sizes=" + ",".join(f"{name}:{n:g}" for name, n in SIZES.items())
BASE = ("--budget=1e13", "--noise=.004,.002")


def test_command_prints_writes_and_draws(tmp_path, capsys, design):
    out, plot = tmp_path / "grid.csv", tmp_path / "grid.png"
    assert main([*BASE, *LAW, NAMED, f"--out={out}", f"--plot={plot}", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parameters"] == ["rho[ternary]"] and document["law"] == "rho"
    assert document["noise"] == {"run": 0.004, "endpoint": 0.002}
    assert document["cost"] == pytest.approx(design.cost)
    assert document["standard_errors"] == pytest.approx(design.errors)
    assert document["least_standard_errors"] == pytest.approx(design.least_errors)
    compared = document["compared"]
    assert "d rises with n" in compared["20 tokens a parameter"]["refused"]
    assert compared["the best isoFLOP grid"]["efficiency"] < 0.5
    table = pd.read_csv(out)
    assert list(table) == ["size", "params_non_embedding", "tokens", "seed"]
    assert table.to_dict("records") == document["grid"] == rows(design.grid)
    assert plot.is_file() and plot.with_suffix(".svg").is_file()


def test_command_takes_a_fit_and_a_ladder(tmp_path, capsys):
    ladder, saved = tmp_path / "ladder.csv", tmp_path / "fit.json"
    pd.DataFrame(
        {"size": [*SIZES, "27k"], "params_non_embedding": [*SIZES.values(), 27040.0]}
    ).to_csv(ladder, index=False)
    saved.write_text(json.dumps({
        "law": "rho", "params": TRUTH, "groups": ["fp16", "ternary"], "rms_log_residual": 0.005,
    }))  # fmt: skip
    common = ["--budget=1e13", f"--ladder={ladder}", f"--fit={saved}"]
    assert main([*common, "--json", "--criterion=D"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parameters"] == list(TRUTH)
    assert document["noise"] == pytest.approx({"run": 0.005 / 2**0.5, "endpoint": 0.005 / 2**0.5})
    assert main([*common, "--sizes=27k,56k,95k", "--parameters=rho,alpha", "--seeds=2"]) == 0
    shown = capsys.readouterr().out
    assert "seed 1" in shown and "seed 2" not in shown and "160k" not in shown
    assert "20 tokens a parameter: d rises with n" in shown
    assert main([*common, "--sizes=27k,56k,95k", "--budget=1e15"]) == 0
    assert "isoFLOP grid: none of this cost lies among these" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*LAW, NAMED, "--budget=1e13"], "give --noise=RUN,END"),
        ([*BASE, *LAW, NAMED, "--noise=.004"], "--noise=.004: expected 2 numbers"),
        ([*BASE, *LAW, NAMED, "--noise=.004,0"], "noise 0.004,0: that of a run is not negative"),
        ([*BASE, NAMED], "give --fit=JSON, or --law=NAME with --params"),
        ([*BASE, *LAW, NAMED, "--fit=x.json"], "give --fit=JSON, or --law=NAME with --params"),
        ([*BASE, *LAW], "give --sizes=NAME:PARAMETERS,... or --ladder=FILE"),
        ([*BASE, *LAW, "--sizes=27k"], "'27k' has no parameters; write NAME:PARAMETERS"),
        ([*BASE, *LAW, NAMED, "--budget=-1"], "--budget=-1: it must be positive"),
        ([*BASE, *LAW, NAMED, "--budget=1e9"], "cannot identify the law"),
        ([*BASE, *LAW, NAMED, "--decay_fraction=1.5"], "it is a share, at most 1"),
        ([*BASE, *LAW, NAMED, "--ratios=5,x"], "--ratios=5,x: expected numbers"),
        ([*BASE, *LAW, NAMED, "--ratios=0,5"], "--ratios=0,5: they must be positive"),
        ([*BASE, *LAW, NAMED, "--criterion=E"], "criterion 'E': choose A or D"),
        ([*BASE, *LAW, NAMED, "--parameters=gamma"], "'rho' has no 'gamma'; it has E, A"),
        ([*BASE, *LAW, NAMED, "--out=grid.txt"], "--out=grid.txt does not end in .csv"),
        ([*BASE, "--law=rho", "--params=E=1", NAMED], "needs the parameters of two arms"),
        ([*BASE, "--law=chinchilla", "--params=E=1", NAMED], "'chinchilla' needs a value of A"),
        ([*BASE, "--law=power", "--params=E=1", NAMED], "'power' is a law of c: a grid is of n"),
        ([*BASE, "--fit=absent.json", NAMED], "absent.json"),
        ([*BASE, *LAW, NAMED, "--ratios=1,nan"], "--ratios=1,nan: they must be positive"),
        ([*BASE, *LAW, NAMED, "--ratios=1,inf"], "--ratios=1,inf: they must be positive"),
        ([*BASE, *LAW, "--sizes=a:nan"], "'a:nan': parameters are a positive number"),
        ([*BASE, *LAW, NAMED, "--seeds=100000000"], "--seeds=100000000: 100 are the most"),
        ([*BASE, LAW[0], LAW[1] + ",zzz=1", NAMED], "--params: 'rho' has no 'zzz'; it has E, A"),
        ([*BASE, LAW[0], LAW[1].replace("E=1.2", "E=nan"), NAMED], "E=nan: it must be positive"),
        ([*BASE, LAW[0], LAW[1].replace("E=1.2", "E=-1"), NAMED], "E=-1: it must be positive"),
        ([*BASE, "--law=chinchilla", "--params=E=1", "--baseline=x", NAMED], "has no groups"),
    ],
)  # fmt: skip
def test_command_refuses_in_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_command_refuses_what_is_no_fit(tmp_path, capsys):
    good = {"law": "chinchilla", "params": TRUTH, "groups": [], "rms_log_residual": 0.005}
    wrong = (
        ({"params": TRUTH | {"E": None}}, "law, params or groups are not a fit's"),
        ({"params": TRUTH | {"E": "x"}}, "law, params or groups are not a fit's"),
        ({"params": TRUTH | {"E": float("nan")}}, "law, params or groups are not a fit's"),
        ({"params": TRUTH | {"E": -1.0}}, "E=-1: it must be positive and finite"),
        ({"params": [1]}, "law, params or groups are not a fit's"),
        ({"law": 3}, "law, params or groups are not a fit's"),
        ({"groups": None}, "law, params or groups are not a fit's"),
        ({"rms_log_residual": -1}, "rms_log_residual is -1, not a number of 0 or more"),
        ({"rms_log_residual": None}, "rms_log_residual is None"),
    )
    texts = [(json.dumps(good | change), message) for change, message in wrong]
    texts += [("{", "it is no JSON"), ("[" * 100_000, "it is no JSON")]
    for text, message in (*texts, ('{"law": "rho"}', "it is not what")):
        (tmp_path / "fit.json").write_text(text)
        assert main([*BASE, NAMED, f"--fit={tmp_path / 'fit.json'}"]) == 2
        assert message in capsys.readouterr().err


def test_designs_know_their_kind(design):
    """A law without arms is trained once at each point."""
    alone = Setting(LAWS["chinchilla"], TRUTH, NOISE)
    found = choose(alone, SIZES, 1e13, Criterion("A", (3, 4)))
    assert isinstance(found, Design) and found.setting.arms == 1
    assert found.to_json()["endpoints"] == len(points(found.grid))
    assert design.to_json()["endpoints"] == 2 * len(points(design.grid))


def test_the_ladder_says_what_a_token_costs(tmp_path, capsys):
    """FLOPs a token of its sizes, unless the user gives k; a size that it lacks costs 6 N."""
    ladder = tmp_path / "ladder.csv"
    flops = {name: 6 * n + 1e5 for name, n in SIZES.items()}
    pd.DataFrame({
        "size": list(SIZES), "params_non_embedding": list(SIZES.values()),
        "training_flops_per_token": list(flops.values()),
    }).to_csv(ladder, index=False)  # fmt: skip
    command = [*BASE, *LAW, f"--ladder={ladder}", "--sizes=27k,56k,95k,own:200000", "--json"]
    sizes = SIZES | {"own": 2e5}

    def counted(document, per_token):
        """FLOPs of a grid by hand, in two arms; a fifth of each end's tokens are its decay."""
        total = 0.0
        for _, ends in pd.DataFrame(document["grid"]).groupby(["size", "seed"]):
            trunk, whole = 0.8 * ends["tokens"].max(), 0.2 * ends["tokens"].sum()
            total += 2 * per_token(ends["size"].iloc[0]) * (trunk + whole)
        return total

    assert main(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cost"] == pytest.approx(
        counted(document, lambda s: flops.get(s, 6 * sizes[s])), rel=1e-6
    )
    assert f"training_flops_per_token of {ladder}, " in document["flops_per_token"]
    assert main([*command, "--flops_per_parameter_token=7"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cost"] == pytest.approx(counted(document, lambda s: 7 * sizes[s]), rel=1e-6)
    assert document["flops_per_token"] == "7 N, with neither attention nor embeddings"


def test_a_ladder_that_contradicts_itself(tmp_path, capsys):
    ladder = tmp_path / "ladder.csv"
    pd.DataFrame({"size": ["a", "a"], "params_non_embedding": [1e5, 2e5]}).to_csv(ladder)
    assert main([*BASE, *LAW, f"--ladder={ladder}"]) == 2
    assert "size 'a' has params_non_embedding 100000 and 200000" in capsys.readouterr().err
