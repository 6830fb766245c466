"""Runs that go on over damaged files: as if nothing had happened, and never without a word."""

import contextlib
import json
import shutil

import jax
import pandas as pd
import pytest
from run_files import DAMAGES, cut, flipped
from test_train import assert_same_results, endpoints, summary

from bitnet_jax import tracking
from bitnet_jax.checkpoint import Checkpointer, DamagedCheckpoint
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.errors import ConfigError
from bitnet_jax.files import SCHEMA_VERSION, NewerFile, sealed
from bitnet_jax.member import Job
from bitnet_jax.train import Interrupted, train_group
from bitnet_jax.train_step import compiled_init
from experiments.run import main

# Trunk [0, 8), decay [8, 10), trunk [8, 16), decay [16, 20): 22 ticks, the last 4 of them a decay.
# Checkpoints at ticks 5 and 19: within the first trunk, and within the last decay, with a stash.
SHORT = {"train.tokens": (10 * 128, 20 * 128), "log.every": 3}
OLDER, NEWER = 5, 19
PAIR = ({}, {"seed": 1, "optim.peak_lr": 0.004})
AGAIN = "no checkpoint to go on from: training starts again from step 0"


@pytest.fixture(scope="module")
def jobs_of(tiny_config, tiny_corpus):
    def make(directory, members):
        configs = [tiny_config({**SHORT, **member}) for member in members]
        specs = [resolve(config, tiny_corpus) for config in configs]
        jobs = [
            Job(spec, directory / spec.run_id, config.to_dict())
            for spec, config in zip(specs, configs, strict=True)
        ]
        return jobs, loop_options(configs[0])

    return make


@pytest.fixture(scope="module")
def launch(jobs_of, tiny_corpus):
    """Train runs, or go on, and stop at a tick: their directories, and the ticks of reports."""

    def run(directory, members=({},), stop=None):
        jobs, options = jobs_of(directory, members)
        reports = []
        with contextlib.suppress(Interrupted):
            train_group(jobs, tiny_corpus, options, reports.append, lambda tick: tick == stop)
        return [job.run_dir for job in jobs], [report.tick for report in reports]

    return run


@pytest.fixture(scope="module")
def trained(launch, tmp_path_factory):
    """(directory of finished runs, that of the same interrupted twice), by their members."""
    known = {}

    def get(members=({},)):
        key = json.dumps(members)
        if key not in known:
            known[key] = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("interrupted")
            launch(known[key][0], members)
            for stop in (OLDER, NEWER):
                launch(known[key][1], members, stop)
        return known[key]

    return get


@pytest.fixture
def go_on(trained, launch, tmp_path, capsys):
    """Copy what was interrupted, damage it, and go on: the ticks of reports, and what was said.

    The results are those of the undisturbed runs, whatever was damaged.
    """

    def run(damage, members=({},)):
        whole, interrupted = trained(members)
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(interrupted, work, symlinks=True)
        damage(work)
        capsys.readouterr()
        directories, ticks = launch(work, members)
        for directory in directories:
            assert_same_results(directory, whole / directory.name)
        return ticks, capsys.readouterr().err.splitlines()

    return run


def checkpoint_files(directory, tick=NEWER):
    """Relative to the directory of the runs; orbax draws some of the names, so by what they are."""
    found = directory.glob(f"*/checkpoints/{tick}/**/*")
    return sorted(path.relative_to(directory) for path in found if path.is_file())


