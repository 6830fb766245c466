"""Two arms with known answers: tests of the ladder, estimates, verdicts, and the command."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.compare import _crossover, main
from analysis.comparing import Verdict, compare
from analysis.estimates import surrounded
from analysis.laws import LAWS
from analysis.multiplicity import SIGNIFICANT, holm
from analysis.nested import TESTS, as_case_of, ladder, least_draws
from analysis.tables import AnalysisError
from analysis.two_arms import TwoArms

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def table(rho=1.0, noise=0.0, of_run=0.0, of_pair=0.0, seeds=3, seed=0, budgets=None, own=None):
    """Two arms of 5 sizes times `seeds` runs of 4 endpoints, one a row.

    Log losses have independent noise, luck of a run, and luck that the runs of a pair share.
    own: parameters of the treatment that differ.
    """
    rng, rows = np.random.default_rng(seed), []
    for n in np.geomspace(1e6, 1e8, 5):
        for s in range(seeds):
            pair = of_pair * rng.normal()
            for arm in ("fp16", "ternary"):
                run = of_run * rng.normal()
                treated = arm == "ternary"
                params = TRUTH | (own or {} if treated else {})
                for d in np.geomspace(1e7, 1e10, 4) if budgets is None else budgets(n):
                    worth = n * (rho if treated else 1)
                    loss = LAWS["chinchilla"](params, {"n": worth, "d": d})
                    loss = float(loss) * np.exp(pair + run + noise * rng.normal())
                    rows.append((n, d, 6 * n * d, loss, arm, f"{arm}-{n:.0f}-{s}", s))
    columns = ["params_non_embedding", "tokens", "flops", "loss", "precision", "run_id", "seed"]
    frame = pd.DataFrame(rows, columns=columns)
    frame["size"] = frame["params_non_embedding"].round().astype(int)
    bits = np.where(frame["precision"] == "fp16", 16.0, 2.0)
    return frame.assign(model_bits=bits * frame["params_non_embedding"])


def two_arms(paired=True, **known):
    frame = table(**known)
    return TwoArms(
        arms=("fp16", "ternary"),
        n=frame["params_non_embedding"].to_numpy(),
        d=frame["tokens"].to_numpy(),
        c=frame["flops"].to_numpy(),
        costs={"model_bits": frame["model_bits"].to_numpy()},
        loss=frame["loss"].to_numpy(),
        group=(frame["precision"] == "ternary").to_numpy(int),
        runs=frame["run_id"].to_numpy(),
        pairs=(frame["size"].astype(str) + " " + frame["seed"].astype(str)).to_numpy()
        if paired
        else None,
    )


# ---- Noise-free: every number is known -----------------------------------------------------------


@pytest.fixture(scope="module")
def exact():
    return compare(two_arms(rho=0.5), bootstrap=0)


def test_recovers_a_known_multiplier(exact):
    found = exact.estimates
    assert found.rho.value == pytest.approx(0.5, rel=1e-6)
    for rows in (found.rho_at, found.iso_loss_rho):
        assert [x.value for _, _, x in rows] == pytest.approx([0.5] * 9, rel=1e-6)
    assert sorted({n for n, _, _ in found.rho_at}) == pytest.approx([1e6, 1e7, 1e8])
    assert exact.verdict is Verdict.UNKNOWN and "no bootstrap" in exact.sentence


def test_half_the_worth_takes_twice_the_compute(exact):
    """With N_eff = rho N both arms have one frontier in rho C, and the treatment's N is 1 / rho."""
    costs = exact.estimates.iso_loss_costs
    assert [row.ratio.value for row in costs["flops"]] == pytest.approx([2.0] * 5, rel=1e-6)
    assert [row.ratio.value for row in costs["model_bits"]] == pytest.approx([0.25] * 5, rel=1e-6)
    losses = exact.arms.loss[exact.arms.group == 0].min(), exact.arms.loss.max()
    assert losses[0] < costs["flops"][0].loss < costs["flops"][-1].loss < losses[1]


