"""Groups of runs: each as it would be alone, whatever becomes of the others, and resumed."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import END, PHASED, assert_same_results, endpoints, is_diverged, metrics, summary

from bitnet_jax import programs
from bitnet_jax.attention import IMPLEMENTATIONS
from bitnet_jax.checkpoint import load_model
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.member import Job
from bitnet_jax.train import Interrupted, train_and_evaluate, train_group
from bitnet_jax.train_step import compiled_init

# What the runs of a group may differ in. The tiny run's ticks: trunk [0, 16), decay [16, 20), trunk
# [20, 36), decay [36, 44).
MEMBERS = (
    {},
    {"seed": 1, "optim.peak_lr": 0.004},
    {"seeds.data": 7, "optim.weight_decay": 0.5},
)
BROKEN = (MEMBERS[0], {**MEMBERS[1], "optim.peak_lr": 1e30}, MEMBERS[2])


@pytest.fixture(scope="module")
def jobs_of(tiny_config, tiny_corpus):
    """A job for each member, in directories by number, and what all of them are launched with."""

    def make(directory, overrides=None, members=MEMBERS):
        configs = [tiny_config({**(overrides or {}), **member}) for member in members]
        jobs = [
            Job(resolve(config, tiny_corpus), directory / str(i), config.to_dict())
            for i, config in enumerate(configs)
        ]
        return jobs, loop_options(configs[0])

    return make


@pytest.fixture(scope="module")
def launch(jobs_of, tiny_corpus):
    """Train a group, or go on: the summaries, or None where it was stopped at a tick."""

    def run(directory, overrides=None, members=MEMBERS, stop=None, watch=lambda report: None):
        jobs, options = jobs_of(directory, overrides, members)
        try:
            return train_group(jobs, tiny_corpus, options, watch, lambda tick: tick == stop)
        except Interrupted:
            return None

    return run


@pytest.fixture(scope="module")
def finished(launch, tmp_path_factory):
    """The directory of an undisturbed group, and the ticks of its reports."""
    directory, reports = tmp_path_factory.mktemp("group"), []
    launch(directory, watch=reports.append)
    return directory, reports


@pytest.fixture(scope="module")
def broken(launch, tmp_path_factory):
    """That of a group in which the second run diverges."""
    directory = tmp_path_factory.mktemp("broken")
    launch(directory, members=BROKEN)
    return directory


def of(directory, run):
    return directory / str(run)


def assert_agree(found, expected, rounding):
    """Two runs' lines: the same kinds, places and keys, and losses as near as that."""
    lines, others = metrics(found), metrics(expected)
    assert [list(line) for line in lines] == [list(line) for line in others]
    for line, other in zip(lines, others, strict=True):
        for key in ("kind", "step", "tokens", "decay_to", "learning_rate", "weight_decay"):
            assert line.get(key) == other.get(key)
        for key in line.keys() & {"loss", "valid_loss"}:
            assert line[key] == pytest.approx(other[key], rel=rounding)
    for row, other in zip(endpoints(found), endpoints(expected), strict=True):
        assert row.keys() == other.keys()
        for key in ("loss", "train_loss", "bits_per_byte", "loss_stderr"):
            # The error of a mean is of differences between rows, a tenth of their losses.
            allowed = rounding * (10 if key == "loss_stderr" else 1)
            assert row.pop(key) == pytest.approx(other.pop(key), rel=allowed)
        assert row == other


def test_members_agree_with_lone_runs(finished, jobs_of, tiny_corpus, tmp_path):
    """Files, lines and identities are the same, and losses to what 44 steps make of float32's
    rounding of 6e-8 a product, summed in another order; the three differ among themselves."""
    directory, _ = finished
    jobs, options = jobs_of(tmp_path)
    for run, job in enumerate(jobs):
        train_and_evaluate(job.spec, tiny_corpus, job.run_dir, options, job.config)
        assert_agree(of(directory, run), job.run_dir, 1e-5)
        found, lone = (json.loads((d / "config.json").read_text()) for d in
                       (of(directory, run), job.run_dir))  # fmt: skip
        own = found.pop("group"), lone.pop("group")
        assert own == ([each.spec.run_id for each in jobs], [job.spec.run_id])
        del found["sha256"], lone["sha256"]
        assert found == lone and found["run_id"] == job.spec.run_id
    losses = [endpoints(of(directory, run))[1]["loss"] for run in range(3)]
    assert all(abs(a - b) > 1e-3 for a, b in zip(losses, losses[1:] + losses[:1], strict=True))


