"""Optima of known surfaces by three approaches, what each refuses, and the command."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.approaches import Sample, compare_approaches, main
from analysis.envelope import Curves, best, envelope
from analysis.intervals import resamples
from analysis.isoflop import INTERPOLANTS, Method, budgets, isoflop, profile, profiles
from analysis.laws import LAWS, frontier
from analysis.optima import Points, power_law
from analysis.parametric import SIX, Spending, optimum, parametric
from analysis.sensitivity import sensitivity
from analysis.tables import AnalysisError

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
EXPONENT = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])  # Hoffmann et al., eq. 4
BUDGETS = np.geomspace(1e17, 1e21, 7)


def surface(c, n, spending=SIX, noise=0.0):
    """Points of the known law at computes and sizes that broadcast, flattened."""
    c, n = (x.ravel() for x in np.broadcast_arrays(c, n))
    d = c / (spending.k * n**spending.power)
    loss = LAWS["chinchilla"](TRUTH, {"n": n, "d": d})
    return Points(c, n, d, loss + noise * np.random.default_rng(0).normal(size=loss.shape))


def best_at(compute):
    return frontier(TRUTH, np.asarray(compute)).n


def around(compute, factor=8.0, count=9, shift=1.0):
    """Sizes [B, count], a factor to each side of the optimum of computes [B], times `shift`."""
    steps = factor ** np.linspace(-1, 1, count)
    return shift * best_at(compute)[:, None] * steps


def isoflop_points(**options):
    return surface(BUDGETS[:, None], around(BUDGETS, **options))


def run_curves(sizes=40, steps=24):
    """Curves of sizes from 1/30 to 30 times the compute where each is best, and run labels."""
    n = np.geomspace(3e6, 3e10, sizes)
    own = (n / best_at(1.0)) ** (1 / EXPONENT)
    c = own[:, None] * np.geomspace(1 / 30, 30, steps)
    return surface(c, n[:, None]), np.repeat([f"run{i}" for i in range(sizes)], steps)


# ---- Known answers -------------------------------------------------------------------------------


def test_eq_4_is_the_best_of_many_sizes():
    n = np.geomspace(1e6, 1e11, 200_001)
    spending = Spending(4.0, 1.1)
    points = surface(np.array(3e19), n, spending)
    laws = optimum(TRUTH, {k: np.empty(0) for k in TRUTH}, spending, (1e17, 1e21))
    least = points.loss.argmin()
    assert laws[0].at(3e19) == pytest.approx(n[least], rel=1e-4)
    assert laws[1].at(3e19) == pytest.approx(points.d[least], rel=1e-4)


@pytest.mark.parametrize(
    ("interpolant", "accuracy"), [("parabola", 1e-12), ("cubic", 1e-12), ("akima", 1e-5)]
)
def test_profiles_recover_the_exponents(interpolant, accuracy):
    """Profiles of the law are one shape, so a polynomial's optimum is off by one factor in all."""
    found = isoflop(isoflop_points(), Method(interpolant))
    assert found.n.exponent == pytest.approx(EXPONENT, abs=accuracy)
    assert found.d.exponent == pytest.approx(1 - EXPONENT, abs=accuracy)
    assert found.notes == () and found.n.interval is None


@pytest.mark.parametrize(
    ("interpolant", "factor", "share"),
    [("parabola", 3.0, 1e-2), ("cubic", 3.0, 1e-4), ("akima", 3.0, 2e-3), ("akima", 8.0, 5e-3)],
)
def test_profiles_find_the_optima(interpolant, factor, share):
    found = isoflop(isoflop_points(factor=factor), Method(interpolant))
    n = best_at(1e19)
    assert found.n.at(1e19) == pytest.approx(n, rel=share)
    assert found.d.at(1e19) == pytest.approx(1e19 / 6 / n, rel=share)


