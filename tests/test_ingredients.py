"""Effects of a recipe's ingredients: pairing, moderated variances, verdicts, figures, refusals."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import polygamma

from analysis import ingredients
from analysis.ingredients import compare
from analysis.tables import AnalysisError

SEEDS = (0, 1, 2)


def rows(base, kind, change, losses, factor="", mse=0.19, seeds=SEEDS):
    """A run a seed; a loss of None is a diverged run's."""
    return pd.DataFrame(
        {
            "run_id": [f"{base}-{kind}-{change}-s{seed}" for seed in seeds],
            "size": "95k",
            "tokens": 600_064,
            "seed": seeds,
            "status": ["diverged" if loss is None else "ok" for loss in losses],
            "loss": [math.nan if loss is None else loss for loss in losses],
            "tag_base": base,
            "tag_kind": kind,
            "tag_change": change,
            "tag_factor": factor,
            "weight_mse": mse,
        }
    )


def table(variants, seed_effects=(0.0, 0.0, 0.0), base="full", noise=1e-3):
    """A base of loss 2 and variants {(kind, change): effect} whose noise is [-1, 0, 1] * `noise`.

    The order of the noise over the seeds differs from variant to variant, its variance does not.
    """
    own = np.array(seed_effects)
    frames = [rows(base, "base", "", 2 + own)]
    for i, ((kind, change), effect) in enumerate(variants.items()):
        errors = noise * np.roll([-1.0, 0.0, 1.0], i)
        frames.append(rows(base, kind, change, 2 + own + effect + errors))
    return pd.concat(frames, ignore_index=True)


MIXED = {
    ("without", "sub-norms"): 0.05,
    ("without", "warmup"): -0.05,
    ("without", "bias"): 1e-5,
    ("with", "clipping"): 0.05,
    ("with", "momentum"): -0.05,
    ("with", "dropout"): 1e-5,
    ("instead", "weights: TWN"): 0.05,
    ("instead", "weights: LSQ"): -0.05,
    ("instead", "weights: median"): 1e-5,
}


def by_change(frame):
    return compare(frame).effects.set_index("change")


def test_verdict_words_of_each_kind():
    assert by_change(table(MIXED))["verdict"].to_dict() == {
        "sub-norms": "helps",
        "warmup": "hurts",
        "bias": "no effect seen",
        "clipping": "hurts",
        "momentum": "helps",
        "dropout": "no effect seen",
        "weights: TWN": "worse",
        "weights: LSQ": "better",
        "weights: median": "no difference seen",
    }


def test_known_differences_and_intervals():
    """Equal variances: the prior is infinitely sure, the t of the pooled dof gives the width."""
    found = by_change(table(MIXED))
    assert found.loc["sub-norms", "difference"] == pytest.approx(0.05, abs=1e-12)
    assert found.loc["warmup", "difference"] == pytest.approx(-0.05, abs=1e-12)
    dof = 4 * 9 * 2 / (9 + 3)  # nine variants of one base, two degrees of freedom each
    half = stats.t.ppf(0.975, dof) * 1e-3 / np.sqrt(3)
    assert found["half_width"].to_numpy() == pytest.approx(half, rel=1e-6)
    assert (found["high"] - found["low"]).to_numpy() == pytest.approx(2 * half, rel=1e-6)
    assert (found["low"] < found["difference"]).all()
    p = 2 * stats.t.sf(0.05 / (1e-3 / np.sqrt(3)), dof)
    assert found.loc["sub-norms", "p"] == pytest.approx(p, rel=1e-5)


def test_pairing_takes_out_what_a_seed_does_to_both():
    calm, stormy = table(MIXED), table(MIXED, seed_effects=(-0.5, 0.1, 0.4))
    stormy = stormy.sample(frac=1, random_state=0)  # pairs are by seed, not by order
    a, b = by_change(calm), by_change(stormy)
    assert b["half_width"].to_numpy() == pytest.approx(a["half_width"].to_numpy(), rel=1e-6)
    assert b.loc[a.index, "difference"].to_numpy() == pytest.approx(a["difference"].to_numpy())
    assert b["verdict"].to_dict() == a["verdict"].to_dict()
    assert compare(stormy).bases["seed_sd"].item() == pytest.approx(
        np.std([-0.5, 0.1, 0.4], ddof=1)
    )