def test_each_member_leaves_the_files_of_a_run(finished, jobs_of):
    """With the model that its own endpoint was measured with: no two are equal."""
    directory, _ = finished
    jobs, _ = jobs_of(directory)
    like, embeddings = compiled_init(jobs[0].spec.step)(0).params, []
    for job in jobs:
        names = sorted(path.name for path in job.run_dir.iterdir())
        assert names == ["checkpoints", "config.json", "metrics.jsonl", "model", "summary.json"]
        result = summary(job.run_dir)
        assert result["run_id"] == job.spec.run_id and result["status"] == "ok"
        assert [row["tokens"] for row in result["endpoints"]] == [2560, 5120]
        assert {row["run_id"] for row in result["endpoints"]} == {job.spec.run_id}
        embeddings.append(np.asarray(load_model(job.run_dir, like)["embedding"]))
    for a, b in zip(embeddings, embeddings[1:] + embeddings[:1], strict=True):
        assert np.abs(a - b).max() > 1e-3


def test_reports_are_of_all_runs(finished):
    """The mean of their losses; a tick is a step of each, and the group's time is shared out."""
    directory, reports = finished
    assert [report.tick for report in reports] == [7, 14, 16, 20, 25, 32, 36, 39, 44]
    lines = [metrics(of(directory, run), "train") for run in range(3)]
    for report, *each in zip(reports, *lines, strict=True):
        assert report.loss == pytest.approx(np.mean([line["loss"] for line in each]), rel=1e-12)
    walls = {summary(of(directory, run))["wall_s"] for run in range(3)}
    assert len(walls) == 1


# Divergence


def test_a_diverging_member_leaves_the_others_alone(finished, broken):
    """Byte for byte: in a decay that has not decayed, and then on a trunk."""
    directory, _ = finished
    for run in (0, 2):
        assert_same_results(of(broken, run), of(directory, run))
    result = summary(of(broken, 1))
    assert result["status"] == "diverged" and not (of(broken, 1) / "model").exists()
    assert all(is_diverged(row) for row in result["endpoints"])
    lines = [(line["kind"], line["step"], line["decay_to"]) for line in metrics(of(broken, 1))]
    assert lines == [
        *(("train", step, None) for step in (7, 14, 16)),
        *[("rollback", 16, 2560)] * 2,  # what its data is does not help
        *(("train", 20, 2560), ("endpoint", 20, 2560)),
        *(("train", step, None) for step in (21, 28)),  # 25 skipped steps, and it is given up
    ]
    assert 25 <= result["skipped_steps"] < 36 and result["rollbacks"] == 2


def test_a_member_that_goes_back_takes_the_others_with_it_to_the_same_bits(
    launch, tmp_path, monkeypatch
):
    """The second is NaN for a decay of four steps; the others make those steps twice."""
    compiled, calls = programs.compiled_steps, iter(range(10**6))
    launch(tmp_path / "healthy")

    def poisoning(*key):
        def step(state, *rest):
            if next(calls) not in range(16, 20):
                return compiled(*key)(state, *rest)
            keep = jax.tree.map(jnp.copy, state.params)
            nan = jax.tree.map(lambda x: x.at[1].set(np.nan), state.params)
            after, found = compiled(*key)(state.replace(params=nan), *rest)
            whole = jax.tree.map(lambda new, old: new.at[1].set(old[1]), after.params, keep)
            return after.replace(params=whole), found

        return step

    monkeypatch.setattr(programs, "compiled_steps", poisoning)
    launch(tmp_path / "run")
    for run in (0, 2):
        assert_same_results(tmp_path / "run" / str(run), tmp_path / "healthy" / str(run))
        assert summary(tmp_path / "run" / str(run))["rollbacks"] == 0
    assert summary(tmp_path / "run" / "1")["rollbacks"] == 1
    first, second = endpoints(tmp_path / "run" / "1")
    healthy = endpoints(tmp_path / "healthy" / "1")
    assert first["status"] == "ok" and first["loss"] != healthy[0]["loss"]
    assert second == healthy[1]