def test_a_spline_needs_no_sizes_about_the_optimum():
    """One ladder of sizes for all budgets: what bends a polynomial leaves a spline alone."""
    points = surface(BUDGETS[:, None], np.geomspace(1e6, 1e11, 41)[None])
    errors = {
        name: abs(isoflop(points, Method(name)).n.exponent - EXPONENT) for name in INTERPOLANTS
    }
    assert errors["akima"] < 1e-4 < 1e-3 < min(errors["parabola"], errors["cubic"])


@pytest.mark.parametrize(("sizes", "outside"), [(20, "29%"), (40, "27%")])
def test_envelope_is_a_staircase_through_the_optima(sizes, outside):
    found = envelope(*run_curves(sizes))
    steps = sizes - 2
    assert found.n.exponent == pytest.approx(EXPONENT * (1 - 1 / steps**2), abs=5e-5)
    assert found.d.exponent == pytest.approx(1 - found.n.exponent, abs=1e-6)
    assert found.n.at(1e19) == pytest.approx(best_at(1e19), rel=2e-3)
    assert found.notes == (f"{outside} of computes: an outermost of the sizes there is best",)


def test_parametric_recovers_the_optimum():
    found = parametric(isoflop_points())
    assert found.n.exponent == pytest.approx(EXPONENT, abs=1e-7)
    assert found.n.at(1e19) == pytest.approx(best_at(1e19), rel=1e-6)
    assert found.d.at(1e19) == pytest.approx(1e19 / 6 / best_at(1e19), rel=1e-6)


@pytest.mark.parametrize("approach", [isoflop, parametric, lambda p: envelope(p, run_curves()[1])])
def test_units_of_compute_do_not_matter(approach):
    points = run_curves()[0] if approach not in (isoflop, parametric) else isoflop_points()
    peta = Points(points.c / 1e15, points.n, points.d, points.loss)
    one, other = approach(points), approach(peta)
    assert other.n.exponent == pytest.approx(one.n.exponent, rel=1e-9)
    assert other.n.at(1e4) == pytest.approx(one.n.at(1e19), rel=1e-9)
    assert other.d.at(1e4) == pytest.approx(one.d.at(1e19), rel=1e-9)


# ---- Budgets, brackets and windows ---------------------------------------------------------------


def test_budgets_are_what_lies_within_a_share():
    assert budgets(np.array([3.0, 1.0, 1.008, 2.97, 1.02, 1.0])).tolist() == [3, 0, 0, 2, 1, 0]


def test_an_optimum_counts_only_between_sizes():
    shifts = np.array([1.0, 1.0, 1.0, 20.0, 0.05, 1.0, 1.0])[:, None]
    points = surface(BUDGETS[:, None], around(BUDGETS) * shifts)
    few = (points.c == BUDGETS[0]) & (points.n > np.sort(points.n[points.c == BUDGETS[0]])[1])
    found = isoflop(points[~few], Method("akima"))
    assert found.notes == (
        "budget 1e+17 FLOPs: akima takes 3 sizes, here are 2",
        "budget 1e+19 FLOPs: the loss is least at the smallest of 9 sizes",
        "budget 4.64e+19 FLOPs: the loss is least at the largest of 9 sizes",
    )
    assert found.n.exponent == pytest.approx(EXPONENT, abs=1e-4)


def test_two_budgets_are_no_line_and_the_others_are_listed():
    points = surface(BUDGETS[:3, None], around(BUDGETS[:3]) * np.array([[1.0], [1.0], [20.0]]))
    found = isoflop(points)
    assert found.n is None and len(found.notes) == 1
    assert found.refused == "2 of 3 budgets have an optimum: a line takes 3"


def test_a_curve_bent_downwards_has_no_optimum():
    points = surface(BUDGETS[:1], around(BUDGETS[:1])[0])
    upside_down = Points(points.c, points.n, points.d, 10 - points.loss)
    assert "the loss is least at the" in profile(upside_down, Method("parabola")).refused


def test_a_cubic_takes_four_sizes():
    points = surface(BUDGETS[:1], around(BUDGETS[:1], count=3)[0])
    assert "cubic takes 4 sizes, here are 3" in profile(points, Method("cubic")).refused
    assert profile(points, Method("parabola")).refused == ""