def test_only_seeds_that_both_finished_are_pairs():
    base = rows("full", "base", "", [2.0, None, 3.0, 2.5], seeds=(0, 1, 2, 3))
    variant = rows("full", "without", "x", [2.1, 9.0, 3.3, 9.0], seeds=(0, 1, 2, 7))
    failed = rows("full", "without", "y", [2.1, 3.3, 9.0], seeds=(0, 2, 3))
    failed.loc[2, "status"] = "failed"
    found = by_change(pd.concat([base, variant, failed]))
    assert found["pairs"].to_dict() == {"x": 2, "y": 2}
    assert found["difference"].to_numpy() == pytest.approx([0.2, 0.2])


def test_each_base_has_its_own_variants():
    frame = pd.concat([table(MIXED), table({("with", "sub-norms"): -0.2}, base="minimal")])
    frame.loc[frame["tag_base"] == "minimal", "loss"] += 1
    found = compare(frame)
    minimal = found.effects[found.effects["base"] == "minimal"]
    assert (
        minimal["difference"].item() == pytest.approx(-0.2) and minimal["verdict"].item() == "helps"
    )
    assert found.bases["loss"].to_numpy() == pytest.approx([2, 3])
    order = found.effects[["base", "kind", "difference"]]
    assert order.equals(order.sort_values(["base", "kind", "difference"]))


# Moderated variances


def test_intervals_cover_what_they_say_and_the_prior_is_found():
    """Variants without effect, their variances scaled inverse chi-square; the base is exact."""
    rng, count = np.random.default_rng(1), 2000
    deviation = 0.01 * np.sqrt(4 / rng.chisquare(4, (count, 1)))
    own = np.array([2.0, 2.1, 1.9])
    variants = pd.DataFrame(
        {
            "seed": np.tile(SEEDS, count),
            "loss": (own + deviation * rng.normal(size=(count, 3))).ravel(),
            "status": "ok",
            "tag_base": "full",
            "tag_kind": "with",
            "tag_change": np.repeat([f"v{i:04d}" for i in range(count)], 3),
            "weight_mse": 0.19,
        }
    )
    found = compare(pd.concat([rows("full", "base", "", own), variants]))
    covered = (found.effects["low"] < 0) & (found.effects["high"] > 0)
    assert 0.935 < covered.mean() < 0.965
    assert math.sqrt(found.prior.variance) == pytest.approx(0.01, rel=0.05)
    assert found.prior.dof == pytest.approx(4, rel=0.2)
    assert found.effects["dof"].to_numpy() == pytest.approx(found.prior.dof + 2)
    # Unmoderated, the t interval of two degrees of freedom is as sure but far wider.
    assert found.effects["half_width"].median() < 0.7 * stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3)


def test_prior_matches_an_independent_reference():
    """The moments by numerical integration of log chi-square, d0 by bisection."""
    rng = np.random.default_rng(2)
    dof = np.repeat([2.0, 3.0, 5.0], 20)
    variances = rng.chisquare(dof) / dof * 3 / rng.chisquare(3, 60)

    def log_moments(d):
        chi = stats.chi2(d)
        mean = chi.expect(np.log)
        return mean, chi.expect(lambda x: (np.log(x) - mean) ** 2)

    means, spreads = np.repeat([log_moments(d) for d in (2, 3, 5)], 20, axis=0).T
    centred = np.log(variances) - means + np.log(dof)
    excess = np.var(centred, ddof=1) - spreads.mean()
    low, high = 1.0, 100.0
    for _ in range(20):
        d0 = math.sqrt(low * high)
        low, high = (d0, high) if log_moments(d0)[1] > excess else (low, d0)
    s2 = math.exp(centred.mean() + log_moments(d0)[0] - math.log(d0))
    found = ingredients.prior(variances, dof)
    assert 1.1 < d0 < 90  # the bisection found it
    assert found.dof == pytest.approx(d0, rel=1e-4)
    assert found.variance == pytest.approx(s2, rel=1e-4)
    weighed = [(d0 * s2 + d * v) / (d0 + d) for v, d in zip(variances, dof, strict=True)]
    assert ingredients.moderated(variances, dof, found) == pytest.approx(weighed, rel=1e-4)


@pytest.mark.parametrize("d0, s0", [(2.0, 0.1), (6.0, 3.0)])
def test_prior_is_found_from_many_variances(d0, s0):
    rng = np.random.default_rng(4)
    variances = s0**2 * d0 / rng.chisquare(d0, 100_000) * rng.chisquare(2, 100_000) / 2
    found = ingredients.prior(variances, np.full(100_000, 2.0))
    assert found.dof == pytest.approx(d0, rel=0.1)
    assert math.sqrt(found.variance) == pytest.approx(s0, rel=0.02)