def test_a_member_that_diverges_in_a_decay_goes_on_from_its_trunk(
    launch, jobs_of, tiny_corpus, tmp_path, monkeypatch
):
    """Its parameters are made NaN before the second step of the first decay."""
    compiled, calls = programs.compiled_steps, iter(range(10**6))

    def poisoning(*key):
        def step(state, *rest):
            if next(calls) == 17:
                embedding = state.params["embedding"].at[1].set(np.nan)
                state = state.replace(params={**state.params, "embedding": embedding})
            return compiled(*key)(state, *rest)

        return step

    long = {"train.tokens": (5120, 6400), "schedule.decay_fraction": 0.7}  # 12 to 40, 15 to 50
    long["train.rollbacks"] = 0
    launch(tmp_path / "healthy", long)
    monkeypatch.setattr(programs, "compiled_steps", poisoning)
    launch(tmp_path / "poisoned", long)
    for run in (0, 2):
        assert_same_results(tmp_path / "poisoned" / str(run), tmp_path / "healthy" / str(run))
    first, second = endpoints(tmp_path / "poisoned" / "1")
    assert is_diverged(first)
    assert second == endpoints(tmp_path / "healthy" / "1")[1]
    steps = [line["step"] for line in metrics(tmp_path / "poisoned" / "1", "train")
             if line["decay_to"] == 5120]  # fmt: skip
    healthy = [line["step"] for line in metrics(tmp_path / "healthy" / "1", "train")
               if line["decay_to"] == 5120]  # fmt: skip
    assert steps == healthy, "25 skips are seen at its end"


def test_a_group_that_diverges_ends_early(launch, tmp_path):
    """At the log step at which the last of them is given up: no step is made after that."""
    reports = []
    members = [{**member, "optim.peak_lr": 1e30} for member in MEMBERS]
    once = {"train.rollbacks": 0}
    results = launch(tmp_path, once, members=members, watch=reports.append)
    assert [report.tick for report in reports] == [7, 14, 16, 20, 25, 32]
    assert reports[-1].loss is None
    for run, result in enumerate(results):
        assert result == summary(of(tmp_path, run)) and result["status"] == "diverged"
        assert all(is_diverged(row) for row in result["endpoints"])
        assert len(result["endpoints"]) == 2


# Resumption


@pytest.mark.parametrize(
    "members, stops",
    [(MEMBERS, (0, 5, 16, 18, 20, END - 1)), (BROKEN, (3, 19, 33, 38))],
    ids=["healthy", "broken"],
)
def test_resumed_equals_undisturbed(launch, finished, broken, tmp_path, members, stops):
    """Bit for bit, at the edges of segments and within them, one of them given up or not."""
    for stop in stops:
        assert launch(tmp_path, members=members, stop=stop) is None
        assert not list(tmp_path.glob("*/summary.json"))
    launch(tmp_path, members=members)
    for run in range(3):
        expected = of(finished[0] if members is MEMBERS else broken, run)
        assert_same_results(of(tmp_path, run), expected)


@pytest.mark.parametrize(
    "stops, lost, seconds",
    [
        ((5, 8), {}, 60.0),
        ((5, 10), {1: 10}, 60.0),
        ((5, 10), {0: 10, 2: 5}, 60.0),  # none is common: from the start
        ((10, 16), {1: 16}, 0.0),  # on the way it is at 16 once more, after a checkpoint at 14
    ],
)
def test_a_group_goes_back_to_the_newest_common_checkpoint(
    launch, finished, tmp_path, stops, lost, seconds
):
    """Where a member's newest was not written: what the others have of later is made again."""
    for stop in stops:
        launch(tmp_path, stop=stop)
    for run, tick in lost.items():
        shutil.rmtree(of(tmp_path, run) / "checkpoints" / str(tick))
    first = []
    launch(tmp_path, {"checkpoint.seconds": seconds}, watch=lambda r: first.append(r.tick))
    kept = set(stops) - set(lost.values())
    assert first[0] == min(t for t in (7, 14, 16) if t > max(kept, default=0))
    for run in range(3):
        assert_same_results(of(tmp_path, run), of(finished[0], run))


