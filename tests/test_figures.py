"""Figures show the numbers that they are drawn from, with their intervals, and name what is not."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_rgba
from test_approaches import BUDGETS, around, isoflop_points, run_curves, surface
from test_compare import two_arms

from analysis import figures, plots
from analysis.approaches import Sample, compare_approaches
from analysis.comparing import compare
from analysis.estimates import Estimate
from analysis.isoflop import Method, profiles
from analysis.learning_rate import optima
from analysis.optima import Allocation
from analysis.tables import AnalysisError

WHITE = to_rgba("white")
TWO_ARMS = (figures.multiplier, figures.cost_ratios, figures.relative_difference)


@pytest.fixture(scope="module")
def without_intervals():
    return compare(two_arms(own={"A": 1400.0, "alpha": 0.38}), bootstrap=0)


@pytest.fixture(scope="module")
def found(without_intervals):
    """With made-up intervals, no two of which are alike: a bootstrap would take half a minute."""
    count = itertools.count(1)

    def widened(x):
        share = 0.05 + 0.001 * next(count)
        return Estimate(x.value, x.value - share * abs(x.value), x.value + 2 * share * abs(x.value))

    own = without_intervals.estimates
    return replace(
        without_intervals,
        estimates=replace(
            own,
            rho_at=[(n, d, widened(x)) for n, d, x in own.rho_at],
            iso_loss_rho=[(n, d, widened(x)) for n, d, x in own.iso_loss_rho],
            iso_loss_costs={
                name: [replace(row, ratio=widened(row.ratio)) for row in rows]
                for name, rows in own.iso_loss_costs.items()
            },
            differences=[replace(row, relative=widened(row.relative)) for row in own.differences],
        ),
    )


@pytest.fixture(scope="module")
def splits():
    points, run = run_curves(sizes=12, steps=8)
    noisy = replace(points, loss=points.loss * np.exp(1e-3 * np.sin(np.arange(run.size))))
    return compare_approaches(Sample(noisy, run, run), bootstrap=20)


def bars(axes):
    """Of each errorbar container: points [P, 2], bars [P, 2] (low, high), and whether hollow."""
    shown = []
    for points, _, lines in axes.containers:
        ends = [segment[:, 1] for segment in lines[0].get_segments()] if lines else []
        hollow = to_rgba(points.get_markerfacecolor()) == WHITE
        shown.append((points.get_xydata(), np.array(ends), hollow))
    return shown


def band(axes):
    """Corners of the only band {x: (low, high)}."""
    (shown,) = (c for c in axes.collections if isinstance(c, FillBetweenPolyCollection))
    corners = shown.get_paths()[0].vertices
    return {x: (own.min(), own.max()) for x in np.unique(corners[:, 0])
            for own in [corners[corners[:, 0] == x, 1]]}  # fmt: skip


def notes(figure):
    return figure.get_supxlabel()


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ---- Two arms ------------------------------------------------------------------------------------


def test_multiplier_shows_both_estimates_by_tokens(found):
    panels = figures.multiplier(found).axes
    assert [axes.get_title() for axes in panels] == ["10M tokens", "316M tokens", "10B tokens"]
    tokens = sorted({d for _, d, _ in found.estimates.rho_at})
    for axes, d in zip(panels, tokens, strict=True):
        moving = [(n, x) for n, at, x in found.estimates.rho_at if at == d]
        apart = [(n, x) for n, at, x in found.estimates.iso_loss_rho if at == d]
        (line,) = (one for one in axes.lines if one.get_label().startswith("multiplier"))
        np.testing.assert_allclose(line.get_xydata(), [(n, x.value) for n, x in moving])
        shown = band(axes)
        for n, x in moving:
            assert shown[n] == pytest.approx((x.low, x.high))
        ((points, ends, hollow),) = bars(axes)
        np.testing.assert_allclose(points[:, 1], [x.value for _, x in apart])
        np.testing.assert_allclose(ends, [(x.low, x.high) for _, x in apart])
        np.testing.assert_allclose(points[:, 0], [n for n, _ in apart], rtol=0.15)
        assert not hollow
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.get_xlabel() == "parameters"
    label = "float16 parameters\nthat one of ternary (W1.58 A8) is worth"
    assert panels[0].get_ylabel() == label


def test_cost_ratios_are_hollow_where_extrapolated(found):
    figure = figures.cost_ratios(found)
    (axes,) = figure.axes
    shown = {(x, y): (tuple(ends), hollow) for points, all_ends, hollow in bars(axes)
             for (x, y), ends in zip(points, all_ends, strict=True)}  # fmt: skip
    rows = [row for own in found.estimates.iso_loss_costs.values() for row in own]
    assert len(shown) == len(rows) and {row.measured for row in rows} == {True, False}
    for row in rows:
        (at,) = (key for key in shown if key[1] == row.ratio.value)
        assert at[0] == pytest.approx(row.loss, rel=0.05)
        ends, hollow = shown[at]
        assert ends == pytest.approx((row.ratio.low, row.ratio.high))
        assert hollow == (not row.measured)
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "loss that both reach (nats per token)"
    assert axes.get_ylabel() == "cost of ternary (W1.58 A8)\nover that of float16"
    assert legend(figure) == ["training FLOPs", "bits of the model", "extrapolated"]


def test_relative_differences_in_percent_beside_one_another(found):
    axes, bar = figures.relative_difference(found).axes
    rows, shown = found.estimates.differences, bars(axes)
    assert len(rows) == len(shown) == 20
    for row, (points, ends, _) in zip(rows, shown, strict=True):
        assert points[0, 1] == pytest.approx(100 * row.relative.value)
        assert ends[0] == pytest.approx([100 * row.relative.low, 100 * row.relative.high])
        assert abs(np.log(points[0, 0] / row.n)) < np.log(10**0.5) / 2  # nearer than any other n
    places = [points[0, 0] for points, _, _ in shown]
    assert len(set(places)) == 20 and places == sorted(places)  # rows are sorted by n, then d
    bounds = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert bounds == pytest.approx([-1.0, 1.0])
    assert axes.get_xscale() == "log" and axes.get_ylabel().endswith("minus 1 (%)")
    assert bar.get_ylabel() == "training tokens"


def test_many_budgets_of_a_size_stay_nearer_to_it_than_to_another():
    row = figures.Difference(1e6, 1.0, Estimate(0.0, -1.0, 1.0))
    rows = [replace(row, n=n, d=float(d)) for n in (1e6, 2e6) for d in range(30)]
    near = np.array(figures._dodged(rows))
    assert np.all(np.diff(near) > 0)
    assert near[29] < np.sqrt(2) * 1e6 < near[30]


@pytest.mark.parametrize("draw", TWO_ARMS)
def test_values_without_intervals_have_no_bars_and_say_why(draw, without_intervals):
    figure = draw(without_intervals)
    assert notes(figure) == "no intervals: no bootstrap"
    for axes in figure.axes:
        assert all(len(ends) == 0 for _, ends, _ in bars(axes))
        assert not any(isinstance(c, FillBetweenPolyCollection) for c in axes.collections)
    few = replace(without_intervals, refused=("fp16 has 5 independent runs",))
    assert notes(draw(few)) == "no intervals: fp16 has 5 independent runs"


@pytest.mark.parametrize("draw", TWO_ARMS)
def test_without_estimates_the_reason_is_raised(draw, found):
    refused = replace(found, estimates=None, refused=("fp16 has one ratio of tokens",))
    with pytest.raises(AnalysisError, match="no estimates to draw: fp16 has one ratio of tokens"):
        draw(refused)


def test_what_no_size_reaches_is_counted_and_an_open_interval_leaves_the_axis(found):
    (n, d, first), (m, e, second), *rest = found.estimates.iso_loss_rho
    rows = [(n, d, replace(first, value=np.inf)), (m, e, replace(second, high=np.inf)), *rest]
    open_ended = replace(found, estimates=replace(found.estimates, iso_loss_rho=rows))
    figure = figures.multiplier(open_ended)
    assert notes(figure) == "not drawn: 1 of 18, which no size reaches"
    assert [len(points) for axes in figure.axes for points, _, _ in bars(axes)] == [2, 3, 3]
    low, high = figure.axes[0].get_ylim()
    assert low < second.low and 5 < high < 20
    assert bars(figure.axes[1])[0][1][0][1] > 1e6 * high


# ---- Compute-optimal splits ----------------------------------------------------------------------


def test_profiles_pass_through_their_sizes_to_an_optimum():
    shifts = np.array([1.0, 1.0, 1.0, 20.0, 1.0, 1.0, 1.0])[:, None]
    points = surface(BUDGETS[:, None], around(BUDGETS) * shifts)
    figure = figures.isoflop_profiles(points)
    axes, bar = figure.axes
    stars = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "*"]
    curves = [line for line in axes.lines if line.get_marker() == "None"]
    expected = profiles(points, Method())
    optimal = [(profile.n, profile.loss) for profile in expected if not profile.refused]
    assert len(optimal) == 6
    np.testing.assert_allclose(stars, optimal)
    assert [curve.get_linestyle() for curve in curves] == ["-"] * 3 + ["--"] + ["-"] * 3
    for curve, profile in zip(curves, expected, strict=True):
        n, loss = curve.get_xydata().T
        at_sizes = np.interp(np.log(profile.points.n), np.log(n), loss)
        np.testing.assert_allclose(at_sizes, profile.points.loss, rtol=2e-3)
    assert len({curve.get_color() for curve in curves}) == 7
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "parameters"
    assert axes.get_ylabel() == "loss (nats per token)"
    assert bar.get_ylabel() == "training compute (FLOPs)"
    assert [text.get_text() for text in bar.get_yticklabels()][::3] == ["1e17", "1e19", "1e21"]
    assert legend(figure)[-1] == "a budget without an optimum"


def test_single_sizes_are_no_profiles():
    points, _ = run_curves(sizes=4, steps=5)
    with pytest.raises(AnalysisError, match="no budget has the 3 sizes that parabola takes"):
        figures.isoflop_profiles(points, Method("parabola"))


def test_allocation_shows_laws_bands_and_refusals(splits):
    figure = figures.allocation(splits)
    above, below = figure.axes
    told = [row for row in splits if row.n is not None]
    assert [row.approach for row in told] == ["envelope", "parametric"]
    reference = told[-1].n
    for row, line, ratio in zip(told, above.lines, below.lines, strict=True):
        compute, n = line.get_xydata().T
        assert (compute[0], compute[-1]) == pytest.approx(row.n.observed)
        np.testing.assert_allclose(n, [row.n.at(c) for c in compute])
        np.testing.assert_allclose(ratio.get_ydata(), n / [reference.at(c) for c in compute])
        assert line.get_label() == f"{row.approach}: C^{row.n.exponent:.3f}"
    drawn = [c for c in above.collections if isinstance(c, FillBetweenPolyCollection)]
    banded = [row.n for row in told if row.n.interval]
    assert len(drawn) == len(banded) > 0
    for shown, law in zip(drawn, banded, strict=True):
        corners = shown.get_paths()[0].vertices
        for c in law.observed:
            own = corners[np.isclose(corners[:, 0], c, rtol=1e-9), 1]
            assert (own.min(), own.max()) == pytest.approx(law.interval_at(c))
    refused = [f"{row.approach}: refused" for row in splits if row.n is None]
    assert refused and legend(figure)[-len(refused) :] == refused
    assert {above.get_xscale(), above.get_yscale(), below.get_yscale()} == {"log"}
    assert below.get_xlabel() == "training compute (FLOPs)"
    assert above.get_ylabel() == "compute-optimal\nparameters"
    assert below.get_ylabel() == "over those of\nparametric"


def test_allocation_of_one_approach_and_of_none(splits):
    rows = [replace(row, n=None) for row in splits[:-1]]
    assert len(figures.allocation([*rows, splits[-1]]).axes) == 1
    with pytest.raises(AnalysisError, match="no approach has .* to draw .a: two; b: three"):
        figures.allocation([Allocation("a", refused="two"), Allocation("b", refused="three")])


# ---- Rates ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rates():
    """Two sizes, two arms; ternary's best rate at the larger size is the last tried."""
    rows = []
    for size, n in (("1k", 1000), ("4k", 4000)):
        for arm, best in (("fp16", 3e-3), ("ternary", 5e-3 if size == "1k" else 4e-2)):
            for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2):
                for seed in (0, 1):
                    loss = 2 + 0.1 * np.log(rate / best) ** 2 + 0.01 * (seed - 0.5)
                    rows.append((n, size, arm, 5000, rate, seed, loss, "ok"))
    columns = ["params_non_embedding", "size", "precision", "tokens", "peak_lr", "seed", "loss",
               "status"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def test_loss_vs_rate_marks_each_arms_optimum(rates):
    figure = plots.loss_vs_rate(rates)
    assert [axes.get_title() for axes in figure.axes] == ["1k, 5k tokens", "4k, 5k tokens"]
    known = optima(rates).set_index(["size", "precision"])["optimum"]
    expected = [[known["1k", "fp16"], known["1k", "ternary"]], [known["4k", "fp16"]]]
    for axes, own in zip(figure.axes, expected, strict=True):
        stars = [line for line in axes.lines if line.get_marker() == "*"]
        assert [star.get_xdata()[0] for star in stars] == pytest.approx(own)
        assert [star.get_ydata()[0] for star in stars] == pytest.approx([2.0] * len(own), abs=1e-9)
        assert axes.get_xscale() == "log" and axes.get_xlabel() == "peak learning rate"
    hollow = [line for line in figure.axes[1].lines if line.get_fillstyle() == "none"]
    assert [line.get_xdata()[0] for line in hollow] == [1.6e-2]
    assert figure.get_supylabel() == "held-out loss (nats per token)"
    assert legend(figure)[-1] == "best at an end: no optimum"


def test_loss_vs_rate_draws_means_over_seeds(rates):
    axes = plots.loss_vs_rate(rates).axes[0]
    one = rates[(rates["size"] == "1k") & (rates["precision"] == "fp16")]
    expected = one.groupby("peak_lr")["loss"].mean()
    points = next(line for line in axes.lines if line.get_marker() == "s")
    np.testing.assert_allclose(points.get_xydata(), list(expected.items()))
    with pytest.raises(AnalysisError, match="no endpoint is finished"):
        plots.loss_vs_rate(rates.assign(status="diverged"))


# ---- Files ---------------------------------------------------------------------------------------


def test_each_figure_is_written_the_same_twice(found, splits, rates, tmp_path):
    drawn = {
        **{draw.__name__: (draw, found) for draw in TWO_ARMS},
        "allocation": (figures.allocation, splits),
        "profiles": (figures.isoflop_profiles, isoflop_points()),
        "rates": (plots.loss_vs_rate, rates),
    }
    for name, (draw, shown) in drawn.items():
        written = [plots.save(draw(shown), tmp_path / f"{name}{i}") for i in (1, 2)]
        for first, second in zip(*written, strict=True):
            assert first.read_bytes() == second.read_bytes(), name