def test_prior_where_there_is_little_to_learn():
    two = np.full(4, 2.0)
    alike = ingredients.prior(np.array([1.0, 1.1, 0.9, 1.0]), two)
    assert alike.dof == math.inf and alike.variance == pytest.approx(1.0)
    assert ingredients.moderated(np.array([5.0]), two[:1], alike) == pytest.approx([1.0])
    alone = ingredients.prior(np.array([3.0]), two[:1])
    assert alone.dof == 0 and ingredients.moderated(np.array([3.0]), two[:1], alone) == [3.0]
    with_idle = ingredients.prior(np.array([0.0, 1e-20, 1.0, 1.1, 0.9, 1.0]), np.full(6, 2.0))
    assert with_idle == alike


def test_one_variant_gets_the_ordinary_paired_t_interval():
    losses = np.array([2.01, 2.13, 2.02])
    base = np.array([2.0, 2.1, 1.9])
    frame = pd.concat([rows("b", "base", "", base), rows("b", "with", "x", losses)])
    found = compare(frame).effects.iloc[0]
    expected = stats.ttest_rel(losses, base)
    assert found["p"] == pytest.approx(expected.pvalue) and found["dof"] == 2
    low, high = expected.confidence_interval(0.95)
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))


def test_a_variant_that_changes_nothing_is_no_effect_and_no_infinity():
    frame = table({("without", "x"): 0.05, ("without", "y"): 0.0, ("without", "z"): -0.05})
    same = rows("full", "without", "idle", [2.0, 2.0, 2.0])
    found = by_change(pd.concat([frame, same]))
    assert found.loc["idle", "verdict"] == "no effect seen" and found.loc["idle", "p"] == 1
    assert found.loc["x", "verdict"] == "helps"
    alone = by_change(pd.concat([frame[frame["tag_kind"] == "base"], same])).loc["idle"]
    assert alone["p"] == 1 and alone["half_width"] == 0


@pytest.mark.parametrize("value", [1e-8, 1e-3, 0.4, 1.0, 7.0, 1e5, 1e9])
def test_inverse_trigamma(value):
    assert polygamma(1, ingredients.inverse_trigamma(value)) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 10, 40])
def test_most_dof_is_that_of_variances_that_share_a_base(count):
    """Against the spread of the pooled variance in simulated families of three seeds."""
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(20_000, count + 1, 3))
    pooled = (noise[:, 1:] - noise[:, :1]).var(axis=-1, ddof=1).mean(axis=1)
    simulated = 2 * pooled.mean() ** 2 / pooled.var()
    dof = np.full(count, 2.0)
    one = ingredients.most_dof(np.full(count, "a"), dof)
    assert one == pytest.approx(simulated, rel=0.06)
    both = ingredients.most_dof(np.repeat(["a", "b"], count), np.tile(dof, 2))
    assert both == pytest.approx(2 * one)


# Holm, diverged runs


def test_holm_by_hand():
    """Times 4, 3, 2, 1 in ascending order, never below an earlier one, at most 1."""
    adjusted = ingredients.holm(np.array([0.03, 0.01, 0.9, 0.014]))
    assert adjusted == pytest.approx([0.06, 0.04, 0.9, 0.042])
    assert ingredients.holm(np.array([0.02, 0.015])) == pytest.approx([0.03, 0.03])
    assert ingredients.holm(np.array([0.7, 0.6])) == pytest.approx([1.0, 1.0])


def test_holm_counts_every_variant_of_the_table():
    """An effect that is significant alone is not among a hundred that are null."""
    one = {("without", "x"): 0.0035}
    many = one | {("with", f"null {i}"): 0.0 for i in range(100)}
    few = one | {("with", "null"): 0.0, ("with", "nil"): 0.0}
    assert by_change(table(few)).loc["x", "p"] < 0.05
    found = by_change(table(many)).loc["x"]
    assert found["p_holm"] == pytest.approx(101 * found["p"])


def test_diverged_runs():
    frame = pd.concat(
        [
            table(MIXED),
            rows("full", "without", "one", [2.1, None, 2.101]),
            rows("full", "without", "two", [2.1, None, None]),
            rows("full", "instead", "all", [None, None, None]),
        ]
    )
    found = by_change(frame)
    assert list(found.loc[["one", "two", "all"], "verdict"]) == [
        "diverged 1 of 3",
        "diverged 2 of 3",
        "diverged 3 of 3",
    ]
    assert found.loc["one", "difference"] == pytest.approx(0.1005)
    assert found.loc["one", "low"] < 0.1005 < found.loc["one", "high"]
    assert found.loc[["two", "all"], ["difference", "half_width", "p_holm"]].isna().all(axis=None)
    intact = by_change(table(MIXED))["verdict"]
    assert found.loc[intact.index, "verdict"].equals(intact)


