"""Prediction intervals for new runs, the dated file, and scores by hand."""

import json
import os
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.fitting import fit
from analysis.laws import LAWS
from analysis.predict import main
from analysis.predictions import predict, scatter
from analysis.scores import read_predictions, score
from analysis.tables import AnalysisError

TRUTH = {"E": 1.2, "A": 22.0, "B": 60.0, "alpha": 0.3, "beta": 0.33}
LAW = LAWS["chinchilla"]
RUN, END = 0.004, 0.002  # standard deviations of log loss
TOKENS = np.array([1e6, 2e6, 4e6, 8e6])


def runs(seed=0, sizes=6, seeds=2, run=RUN, end=END):
    """n, d, cluster and loss [sizes * seeds * 4] of runs with four ends each."""
    rng = np.random.default_rng(seed)
    n = np.repeat(np.round(np.geomspace(3e4, 1e6, sizes)), len(TOKENS) * seeds)
    d = np.tile(TOKENS, sizes * seeds)
    cluster = np.repeat(np.arange(sizes * seeds), len(TOKENS))
    noise = run * rng.normal(size=sizes * seeds)[cluster] + end * rng.normal(size=n.size)
    return n, d, cluster, LAW(TRUTH, {"n": n, "d": d}) * np.exp(noise)


def fitted(seed=0, bootstrap=100, **given):
    n, d, cluster, loss = runs(seed, **given)
    return fit("chinchilla", {"n": n, "d": d}, loss, objective="log_mse", bootstrap=bootstrap,
               clusters=cluster, hold_out=False)  # fmt: skip


# ---- Intervals -----------------------------------------------------------------------------------


def test_scatter_of_points_is_the_residual_over_root_one_minus_leverage():
    n, d, _, loss = runs()
    found = fit("chinchilla", {"n": n, "d": d}, loss, objective="log_mse", hold_out=False)

    def log_fit(params):
        return np.log(LAW(params, {"n": n, "d": d}))

    moved = [found.params | {k: v * (1 + 1e-6)} for k, v in found.params.items()]
    x = np.stack([(log_fit(p) - log_fit(found.params)) / 1e-6 for p in moved], axis=1)
    x /= np.linalg.norm(x, axis=0)
    leverages = np.diag(x @ np.linalg.pinv(x))
    expected = (np.log(loss) - log_fit(found.params)) / np.sqrt(1 - leverages)
    assert scatter(found) == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_scatter_of_runs_is_that_of_new_ones():
    """Its mean square, over simulated tables, is the variance of a new endpoint."""
    squares = [np.mean(scatter(fitted(seed, bootstrap=0)) ** 2) for seed in range(60)]
    assert np.mean(squares) == pytest.approx(RUN**2 + END**2, rel=0.12)


def test_a_cluster_that_the_fit_follows_adds_nothing():
    """With three clusters for five parameters, some directions of each have a leverage of one."""
    n, d, cluster, loss = runs(sizes=3, seeds=3)
    found = fit("chinchilla", {"n": n, "d": d}, loss, objective="log_mse", clusters=n)
    assert np.all(np.isfinite(scatter(found)))
    assert np.abs(scatter(found)).max() < 5 * (RUN + END)


def test_intervals_hold_new_runs():
    inputs = {"n": np.array([1e5, 3e6]), "d": np.array([3e6, 2e7])}  # inside and beyond
    inside = []
    for seed in range(60):
        noise = np.random.default_rng(1000 + seed).normal(size=(2, 2))
        new = LAW(TRUTH, inputs) * np.exp(RUN * noise[0] + END * noise[1])
        _, (low, high) = predict(fitted(seed), inputs)
        inside.append((low < new) & (new < high))
    assert 0.88 <= np.mean(inside) <= 0.99


def test_intervals_of_runs_are_wider_than_of_the_law():
    found = fitted()
    inputs = {"n": np.array([1e5]), "d": np.array([3e6])}
    losses, (low, high) = predict(found, inputs)
    assert losses == pytest.approx(found.predict(inputs))
    near, far = found.predict_interval(inputs)
    assert low < near < far < high
    of_runs = np.diff(np.percentile(scatter(found), [2.5, 97.5]))[0]
    of_law = np.log(far / near)[0]
    assert max(of_runs, of_law) < np.log(high / low)[0] < of_runs + of_law
    assert predict(fitted(bootstrap=0), inputs)[1] is None