def largest(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def run_id_of(path):
    return path.parts[0]


# A lone run


def test_undamaged_is_silent(go_on):
    ticks, said = go_on(lambda work: None)
    assert ticks[0] > NEWER and said == []


def test_a_new_run_is_silent(launch, tmp_path, capsys):
    launch(tmp_path)
    assert capsys.readouterr().err == ""


def damage_each_file(go_on, trained, damage, files):
    """Damage each file of the newest checkpoint in turn; how many were missed."""
    missed = 0
    for path in files(checkpoint_files(trained()[1])):
        ticks, said = go_on(lambda work, path=path: DAMAGES[damage](work / path))
        if said:
            (line,) = said
            assert line.startswith(f"warning: {run_id_of(path)}: tick {NEWER}: damaged"), line
            assert OLDER < ticks[0] <= OLDER + 3, "it goes on from the one before"
            missed += 1
        else:
            assert ticks[0] > NEWER, "nothing was said, so nothing was lost"
    return missed


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_progress_is_not_believed(go_on, trained, damage):
    def progress(paths):
        return [path for path in paths if path.name == "metadata"]

    assert damage_each_file(go_on, trained, damage, progress) == 1


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damaged_file_of_a_checkpoint(go_on, trained, damage):
    """Told, or of no use: some files of orbax's are never read."""
    assert damage_each_file(go_on, trained, damage, lambda paths: paths) >= 5


@pytest.mark.parametrize("kind", ["state", "stash"])
def test_damaged_arrays_are_not_believed(go_on, kind):
    """The largest file of each holds its arrays, which nothing but their fingerprint protects."""

    def damage(work):
        flipped(largest(next(work.glob(f"*/checkpoints/{NEWER}/{kind}"))))

    ticks, (line,) = go_on(damage)
    assert f"tick {NEWER}: damaged checkpoint removed: {kind}: " in line
    assert ticks[0] <= OLDER + 3


def test_where_both_are_damaged_it_starts_again(go_on, trained):
    def damage(work):
        for tick in (OLDER, NEWER):
            (path,) = work.glob(f"*/checkpoints/{tick}/progress/metadata")
            cut(path)

    ticks, said = go_on(damage)
    (run,) = trained()[0].iterdir()
    assert [line.split(": damaged")[0] for line in said[:2]] == [
        f"warning: {run.name}: tick {tick}" for tick in (NEWER, OLDER)
    ]
    assert said[2:] == [f"warning: {run.name}: {AGAIN}"] and ticks[0] == 3


def test_a_checkpoint_under_the_name_of_another_tick(go_on):
    def rename(work):
        (path,) = work.glob(f"*/checkpoints/{NEWER}")
        path.rename(path.with_name("20"))

    ticks, (line,) = go_on(rename)
    assert "tick 20: damaged checkpoint removed: progress: it is that of" in line
    assert ticks[0] <= OLDER + 3


def test_a_checkpoint_of_another_run(go_on, launch, tmp_path):
    """Of the same shapes; only who it is tells."""
    (other,), _ = launch(tmp_path / "other", PAIR[1:], NEWER)

    def exchange(work):
        (path,) = work.glob(f"*/checkpoints/{NEWER}")
        shutil.rmtree(path)
        shutil.copytree(other / "checkpoints" / str(NEWER), path)

    ticks, (line,) = go_on(exchange)
    assert f"it is that of {other.name} at tick {NEWER}" in line and ticks[0] <= OLDER + 3


def test_damaged_checkpoints_are_gone(go_on, tmp_path):
    """They cannot be met again."""
    go_on(lambda work: flipped(next(work.glob(f"*/checkpoints/{NEWER}/progress/metadata"))))
    (kept,) = (tmp_path / "work").glob("*/checkpoints")
    assert sorted(path.name for path in kept.iterdir()) == [str(OLDER)]


# The log


@pytest.mark.parametrize("damage", [cut, flipped, lambda path: path.unlink()])
def test_a_damaged_log_takes_the_checkpoints_after_it_away(go_on, damage):
    """What is whole of it is enough for the older checkpoint, or it starts again."""
    ticks, said = go_on(lambda work: damage(next(work.glob("*/metrics.jsonl"))))
    what = "metrics.jsonl does not begin with the "
    told = [line for line in said if what in line]
    assert f"tick {NEWER}: damaged checkpoint removed: {what}" in told[0]
    if len(told) == 2:
        assert f"tick {OLDER}: " in told[1] and said[2].endswith(AGAIN) and ticks[0] == 3
    else:
        assert len(said) == 1 and OLDER < ticks[0] <= OLDER + 3


def test_the_older_checkpoint_needs_only_its_own_part_of_the_log(go_on):
    def damage(work):
        path = next(work.glob("*/metrics.jsonl"))
        flipped(path, 8 * (path.stat().st_size - 5))

    ticks, said = go_on(damage)
    assert len(said) == 1 and OLDER < ticks[0] <= OLDER + 3


def test_the_log_is_on_disk_before_a_checkpoint_refers_to_it(launch, tmp_path, monkeypatch):
    order = []
    sync, save = tracking.MetricsLog.sync, Checkpointer.save
    monkeypatch.setattr(
        tracking.MetricsLog, "sync", lambda self: (order.append("sync"), sync(self))
    )
    monkeypatch.setattr(
        Checkpointer, "save", lambda self, *rest: (order.append("save"), save(self, *rest))
    )
    launch(tmp_path, stop=OLDER)
    assert order[:2] == ["sync", "save"]


# A group


@pytest.mark.parametrize("run, kind", [(0, "progress"), (1, "state"), (1, "stash")])
def test_a_group_goes_back_to_what_is_sound_in_all(go_on, jobs_of, tmp_path, run, kind):
    jobs, _ = jobs_of(tmp_path, PAIR)
    name = jobs[run].spec.run_id

    def damage(work):
        flipped(largest(work / name / "checkpoints" / str(NEWER) / kind))

    ticks, (line,) = go_on(damage, PAIR)
    assert line.startswith(f"warning: {name}: tick {NEWER}: damaged checkpoint removed: {kind}")
    assert OLDER < ticks[0] <= OLDER + 3


def test_a_group_with_nothing_sound_in_common_starts_again(go_on, jobs_of, tmp_path):
    names = [job.spec.run_id for job in jobs_of(tmp_path, PAIR)[0]]

    def damage(work):
        for name, tick in zip(names, (OLDER, NEWER), strict=True):
            flipped(work / name / "checkpoints" / str(tick) / "progress" / "metadata")

    ticks, said = go_on(damage, PAIR)
    assert len(said) == 3 and f"{names[1]}: tick {NEWER}" in said[0]
    assert f"{names[0]}: tick {OLDER}" in said[1]
    assert said[2] == f"warning: {names[0]}, {names[1]}: {AGAIN}" and ticks[0] == 3


# Versions


def test_a_checkpoint_of_before_is_gone_on_from(go_on):
    """Its progress has neither digest nor fingerprints, nor does it know of later keys."""

    def strip(work):
        for path in work.glob("*/checkpoints/*/progress/metadata"):
            known = json.loads(path.read_text())
            for key in ("sha256", "schema_version", "fingerprints", "run_id", "metrics_sha256",
                        "model", "origins"):  # fmt: skip
                del known[key]
            path.write_text(json.dumps(known))

    ticks, said = go_on(strip)
    assert said == [] and ticks[0] > NEWER


def test_a_checkpoint_of_a_newer_version_is_refused_and_kept(trained, launch, tmp_path):
    shutil.copytree(trained()[1], tmp_path / "work")
    (path,) = (tmp_path / "work").glob(f"*/checkpoints/{NEWER}/progress/metadata")
    newer = sealed({**json.loads(path.read_text()), "schema_version": SCHEMA_VERSION + 1})
    path.write_text(json.dumps(newer))
    with pytest.raises(NewerFile, match=rf"{NEWER}: schema_version={SCHEMA_VERSION + 1}: "):
        launch(tmp_path / "work")
    assert path.exists()


# Provenance


def test_a_run_that_went_on_under_another_commit_says_so(trained, launch, tmp_path, monkeypatch):
    """In every row, whatever else is the same; values that stay are not repeated."""
    shutil.copytree(trained()[1], tmp_path / "work")
    first = tracking.provenance()
    monkeypatch.setattr(tracking, "git_commit", lambda: "fedcba987654")
    for stop in (20, 21, None):  # three launches, and one value more
        (directory,), _ = launch(tmp_path / "work", stop=stop)
    joined = f"{first['git_commit']} + fedcba987654"
    for document in (summary(directory), *summary(directory)["endpoints"]):
        assert document["git_commit"] == joined
        assert document["jax_version"] == jax.__version__
        assert document["device"] == first["device"]
    assert endpoints(directory) == endpoints(trained()[0] / directory.name)


def test_a_run_that_starts_again_is_of_the_new_commit_alone(trained, launch, tmp_path, monkeypatch):
    shutil.copytree(trained()[1], tmp_path / "work")
    for path in (tmp_path / "work").glob("*/checkpoints/*/progress/metadata"):
        flipped(path)
    monkeypatch.setattr(tracking, "git_commit", lambda: "fedcba987654")
    (directory,), _ = launch(tmp_path / "work")
    assert {row["git_commit"] for row in summary(directory)["endpoints"]} == {"fedcba987654"}


# Links


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "model", "wandb"])
def test_nothing_is_written_through_a_link(jobs_of, launch, tmp_path, name):
    ((job,), _), out = jobs_of(tmp_path, ({},)), tmp_path / "out"
    out.mkdir()
    job.run_dir.mkdir()
    (job.run_dir / name).symlink_to(out)
    with pytest.raises(ConfigError, match=f"{name}: a symbolic link that leads out of"):
        launch(tmp_path)
    assert list(out.iterdir()) == [] and [p.name for p in job.run_dir.iterdir()] == [name]