def test_a_single_pair_has_no_verdict():
    lonely = rows("full", "with", "lonely", [2.1], seeds=(0,))
    assert by_change(pd.concat([table(MIXED), lonely])).loc["lonely", "verdict"] == "too few pairs"


# The command


def test_command_reads_csv_prints_writes_and_draws(tmp_path, capsys):
    path = tmp_path / "endpoints.csv"
    weights = rows("full", "instead", "weights: binary", [2.3, 2.301, 2.302], "weights", 0.36)
    diverged = rows("full", "instead", "all", [None, None, None])
    pd.concat([table(MIXED), weights, diverged]).to_csv(path, index=False)
    out, csv = tmp_path / "figures", tmp_path / "effects.csv"
    out.mkdir()
    assert ingredients.main([str(path), f"--plot={out / 'worth'}", f"--csv={csv}"]) == 0
    printed = capsys.readouterr().out
    assert "full: loss 2.0000 nats a token, seed-to-seed standard deviation 0.0000" in printed
    assert "standard deviation s0 0.0010" in printed
    least = stats.t.ppf(1 - 0.05 / 20, 4 * 10 * 2 / (10 + 3)) * 1e-3 / np.sqrt(3)
    assert f"all 10 tested, one below about {least:.4f}" in printed
    line = next(line for line in printed.splitlines() if "sub-norms" in line)
    half = compare(pd.read_csv(path)).effects.set_index("change").loc["sub-norms", "half_width"]
    for text in ("without", "2.0000", "+0.0500", f"±{half:.4f}", "helps"):
        assert text in line
    assert pd.read_csv(csv)["verdict"].value_counts()["diverged 3 of 3"] == 1
    names = ["worth-effects", "worth-errors"]
    assert sorted(p.name for p in out.iterdir()) == [
        f"{n}.{e}" for n in names for e in ("png", "svg")
    ]

    assert ingredients.main([str(path), "--json"]) == 0
    document = json.loads(
        capsys.readouterr().out, parse_constant=pytest.fail
    )  # no NaN, no Infinity
    assert document["prior"]["d0"] == "inf" and document["prior"]["s0"] == pytest.approx(1e-3)
    assert document["bases"][0]["seeds"] == 3
    effects = {row["change"]: row for row in document["effects"]}
    assert effects["sub-norms"]["verdict"] == "helps" and effects["all"]["difference"] is None


def without_column(frame, name):
    return frame.drop(columns=name)


@pytest.mark.parametrize(
    "spoil, said",
    [
        *[
            (lambda f, n=n: without_column(f, n), n)
            for n in ("tag_base", "weight_mse", "seed", "loss")
        ],
        (lambda f: f[f["tag_kind"] != "base"], "no base rows"),
        (lambda f: f[f["tag_kind"] == "base"], "no variants"),
        (lambda f: f[f["seed"] == 1], "fewer than 2 seeds"),
        (lambda f: f.replace({"tag_kind": {"with": "plus"}}), "'plus'"),
        (lambda f: pd.concat([f, f.assign(size="330k")]), "more than once"),
        (lambda f: f.assign(loss=f["loss"].where(f.index != 4, np.inf)), "not a positive finite"),
    ],
)
def test_bad_tables_get_one_sentence_and_status_2(spoil, said, tmp_path, capsys):
    path = tmp_path / "endpoints.csv"
    spoil(table(MIXED)).to_csv(path, index=False)
    assert ingredients.main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert said in captured.err and not captured.out


def test_variants_of_a_base_that_is_not_there():
    stray = rows("minimal", "with", "x", [2.0, 2.1, 2.2])
    with pytest.raises(AnalysisError, match="'minimal'"):
        compare(pd.concat([table(MIXED), stray]))


def test_where_chooses_among_sizes_and_untagged_rows_do_not_count(tmp_path, capsys):
    frame, other = table(MIXED), rows("", "", "", [9.0, 9.0, 9.0])
    path = tmp_path / "endpoints.parquet"
    pd.concat([frame, other, frame.assign(size="330k")]).to_parquet(path)
    assert ingredients.main([str(path), "--where=size == '95k'"]) == 0
    assert "sub-norms" in capsys.readouterr().out


