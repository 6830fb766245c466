"""Recovery of known laws, objectives by hand, refusals, and the command."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from analysis.fit import main
from analysis.fitting import fit
from analysis.laws import LAWS
from analysis.solver import OBJECTIVES, Problem, refit, solve
from analysis.tables import AnalysisError

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def grid(sizes=5, budgets=4):
    """Parameters and tokens [sizes * budgets] on a full grid."""
    n, d = np.meshgrid(np.geomspace(1e5, 3e7, sizes), np.geomspace(1e6, 1e9, budgets))
    return n.ravel(), d.ravel()


def surface(n, d, noise=0.0, seed=0, params=TRUTH):
    rng = np.random.default_rng(seed)
    loss = LAWS["chinchilla"](params, {"n": n, "d": d})
    return loss * np.exp(noise * rng.normal(size=n.shape))


@pytest.mark.parametrize("objective", ["huber", "lad", "log_mse", "mse"])
def test_recovers_a_noise_free_law(objective):
    n, d = grid()
    found = fit("chinchilla", {"n": n, "d": d}, surface(n, d), objective=objective)
    assert found.params == pytest.approx(TRUTH, rel=1e-8)
    assert found.rms_log_residual < 1e-12 and found.share_of_starts > 0.5


def test_recovers_random_laws():
    n, d = grid()
    rng = np.random.default_rng(1)
    for _ in range(20):
        alpha, beta = rng.uniform(0.1, 0.8, size=2)
        truth = {
            "E": rng.uniform(0.3, 3),
            "A": rng.uniform(0.1, 1.5) * 1e6**alpha,
            "B": rng.uniform(0.1, 1.5) * 1e7**beta,
            "alpha": alpha,
            "beta": beta,
        }
        found = fit("chinchilla", {"n": n, "d": d}, surface(n, d, params=truth))
        assert found.params == pytest.approx(truth, rel=1e-7)


def test_recovers_a_power_law():
    truth = {"E": 2.0, "A": 1e3, "alpha": 0.2}
    c = np.geomspace(1e13, 1e18, 6)
    found = fit("power", {"c": c}, LAWS["power"](truth, {"c": c}))
    assert found.params == pytest.approx(truth, rel=1e-8)


def test_noise_moves_parameters_little():
    n, d = grid(8, 6)
    found = fit("chinchilla", {"n": n, "d": d}, surface(n, d, noise=3e-3), objective="log_mse")
    for name in ("E", "alpha", "beta"):
        assert found.params[name] == pytest.approx(TRUTH[name], rel=0.05)
    assert found.rms_log_residual == pytest.approx(3e-3, rel=0.25)


def test_objectives_by_hand():
    n, d = grid()
    loss = surface(n, d, noise=2e-3)
    found = {
        o: fit("chinchilla", {"n": n, "d": d}, loss, objective=o)
        for o in ("huber", "lad", "log_mse", "mse")
    }
    r = {o: np.log(f.predict({"n": n, "d": d}) / loss) for o, f in found.items()}
    huber = sum(x * x / 2 if abs(x) <= 1e-3 else 1e-3 * (abs(x) - 5e-4) for x in r["huber"])
    assert found["huber"].objective_value == pytest.approx(huber, rel=1e-9)
    assert found["lad"].objective_value == pytest.approx(sum(map(abs, r["lad"])), rel=1e-9)
    assert found["log_mse"].objective_value == pytest.approx(np.mean(r["log_mse"] ** 2), rel=1e-9)
    error = found["mse"].predict({"n": n, "d": d}) - loss
    assert found["mse"].objective_value == pytest.approx(np.mean(error**2), rel=1e-9)
    # Each is the best by its own measure.
    assert np.abs(r["lad"]).sum() < min(np.abs(r[o]).sum() for o in ("huber", "log_mse"))
    assert np.mean(r["log_mse"] ** 2) < min(np.mean(r[o] ** 2) for o in ("huber", "lad", "mse"))


def test_no_nearby_parameters_are_better():
    n, d = grid()
    loss = surface(n, d, noise=5e-3)
    found = fit("chinchilla", {"n": n, "d": d}, loss, objective="lad")
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1e-5):
        for step in rng.normal(size=(200, 5)) * scale:
            near = {k: v * np.exp(s) for (k, v), s in zip(found.params.items(), step, strict=True)}
            moved = np.abs(np.log(LAWS["chinchilla"](near, {"n": n, "d": d}) / loss)).sum()
            assert moved >= found.objective_value * (1 - 1e-9)


def test_units_change_amplitudes_alone():
    n, d = grid()
    loss = surface(n, d, noise=2e-3)
    one = fit("chinchilla", {"n": n, "d": d}, loss)
    million = fit("chinchilla", {"n": n / 1e6, "d": d}, loss)
    expected = one.params | {"A": one.params["A"] / 1e6 ** one.params["alpha"]}
    assert million.params == pytest.approx(expected, rel=1e-6)
    bits = fit("chinchilla", {"n": n, "d": d}, loss / np.log(2))
    for name in ("E", "A", "B"):
        assert bits.params[name] == pytest.approx(one.params[name] / np.log(2), rel=1e-6)


def test_refuses_what_cannot_identify_the_law():
    def refusal(n, d):
        with pytest.raises(AnalysisError) as caught:
            fit("chinchilla", {"n": n, "d": d}, surface(n, d))
        return str(caught.value)

    n, d = grid(8, 8)
    assert "5 points cannot fit the 5 parameters" in refusal(n[:5], d[:5])
    assert "3 different values of n, these points have 1" in refusal(n[n < 2e5], d[n < 2e5])
    assert "3 different values of d, these points have 1" in refusal(n[d < 2e6], d[d < 2e6])
    assert "d rises with n as n^1.00" in refusal(n, 20 * n)


def test_refuses_parameters_that_only_trade_off():
    """Two budgets, of which one was missed by a few tokens: E, B and beta trade off."""
    n = np.repeat([1e5, 3e5, 1e6, 3e6], 2)
    d = np.tile([1e6, 1e7], 4) * np.array([1, 1, 1, 1, 1, 1, 1, 1 + 1e-9])
    with pytest.raises(AnalysisError, match="cannot tell the parameters of 'chinchilla' apart"):
        fit("chinchilla", {"n": n, "d": d}, surface(n, d))


def test_refuses_losses_that_are_not_positive():
    n, d = grid()
    loss = surface(n, d)
    loss[3] = np.nan
    with pytest.raises(AnalysisError, match="loss: expected 20 positive finite numbers"):
        fit("chinchilla", {"n": n, "d": d}, loss)


def test_warns_of_an_offset_near_zero_and_of_few_points():
    n, d = grid()
    found = fit("chinchilla", {"n": n, "d": d}, surface(n, d, params=TRUTH | {"E": 1e-9}))
    assert "E is indistinguishable from 0" in found.warnings
    keep = np.arange(n.size) % 3 == 0
    few = fit("chinchilla", {"n": n[keep], "d": d[keep]}, surface(n[keep], d[keep]))
    assert "7 points for 5 parameters: under 2 each" in few.warnings


def test_intervals_hold_the_truth_and_widen_with_clusters():
    n, d = grid(8, 6)
    runs = np.exp(4e-3 * np.random.default_rng(3).normal(size=8))[np.arange(n.size) % 8]
    loss = surface(n, d, noise=1e-3) * runs
    alone = fit("chinchilla", {"n": n, "d": d}, loss, bootstrap=100)
    clustered = fit("chinchilla", {"n": n, "d": d}, loss, bootstrap=100, clusters=n)
    for name, (low, high) in clustered.intervals.items():
        assert low < clustered.params[name] < high
    low, high = clustered.predict_interval({"n": np.array([1e7]), "d": np.array([1e8])})
    near, far = alone.predict_interval({"n": np.array([1e7]), "d": np.array([1e8])})
    assert low < clustered.predict({"n": 1e7, "d": 1e8}) < high
    assert high - low > far - near


def test_no_intervals_from_too_few_runs():
    n, d = grid(4, 4)
    found = fit("chinchilla", {"n": n, "d": d}, surface(n, d, 1e-3), bootstrap=50, clusters=n)
    assert found.intervals == {}
    assert "no intervals: too few independent runs to resample" in found.warnings


def test_bootstrap_refit_equals_a_fit_of_the_repeated_points():
    n, d = grid()
    loss = surface(n, d, noise=3e-3)
    weights = np.arange(n.size) % 3
    problem = Problem.of(LAWS["chinchilla"], {"n": n, "d": d}, loss, OBJECTIVES["huber"])
    theta = solve(problem).theta
    weighted = problem.natural(refit(problem, theta, weights[None].astype(float)))
    repeated = np.repeat(np.arange(n.size), weights)
    direct = fit("chinchilla", {"n": n[repeated], "d": d[repeated]}, loss[repeated])
    assert {k: v[0] for k, v in weighted.items()} == pytest.approx(direct.params, rel=1e-5)


@pytest.fixture
def table(tmp_path):
    n, d = grid()
    frame = pd.DataFrame(
        {
            "params": n,
            "tokens": d,
            "loss": surface(n, d),
            "status": "ok",
            "arm": np.where(n < 1e6, "small", "large"),
        }
    )
    frame.loc[2, ["status", "loss"]] = ["diverged", np.nan]
    path = tmp_path / "table.csv"
    frame.to_csv(path, index=False)
    return path


COLUMNS = ("--n=params", "--d=tokens", "--loss=loss")


def test_command_prints_the_contract(table, tmp_path):
    new = tmp_path / "new.csv"
    pd.DataFrame({"params": [1e8], "tokens": [1e10]}).to_csv(new, index=False)
    done = subprocess.run(
        [sys.executable, "-m", "analysis.fit", table, "--law=chinchilla", *COLUMNS,
         f"--predict={new}", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert {
        "law",
        "objective",
        "objective_value",
        "n_points",
        "params",
        "intervals",
        "predictions",
        "warnings",
    } <= set(document)
    assert document["n_points"] == 19
    assert list(document["params"]) == ["E", "A", "B", "alpha", "beta"]
    assert document["params"] == pytest.approx(TRUTH, rel=1e-7)
    assert document["predictions"][0]["loss"] == pytest.approx(surface(np.array(1e8), 1e10))
    assert document["predictions"][0]["low"] is None
    assert "left out 1 endpoints" in document["warnings"][-3]
    assert document["warnings"][-2:] == [
        f"predictions: {name} of 1 of 1 rows lies beyond the fitted range, {ends}, by a factor of "
        f"up to {factor}"
        for name, ends, factor in (("n", "100k to 30M", "3.33"), ("d", "1M to 1B", "10"))
    ]


def test_command_bootstraps_where_and_plots(table, tmp_path, capsys):
    png = tmp_path / "law.png"
    new = tmp_path / "new.csv"
    pd.DataFrame({"params": [1e8], "tokens": [1e10]}).to_csv(new, index=False)
    assert (
        main(
            [
                str(table),
                *COLUMNS,
                "--where=tokens < 5e8",
                "--bootstrap=30",
                f"--plot={png}",
                f"--predict={new}",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "14 points, huber" in shown and "predicted loss" in shown and "[" in shown
    assert png.is_file() and png.with_suffix(".svg").is_file()


def test_command_plots_the_groups_of_a_law_and_keeps_json_clean(table, tmp_path, capsys):
    frame = pd.read_csv(table)
    frame = pd.concat([frame.assign(arm=arm) for arm in ("fp16", "ternary")])
    frame["loss"] *= np.where(frame["arm"] == "ternary", 1.01, 1.0)
    frame.to_csv(tmp_path / "arms.csv", index=False)
    options = ["--law=rho", "--group=arm", "--baseline=fp16", f"--plot={tmp_path / 'rho'}"]
    assert main([str(tmp_path / "arms.csv"), *COLUMNS, *options, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["groups"] == ["fp16", "ternary"]
    svg = tmp_path / "rho.svg"
    assert captured.err == f"wrote {tmp_path / 'rho.png'} and {svg}\n"
    assert (tmp_path / "rho.png").is_file() and svg.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n=size", "--d=tokens", "--loss=loss"], "no column 'size': the table has params"),
        (["--n=params", "--loss=loss"], "--law=chinchilla needs --d=COLUMN"),
        ([*COLUMNS, "--law=caplan"], "unknown law 'caplan'"),
        ([*COLUMNS, "--objective=l2"], "unknown objective 'l2'"),
        ([*COLUMNS, "--where=__import__('os').system('true')"], "has a Call"),
        ([*COLUMNS, "--where=params > 1e99"], "leaves no rows"),
        ([*COLUMNS, "--bootstrap=-1"], "bootstrap=-1: an interval takes 20"),
        ([*COLUMNS, "--bootstrap=many"], "invalid int value: 'many'"),
        ([*COLUMNS, "--plot=law.pdf"], "--plot=law.pdf: expected PATH or PATH.png"),
        ([*COLUMNS, "--plot=absent/law"], "--plot=absent/law: there is no directory absent"),
        ([*COLUMNS, "--cluster=run"], "no column 'run'"),
        ([*COLUMNS, "--predict=absent.csv"], "absent.csv: no such file"),
        ([*COLUMNS, "--predict="], "a table ends in .csv or .parquet"),
        ([*COLUMNS, "--cluster="], "no column ''"),
        ([*COLUMNS, "--baseline=small"], "baseline='small': 'chinchilla' has no groups"),
        ([*COLUMNS, "--bootstrap=1000000000"], "bootstrap=1000000000: 100000 are the most"),
        ([], "--loss"),
    ],
)
def test_command_refuses_in_one_line(table, capsys, arguments, message):
    assert main([str(table), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


# ---- What a sceptical reader found ---------------------------------------------------------------


def two_arms(shift):
    """A table of two arms, the second `shift` worse, in random order of no consequence."""
    n, d = grid()
    frame = pd.DataFrame({"params": n, "tokens": d, "loss": surface(n, d, noise=1e-4)})
    both = [frame.assign(precision="fp16"), frame.assign(precision="ternary")]
    both[1]["loss"] *= 1 + shift
    return pd.concat(both, ignore_index=True)


def test_two_arms_under_one_law_are_no_result(tmp_path, capsys):
    """Under Huber's loss two arms lie beyond its delta on either side: any law between them fits
    as well. Least squares has an optimum there, and warns."""
    path = tmp_path / "arms.csv"
    two_arms(0.05).to_csv(path, index=False)
    assert main([str(path), *COLUMNS]) == 2
    error = capsys.readouterr().err
    assert "column 'precision' has 2 values ('fp16', 'ternary')" in error
    assert "are not determined" in error and error.count("\n") == 1
    assert main([str(path), *COLUMNS, "--objective=log_mse"]) == 0
    assert "warning: column 'precision' has 2 values" in capsys.readouterr().out
    assert main([str(path), *COLUMNS, "--where=precision == 'fp16'", "--json"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert len(warnings) == 1 and "each row counts as a run of its own" in warnings[0]


def test_a_flat_objective_is_told():
    frame = two_arms(0.05)
    inputs = {"n": frame["params"].to_numpy(), "d": frame["tokens"].to_numpy()}
    flat = fit("chinchilla", inputs, frame["loss"].to_numpy(), hold_out=False)
    assert flat.undetermined and flat.covariance is None
    assert any("no curvature at this optimum: E" in warning for warning in flat.warnings)
    sharp = fit("chinchilla", inputs, frame["loss"].to_numpy(), objective="log_mse", hold_out=False)
    assert sharp.undetermined == () and sharp.covariance is not None


def test_starts_agree_only_in_the_same_place():
    """Along a flat objective every start is as good, each elsewhere; at an optimum all are one."""

    def solved(frame):
        inputs = {"n": frame["params"].to_numpy(), "d": frame["tokens"].to_numpy()}
        return solve(
            Problem.of(LAWS["chinchilla"], inputs, frame["loss"].to_numpy(), OBJECTIVES["huber"])
        )

    flat, sharp = solved(two_arms(0.1)), solved(two_arms(0.0))
    assert flat.share_of_starts + flat.share_elsewhere == 1 and flat.share_of_starts < 0.1
    assert sharp.share_of_starts > 0.5 and sharp.share_elsewhere == 0


def test_two_ratios_of_tokens_are_told():
    """10 different budgets in all, but two of each size: the form of the law decides."""
    n = np.repeat(np.geomspace(1e5, 3e7, 5), 2)
    expected = "these points have two {} only"
    for what, d in (
        ("ratios of tokens to parameters", n * np.tile([10.0, 80.0], 5)),
        ("products of n and d", 1e13 / n * np.tile([1.0, 8.0], 5)),
    ):
        found = fit("chinchilla", {"n": n, "d": d}, surface(n, d), hold_out=False)
        assert sum(expected.format(what) in warning for warning in found.warnings) == 1
    d = n * np.tile([10.0, 80.0], 5)
    d[0] *= 4
    third = fit("chinchilla", {"n": n, "d": d}, surface(n, d), hold_out=False)
    assert not any("only" in warning for warning in third.warnings)


def test_planned_counts_are_checked(table, tmp_path, capsys):
    new = tmp_path / "new.csv"
    pd.DataFrame({"params": [100.0], "tokens": [1e8]}).to_csv(new, index=False)
    assert main([str(table), *COLUMNS, f"--predict={new}"]) == 2
    assert "column 'params' has a median of 100" in capsys.readouterr().err


@pytest.mark.slow
def test_recovers_a_thousand_random_laws():
    """Every one of them, to eight digits, each of a random design of five sizes."""
    law, rng, worst = LAWS["chinchilla"], np.random.default_rng(1), []
    for _ in range(1000):
        sizes = rng.uniform(3e4, 1e7) * np.geomspace(1, rng.uniform(30, 1000), 5)
        ratios = np.exp(rng.uniform(np.log(3), np.log(300), (5, 4)))
        inputs = {"n": np.repeat(sizes, 4), "d": (sizes[:, None] * ratios).ravel()}
        n, d = (np.exp(np.log(values).mean()) for values in inputs.values())
        alpha, beta = rng.uniform(0.1, 0.8, size=2)
        truth = {
            "E": rng.uniform(0.3, 3),
            "A": rng.uniform(0.1, 1.5) * n**alpha,
            "B": rng.uniform(0.1, 1.5) * d**beta,
            "alpha": alpha,
            "beta": beta,
        }
        problem = Problem.of(law, inputs, law(truth, inputs), OBJECTIVES["huber"])
        found = problem.natural(solve(problem).theta)
        worst.append(max(abs(found[name] / truth[name] - 1) for name in truth))
    assert max(worst) < 1e-8
