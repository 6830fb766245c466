"""Branches beside independent runs: differences, noise, intervals, verdicts, FLOPs, refusals."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import branching
from analysis.branching import compare
from analysis.tables import AnalysisError
from bitnet_jax.configs.resolve import loop_options
from bitnet_jax.results import endpoint_row
from bitnet_jax.train import train_and_evaluate
from experiments.collect import collect
from experiments.plan import load_config, load_points, make_plan
from sweeps import branching as sweep

ARMS, SEEDS, ENDS, BATCH, TOKEN = ("fp16", "ternary"), (0, 1, 2), (100, 200, 400), 1024, 7.0
SPREAD = np.array([-0.04, 0.0, 0.04])  # of the seeds; its standard deviation is .04


def row(kind, arm, end, seed, loss):
    """An endpoint; a loss of None is a diverged one's."""
    return {
        "tag_kind": kind,
        "size": "95k",
        "precision": arm,
        "tokens": end * BATCH,
        "seed": seed,
        "loss": math.nan if loss is None else loss,
        "status": "diverged" if loss is None else "ok",
        "flops": end * BATCH * TOKEN,
        "batch_tokens": BATCH,
        "tag_decay_fraction": "0.2",
    }


def table(effect=lambda arm, end, seed: 0.0, scale=1.0):
    """All kinds; branched minus own is `effect`, same is equal; seed noise is .04 * scale."""
    rows = []
    for arm in ARMS:
        for seed in SEEDS:
            for end in ENDS:
                loss = 2.0 + 10 / end + scale * SPREAD[seed]
                rows += [row("branched", arm, end, seed, loss), row("same", arm, end, seed, loss)]
                if end > ENDS[0]:
                    own = loss - effect(arm, end, seed)
                    rows.append(row("own", arm, end, seed, own))
    return pd.DataFrame(rows)


def where(frame, kind, arm="fp16", end=200, seed=1):
    """The index of one row."""
    same = frame["tag_kind"].eq(kind) & frame["precision"].eq(arm) & frame["seed"].eq(seed)
    (index,) = frame.index[same & frame["tokens"].eq(end * BATCH)]
    return index


def uneven(arm, end, seed):
    """.001 (seed + 1) in fp16, on average over the budgets, and twice that in ternary."""
    return 0.001 * (seed + 1) * (1 + (arm == "ternary")) + (0.005 if end == 200 else -0.005)


def test_known_differences_intervals_and_noise():
    found = compare(table(uneven).sample(frac=1, random_state=0))  # pairs are by name, not by order
    half = stats.t.ppf(0.975, 2) * 0.0015 / math.sqrt(3)  # of .0015, .003 and .0045
    assert found.own.difference == pytest.approx(0.003, abs=1e-12)
    assert found.own.low == pytest.approx(0.003 - half)
    assert found.own.high == pytest.approx(0.003 + half)
    assert (found.own.runs, found.own.pairs, found.own.seeds) == (12, 12, 3)
    assert found.own.noise == pytest.approx(0.04)
    assert found.same == branching.Same(18, 18, 0.0)


