"""Reading tables, choosing rows without running code, and refusing implausible values."""

import numpy as np
import pandas as pd
import pytest

from analysis.tables import (
    AnalysisError,
    clusters_of,
    count_text,
    finished,
    fitted_rows,
    labels,
    mixed_arms,
    paired_differences,
    points,
    read_table,
    read_tables,
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


def test_several_tables_are_one(tmp_path):
    """Whatever their formats; what stands in two of them, or has other columns, is refused."""
    paths = [tmp_path / name for name in ("a.csv", "b.parquet", "c.csv", "d.csv")]
    rows = pd.DataFrame({"run_id": ["x", "x", "y"], "tokens": [1, 2, 1], "loss": [3.0, 2.0, 2.5]})
    rows[:2].to_csv(paths[0], index=False)
    rows[2:].to_parquet(paths[1], index=False)
    rows[1:].to_csv(paths[2], index=False)
    rows.assign(seed=0).to_csv(paths[3], index=False)
    pd.testing.assert_frame_equal(read_tables(paths[:2]), rows)
    pd.testing.assert_frame_equal(read_tables(paths[:1]), rows[:2])
    with pytest.raises(AnalysisError, match="^x at 2 tokens is there twice"):
        read_tables([paths[0], paths[2]])
    with pytest.raises(AnalysisError, match=r"d\.csv: .*a\.csv has other columns: seed$"):
        read_tables([paths[0], paths[3]])


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
        '"a" * 10000000000 == size',
        'size * 10000000000 == "a"',
        '["a"] * 10000000000 == size',
        "-" * 50_000 + "n > 0",
        "-" * 1900 + "n > 0",
        "not " * 20_000 + "n > 0",
        "1 + " * 10_000 + "n > 0",
    ],
)
def test_select_refuses(frame, expression):
    with pytest.raises(AnalysisError) as caught:
        select(frame, expression)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


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
    counts = [12, 2.1e5, 5.184e6, 70e9, 1.4e12, 1e16, np.inf]
    shown = ["12", "210k", "5.18M", "70B", "1.4T", "1.00e16", "inf"]
    assert [count_text(count) for count in counts] == shown


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


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ([True, False, True], [0, 2]),
        ([1, 0, 1], [0, 2]),
        (["true", "False", "TRUE"], [0, 2]),
        (pd.array([True, False, True], dtype="boolean"), [0, 2]),
    ],
)
def test_decayed_is_true_or_false(frame, values, rows):
    table = frame.assign(decayed=values, status="ok")
    assert finished(table).index.tolist() == rows
    with pytest.raises(AnalysisError, match="1 of 3 rows are not at the end"):
        fitted_rows(table)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (["yes", "no", "yes"], "row 0: yes"),
        ([True, None, True], "row 1: None"),
        ([1.0, np.nan, 1.0], "row 1: nan"),
        ([1, 2, 0], "row 1: 2"),
        (pd.array([True, True, pd.NA], dtype="boolean"), "row 2: <NA>"),
    ],
)
def test_decayed_is_nothing_else(frame, values, shown):
    with pytest.raises(AnalysisError, match=f"'decayed', {shown} is not true or false"):
        finished(frame.assign(decayed=values))


def test_a_status_that_leaves_out_all_rows(frame):
    gaps = frame.assign(status=pd.array(["ok", pd.NA, "ok"], dtype="string"))
    assert finished(gaps).index.tolist() == [0, 2]
    with pytest.raises(AnalysisError, match="'status' leaves out all 3 rows: only 'ok' counts"):
        fitted_rows(frame.assign(status="OK"))


def test_an_index_that_names_runs_is_a_column(frame, tmp_path):
    frame.assign(run_id=["a", "b", "c"]).set_index("run_id").to_parquet(tmp_path / "a.parquet")
    read = read_table(tmp_path / "a.parquet")
    assert read["run_id"].tolist() == ["a", "b", "c"]
    assert clusters_of(read, None)[0].tolist() == ["a", "b", "c"]


def test_names_have_no_gaps(frame):
    for gap in (None, np.nan):
        with pytest.raises(AnalysisError, match="'size', row 1: it is empty \\(1 of 3 are\\)"):
            labels(frame.assign(size=["a", gap, "b"]), "size")
    found, warnings = clusters_of(frame, None)
    assert found is None and "each row counts as a run of its own" in warnings[0]
    assert clusters_of(frame, "size")[1] == ()
    with pytest.raises(AnalysisError, match="no column ''"):
        clusters_of(frame, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": [3.0, 1e300, 2.0]}, "'loss', row 1: 1e\\+300 is expected between"),
        ({"d": [1e8, 1e8, 1e300]}, "'d', row 2: 1e\\+300 is expected between 1 and 1e\\+30"),
        ({"n": [1e6, 1e-300, 1e6]}, "'n', row 1: 1e-300 is expected between 1 and"),
        ({"loss": [[3.0], [2.0], [1.0]]}, "'loss', row 0: \\[3.0\\] is not a positive"),
        ({"loss": [{"a": 3.0}] * 3}, "'loss', row 0: {'a': 3.0} is not a positive"),
        ({"bits_per_byte": [3.0, 2.5, 2.2]}, "'loss' equals bits_per_byte"),
        ({"bits_per_byte": [6.0, 5.0, 4.4]}, "mean 0.721 to 0.721 bytes a token"),
        ({"bits_per_byte": [1.0, 2.5, 2.0]}, "mean 1.44 to 4.33 bytes a token"),
        ({"run_id": "a", "tokens": 1e8, "d": 1e8}, "row 1 repeats an earlier row in run_id, d:"),
        ({"n": 1e6, "d": 1e8, "loss": 3.0}, "row 1 repeats an earlier row in n, d, loss:"),
    ],
)
def test_more_implausible_values(frame, change, message):
    with pytest.raises(AnalysisError, match=message):
        points(frame.assign(**change), {"n": "n", "d": "d"}, "loss")


def test_what_is_no_repetition(frame):
    """Seeds of one run's loss, and columns of lists that no one asked for."""
    columns = {"n": "n", "d": "d"}
    alike = frame.assign(n=1e6, d=1e8, loss=3.0, seed=[0, 1, 2], extra=[[1], [1], [1]])
    assert points(alike, columns, "loss")[1].tolist() == [3.0] * 3
    consistent = frame.assign(bits_per_byte=frame["loss"] / 2.5)
    assert points(consistent, columns, "loss")[1].tolist() == [3.0, 2.5, 2.2]


@pytest.mark.parametrize("name", ["bpc", "val_ppl", "Perplexity", "loss_bits", "BPB"])
def test_losses_in_other_units_by_name(frame, name):
    with pytest.raises(AnalysisError, match="expected in nats a token"):
        points(frame.rename(columns={"loss": name}), {"n": "n"}, name)
    points(frame.rename(columns={"loss": "supply"}), {"n": "n"}, "supply")


def test_arms_are_known_by_their_columns(frame):
    assert mixed_arms(frame) is None
    assert mixed_arms(frame.assign(precision="fp16", variant=np.nan)) is None
    assert "'variant' has 2 values" in mixed_arms(frame.assign(variant=["a", np.nan, np.nan]))
    assert "'precision' has 3 values" in mixed_arms(frame.assign(precision=["a", "b", "c"]))