def test_a_window_leaves_out_what_is_far():
    points = isoflop_points(count=13)
    is_far = points.n > 4.1 * best_at(points.c)
    bent = np.where(is_far & (points.c > 1e19), points.loss + 0.3, points.loss)
    far = Points(points.c, points.n, points.d, bent)
    for interpolant in ("parabola", "cubic"):
        within = isoflop(far, Method(interpolant, 4.0))
        assert within.n.exponent == pytest.approx(EXPONENT, abs=1e-12)
        assert abs(isoflop(far, Method(interpolant)).n.exponent - EXPONENT) > 1e-3
    assert {len(p.points.n) for p in profiles(far, Method(window=4.0))} == {9}


def test_the_best_run_of_a_size_stands_for_it():
    points = isoflop_points()
    worse = Points(points.c, points.n, points.d, points.loss + 0.2)
    both = Points(
        *(np.append(getattr(worse, k), getattr(points, k)) for k in ("c", "n", "d", "loss"))
    )
    expected = isoflop(points).n.exponent
    assert isoflop(both).n.exponent == pytest.approx(expected, rel=1e-12)


# ---- Intervals -----------------------------------------------------------------------------------


def test_noisy_copies_give_intervals_as_wide_as_the_noise():
    points = isoflop_points()
    widths = []
    for noise in (5e-4, 1e-3):
        found = isoflop(points, Method("parabola", noise=noise, copies=400))
        low, high = found.n.interval
        assert low < EXPONENT < high
        widths.append(high - low)
    assert widths[1] / widths[0] == pytest.approx(2, rel=0.05)


def test_the_median_of_copies_stands_for_the_optimum():
    points = isoflop_points()[:9]
    method = Method("parabola", noise=1e-3, copies=101, observation="median")
    found = profile(points, method)
    assert found.n == pytest.approx(np.median(found.copies))
    assert found.n != profile(points, Method("parabola", noise=1e-3, copies=101)).n


def test_an_optimum_that_noise_moves_to_an_end_is_none():
    points = surface(BUDGETS[:1], around(BUDGETS[:1], count=3)[0])
    found = profile(points, Method("akima", noise=10.0, copies=100))
    assert found.refused.startswith("noise moves the optimum to an end in")
    assert np.isnan(found.copies).mean() > 0.5
    assert not profile(points, Method("akima", noise=1e-4, copies=100)).refused


def test_a_drawn_budget_counts_as_often_as_it_is_drawn():
    n = best_at(BUDGETS) * np.exp(0.1 * np.random.default_rng(0).normal(size=7))
    weights = np.array([[0.0, 2, 1, 1, 0, 3, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 7, 0, 0, 0, 0]])
    found = power_law(BUDGETS, n, weights=weights)
    assert found.samples.shape == (2, 2)  # one budget is no line
    repeated = np.repeat(np.arange(7), weights[0].astype(int))
    slope, level = np.polyfit(np.log(BUDGETS[repeated]), np.log(n[repeated]), 1)
    assert found.samples[:, 0] == pytest.approx([np.exp(level), slope])
    assert found.samples[:, 1] == pytest.approx([found.coefficient, found.exponent])
    assert found.interval_at(1e19)[0] < found.interval_at(1e19)[1]
    assert power_law(BUDGETS, n, weights=weights[2:]).interval is None


def test_clusters_are_drawn_whole():
    points = surface(BUDGETS[:, None], around(BUDGETS, count=15), noise=2e-4)
    columns = np.arange(points.n.size) % 15  # a cluster has one size of every budget
    found = isoflop(points, Method("cubic"), clusters=columns, bootstrap=20)
    for sample, weights in zip(
        found.n.samples[1], resamples(points.n.size, 20, columns), strict=True
    ):
        drawn = isoflop(points[weights > 0], Method("cubic"))
        assert sample == pytest.approx(drawn.n.exponent, rel=1e-12)
    budgets_drawn = isoflop(points, Method("cubic"), bootstrap=20)
    assert budgets_drawn.n.interval[0] < budgets_drawn.n.exponent < budgets_drawn.n.interval[1]