def test_known_cells():
    cells = compare(table(uneven)).cells
    assert list(zip(cells["precision"], cells["tokens"] // BATCH, strict=True)) == [
        (arm, end) for arm in ARMS for end in ENDS
    ]
    assert list(cells["pairs"]) == [0, 3, 3] * 2
    assert cells["noise"].to_numpy() == pytest.approx(0.04)
    assert cells["loss"].to_numpy() == pytest.approx([2.1, 2.05, 2.025] * 2)
    expected = [math.nan, 0.007, -0.003, math.nan, 0.009, -0.001]
    assert cells["difference"].to_numpy() == pytest.approx(expected, nan_ok=True)
    half = stats.t.ppf(0.975, 2) * 0.001 / math.sqrt(3)
    halves = np.array([math.nan, 1, 1, math.nan, 2, 2]) * half
    widths = (cells["high"] - cells["difference"], cells["difference"] - cells["low"])
    for width in widths:
        assert width.to_numpy() == pytest.approx(halves, nan_ok=True)


def test_noise_is_pooled_over_the_budgets_compared():
    """Not over the smallest, of which there is no run with its own warm-up."""
    frame = table()
    for end, factor in ((100, 9.0), (200, 3.0)):
        for kind in ("branched", "same"):
            for arm in ARMS:
                for seed in SEEDS:
                    at = where(frame, kind, arm, end, seed)
                    frame.loc[at, "loss"] += (factor - 1) * SPREAD[seed]
    assert compare(frame).own.noise == pytest.approx(0.04 * math.sqrt((1 + 3**2) / 2))


@pytest.mark.parametrize(
    ("size", "scale", "words"),
    [
        (0.039, 1.0, "agree within seed noise"),
        (-0.039, 1.0, "agree within seed noise"),
        (0.041, 1.0, "differ by more than seed noise"),
        (-0.041, 1.0, "differ by more than seed noise"),
        (0.0, 1e-6, "agree within seed noise"),
    ],
)
def test_verdicts_of_sure_differences(size, scale, words):
    """All seeds differ alike, so the interval is narrow and the seed noise, .04, decides."""
    found = compare(table(lambda *_: size, scale))
    assert found.own.high - found.own.low < 1e-9
    assert found.own.verdict.endswith(f"branched and independent endpoints {words}")


@pytest.mark.parametrize("offset", [0.0, 0.03, -0.03])
def test_a_wide_interval_decides_nothing(offset):
    found = compare(table(lambda arm, end, seed: offset + 0.06 * (seed - 1)))
    assert abs(found.own.difference) < found.own.noise < found.own.high - found.own.low
    assert found.own.verdict.endswith("cannot be told from so few seeds")


def test_the_interval_must_lie_within_on_both_sides():
    """An interval from -.05 or to .05 leaves the noise of .04 on one side only."""
    for sign in (1, -1):
        found = compare(table(lambda arm, end, seed, s=sign: s * 0.02 + 0.01 * (seed - 1)))
        inside, outside = sorted([abs(found.own.low), abs(found.own.high)])
        assert inside < found.own.noise < outside
        assert "cannot be told" in found.own.verdict


@pytest.mark.parametrize("sign", [1, -1])
def test_an_interval_about_the_noise_decides_nothing(sign):
    """Surely a difference, on average above the noise of .04, but perhaps below it."""
    found = compare(table(lambda arm, end, seed: sign * (0.05 + 0.015 * (seed - 1))))
    inside, outside = sorted([abs(found.own.low), abs(found.own.high)])
    assert found.own.low * found.own.high > 0 and inside < found.own.noise < 0.05 < outside
    assert found.own.verdict.endswith("cannot be told from so few seeds")


def test_one_bit_is_a_difference():
    frame = table()
    at = where(frame, "same")
    frame.loc[at, "loss"] = np.nextafter(frame.loc[at, "loss"], 0)
    found = compare(frame)
    assert 0 < found.same.largest < 1e-15 and found.same.verdict.endswith("NOT exact")
    assert (found.cells["largest_same"] > 0).tolist() == [False, True, False, False, False, False]
    assert compare(table()).same.verdict.endswith("equal to the last bit: branches are exact")


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_difference_is_without_sign(sign):
    frame = table()
    frame.loc[where(frame, "same"), "loss"] += sign * 0.25
    frame.loc[where(frame, "same", seed=2), "loss"] -= sign * 0.125
    assert compare(frame).same.largest == pytest.approx(0.25)


def test_runs_that_did_not_finish_are_told():
    frame = table()
    frame.loc[where(frame, "same", end=100), ["loss", "status"]] = [math.nan, "diverged"]
    found = compare(frame)
    assert found.same.pairs == 17 and found.same.verdict.endswith("exact, as far as they finished")
    assert found.own.pairs == 12 and "agree within" in found.own.verdict
    frame.loc[where(frame, "branched"), ["loss", "status"]] = [math.nan, "failed"]
    found = compare(frame)
    assert (found.same.pairs, found.own.pairs, found.own.runs) == (16, 11, 12)
    assert found.own.verdict.endswith("cannot be told, as not all runs finished")
    frame.loc[frame["tag_kind"] == "same", "status"] = "failed"
    found = compare(frame)
    assert found.same.verdict == "0 of 18 pairs finished: whether branches are exact cannot be told"
    assert found.to_json()["same"]["largest"] is None


# FLOPs


def test_flops_by_hand():
    """Trunk to 320, decays of 20, 40 and 80 steps: 460 of 700, for each of six trunks."""
    found = compare(table())
    assert found.branched_flops == 6 * 460 * BATCH * TOKEN
    assert found.independent_flops == 6 * 700 * BATCH * TOKEN
    assert found.ratio == pytest.approx(46 / 70)


@pytest.fixture(scope="module")
def plan_of(tiny_corpus):
    def make(**overrides):
        path = sweep.__file__
        config = load_config(path)
        config.update_from_flattened_dict(overrides)
        return make_plan(config, load_points(path, config), tiny_corpus, Path("unused"))

    return make


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"sweep.budgets": (250_000, 310_000, 777_777)},
        {"schedule.decay_fraction": 0.35},
        {"train.batch_tokens": 4096},
        {"schedule.decay_fraction": 0.001, "sweep.budgets": (200_000, 400_000)},  # one step each
    ],
    ids=str,
)
def test_flops_are_those_of_the_plan(plan_of, overrides):
    """The table has no trunks; what is counted from its columns is exactly what is trained."""
    specs = [run.spec for run in plan_of(**overrides).runs]
    measured = dict.fromkeys(("loss_stderr", "bits_per_byte", "train_loss", "wall_s"), 1.0)
    origin = {"device": "none", "jax_version": "0", "git_commit": "0"}
    rows = [
        endpoint_row(
            spec,
            {
                "end": end,
                "loss": 2 + spec.seed_init,
                "unique_tokens": 1,
                "status": "ok",
                **measured,
            },
            origin,
        )
        for spec in specs
        for end in spec.ends
    ]
    found = compare(pd.DataFrame(rows))
    branched = [spec for spec in specs if dict(spec.tags)["kind"] == "branched"]
    assert found.branched_flops == sum(spec.total_flops for spec in branched)
    assert found.independent_flops == sum(spec.independent_flops for spec in branched)
    alone = [spec.total_flops for spec in specs if dict(spec.tags)["kind"] == "same"]
    assert found.independent_flops == sum(alone)