def test_crossovers_of_known_laws():
    """A and alpha alone differ: A N^-alpha = A' N^-alpha' at the crossover."""
    found = compare(two_arms(own={"A": 800.0, "alpha": 0.38}), bootstrap=0).estimates.crossovers
    meeting = (800.0 / 406.4) ** (1 / 0.04)
    assert found["n"].cost.value == pytest.approx(meeting, rel=1e-5)
    assert found["n"].observed == (1e6, 1e8) and found["n"].searched == (1e4, 1e10)
    assert (found["n"].none_observed, found["n"].none) == (0.0, 0.0)
    worse = compare(two_arms(own={"A": 1400.0, "alpha": 0.38}), bootstrap=0).estimates.crossovers
    assert (worse["n"].none_observed, worse["n"].none) == (1.0, 1.0)
    assert worse["n"].to_json()["value"] is None
    # At equal bits it has 8 times the parameters: A (x / 16)^-alpha = A' (x / 2)^-alpha'.
    bits = (1400.0 * 2.0**0.38 / (406.4 * 16.0**0.34)) ** (1 / 0.04)
    assert worse["model_bits"].cost.value == pytest.approx(bits, rel=1e-5)
    assert worse["model_bits"].observed == pytest.approx((16e6, 2e8))


def test_objectives_of_nested_laws_fall(exact):
    values = [exact.ladder.steps[name].objective_value for name in ("same", "rho")]
    assert values[0] > 1e-4 and values[1] < 1e-20
    assert [step.theta.size for step in exact.ladder.steps.values()] == [5, 6, 8, 9, 10]
    assert exact.ladder.test("same", "rho").statistic > 1000
    assert exact.ladder.test("rho", "shared_offset").statistic == 0.0


def test_separate_laws_are_those_of_each_arm_alone():
    own = {"E": 1.8, "A": 300.0, "B": 500.0, "alpha": 0.3, "beta": 0.3}
    found = ladder(two_arms(own=own), objective="log_mse", bootstrap=0).steps["separate"].params
    expected = {f"{k}[fp16]": v for k, v in TRUTH.items()}
    expected |= {f"{k}[ternary]": v for k, v in own.items()}
    assert found == pytest.approx(expected, rel=1e-6)


def test_each_smaller_law_is_a_case_of_the_larger():
    arms = two_arms(rho=0.5, noise=3e-3)
    steps = ladder(arms, objective="log_mse", bootstrap=0).steps
    for small, large, case in TESTS:
        inside = as_case_of(steps[small], steps[large].problem, case, arms)(steps[small].theta)
        same = steps[large].problem.residuals(inside)
        expected = steps[small].problem.residuals(steps[small].theta)
        np.testing.assert_allclose(same, expected, atol=1e-12)
        assert steps[large].objective_value <= steps[small].objective_value


def test_criteria_by_hand():
    step = ladder(two_arms(noise=3e-3), objective="log_mse", bootstrap=0).steps["rho"]
    r = step.problem.residuals(step.theta)
    sigma, found = np.sqrt(np.mean(r**2)), step.criteria
    densities = -0.5 * (r / sigma) ** 2 - np.log(sigma * np.sqrt(2 * np.pi))
    assert found["log_likelihood"] == pytest.approx(densities.sum(), rel=1e-12)
    assert found["aic"] == pytest.approx(2 * 7 - 2 * densities.sum(), rel=1e-12)
    assert found["aicc"] == pytest.approx(found["aic"] + 2 * 7 * 8 / (120 - 8), rel=1e-12)
    assert found["bic"] == pytest.approx(7 * math.log(120) - 2 * densities.sum(), rel=1e-12)
    huber = ladder(two_arms(noise=3e-3), objective="huber", bootstrap=0).steps["rho"]
    assert set(huber.criteria.values()) == {None}


# ---- Noise: tests and intervals ------------------------------------------------------------------


@pytest.fixture(scope="module")
def multiplied():
    return compare(two_arms(rho=0.5, noise=1e-3, of_run=2e-3), bootstrap=200)


def test_intervals_hold_a_known_multiplier(multiplied):
    assert multiplied.verdict is Verdict.MULTIPLIER
    found = multiplied.estimates
    for x in (found.rho, *(x for _, _, x in [*found.rho_at, *found.iso_loss_rho])):
        assert x.low < 0.5 < x.high and x.high - x.low < 0.1
    middle = found.iso_loss_costs["flops"][2]
    assert middle.measured and middle.ratio.low < 2 < middle.ratio.high
    assert not multiplied.significant("rho", "epm")