def test_no_intervals_where_resamples_have_no_line():
    points = surface(BUDGETS[:3, None], around(BUDGETS[:3]))
    found = isoflop(points, bootstrap=50)
    assert found.n.interval is None and found.notes[-1].startswith("no intervals: most resamples")


def test_the_law_is_fitted_to_whole_clusters():
    points = surface(BUDGETS[:, None], around(BUDGETS), noise=1e-3)
    low, high = parametric(points, bootstrap=40).n.interval
    assert low < EXPONENT < high
    together = parametric(points, bootstrap=40, clusters=np.zeros(points.n.size))
    assert together.n.interval is None
    assert "no intervals: too few independent runs to resample" in together.notes


def test_envelope_resamples_runs():
    points, run = run_curves()
    low, high = envelope(points, run, bootstrap=40).n.interval
    assert low < EXPONENT < high
    together = envelope(points, run, bootstrap=40, clusters=np.zeros(points.n.size))
    assert np.ptp(together.n.samples[1]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolant": "spline"}, "unknown interpolant 'spline'"),
        ({"window": 1.0}, "window=1: expected a factor above 1"),
        ({"noise": 0.1}, "noise=0.1 and 0 copies"),
        ({"copies": 100}, "noise=0 and 100 copies"),
        ({"observation": "median"}, "the median of noisy copies"),
        ({"noise": 0.1, "copies": 5}, "bootstrap=5: an interval takes 20"),
    ],
)
def test_a_method_that_cannot_be_meant_is_refused(options, message):
    with pytest.raises(AnalysisError, match=message):
        Method(**options)


# ---- The envelope --------------------------------------------------------------------------------


def test_the_best_run_is_bracketed_by_those_that_pass():
    """At the last two computes the smallest has ended, or the largest not begun."""
    loss = np.array(
        [
            [1.0, 2.0, 3.0, np.nan, 2.0],
            [2.0, 1.0, 2.0, 1.0, 1.0],
            [3.0, 3.0, 1.0, 2.0, np.nan],
        ]
    )
    sizes, labels = np.array([1.0, 2.0, 3.0]), np.array(["a", "b", "c"])
    of = Curves(np.arange(1.0, 6), sizes, np.ones((3, 5)), loss, labels)
    found = best(of, np.ones(3, bool))
    assert found.run.tolist() == [0, 1, 2, 1, 1]
    assert found.bracketed.tolist() == [False, True, False, False, False]
    assert best(of, np.array([True, False, True])).run.tolist() == [0, 0, 2, 2, 0]


def test_curves_give_profiles_between_the_points():
    points, run = run_curves()
    sample = Sample(points, runs=run).at_budgets(12)
    found = isoflop(sample.points, Method("akima"))
    assert found.n.exponent == pytest.approx(EXPONENT, abs=1e-4)
    assert len(np.unique(sample.points.c)) == 12
    assert set(sample.clusters[sample.points.n == points.n.min()]) == {"run0"}


def test_envelope_refuses_what_is_no_curve():
    points, run = run_curves(sizes=6)

    def refusal(chosen, labels):
        with pytest.raises(AnalysisError) as caught:
            envelope(points[chosen], labels[chosen])
        return str(caught.value)

    everything = np.arange(run.size)
    ends = everything % 24 > 20
    assert "run run0: 3 points are no curve, an envelope takes 4" in refusal(ends, run)
    assert "run run0: several sizes" in refusal(everything, np.where(run == "run1", "run0", run))
    assert "run run0: several points at" in refusal(np.append(0, everything), run)
    points, run = run_curves(sizes=12)
    four = np.isin(run, ["run0", "run1", "run2", "run3"])
    assert "2 sizes are best at some compute" in refusal(four, run)


# ---- Side by side --------------------------------------------------------------------------------