# Figures


@pytest.fixture(scope="module")
def effects():
    frames = [
        table(MIXED),
        rows("full", "without", "far", [4.0, 4.001, 4.002]),
        rows("full", "with", "shaky", [2.1, None, 2.101]),
        rows("full", "with", "broken", [None, None, None]),
        rows("full", "instead", "weights: binary", [2.3, 2.301, 2.302], "weights", 0.36),
        rows("full", "instead", "weights: 4 bits", [1.9, 1.901, 1.902], "weights", 0.01),
        rows("full", "instead", "weights: same error", [2.05, 2.051, 2.052], "weights", 0.19),
        rows("full", "instead", "optimizer: Lion", [2.2, 2.201, 2.202], "optimizer", 0.19),
        rows("full", "without", "ternary", [1.8, 1.801, 1.802], "precision", 0.0),
        table({("with", "sub-norms"): -0.05}, base="minimal"),
    ]
    return compare(pd.concat(frames)).effects


def ticks(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_plot_effects(effects):
    figure = ingredients.plot_effects(effects)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == [
        "full: without one ingredient",
        "full: with one ingredient more",
        "full: an alternative instead",
        "minimal: with one ingredient more",
    ]
    first = panels["full: without one ingredient"]
    assert ticks(first) == ["far", "sub-norms", "bias", "warmup", "ternary"]
    assert first.get_xlim()[1] < 1.5  # the far one is an arrow, its number beside it
    assert [line.get_marker() for line in first.lines].count(">") == 1
    assert ticks(first.child_axes[0])[0].startswith("+2.0010 ±")
    added = panels["full: with one ingredient more"]
    beside = dict(zip(ticks(added), ticks(added.child_axes[0]), strict=True))
    assert beside["broken"] == "diverged 3 of 3" and beside["shaky"].endswith(", diverged 1 of 3")
    assert [line.get_marker() for line in added.lines].count("X") == 1
    for axes in figure.axes:
        assert any(np.array_equal(line.get_xdata(), [0, 0]) for line in axes.lines)
    xlabels = [axes.get_xlabel() for axes in figure.axes]
    assert xlabels.count("held-out loss minus the base's (nats per token)") == 2


def test_plot_prediction_holds_the_variants_of_weights_only(effects):
    axes = ingredients.plot_prediction(effects).axes
    assert len(axes) == 1  # minimal has no variant of its weights
    names = [text.get_text() for text in axes[0].texts]
    chosen = ["ternary", "weights: 4 bits", "weights: same error", "weights: binary"]
    assert names == chosen  # by difference; neither the optimizer nor a kind without the factor
    assert axes[0].get_title() == "full: Spearman 1.00 (n = 4)"
    assert axes[0].get_xlabel().startswith("weight quantizer's mean squared error")
    assert axes[0].get_ylabel() == "held-out loss minus the base's (nats per token)"


def test_plot_prediction_says_when_it_cannot_correlate_or_draw(effects):
    few = effects[effects["change"].isin(["weights: binary", "weights: 4 bits"])]
    assert "(n = 2)" in ingredients.plot_prediction(few).axes[0].get_title()
    with pytest.raises(AnalysisError, match="weights"):
        ingredients.plot_prediction(effects[effects["factor"] == "optimizer"])


def test_labels_are_spread_in_order_and_within_the_panel():
    places = ingredients.spread(np.array([0.1, 0.11, 0.12, 0.97, 0.98, 0.99]), 0.05)
    assert np.all(np.diff(places) >= 0.05 - 1e-12)
    assert places[0] == 0.1 and places[-1] <= 1


@pytest.mark.parametrize("column, value", [("tokens", 800_000), ("params_non_embedding", 330_000)])
def test_unlike_runs_are_refused(column, value):
    frame = pd.DataFrame(
        [
            {
                "tag_base": "full", "tag_kind": kind, "tag_change": change, "tag_factor": "",
                "seed": seed, "loss": 2.0 + 0.01 * seed, "status": "ok", "weight_mse": 0.26,
                "tokens": 400_000, "params_non_embedding": 95_000,
            }
            for kind, change in (("base", ""), ("instead", "other"))
            for seed in range(3)
        ]
    )  # fmt: skip
    compare(frame)
    frame.loc[frame["tag_kind"] == "instead", column] = value
    with pytest.raises(AnalysisError, match=column):
        compare(frame)