def test_a_long_run_counts_no_more_than_a_short_one():
    """The calmest points as one run: the others, a run each, are drawn far more often."""
    found = fitted()
    residuals = np.abs(found.log_residuals)
    calm = residuals < np.percentile(residuals, 80)
    relabelled = replace(found, clusters=np.where(calm, -1, np.arange(calm.size)))
    alone = replace(found, clusters=np.arange(calm.size))
    inputs = {"n": np.array([1e5]), "d": np.array([3e6])}
    _, (low, high) = predict(relabelled, inputs)
    _, (near, far) = predict(alone, inputs)
    assert np.log(high / low)[0] > 1.2 * np.log(far / near)[0]


# ---- The dated file ------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """In the working directory: table.csv of two arms, and planned.csv, of which one has none."""
    frames = []
    for arm, factor in (("fp16", 1.0), ("ternary", 1.05)):
        n, d, cluster, loss = runs(seed=int(100 * factor))
        frames.append(pd.DataFrame({
            "run_id": [f"{arm}-{c}" for c in cluster], "size": [f"{x / 1e3:.0f}k" for x in n],
            "precision": arm, "seed": cluster % 2, "params": n.astype(int),
            "tokens": d.astype(int), "loss": factor * loss, "status": "ok",
        }))  # fmt: skip
    table = pd.concat(frames)
    table.iloc[3, table.columns.get_loc("status")] = "diverged"
    table.to_csv(tmp_path / "table.csv", index=False)
    planned = pd.DataFrame({
        "size": "2m", "precision": ["fp16", "ternary", "fp16"], "seed": [0, 0, 1],
        "params": 2_000_000, "tokens": 16_000_000, "note": ["", "x", "y"],
    })  # fmt: skip
    planned.to_csv(tmp_path / "planned.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return planned


COLUMNS = ("--n=params", "--d=tokens", "--loss=loss")
ASK = ("table.csv", "--planned=planned.csv", *COLUMNS, "--by=precision", "--bootstrap=40")
FILE = "predictions-2026-01-31.json"


def asked(*arguments):
    assert main([*ASK, "--date=2026-01-31", *arguments]) == 0
    return json.loads(Path(FILE).read_text())


def test_the_file_holds_all_that_was_known(files, capsys):
    document = asked()
    assert FILE in capsys.readouterr().out
    assert document["table"] == "table.csv" and document["date"] == "2026-01-31"
    assert document["command"].startswith("python -m analysis.predict table.csv --planned=")
    assert list(document["fits"]) == ["fp16", "ternary"]
    for arm, count in (("fp16", 47), ("ternary", 48)):
        found = document["fits"][arm]
        assert found["n_points"] == count and found["law"] == "chinchilla"
        assert found["intervals"] and found["held_out"]["of"] == "n"
    assert len(document["fitted_rows"]) == 95
    rows = pd.DataFrame(document["planned"])
    assert list(rows) == [*files, "predicted", "low", "high"]
    pd.testing.assert_frame_equal(rows[["params", "tokens", "seed"]],
                                  files[["params", "tokens", "seed"]])  # fmt: skip
    assert [row["note"] for row in document["planned"]] == [None, "x", "y"]
    expected = LAW(TRUTH, {"n": 2e6, "d": 1.6e7}) * np.array([1, 1.05, 1])
    assert rows["predicted"].to_numpy() == pytest.approx(expected, rel=0.02)
    assert ((rows["low"] < rows["predicted"]) & (rows["predicted"] < rows["high"])).all()


def test_runs_are_drawn_whole(files):
    """run_id is the cluster unless another is named: the intervals are those of runs."""
    whole = asked()
    Path(FILE).unlink()
    assert asked("--cluster=run_id") | {"command": ""} == whole | {"command": ""}
    Path(FILE).unlink()
    pd.read_csv("table.csv").drop(columns="run_id").to_csv("table.csv", index=False)
    single = asked()
    errors = [found["fits"]["fp16"]["standard_errors"]["E"] for found in (single, whole)]
    assert errors[0] != pytest.approx(errors[1], rel=0.05)


def test_a_file_is_never_overwritten(files, capsys):
    asked()
    before = Path(FILE).read_bytes()
    assert main([*ASK, "--date=2026-01-31"]) == 2
    assert "is there already; a prediction is never overwritten" in capsys.readouterr().err
    assert Path(FILE).read_bytes() == before
    assert main([*ASK, "--date=2026-01-31", "--out=next"]) == 0
    assert main([*ASK, "--out=other/mine.json", "--where=seed == 0"]) == 0
    assert Path("next", FILE).is_file()
    assert json.loads(Path("other/mine.json").read_text())["date"] == date.today().isoformat()


def test_a_law_of_arms_predicts_each(files):
    ask = [a for a in ASK if not a.startswith("--by")]
    arms = ("--law=rho", "--group=precision", "--baseline=fp16")
    assert main([*ask, *arms, "--out=rho.json"]) == 0
    document = json.loads(Path("rho.json").read_text())
    assert document["fits"][""]["groups"] == ["fp16", "ternary"]
    losses = [row["predicted"] for row in document["planned"]]
    assert losses[0] == losses[2] < losses[1]


def test_known_losses_are_left_behind(files):
    files.assign(loss=9.0).to_csv("planned.csv", index=False)
    assert all("loss" not in row for row in asked("--bootstrap=0")["planned"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ASK, "--date=31.1.2026"], "--date=31.1.2026: expected YYYY-MM-DD"),
        ([*ASK[:1], *COLUMNS], "--law=chinchilla needs --planned"),
        ([*ASK[:2], "--n=params", "--loss=loss"], "--law=chinchilla needs --d"),
        ([*ASK[:2], "--n=params", "--d=tokens"], "--law=chinchilla needs --loss"),
        ([*ASK, "--by=arm"], "no column 'arm'"),
        ([*ASK, "--where=precision == 'fp16'"], "precision 'ternary': the table has fp16"),
        ([*ASK, "--cluster=lot"], "no column 'lot'"),
        ([*ASK, "--bootstrap=3"], "bootstrap=3: an interval takes 20 or more"),
        ([*ASK, "--planned=absent.csv"], "absent.csv: no such file"),
        ([*ASK, "--n=size"], "column 'size'"),
        (["table.csv", "--score=absent.json"], "absent.json"),
        (["table.csv", "--score=absent.json", "--date=zzz"], "--date=zzz: expected YYYY-MM-DD"),
        ([*ASK, "--bootstrap=1000000000"], "bootstrap=1000000000: 100000 are the most"),
        ([*ASK, "--baseline=fp16"], "baseline='fp16': 'chinchilla' has no groups"),
        ([*ASK, "--cluster="], "no column ''"),
        (["table.csv", "--score=table.csv"], "table.csv: it is no JSON"),
        ([*ASK, "--plot=p.png"], "--plot goes with --score"),
        ([*ASK, "--match=size"], "--match goes with --score"),
        ([*ASK, "--json"], "--json goes with --score"),
        ([*ASK, "--out=table.csv/deep"], "--out=table.csv/deep"),
    ],
)  # fmt: skip
def test_command_refuses_in_one_line(files, capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not list(Path().glob("*.json"))


def test_a_planned_column_that_is_taken(files, capsys):
    files.assign(low=1).to_csv("planned.csv", index=False)
    assert main([*ASK]) == 2
    assert "the planned rows have a column 'low'" in capsys.readouterr().err


# ---- Scores --------------------------------------------------------------------------------------


def prediction(**row):
    return {"size": "2m", "precision": "fp16", "tokens": 1_000_000, "seed": 0, "params": 2_000_000,
            "predicted": 2.0, "low": 1.9, "high": 2.1} | row  # fmt: skip


DOCUMENT = {
    "planned": [
        prediction(),
        prediction(precision="ternary", predicted=2.2, low=2.15, high=2.25),
        prediction(seed=1),
        prediction(tokens=2_000_000, predicted=1.8, low=None, high=None),
    ],
    "columns": {"n": "params", "d": "tokens"},
    "loss": "loss",
    "fitted_rows": [],
    "sha256": "",
}


def result(**row):
    return {"size": "2m", "precision": "fp16", "tokens": 1_000_448, "seed": 0, "params": 2_000_000,
            "status": "ok", "loss": 2.05} | row  # fmt: skip


def test_scores_by_hand():
    results = pd.DataFrame([
        result(),
        result(precision="ternary", loss=2.3),
        result(tokens=1_999_872, loss=1.8),
        result(seed=1, status="diverged", loss=np.nan),
        result(seed=7),
        result(size="4m"),
        result(tokens=1_020_000, loss=1.0),
    ])  # fmt: skip
    found = score(DOCUMENT, results)
    assert found.matched_by == ("params", "tokens", "size", "precision", "seed")
    assert "matched by params, tokens, size, precision, seed" in found.readable()
    assert found.rows["measured"].tolist() == [2.05, 2.3, 1.8]
    errors = [2.0 / 2.05 - 1, 2.2 / 2.3 - 1, 0.0]
    assert found.rows["relative_error"].tolist() == pytest.approx(errors)
    assert found.rows["inside"].tolist() == [True, False, None]
    document = found.to_json()
    assert document["coverage"] == 0.5 and document["results"] == 3
    assert document["mean_relative_error"] == pytest.approx(np.mean(np.abs(errors)))
    assert document["max_relative_error"] == pytest.approx(-errors[1])
    assert [row["seed"] for row in document["missing"]] == [1]
    assert document["warnings"] == ["3 results go with no planned row and are left out"]
    assert json.dumps(document)
    assert "no result yet: size 2m, precision fp16, tokens 1000000, seed 1" in found.readable()


def test_a_result_goes_with_the_nearest_planned_row():
    planned = [prediction(tokens=tokens, predicted=x) for tokens, x in ((10**6, 2), (1_008_000, 3))]
    found = score(DOCUMENT | {"planned": planned}, pd.DataFrame([result(tokens=1_005_000)]))
    assert found.rows["predicted"].tolist() == [3] and len(found.missing) == 1


def test_seeds_that_were_not_planned_by_number_all_count():
    planned = [{k: v for k, v in prediction().items() if k != "seed"}]
    results = pd.DataFrame([result(seed=s, loss=2 + s / 10) for s in range(3)])
    found = score(DOCUMENT | {"planned": planned}, results)
    assert found.matched_by == ("params", "tokens", "size", "precision")
    assert len(found.rows) == 3
    assert found.coverage == pytest.approx(2 / 3)


def test_columns_that_name_a_run():
    results = pd.DataFrame([result(seed=5)])
    assert len(score(DOCUMENT, results).rows) == 0
    with pytest.raises(AnalysisError, match="several planned rows are the same in params, tokens"):
        score(DOCUMENT, results, match=["precision"])
    one_seed = DOCUMENT | {"planned": DOCUMENT["planned"][:2]}
    found = score(one_seed, results, match=["precision"])
    assert found.matched_by == ("params", "tokens", "precision") and len(found.rows) == 1
    others = [{"n": 1e6, "d": 2e6, "predicted": 2.0, "low": 1.9, "high": 2.1}]
    document = DOCUMENT | {"planned": others, "columns": {"n": "n", "d": "d"}}
    found = score(document, pd.DataFrame({"n": [1e6 + 1e-7, 2e6], "d": 2e6, "loss": 2.0}))
    assert found.matched_by == ("n", "d") and len(found.rows) == 1


def test_no_results_yet():
    found = score(DOCUMENT, pd.DataFrame([result(size="9m")])).to_json()
    assert found["results"] == 0 and len(found["missing"]) == 4
    assert found["coverage"] is found["mean_relative_error"] is None


def test_what_was_fitted_is_no_prediction(files, capsys):
    """The same file, or some of its rows in another."""
    table = pd.read_csv("table.csv")
    last = table[table["status"] == "ok"].tail(2)
    last[["size", "precision", "params", "tokens", "seed"]].to_csv("planned.csv", index=False)
    asked("--bootstrap=0")
    capsys.readouterr()
    assert main(["table.csv", f"--score={FILE}", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["results"] == 2
    assert "the results are the table that was fitted" in document["warnings"][0]
    assert "2 of the results were among the rows fitted" in document["warnings"][1]
    extra = last.tail(1).assign(tokens=last["tokens"].tail(1) * 1.001)
    pd.concat([last.head(1), extra]).to_parquet("results.parquet")
    assert main(["results.parquet", f"--score={FILE}", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["results"] == 2
    assert [w[:28] for w in document["warnings"]] == ["1 of the results were among "]


def test_command_scores_writes_and_draws(files, capsys):
    asked()
    capsys.readouterr()
    measured = LAW(TRUTH, {"n": 2e6, "d": 1.6e7})
    files.head(2).assign(loss=[measured, 3 * measured]).to_csv("results.csv", index=False)
    command = ["results.csv", f"--score={FILE}", "--out=scores.json", "--plot=scores.png"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "2 results: off by" in shown and "50% inside" in shown and "no result yet" in shown
    written = json.loads(Path("scores.json").read_text())
    assert [row["inside"] for row in written["rows"]] == [True, False]
    assert Path("scores.png").is_file() and Path("scores.svg").is_file()
    assert main(command) == 2
    assert "scores.json is there already" in capsys.readouterr().err
    assert main(["results.csv", f"--score={FILE}", "--out=results.csv/scores.json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "--out=results.csv/scores.json: cannot be written" in printed.err


def test_figure():
    from analysis import plots

    rows = pd.DataFrame({
        "predicted": [2.0, 2.2, 1.8], "low": [1.9, 2.15, np.nan], "high": [2.1, 2.25, np.nan],
        "measured": [2.05, 2.3, 1.8],
    })  # fmt: skip
    figure = plots.predicted_and_measured(rows)
    axes = figure.axes[0]
    assert axes.get_xlabel() == "predicted loss (nats per token)"
    assert axes.get_ylabel() == "measured over predicted loss (%)"
    labelled = {c.get_label(): c for c in axes.collections}
    drawn = {name: np.asarray(c.get_offsets()) for name, c in labelled.items() if "m" in name[:1]}
    assert drawn["measured"] == pytest.approx(np.array([[2.0, 2.5], [1.8, 0.0]]))
    assert drawn["measured, outside"] == pytest.approx(np.array([[2.2, 100 * (2.3 / 2.2 - 1)]]))


# ---- Published data ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "mean"),
    [("huber", 0.010513), ("lad", 0.010747), ("log_mse", 0.011843), ("mse", 0.012905)],
)
def test_extrapolation_of_chinchilla(tmp_path, capsys, objective, mean):
    """From 217 points below 1e21 FLOPs to the 23 others, up to 1.3e22 (see test_published_laws)."""
    path = Path(os.environ.get("BITNET_JAX_LAW_DATA", "")) / "epoch_chinchilla.csv"
    if "BITNET_JAX_LAW_DATA" not in os.environ or not path.is_file():
        pytest.skip("BITNET_JAX_LAW_DATA names no directory with epoch_chinchilla.csv")
    frame = pd.read_csv(path).dropna(subset=["Model Size", "Training FLOP", "loss"])
    frame = frame[frame["loss"] < frame["loss"].nlargest(5).min()]
    n, flops = frame["Model Size"], frame["Training FLOP"]
    frame = pd.DataFrame({"n": n, "d": flops / (6 * n), "c": flops, "loss": frame["loss"]})
    large = frame["c"] >= 1e21
    frame[~large].to_csv(tmp_path / "small.csv", index=False)
    frame[large].to_csv(tmp_path / "large.csv", index=False)
    small, found = str(tmp_path / "small.csv"), tmp_path / "found.json"
    ask = [small, f"--planned={tmp_path / 'large.csv'}", "--n=n", "--d=d", "--loss=loss"]
    assert main([*ask, f"--objective={objective}", f"--out={found}", "--bootstrap=0"]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "large.csv"), f"--score={found}", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["results"] == 23 and document["warnings"] == []
    assert document["mean_relative_error"] == pytest.approx(mean, abs=2e-6)


# ---- What a sceptical reader found ---------------------------------------------------------------


def test_results_go_with_predictions_by_the_inputs_of_the_law():
    """Columns N and D, an arm, and no size or tokens: each result with its own prediction."""
    rows = [(n, d, arm) for arm in ("a", "b") for n in (1e6, 2e6) for d in (1e7, 4e7)]
    planned = [
        {"N": n, "D": d, "precision": arm, "predicted": 2.0 + i, "low": None, "high": None}
        for i, (n, d, arm) in enumerate(rows)
    ]
    document = DOCUMENT | {"planned": planned, "columns": {"n": "N", "d": "D"}, "by": "precision"}
    results = pd.DataFrame(rows, columns=["N", "D", "precision"]).assign(loss=np.arange(8) + 2.0)
    found = score(document, results.sample(frac=1, random_state=0))
    assert found.matched_by == ("N", "D", "precision")
    assert len(found.rows) == 8 and not found.missing
    assert (found.rows["predicted"] == found.rows["measured"]).all()
    for missing in ("N", "precision"):
        with pytest.raises(AnalysisError, match=f"the results have no column '{missing}'"):
            score(document, results.drop(columns=missing))


def test_results_that_are_not_told_apart():
    again = [result(loss=2.0), result(loss=2.1)]
    with pytest.raises(AnalysisError, match="result row 1 .* they have the same seed '0'"):
        score(DOCUMENT, pd.DataFrame(again))
    planned = [{k: v for k, v in prediction().items() if k != "seed"}]
    bare = pd.DataFrame(again).drop(columns="seed")
    with pytest.raises(AnalysisError, match="they have no seeds"):
        score(DOCUMENT | {"planned": planned}, bare)
    assert len(score(DOCUMENT | {"planned": planned}, bare.assign(run_id=["x", "y"])).rows) == 2
    with pytest.raises(AnalysisError, match="such as 0 and 1: give a column"):
        score(DOCUMENT | {"planned": [prediction(), prediction()]}, pd.DataFrame(again[:1]))


def test_planned_rows_in_other_units_and_beyond(files, capsys):
    document = asked("--bootstrap=0")
    assert document["warnings"] == [
        f"{arm}: {name} of {count} of {count} rows lies beyond the fitted range, {ends}, by a "
        "factor of up to 2"
        for arm, count in (("fp16", 2), ("ternary", 1))
        for name, ends in (("n", "30k to 1M"), ("d", "1M to 8M"))
    ]
    assert "warning: fp16: n of 2 of 2 rows lies beyond" in capsys.readouterr().out
    files.assign(params=2.0).to_csv("planned.csv", index=False)
    assert main([*ASK, "--out=other.json"]) == 2
    assert "column 'params' has a median of 2: counts" in capsys.readouterr().err


def test_two_arms_without_a_fit_each(files, capsys):
    ask = [a for a in ASK if not a.startswith("--by")]
    assert main([*ask, "--objective=log_mse", "--bootstrap=0", "--out=mixed.json"]) == 0
    warnings = json.loads(Path("mixed.json").read_text())["warnings"]
    assert "column 'precision' has 2 values" in warnings[-1] and "--by" in warnings[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planned": 3}, "'planned' is not a list of rows"),
        ({"planned": {"a": 1}}, "'planned' is not a list of rows"),
        ({"planned": []}, "'planned' is not a list of rows"),
        ({"planned": [1]}, "'planned' is not a list of rows"),
        ({"planned": [{"low": 1.0, "high": 2.0}]}, "planned row 0: 'predicted' is None"),
        ({"planned": [{"predicted": 2.0}]}, "planned row 0: 'low' is None"),
        ({"planned": [prediction(predicted=None)]}, "'predicted' is None"),
        ({"planned": [prediction(predicted=float("inf"))]}, "'predicted' is inf"),
        ({"planned": [prediction(predicted=-1)]}, "'predicted' is -1"),
        ({"planned": [prediction(low="x")]}, "'low' is 'x'"),
        ({"planned": [prediction(low=2.5)]}, "low 2.5 lies above high 2.1"),
        ({"planned": [prediction(low=None)]}, "it has one end of an interval"),
        ({"planned": [prediction(size={"a": 1})]}, "'size' is no single value"),
        ({"columns": ["params"]}, "'columns' is not a column for each input"),
        ({"columns": None}, "'columns' is not a column for each input"),
        ({"columns": {"n": ["params"]}}, "'columns.n' is not text"),
        ({"loss": ["loss"]}, "'loss' is not text"),
        ({"fitted_rows": None}, "'fitted_rows' is not a list of texts"),
        ({"sha256": 3}, "'sha256' is not text"),
        ({"by": 3}, "'by' is not text"),
    ],
)
def test_doctored_prediction_files(tmp_path, change, message):
    path = tmp_path / "doctored.json"
    path.write_text(json.dumps(DOCUMENT))
    assert read_predictions(path) == DOCUMENT
    path.write_text(json.dumps(DOCUMENT | change))
    with pytest.raises(AnalysisError, match=message):
        read_predictions(path)


def test_a_file_that_nests_too_deeply(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(AnalysisError, match="it is no JSON"):
        read_predictions(path)