# The checkpoint by itself


def test_a_checkpoint_of_another_model_is_damaged(trained, tiny_config, tiny_corpus, tmp_path):
    """Whole in itself, and of no use here."""
    (run,) = trained()[1].iterdir()
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    wider = resolve(tiny_config({"model.ff_width": 48}), tiny_corpus).step
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    with pytest.raises(DamagedCheckpoint, match="^state: "):
        checkpointer.restore(NEWER, compiled_init(wider)(0))
    checkpointer.close()


# The main command


def test_a_run_whose_summary_is_damaged_is_trained_again(tiny_overrides, tmp_path, capsys):
    """The plan shows it, one line tells it, and the table is what it was."""
    flags = [f"--config.{key}={value}" for key, value in {**tiny_overrides, **SHORT}.items()]
    arguments = ["run", *flags, f"--workdir={tmp_path}"]
    clock = ["wall_s", "git_commit"]
    assert main(arguments) == 0
    table = pd.read_parquet(tmp_path / "tiny" / "endpoints.parquet").drop(columns=clock)
    (path,) = tmp_path.glob("tiny/runs/*/summary.json")
    flipped(path, 8 * path.read_bytes().index(b'"loss"') + 8 * 10)
    capsys.readouterr()
    assert main([*arguments, "--dry_run"]) == 0
    assert "damaged" in capsys.readouterr().out
    assert main(arguments) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        f"warning: {path}: damaged: the run is trained again from its newest checkpoint"
    ]
    again = pd.read_parquet(tmp_path / "tiny" / "endpoints.parquet").drop(columns=clock)
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert main(arguments) == 0 and "warning" not in capsys.readouterr().err