def test_the_sentence_says_law_multiplier_range_and_runs(multiplied):
    sentence, rho = multiplied.sentence, multiplied.estimates.rho
    assert sentence.startswith("ternary against fp16: same law up to a multiplier of N, at a")
    assert f"rho of {rho.value:.3g} (95 % interval {rho.low:.3g} to {rho.high:.3g})" in sentence
    assert "N 1M to 100M, D 10M to 10B; 15 runs of fp16 and 15 runs of ternary" in sentence
    assert sentence.endswith("120 endpoints.")


def test_one_law_is_told_as_one():
    found = compare(two_arms(noise=1e-3, of_run=1e-3), bootstrap=100)
    assert found.verdict is Verdict.SAME
    assert found.estimates.rho.low < 1 < found.estimates.rho.high
    assert found.estimates.largest.reach < 0.01


def test_another_exponent_is_another_law():
    """The treatment's alpha is .30, at an amplitude with which the arms meet at 10^7."""
    own = {"alpha": 0.30, "A": 406.4 * 1e7 ** (0.30 - 0.34)}
    found = compare(two_arms(own=own, noise=1e-3, of_run=1e-3), bootstrap=100)
    assert found.verdict is Verdict.DIFFERENT and found.significant("rho", "shared_offset")
    assert found.sentence.startswith(
        "ternary against fp16: different laws, whose multiplier of N moves with N and D (p after"
    )
    assert "rho of" not in found.sentence  # no one multiplier holds


def test_a_relevant_difference_that_noise_hides_cannot_be_told():
    noisy = two_arms(noise=1e-2, of_run=3e-2)
    found = compare(noisy, bootstrap=100)
    assert found.verdict is Verdict.UNKNOWN and not found.refused
    low, high = found.estimates.largest.relative.low, found.estimates.largest.relative.high
    assert low < 0 < high and max(-low, high) > 0.01
    assert replace(found, relevant=10 * max(-low, high)).verdict is Verdict.SAME


def test_pairing_narrows_the_interval_where_pairs_share_luck():
    known = dict(rho=0.5, noise=1e-3, of_pair=1e-2)
    widths = []
    for paired in (True, False):
        rho = compare(two_arms(paired, **known), bootstrap=200).estimates.rho
        widths.append(rho.high - rho.low)
        assert rho.low < 0.5 < rho.high
    assert widths[0] < 0.7 * widths[1]


def test_runs_widen_the_interval_over_points():
    """Endpoints of a run are not independent: taken as runs of their own, they look like more."""
    arms = two_arms(False, rho=0.5, of_run=1e-2, noise=1e-4)
    alone = replace(arms, runs=np.arange(arms.n.size))
    widths = [
        x.high - x.low for x in (compare(a, bootstrap=200).estimates.rho for a in (arms, alone))
    ]
    assert widths[0] > 1.3 * widths[1]


@pytest.mark.slow
def test_a_true_law_is_rejected_no_more_often_than_the_level():
    """40 tables of one law, with luck of runs: 2 rejections at 5 % are expected, 6 or more have a
    chance of 1.4 %. Taking each endpoint as a run of its own rejects about a half."""
    p = [
        ladder(
            two_arms(False, noise=1e-3, of_run=3e-3, seed=seed), objective="log_mse", bootstrap=99
        )
        .test("same", "rho")
        .p
        for seed in range(40)
    ]
    assert sum(x <= 0.05 for x in p) < 6
    assert 0.3 < np.mean(p) < 0.7


# ---- Refusals ------------------------------------------------------------------------------------


def test_no_multiplier_from_one_ratio_of_tokens():
    frame = two_arms(rho=0.5, noise=1e-3)
    # The treatment's runs end at 100 tokens a parameter alone.
    fixed = replace(frame, d=np.where(frame.group == 1, 100 * frame.n, frame.d))
    found = compare(fixed, bootstrap=100)
    assert found.verdict is Verdict.UNKNOWN and found.estimates is None
    assert list(found.ladder.steps) == ["same", "rho"]
    assert "ternary has one ratio of tokens to parameters (d rises as n^1.00)" in found.sentence
    both = compare(replace(frame, d=100 * frame.n), bootstrap=100)
    assert len(both.refused) == 2 and not both.ladder.steps