def test_all_approaches_agree_on_curves_of_the_law():
    points, run = run_curves()
    rows = compare_approaches(Sample(points, run, run), budgets=12, windows=(4.0,))
    names = [row.approach for row in rows]
    assert names[0] == "envelope" and names[-1] == "parametric" and len(names) == 8
    within = [row for row in rows if row.approach.startswith("isoflop") and "4x" in row.approach]
    for row in (rows[0], *within, rows[-1]):
        assert row.n.exponent == pytest.approx(EXPONENT, abs=5e-4), row.approach


def test_an_approach_without_its_points_says_so():
    rows = {row.approach: row for row in compare_approaches(Sample(isoflop_points()))}
    assert rows["envelope"].refused == "an envelope of training curves needs the runs' names"
    assert rows["isoflop akima"].refused == "" and rows["parametric"].refused == ""
    fixed_tokens = isoflop_points()
    fixed_tokens = Points(fixed_tokens.c, fixed_tokens.n, 20 * fixed_tokens.n, fixed_tokens.loss)
    assert "d rises with n" in compare_approaches(Sample(fixed_tokens))[-1].refused


def test_points_are_positive_and_of_one_length():
    with pytest.raises(AnalysisError, match="n: expected 2 positive finite numbers"):
        Points(np.ones(2), np.array([1.0, 0.0]), np.ones(2), np.ones(2))
    with pytest.raises(AnalysisError, match="c: expected 2 positive finite numbers"):
        Points(np.ones(3), np.ones(2), np.ones(2), np.ones(2))


def test_sensitivity_tells_conventions_apart():
    spending = Spending(4.0, 1.1)
    points = surface(BUDGETS[:, None], around(BUDGETS), spending)
    rows = {row.choice: row for row in sensitivity(points, 1e19, n_other=2 * points.n)}
    own = TRUTH["beta"] / (TRUTH["alpha"] + 1.1 * TRUTH["beta"])
    for choice, row in rows.items():
        assert row.a == pytest.approx(EXPONENT if "6 N D" in choice else own, abs=1e-6), choice
        assert row.e == pytest.approx(TRUTH["E"], rel=1e-6)
    exact = rows["as given"]
    assert exact.d == pytest.approx(1e19 / (4 * exact.n**1.1), rel=1e-6)
    assert rows["C = 6 N D"].n == pytest.approx(best_at(1e19), rel=1e-5)
    assert rows["other N"].n == pytest.approx(2 * exact.n, rel=1e-5)
    objectives = {"objective lad", "objective log_mse", "objective mse"}
    assert objectives | {"huber delta 0.01", "huber delta 0.0001"} <= set(rows)
    assert sum(choice.startswith("from ") for choice in rows) == 3


def test_sensitivity_uses_the_choice_that_it_names():
    """On noisy points every choice has numbers of its own; too few sizes are refused."""
    points = surface(BUDGETS[:, None], np.geomspace(1e8, 1e9, 4)[None], noise=3e-3)
    rows = sensitivity(points, 1e19)
    told = [row for row in rows if not row.refused]
    assert len({round(row.a, 9) for row in told if "6 N D" not in row.choice}) == len(told) - 1
    refused = {row.choice: row.refused for row in rows if row.refused}
    sizes = "needs at least 3 different values of n"
    assert [sizes in reason for reason in refused.values()] == [True, True]
    assert all(choice.startswith("from ") for choice in refused)


# ---- The command ---------------------------------------------------------------------------------

OPTIONS = ("--n=params", "--d=tokens", "--c=flops", "--loss=loss")


@pytest.fixture
def table(tmp_path):
    points, run = run_curves(sizes=12, steps=8)
    frame = pd.DataFrame({
        "params": points.n, "total": 2 * points.n, "tokens": points.d, "flops": points.c,
        "loss": points.loss, "run": run, "status": "ok",
    })  # fmt: skip
    frame.loc[0, "status"] = "diverged"
    path = tmp_path / "table.csv"
    frame.to_csv(path, index=False)
    return path


