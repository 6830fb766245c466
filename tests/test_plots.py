"""Figures carry labelled axes and the artists that they promise, and are written reproducibly."""

import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from synthetic_results import SIZES, TRIGRAM, endpoints

from analysis import plots
from analysis.arms import accepted, fit_arms
from analysis.curves import loss_against_compute
from analysis.fitting import fit


@pytest.fixture(scope="module")
def table():
    return endpoints()


@pytest.fixture(scope="module")
def fits(table):
    return accepted(fit_arms(table, bootstrap=0))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_loss_vs_compute(table, fits):
    axes = plots.loss_vs_compute(table, fits, TRIGRAM).axes[0]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "training compute (FLOPs)"
    assert axes.get_ylabel() == "held-out loss (nats per token)"
    assert [child.get_ylabel() for child in axes.child_axes] == ["bits per byte"]
    assert len(axes.containers) == 2  # an errorbar container an arm
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[:3] == ["ternary (W1.58 A8)", "float16", "fitted compute-optimal frontier"]
    assert texts(axes) == [*SIZES, "byte trigram (Witten-Bell) 2.97 bits"]


def test_runs_are_joined_and_bands_drawn_where_there_are_intervals(table):
    many = endpoints(seeds=3)
    axes = plots.loss_vs_compute(many, accepted(fit_arms(many, bootstrap=50))).axes[0]
    bands = [c for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]
    joined = [line for line in axes.lines if line.get_alpha() == 0.3]
    assert len(joined) == many["run_id"].nunique()
    assert len(bands) == 2


def test_points_alone(table):
    """Without fits, references, bits a byte or more than one finished endpoint."""
    one = table.drop(columns="bits_per_byte").head(2)
    one.loc[1, ["status", "loss"]] = ["diverged", np.nan]
    axes = plots.loss_vs_compute(one).axes[0]
    assert not axes.child_axes and len(axes.containers) == 1


def test_an_arm_without_a_style_of_its_own(table):
    renamed = table.replace({"precision": {"ternary": "int4"}})
    axes = plots.loss_vs_compute(renamed).axes[0]
    assert axes.get_legend().get_texts()[0].get_text() == "int4"


def test_references_far_above_are_not_drawn(table):
    references = {"bigram": 2.46, "trigram": 2.06, "uniform": 5.5}
    axes = plots.loss_vs_compute(table, {}, references).axes[0]
    assert [text for text in texts(axes) if "bits" in text] == ["trigram 2.97 bits"]


def test_frontier_runs_through_the_fitted_surface(table, fits):
    rows = table[table["precision"] == "fp16"]
    compute = np.geomspace(rows["flops"].min(), rows["flops"].max(), 20)
    curve = loss_against_compute(fits["fp16"], rows, compute)
    assert np.all(np.diff(curve.loss) < 0) and curve.band is None
    for flops, loss in zip(rows["flops"], rows["loss"], strict=True):
        best = loss_against_compute(fits["fp16"], rows, np.array([flops])).loss[0]
        assert best < loss * 1.01  # nothing measured lies far below the frontier


def test_loss_vs_parameters(table, fits):
    figure = plots.loss_vs_parameters(table, fits)
    left, right, bar = figure.axes
    assert [axes.get_title() for axes in (left, right)] == ["ternary (W1.58 A8)", "float16"]
    assert left.get_xlabel() == "non-embedding parameters" and bar.get_ylabel() == "training tokens"
    assert len(left.lines) == 4 and len(left.collections[0].get_offsets()) == 8


def test_law_and_points(fits):
    above, below = plots.law_and_points(fits["fp16"]).axes
    assert above.get_title().startswith("L = ") and below.get_ylabel() == "residual (%)"
    assert below.get_xlabel() == "fitted loss (nats per token)"


def test_groups_of_a_law_differ_and_their_numbers_are_written(table):
    inputs = {"n": table["params_non_embedding"], "d": table["tokens"], "group": table["precision"]}
    inputs = {name: column.to_numpy() for name, column in inputs.items()}
    found = fit("rho", inputs, table["loss"].to_numpy(), baseline="fp16")
    above, below = plots.law_and_points(found).axes
    fitted = found.predict(found.inputs)
    for i, (own, residuals) in enumerate(zip(above.lines[1:], below.lines[1:], strict=True)):
        chosen = found.inputs["group"] == i
        np.testing.assert_allclose(own.get_xydata(), np.c_[fitted, found.loss][chosen])
        expected = 100 * (found.loss / fitted - 1)[chosen]
        np.testing.assert_allclose(residuals.get_ydata(), expected)
    labels = [text.get_text() for text in above.get_legend().get_texts()]
    assert labels == ["float16", "ternary (W1.58 A8)"]
    assert len({line.get_color() for line in above.lines[1:]}) == 2
    rho = found.params["rho[ternary]"]
    assert above.get_title().splitlines()[-1] == f"ternary (W1.58 A8): rho {rho:.4g}"
    assert max(map(len, above.get_title().splitlines())) <= 62


def test_save_writes_both_the_same_way_twice(table, fits, tmp_path):
    written = [plots.save(plots.loss_vs_compute(table, fits), tmp_path / name) for name in "ab"]
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in written[0]] == ["a.png", "a.svg"]
    assert written[0][0].read_bytes().startswith(b"\x89PNG")