def test_no_intervals_from_few_runs():
    """5 runs an arm: the multiplier alone, and why there is no more."""
    budgets = np.geomspace(1e7, 1e10, 12)
    few = two_arms(rho=0.5, noise=1e-3, seeds=1, budgets=lambda n: budgets)
    found = compare(few, bootstrap=100)
    assert found.verdict is Verdict.UNKNOWN
    assert found.refused[0] == "fp16 has 5 independent pairs: 8 or more are needed"
    assert math.isnan(found.estimates.rho.low) and found.ladder.tests[0].p is None
    assert found.to_json()["estimates"]["rho"]["low"] is None


def test_flags_a_parameter_at_its_bound():
    found = compare(two_arms(own={"E": 1e-9}), bootstrap=0)
    assert "separate: E[ternary] is indistinguishable from 0" in found.warnings


def test_refuses_arms_that_span_nothing_in_common():
    arms = two_arms(rho=0.5, noise=1e-3)
    apart = replace(arms, n=np.where(arms.group == 1, 1000 * arms.n, arms.n))
    with pytest.raises(AnalysisError, match="the arms have no n in common"):
        compare(apart, bootstrap=0)


def test_refuses_a_run_in_two_pairs():
    arms = two_arms()
    with pytest.raises(AnalysisError, match="lies in two pairs: a run is drawn as a whole"):
        replace(arms, pairs=arms.d.astype(str))


def test_draws_keep_arms_pairs_and_runs_whole():
    arms = two_arms(noise=1e-3)
    weights = arms.drawn(50, 0)
    assert weights.shape == (50, 120)
    for row in weights:
        assert row[arms.group == 0].sum() == row[arms.group == 1].sum() == 60
        for cluster in range(15):
            assert len(set(row[arms.clusters == cluster])) == 1
    wild = replace(arms, pairs=None).wild_weights(4000, 0)
    assert wild.mean() == pytest.approx(0, abs=0.01)
    assert (wild**2).mean() == pytest.approx(1, abs=0.01)
    assert len(np.unique(np.round(wild[0], 9))) <= 6
    assert len(np.unique(arms.clusters)) == 15
    assert len(np.unique(replace(arms, pairs=None).clusters)) == 30
    # Arms whose runs have the same labels are still two arms.
    assert len(np.unique(replace(arms, pairs=None, runs=arms.pairs).clusters)) == 30


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    frame = table(rho=0.5, noise=1e-3, of_run=1e-3).assign(status="ok")
    frame.loc[3, ["status", "loss"]] = ["diverged", np.nan]
    path = tmp_path_factory.mktemp("compare") / "endpoints.csv"
    frame.to_csv(path, index=False)
    return path


ARMS = ("--baseline=fp16", "--treatment=ternary")


