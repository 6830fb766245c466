"""Figures of pairs: every difference is a point, the law a line through what it says, intervals are
bars, and the commands write them."""

import numpy as np
import pandas as pd
import pytest
from test_equal_loss import table as worth_table
from test_gap_law import table, truth

from analysis import equal_loss, gap_law, paired_figures
from analysis.tables import AnalysisError


def points(axes):
    """[(x, y)] of all that is drawn with a marker."""
    return [
        xy for line in axes.lines if line.get_marker() not in ("None", "")
        for xy in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]  # fmt: skip


def bars(axes):
    """[(x, low, high)] of all vertical lines."""
    segments = [s for lines in axes.collections for s in lines.get_segments()]
    return sorted((s[0][0], s[:, 1].min(), s[:, 1].max()) for s in map(np.asarray, segments))


@pytest.fixture(scope="module")
def law_and_pairs():
    frame = table(noise=0.002)
    law = gap_law.fit_gap_law(frame, "fp16", "ternary", bootstrap=100)
    return law, gap_law.pairs_of(frame, "fp16", "ternary")


def test_each_pair_is_a_point_and_each_size_a_line(law_and_pairs):
    law, pairs = law_and_pairs
    axes = paired_figures.distances(law, pairs).axes[0]
    drawn = sorted(points(axes))
    assert drawn == sorted(zip(pairs["tokens"], pairs["difference"], strict=True))
    lines = [line for line in axes.lines if len(line.get_xdata()) == 50]
    sizes = sorted(pairs["params_non_embedding"].unique())
    assert len(lines) == len(sizes) == 4
    for line, n in zip(lines, sizes, strict=True):
        np.testing.assert_allclose(line.get_ydata(), truth(n, line.get_xdata()), rtol=0.1)
    assert axes.get_ylim()[0] <= 0


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_predicted_has_its_interval_and_what_was_measured(law_and_pairs, trained):
    law, pairs = law_and_pairs
    frame = table(sizes={"800k": 8e5}, ratios=(5, 10), seeds=1)
    new = gap_law.new_gaps(law, frame if trained else frame.drop(columns="loss"))
    figure = paired_figures.distances(law, pairs, new)
    found = bars(figure.axes[0])
    np.testing.assert_allclose([b[1:] for b in found], new[["low", "high"]])
    measured = [xy for xy in points(figure.axes[0]) if xy[0] in set(new["tokens"])]
    assert len(measured) == (2 if trained else 0)
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "800k parameters" in said and "predicted (95 %)" in said


def test_more_sizes_than_colours_are_refused(law_and_pairs):
    law, pairs = law_and_pairs
    many = pd.concat([pairs.assign(size=f"{i}", params_non_embedding=1e5 * i) for i in range(1, 9)])
    with pytest.raises(AnalysisError, match="8 sizes: colours for 7"):
        paired_figures.distances(law, many)


def test_worth_is_drawn_with_its_intervals():
    """One that leaves the measured sizes goes on to the edge of the picture."""
    found = equal_loss.equal_loss(worth_table(noise=0.004), "fp16", "ternary", noise=0.02)
    axes = paired_figures.worth(found, "fp16", "ternary").axes[0]
    assert sorted(y for _, y in points(axes)) == sorted(found["rho"])
    bottom, top = axes.get_ylim()
    ends = zip(sorted(found["rho_low"]), sorted(b[1] for b in bars(axes)), strict=True)
    assert all(shown == low if low > 0 else shown < bottom for low, shown in ends)
    ends = zip(sorted(found["rho_high"]), sorted(b[2] for b in bars(axes)), strict=True)
    assert all(shown == high if np.isfinite(high) else shown > top for high, shown in ends)
    assert not (found["rho_low"] > 0).all() or not np.isfinite(found["rho_high"]).all()
    for (x, _), n in zip(points(axes), found["params_non_embedding"], strict=True):
        assert n / 1.3 < x < n * 1.3


@pytest.mark.parametrize(
    ("command", "frame"), [(gap_law.main, table), (equal_loss.main, worth_table)]
)
def test_the_commands_write_them(tmp_path, capsys, command, frame):
    file = tmp_path / "endpoints.csv"
    frame(noise=0.002).to_csv(file, index=False)
    assert command([str(file), f"--plot={tmp_path / 'figure'}"]) == 0
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert (tmp_path / "figure.svg").exists()
    assert command([str(file), f"--plot={tmp_path}"]) == 2
    assert "is a directory: name the figures in it" in capsys.readouterr().err
