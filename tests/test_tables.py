"""Reading tables, choosing rows without running code, and refusing implausible values."""

import numpy as np
import pandas as pd
import pytest

from analysis.tables import (
    AnalysisError,
    count_text,
    finished,
    paired_differences,
    points,
    read_table,
    select,
)


@pytest.fixture
def frame():
    return pd.DataFrame({
        "n": [1e6, 2e6, 4e6], "d": [1e8, 2e8, 3e8], "loss": [3.0, 2.5, 2.2],
        "size": ["1m", "2m", "4m"], "status": ["ok", "diverged", "ok"],
    })  # fmt: skip


def test_csv_and_parquet_read_alike(frame, tmp_path):
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(read_table(tmp_path / "a.csv"), frame)
    pd.testing.assert_frame_equal(read_table(tmp_path / "a.parquet"), frame)


def test_unreadable_tables(frame, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"not a table")
    (tmp_path / "empty.csv").write_text("")
    frame.head(0).to_csv(tmp_path / "bare.csv")
    for name, message in [("absent.csv", "no such file"), ("broken.parquet", "cannot be read"),
                          ("empty.csv", "cannot be read"), ("bare.csv", "has no rows"),
                          ("a.xlsx", "a table ends in .csv or .parquet")]:  # fmt: skip
        with pytest.raises(AnalysisError, match=message) as caught:
            read_table(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ('size == "1m"', [0]),
        ("n >= 2e6 and not status == 'diverged'", [2]),
        ("1e6 < n < 4e6", [1]),
        ("size in ['1m', '4m'] or loss < 2.3", [0, 2]),
        ("d / n >= 100", [0, 1]),
        ("(n > 3e6) or (loss > 2.9)", [0, 2]),
    ],
)
def test_select(frame, expression, rows):
    assert select(frame, expression).index.tolist() == rows


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "@pd.compat.os.system('true') == 0",
        "n.__class__ == 1",
        "size.str.len() > 1",
        "n[0] > 1",
        "`n` > 1",
        "[x for x in n]",
        "(lambda: 1)() == n",
        "n if loss else d",
        "width > 3",
        "n = 3",
        "n +",
        "n",
        "loss < size",
        "n > 1e12",
        "",
    ],
)
def test_select_refuses(frame, expression):
    with pytest.raises(AnalysisError) as caught:
        select(frame, expression)
    assert "\n" not in str(caught.value)


def test_finished_drops_diverged_and_undecayed(frame):
    assert finished(frame).index.tolist() == [0, 2]
    assert finished(frame.assign(decayed=[True, True, False])).index.tolist() == [0]
    assert len(finished(frame.drop(columns="status"))) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": [3.0, -1.0, 2.0]}, "column 'loss', row 1: -1.0 is not a positive finite number"),
        ({"loss": [3.0, np.nan, 2.0]}, "row 1: nan"),
        ({"loss": [20.1, 12.2, 25.0]}, "not as a perplexity"),
        ({"n": [70, 160, 410]}, "column 'n' has a median of 160: counts are expected one by one"),
        ({"d": ["x", 1e9, 1e9]}, "column 'd', row 0: x is not"),
        ({"n": [1e6] * 3, "d": [1e8] * 3, "loss": [3.0] * 3, "size": ["1m"] * 3,
          "status": ["ok"] * 3}, "row 1 repeats an earlier row"),
    ],
)  # fmt: skip
def test_implausible_values(frame, change, message):
    with pytest.raises(AnalysisError, match=message):
        points(frame.assign(**change), {"n": "n", "d": "d"}, "loss")


def test_bits_are_refused(frame):
    with pytest.raises(AnalysisError, match="'bits_per_byte' is in bits"):
        points(frame.rename(columns={"loss": "bits_per_byte"}), {"n": "n"}, "bits_per_byte")


def test_count_text():
    counts = [12, 2.1e5, 5.184e6, 70e9, 1.4e12]
    assert [count_text(count) for count in counts] == ["12", "210k", "5.18M", "70B", "1.4T"]


def test_pairs_share_size_tokens_and_seed():
    rows = [
        ("1m", 10, 0, "fp16", 3.0),
        ("1m", 10, 0, "ternary", 3.3),
        ("1m", 10, 0, "ternary", 3.1),
        ("1m", 20, 0, "fp16", 2.9),
        ("2m", 10, 1, "fp16", 2.8),
        ("2m", 10, 0, "ternary", 2.7),
    ]
    table = pd.DataFrame(rows, columns=["size", "tokens", "seed", "precision", "loss"])
    pairs = paired_differences(table.assign(loss_stderr=0.03), "fp16", "ternary")
    assert len(pairs) == 1
    assert pairs.loc[0, "difference"] == pytest.approx(0.1)
    assert pairs.loc[0, "stderr"] == pytest.approx(0.03 * np.sqrt(2))
    assert pairs.loc[0, "relative"] == pytest.approx(0.1 / 3)