# Refusals


def changed(**columns):
    return lambda frame: frame.assign(**columns)


def without(kind):
    return lambda frame: frame[frame["tag_kind"] != kind]


MISTAKES = [
    *(
        (lambda frame, c=column: frame.drop(columns=c), f"no column '{column}'")
        for column in row("own", "fp16", 100, 0, 2.0)
    ),
    *((without(kind), f"no rows have the tag_kind '{kind}'") for kind in branching.KINDS),
    (changed(tag_kind="base"), "unknown tag_kind 'base'"),
    (lambda frame: frame.assign(tag_kind=frame["tag_kind"].where(frame["seed"] > 0)), "unknown"),
    (lambda frame: pd.concat([frame, frame.tail(1)]), "more than once"),
    (lambda frame: frame[frame["seed"] == 0], "fewer than 2 seeds"),
    (lambda frame: frame[(frame["seed"] == 0) | (frame["tag_kind"] == "same")], "fewer than 2"),
    (changed(status="failed"), "fewer than 2 seeds"),
    (changed(loss=-1.0), "column 'loss'"),
    (changed(batch_tokens=0), "column 'batch_tokens'"),
    (changed(tag_decay_fraction=""), "column 'tag_decay_fraction'"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_tables_that_cannot_be_compared(change, message, tmp_path, capsys):
    frame = change(table())
    with pytest.raises(AnalysisError, match=message):
        compare(frame)
    frame.to_csv(tmp_path / "endpoints.csv", index=False)
    assert branching.main([str(tmp_path / "endpoints.csv")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_sizes_are_kept_apart_and_where_chooses():
    """Each pair is of one size; a seed's mean is over both."""
    other = table(lambda *_: 0.02).assign(size="27k")
    found = compare(pd.concat([table(lambda *_: 0.01), other]))
    assert (
        found.own.pairs == 24
        and found.own.seeds == 3
        and found.own.difference == pytest.approx(0.015)
    )
    assert set(found.cells["size"]) == {"27k", "95k"} and len(found.cells) == 12
    assert found.branched_flops == 12 * 460 * BATCH * TOKEN


# The command


def test_command(tmp_path, capsys):
    path = tmp_path / "endpoints.parquet"
    table(uneven).to_parquet(path)
    assert branching.main([str(path)]) == 0
    out = capsys.readouterr().out
    for text in (
        "same: 18 of 18 pairs finished, their losses are equal to the last bit",
        "own: branched minus independent +0.0030 nats, 95 % interval",
        "seed noise 0.0400: branched and independent endpoints agree within seed noise",
        "ratio 0.657",
        "+0.0090",
    ):
        assert text in out
    assert branching.main([str(path), "--json"]) == 0
    text = capsys.readouterr().out
    document = json.loads(text)
    assert "NaN" not in text
    assert document == compare(pd.read_parquet(path)).to_json()
    assert document["same"]["largest"] == 0 and document["own"]["noise"] == pytest.approx(0.04)
    assert document["own"]["verdict"].endswith("agree within seed noise")
    assert document["flops"]["ratio"] == pytest.approx(46 / 70)
    assert [cell["difference"] is None for cell in document["cells"]] == [True, False, False] * 2
    assert branching.main([str(path), "--json", "--where", 'precision == "fp16"']) == 0
    assert json.loads(capsys.readouterr().out)["own"]["pairs"] == 6


@pytest.mark.parametrize(
    "arguments", [["missing.csv"], [], ["--bogus"], ["x.csv", "--where"]], ids=str
)
def test_bad_usage_is_one_line(arguments, capsys):
    assert branching.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


# The sweep, trained


@pytest.mark.slow
def test_trained_branches_are_exact(tiny_config, tiny_corpus, tmp_path):
    """The whole way: the sweep's runs at the tiny shape, their table, and its analysis."""
    own = sweep.get_config("size=27k")
    config = tiny_config()
    config.tags, config.sweep = own.tags, own.sweep
    config.sweep.update(budgets=(1280, 2560, 5120), seeds=(0, 1), precisions=("ternary",))
    plan = make_plan(config, sweep.sweep(config), tiny_corpus, tmp_path)
    for run in plan.runs:
        options = loop_options(run.config)
        train_and_evaluate(run.spec, tiny_corpus, run.directory, options, run.config.to_dict())
    frame = collect(plan.directory)
    assert frame["tag_kind"].value_counts().to_dict() == {"branched": 6, "same": 6, "own": 4}
    found = compare(frame)
    assert found.same == branching.Same(6, 6, 0.0) and found.own.pairs == found.own.runs == 4
    assert frame["loss"].nunique() == 6 + 4, "nothing else is equal"