def test_command_prints_the_contract(table, capsys):
    arguments = ["--run=run", "--cluster=run", "--budgets=9", "--n_total=total", "--sensitivity"]
    assert main([str(table), *OPTIONS, *arguments, "--bootstrap=20", "--at=1e19", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["n_points"] == 95 and document["at"] == 1e19
    rows = {row["approach"]: row for row in document["approaches"]}
    assert len(rows) == 11
    for name in ("envelope", "isoflop akima", "parametric"):
        row = rows[name]
        low, high = row["n"]["interval"]
        assert low <= row["n"]["exponent"] <= high and not row["extrapolated"]
        assert row["n"]["exponent"] == pytest.approx(EXPONENT, rel=0.02)
        assert row["n"]["at"] == pytest.approx(
            row["n"]["coefficient"] * 1e19 ** row["n"]["exponent"]
        )
        assert row["d"]["at"] == pytest.approx(1e19 / 6 / row["n"]["at"], rel=0.02)
    assert rows["isoflop akima"]["notes"][0].startswith("budget ")
    assert {"as given", "C = 6 N D", "other N"} <= {r["choice"] for r in document["sensitivity"]}


def test_command_plots_beside_clean_json(table, tmp_path, capsys):
    plot = f"--plot={tmp_path / 'split'}"
    assert main([str(table), *OPTIONS, "--run=run", "--budgets=9", plot, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["n_points"] == 95
    paths = [tmp_path / f"split-{name}" for name in ("allocation", "profiles")]
    assert captured.err.splitlines() == [f"wrote {path}.png and {path}.svg" for path in paths]
    assert all(path.with_suffix(f".{kind}").is_file() for path in paths for kind in ("png", "svg"))
    # Without budgets of their own or asked for, the points are no profiles.
    assert main([str(table), *OPTIONS, plot]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"{paths[1]}: not drawn: no budget has the 3 sizes that akima takes"


def test_command_leaves_rows_out_and_adds_noise(table, capsys):
    frame = pd.read_csv(table)
    frame["decayed"] = frame.index != 5
    frame.to_csv(table, index=False)
    assert main([str(table), *OPTIONS]) == 2
    assert "1 of 96 rows are not at the end of a learning-rate decay" in capsys.readouterr().err
    widths = []
    for noise in ("--noise=0", "--noise=0.001", "--noise=0.002"):
        options = ["--where=decayed", "--run=run", "--budgets=9", "--bootstrap=40", "--json"]
        assert main([str(table), *OPTIONS, *options, noise]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["n_points"] == 94 and document["at"] == frame["flops"].max()
        rows = {row["approach"]: row for row in document["approaches"]}
        low, high = rows["isoflop parabola"]["n"]["interval"]
        widths.append(high - low)
    assert widths[2] / widths[1] == pytest.approx(2, rel=0.1) and widths[0] != widths[1]


def test_command_prints_a_table(table, capsys):
    assert main([str(table), *OPTIONS, "--sensitivity", "--at=1e30"]) == 0
    shown = capsys.readouterr().out
    assert "at 1e+30 FLOPs" in shown and "extrapolated" in shown
    assert "envelope                      refused: an envelope of training curves" in shown
    assert "more: see --json" in shown and "C = 6 N D" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n=size", *OPTIONS[1:]], "no column 'size': the table has params"),
        (OPTIONS[1:], "the following arguments are required: --n"),
        ([*OPTIONS, "--cluster=seed"], "no column 'seed'"),
        ([*OPTIONS, "--run=seed"], "no column 'seed'"),
        ([*OPTIONS, "--where=params > 1e99"], "leaves no rows"),
        ([*OPTIONS, "--at=-1"], "--at=-1: expected a positive number of FLOPs"),
        ([*OPTIONS, "--at=inf"], "--at=inf: expected a positive number of FLOPs"),
        ([*OPTIONS, "--bootstrap=3"], "bootstrap=3: an interval takes 20"),
        ([*OPTIONS, "--noise=0.1"], "--noise=0.1: expected 0 or more, and --bootstrap=N with it"),
        ([*OPTIONS, "--noise=-1", "--bootstrap=20"], "--noise=-1: expected 0 or more"),
        ([*OPTIONS, "--budgets=9"], "--budgets=9: expected 3 or more, and --run=COLUMN with it"),
        ([*OPTIONS, "--budgets=2", "--run=run"], "--budgets=2: expected 3 or more"),
        ([*OPTIONS, "--plot=absent/split"], "--plot=absent/split: there is no directory absent"),
        (
            [*OPTIONS, "--budgets=1000000000", "--run=run"],
            "--budgets=1000000000: 1000 are",
        ),
        ([*OPTIONS, "--noise=inf", "--bootstrap=20"], "--noise=inf: expected 0 or more"),
        ([*OPTIONS, "--noise=nan", "--bootstrap=20"], "--noise=nan: expected 0 or more"),
        ([*OPTIONS, "--bootstrap=1000000000"], "bootstrap=1000000000: 100000 are the most"),
        ([*OPTIONS, "--n_total=total"], "--n_total is for --sensitivity"),
        ([*OPTIONS, "--n_total=whole", "--sensitivity"], "no column 'whole'"),
    ],
)
def test_command_refuses_in_one_line(table, capsys, arguments, message):
    assert main([str(table), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_one_row_says_nothing(table, capsys):
    pd.read_csv(table).tail(1).to_csv(table, index=False)
    assert main([str(table), *OPTIONS]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "no approach says anything; parametric: 1 points cannot fit the 5" in captured.err


def test_runs_are_drawn_whole_by_default(table, capsys):
    """run_id as with --cluster=run_id; without it the points are, with a warning."""
    frame = pd.read_csv(table).rename(columns={"run": "run_id"})
    frame["loss"] *= np.exp(2e-3 * np.random.default_rng(0).normal(size=len(frame)))
    frame.to_csv(table, index=False)

    def asked(*arguments):
        assert main([str(table), *OPTIONS, "--bootstrap=20", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    whole = asked()
    assert whole == asked("--cluster=run_id") and whole["warnings"] == []
    frame.drop(columns="run_id").assign(precision=np.arange(96) % 2).to_csv(table, index=False)
    alone = asked()
    assert ["each row counts as a run" in alone["warnings"][0], len(alone["warnings"])] == [True, 2]
    assert "column 'precision' has 2 values" in alone["warnings"][1]
    widths = [np.diff(x["approaches"][-1]["n"]["interval"])[0] for x in (whole, alone)]
    assert widths[0] != pytest.approx(widths[1], rel=0.05)


# ---- Published data ------------------------------------------------------------------------------

PUBLISHED = os.environ.get("BITNET_JAX_LAW_DATA")
SETTING = ["file", "dataset", "hparams", "warmup", "decay", "param_count", "val"]
PORIAN = Method("akima", noise=0.002, copies=1000, observation="median")


@pytest.mark.skipif(PUBLISHED is None, reason="BITNET_JAX_LAW_DATA names no directory")
def test_published_profiles_give_the_published_exponents():
    """Porian et al. 2024: exponents of .50 to .83, by training recipe, and their intervals."""
    rows = pd.read_csv(Path(PUBLISHED) / "porian_isoflop.csv").set_index(SETTING).sort_index()
    answers = pd.read_csv(Path(PUBLISHED) / "porian_answers.csv").set_index(SETTING)
    assert len(answers) == 10
    for setting, answer in answers.iterrows():
        own = rows.loc[setting]
        points = Points(*(own[name].to_numpy() for name in ("flops", "N", "D", "loss")))
        found = isoflop(points, PORIAN)
        assert found.n.exponent == pytest.approx(answer["basic_n_exponent"], abs=0.002)
        assert found.d.exponent == pytest.approx(answer["basic_t_exponent"], abs=0.002)
        ends = [answer[f"bootstrap_n_exponent_p{end}"] for end in ("2.5", "97.5")]
        assert found.n.interval == pytest.approx(ends, abs=0.002)