def test_what_was_left_of_a_finished_group_has_nothing_to_train(launch, finished, tmp_path):
    """Cut short between two summaries: the last is written, alone, from its last checkpoint."""
    shutil.copytree(of(finished[0], 1), tmp_path / "0")
    (tmp_path / "0" / "summary.json").unlink()
    reports = []
    launch(tmp_path, members=MEMBERS[1:2], watch=reports.append)
    assert reports == []
    assert_same_results(tmp_path / "0", of(finished[0], 1))
    assert summary(tmp_path / "0")["groups"] == [3], "those that it made steps in"


# What may be in one group


def test_runs_that_differ_in_more_are_refused(jobs_of, tiny_corpus, tmp_path):
    """In what the program is made of, or in when what happens; nothing is written."""
    ((job, *_), options) = jobs_of(tmp_path)
    for changes in (
        {"precision": "ternary"},
        {"train.tokens": (2560,)},
        {"train.batch_tokens": 64},
        {"schedule.decay_fraction": 0.5},
        {"optim.b1": 0.8},
        {"loss.z_loss": 1e-3},
        {"eval.tokens": 64},
        {"model.remat": True},
        {"model.size": "56k"},
    ):
        (other, *_), _ = jobs_of(tmp_path, changes)
        with pytest.raises(ValueError, match="may differ in seeds, learning rate and decay alone"):
            train_group([job, other], tiny_corpus, options)
    assert not list(tmp_path.iterdir())


def test_a_group_is_of_one_way_to_compute(jobs_of, tmp_path):
    """Carriers and attention change a run by no more than rounding, but they are the program."""
    ((job, *_), _) = jobs_of(tmp_path, {"precision": "ternary"})
    ((int8, *_), _) = jobs_of(tmp_path, {"precision": "ternary", "matmul.carrier": "int8"})
    assert int8.spec.run_id == job.spec.run_id and int8.spec.group != job.spec.group
    for attention in set(IMPLEMENTATIONS) - {"blocks"}:
        model = dataclasses.replace(job.spec.step.model, attention=attention)
        step = dataclasses.replace(job.spec.step, model=model)
        other = dataclasses.replace(job.spec, step=step)
        assert other.run_id == job.spec.run_id and other.group != job.spec.group
    tagged = dataclasses.replace(job.spec, tags=(("kind", "other"),), seed_data=9)
    assert tagged.group == job.spec.group


# Phases and telemetry


@pytest.mark.slow
def test_phases_and_telemetry_of_a_group(launch, jobs_of, tiny_corpus, tmp_path):
    """Warm-up, late switch, statistics and gradient checks of two runs beside each other: every
    line of a lone run, near its values; and resumed within each phase, bit for bit.

    Products are rounded to 2^-8, and a code that flips on that moves a loss by more than rounding:
    by up to 1e-2, where the two runs differ by 1e-1.
    """
    two = MEMBERS[:2]
    launch(tmp_path / "group", PHASED, two)
    jobs, options = jobs_of(tmp_path / "lone", PHASED, two)
    for run, job in enumerate(jobs):
        train_and_evaluate(job.spec, tiny_corpus, job.run_dir, options, job.config)
        found = tmp_path / "group" / str(run)
        assert_agree(found, job.run_dir, 1e-2)
        for kind in ("layers", "train"):
            line, lone = metrics(found, kind)[0], metrics(job.run_dir, kind)[0]
            if kind == "train":
                for key in line.keys() - {"kind", "decay_to"}:
                    assert line[key] == pytest.approx(lone[key], rel=1e-3, abs=2e-3), key
                continue
            for name, layer in line["layers"].items():
                for key, row in layer.items():
                    assert row == pytest.approx(lone["layers"][name][key], rel=0.02, abs=8e-3)
    lines = [metrics(tmp_path / "group" / str(run), "endpoint") for run in range(2)]
    assert all("gradient_cosine" in line for each in lines for line in each)
    assert lines[0] != lines[1]
    for stop in (2, 7, 9, 21):
        assert launch(tmp_path / "resumed", PHASED, two, stop) is None
    launch(tmp_path / "resumed", PHASED, two)
    for run in range(2):
        assert_same_results(tmp_path / "resumed" / str(run), tmp_path / "group" / str(run))