def test_command_prints_the_contract(file, capsys):
    options = ("--pair=size,seed", "--cost=model_bits", "--bootstrap=80", "--json")
    assert main([str(file), *ARMS, *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["n_points"] == 119 and document["runs"] == [15, 15]
    assert document["paired"] and document["clusters"] == 15
    assert [row["step"] for row in document["ladder"]] == [
        "same", "rho", "epm", "shared_offset", "separate",
    ]  # fmt: skip
    assert [(t["smaller"], t["larger"]) for t in document["tests"]] == [
        ("same", "rho"), ("rho", "epm"), ("rho", "shared_offset"), ("shared_offset", "separate"),
    ]  # fmt: skip
    assert all(1 / 81 <= t["p"] <= t["p_holm"] <= 1 for t in document["tests"])
    rho = document["estimates"]["rho"]
    assert rho["low"] < rho["value"] < rho["high"]
    assert rho["value"] == pytest.approx(0.5, rel=0.02)
    assert set(document["estimates"]["iso_loss_costs"]) == {"flops", "model_bits"}
    assert set(document["estimates"]["crossovers"]) == {"n", "flops", "model_bits"}
    assert document["verdict"] in {str(v) for v in Verdict}
    assert "left out 1 endpoints" in document["warnings"][-1]
    assert document["sentence"].startswith("ternary against fp16: ")


def test_command_plots_beside_clean_json(file, tmp_path, capsys):
    options = ("--cost=model_bits", "--bootstrap=0", "--json", f"--plot={tmp_path / 'arms.png'}")
    assert main([str(file), *ARMS, *options]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["estimates"] is not None
    paths = [tmp_path / f"arms-{name}" for name in ("multiplier", "cost-ratios", "differences")]
    assert captured.err.splitlines() == [f"wrote {path}.png and {path}.svg" for path in paths]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"{path.name}.{kind}" for path in paths for kind in ("png", "svg")}


def test_command_without_estimates_says_what_is_not_drawn(file, tmp_path, capsys):
    frame = pd.read_csv(file)
    frame["tokens"] = 100 * frame["params_non_embedding"]
    frame["run_id"] = [f"run{i}" for i in frame.index]  # each with one end
    path = tmp_path / "fixed.csv"
    frame.to_csv(path, index=False)
    assert main([str(path), *ARMS, "--bootstrap=0", f"--plot={tmp_path / 'arms'}"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and not list(tmp_path.glob("*.png"))
    assert "arms-multiplier: not drawn: no estimates to draw: fp16 has one ratio" in lines[0]


def test_command_refuses_a_plot_before_it_computes(file, capsys, monkeypatch):
    monkeypatch.setattr("analysis.compare.compare", lambda *_, **__: pytest.fail("it computed"))
    assert main([str(file), *ARMS, "--plot=absent/arms"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: --plot=absent/arms: there is no directory absent\n"


def test_module_is_a_command(file):
    command = [sys.executable, "-m", "analysis.compare", file, "--baseline=fp16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--treatment" in done.stderr


def test_command_ends_in_a_sentence(file, capsys):
    assert main([str(file), *ARMS, "--cost=model_bits", "--bootstrap=0"]) == 0
    shown = capsys.readouterr().out
    assert "rho against same: statistic" in shown and "for equal loss" in shown
    assert shown.strip().splitlines()[-1].startswith("ternary against fp16: cannot be told")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline=fp16"], "--treatment"),
        (["--baseline=fp16", "--treatment=binary"], "--treatment=binary: column 'precision' has"),
        (["--baseline=fp16", "--treatment=fp16"], "are both 'fp16'"),
        ([*ARMS, "--where=tokens < 2e7"], "fp16: 'chinchilla' needs at least 3 different values"),
        ([*ARMS, "--where=tokens < 2e7 and seed == 0"], "fp16: 5 points cannot fit the 5"),
        ([*ARMS, "--objective=lad"], "a comparison takes log_mse or huber"),
        ([*ARMS, "--bootstrap=5"], "bootstrap=5: 4 tests at p < 0.05 after Holm take 80"),
        ([*ARMS, "--relevant=0"], "relevant=0: expected a positive share"),
        ([*ARMS, "--relevant=nan"], "relevant=nan: expected a positive share"),
        ([*ARMS, "--bootstrap=1000000000"], "bootstrap=1000000000: 100000 are the most"),
        ([*ARMS, "--cluster="], "no column ''"),
        ([*ARMS, "--cost=energy"], "no column 'energy'"),
        ([*ARMS, "--cost=tokens", "--bootstrap=0"], "'tokens' is no function of size"),
        ([*ARMS, "--pair=size,luck"], "no column 'luck'"),
        ([*ARMS, "--cluster=run"], "no column 'run'"),
        ([*ARMS, "--c=compute"], "no column 'compute'"),
    ],
)
def test_command_refuses_in_one_line(file, capsys, arguments, message):
    assert main([str(file), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_command_refuses_endpoints_without_decay(file, tmp_path, capsys):
    frame = pd.read_csv(file)
    path = tmp_path / "undecayed.csv"
    frame.assign(decayed=frame.index != 5).to_csv(path, index=False)
    assert main([str(path), *ARMS]) == 2
    assert "1 of 120 rows are not at the end of a learning-rate decay" in capsys.readouterr().err


# ---- What a sceptical reader found ---------------------------------------------------------------


def test_the_least_draws_are_those_that_can_reject_every_law():
    least = least_draws(SIGNIFICANT)
    assert holm(np.full(len(TESTS), 1 / (1 + least))).max() < SIGNIFICANT
    assert holm(np.full(len(TESTS), 1 / least)).min() >= SIGNIFICANT
    with pytest.raises(AnalysisError, match=f"after Holm take {least} or more"):
        compare(two_arms(noise=1e-3), bootstrap=least - 1)


def test_losses_that_rise_end_at_bounds():
    arms = two_arms()
    rising = replace(arms, loss=1 + np.log(arms.n) / 5 + np.log(arms.d) / 5)
    steps = ladder(rising, objective="log_mse", bootstrap=0, only=("same",)).steps
    assert {"alpha", "beta"} <= set(steps["same"].shared_at_bound)
    steps = ladder(arms, objective="log_mse", bootstrap=0, only=("same",)).steps
    assert steps["same"].shared_at_bound == []


def test_a_law_that_describes_nothing_is_no_verdict(multiplied):
    """The law of the verdict with a shared parameter moved to its bound."""
    assert multiplied.chosen == "rho" and multiplied.misfit == ""
    step = multiplied.ladder.steps["rho"]
    low, _ = step.problem.bounds

    def moved(name):
        theta = np.where(np.array(step.problem.law.names) == name, low, step.theta)
        steps = {**multiplied.ladder.steps, "rho": replace(step, theta=theta)}
        return replace(multiplied, ladder=replace(multiplied.ladder, steps=steps))

    assert moved("rho[ternary]").verdict is Verdict.MULTIPLIER
    assert moved("beta").verdict is Verdict.UNKNOWN
    sentence = moved("beta").sentence
    assert "cannot be told (the law 'rho' does not describe these losses: beta is at a" in sentence


def test_two_ratios_of_an_arm_cannot_be_told():
    arms = two_arms(rho=0.5, noise=1e-3, budgets=lambda n: n * np.array([10.0, 80.0] * 2))
    found = compare(arms, bootstrap=0)
    assert found.verdict is Verdict.UNKNOWN
    assert found.refused[0] == (
        "fp16: these points have two ratios of tokens to parameters only; three budgets of a size "
        "or more are needed"
    )


def test_places_that_no_run_came_near_are_extrapolated():
    """Runs along the diagonal of the range: its other two corners have no points beyond them."""
    arms = two_arms(budgets=lambda n: n * np.array([10.0, 20.0, 40.0]))
    n, d = np.array([1e6, 1e8, 1e7, 1e6]), np.array([1e7, 1e7, 2e8, 4e9])
    assert surrounded(arms, n, d) == [True, False, True, False]


def test_crossovers_say_what_was_searched_and_seen():
    row = {"value": 2.0, "low": 1.0, "high": 3.0, "searched": [1e-2, 1e2], "observed": [1.0, 10.0]}
    assert _crossover("n", row) == "as good from n 2  [1, 3] on"
    assert _crossover("n", row | {"value": 20.0}).endswith("on  extrapolated")
    assert _crossover("n", row | {"observed": None}).endswith("on  extrapolated")
    assert _crossover("n", row | {"value": 1e-2}).startswith("as good at every n from 0.01 on, the")
    assert _crossover("n", row | {"value": None}) == (
        "as good from no n on, up to 100, the most that was searched"
    )


@pytest.mark.parametrize(
    ("column", "option"), [("precision", ()), ("seed", ("--pair=size,seed",)), ("run_id", ())]
)
def test_names_with_gaps_are_refused(file, tmp_path, capsys, column, option):
    frame = pd.read_csv(file)
    frame[column] = frame[column].astype(object)
    frame.loc[7, column] = None
    frame.to_csv(tmp_path / "gaps.csv", index=False)
    assert main([str(tmp_path / "gaps.csv"), *ARMS, *option]) == 2
    error = capsys.readouterr().err
    assert f"column '{column}', row 7: it is empty" in error and error.count("\n") == 1
