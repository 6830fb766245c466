"""Workers: what they leave to others, what they try again, and what they give up."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pandas as pd
import pytest
import test_launch_together
from rich.console import Console
from test_launch_together import HARNESS, Sweep, later, together
from test_run import SWEEP

from bitnet_jax.train import Interrupted
from experiments import display
from experiments.collect import collect
from experiments.launch import failures, local, sharing
from experiments.launch.failures import count_failure, read_failures
from experiments.launch.leases import TIMEOUT, Held, Leases
from experiments.run import main

ROOT = Path(__file__).parent.parent


class Worker(Sweep):
    """A sweep that is launched as a worker."""

    def work(self, should_stop=lambda tick: False):
        screen = Console(file=self.text, width=200)
        return local.work(self.plan, display.SweepDisplay(screen, self.plan), should_stop)


@pytest.fixture
def sweep(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    def make(runs, group=1):
        made = Worker(tiny_config, tiny_corpus, tmp_path / "tiny", group, runs)
        monkeypatch.setattr(local, "train_group", made.train_group)
        monkeypatch.setattr(local, "compile_ahead", lambda *_: None)
        monkeypatch.setattr(local, "POLL", 0.05)
        return made

    return make


def beating(folder, seconds=0.02):
    return Leases(folder / "leases", heartbeat=seconds)


# What others have


def test_what_another_who_lives_has_is_left_to_it(sweep):
    """All else first; said whose it is; nothing of it touched."""
    tiny = sweep(3)
    with beating(tiny.folder) as other:
        (lease,) = other.claim([tiny.id(1)])
        assert tiny.work() is True
        other.check([lease])
    assert tiny.trained == [[0], [2]] and not tiny.runs[1].directory.exists()
    assert tiny.lines[-1] == f"left to {os.uname().nodename} pid {os.getpid()}"


def test_a_holder_that_is_silent_is_not_taken_for_one_who_lives(sweep, monkeypatch):
    """Its heart last beat before the worker had nothing to do: waited for, then succeeded."""
    tiny, clock = sweep(2), [0.0]
    original = sharing.Leases
    monkeypatch.setattr(
        sharing, "Leases", lambda folder: original(folder, clock=lambda: clock[0], machine="here")
    )
    with Leases(tiny.folder / "leases", heartbeat=3600, machine="elsewhere") as other:
        other.claim([tiny.id(0)])
        tiny.train = lambda seeds, *_: other.beat() if seeds == [1] else None

        def pass_time():
            clock[0] = TIMEOUT + 1

        waits, wait = [], local._wait
        monkeypatch.setattr(local, "_wait", lambda stop: waits.append(wait(stop)))
        thread = later(pass_time, lambda: len(waits) > 4)
        assert tiny.work() is True
        thread.join()
    assert tiny.trained == [[1], [0]]
    assert not any("left to" in line for line in tiny.lines)


def test_when_a_counter_was_seen_to_move(tmp_path):
    """Never at the first look, nor with a new holder; then at the look that saw it."""
    clock = [10.0]
    watching = Leases(tmp_path / "leases", clock=lambda: clock[0], machine="elsewhere")

    def moved():
        with pytest.raises(Held) as held:
            watching.claim(["run"])
        return held.value.moved

    with Leases(tmp_path / "leases", heartbeat=3600) as first:
        (lease,) = first.claim(["run"])
        assert moved() == moved() == -float("inf")
        first.beat()
        clock[0] = 20.0
        assert moved() == 20.0
        clock[0] = 30.0
        assert moved() == 20.0
        first.release(lease, done=False)
        with Leases(tmp_path / "leases", heartbeat=3600) as second:
            second.claim(["run"])
            assert moved() == -float("inf")
    watching.__exit__()


def test_of_a_group_the_holder_that_has_been_silent_longest_counts(tmp_path):
    clock = [10.0]
    watching = Leases(tmp_path / "leases", clock=lambda: clock[0], machine="elsewhere")
    with Leases(tmp_path / "leases", heartbeat=3600) as one, \
         Leases(tmp_path / "leases", heartbeat=3600) as two:  # fmt: skip
        one.claim(["a"])
        two.claim(["b"])
        for now in (20.0, 30.0):
            clock[0] = now
            one.beat()
            with pytest.raises(Held) as held:
                watching.claim(["a", "b"])
        assert held.value.moved == -float("inf")
        two.beat()
        clock[0] = 40.0
        with pytest.raises(Held) as held:
            watching.claim(["a", "b"])
        assert held.value.moved == 30.0
    watching.__exit__()


def test_a_worker_that_waits_is_stopped(sweep):
    tiny = sweep(1)
    with Leases(tiny.folder / "leases", heartbeat=3600) as other:
        other.claim([tiny.id(0)])
        with pytest.raises(Interrupted):
            tiny.work(lambda tick: "waiting" in tiny.text.getvalue())


# Failures


def test_what_fails_is_tried_again_after_the_rest_and_then_given_up(sweep):
    """Three times, as the config says; its row is in the table, and later workers leave it."""
    tiny = sweep(3)

    def train(seeds, should_stop, guard):
        if seeds == [0]:
            raise RuntimeError("no memory")

    tiny.train = train
    assert tiny.work() is False
    assert tiny.trained == [[0], [1], [2], [0], [0]]
    known = read_failures(tiny.runs[0].directory)
    assert (known.count, known.given_up, known.reason) == (3, True, "no memory")
    assert "RuntimeError: no memory" in (tiny.runs[0].directory / "failure.txt").read_text()
    assert "FAILED: no memory" in tiny.lines[-1]
    rows = known.endpoints
    assert [row["tokens"] for row in rows] == [2560, 5120]
    assert {row["status"] for row in rows} == {"failed"} and {row["loss"] for row in rows} == {None}
    assert tiny.work() is True, "it is not this worker's failure"
    assert len(tiny.trained) == 5 and "given up after 3 failures" in tiny.lines[-1]
    # A person who launches the sweep means it.
    tiny.train = lambda *_: None
    assert tiny.launch() == {} and tiny.trained[5:] == [[0]]
    assert not (tiny.runs[0].directory / failures.FILE).exists()


def test_a_failure_that_mends_itself_is_forgotten(sweep):
    tiny, fails = sweep(1), [1, 2]

    def train(*_):
        if fails:
            raise OSError(f"stale file handle {fails.pop()}")

    tiny.train = train
    assert tiny.work() is True and tiny.trained == [[0]] * 3
    assert not (tiny.runs[0].directory / failures.FILE).exists()


def test_only_failures_without_progress_are_counted(tmp_path):
    """Ten in a row, each with a later checkpoint than before: the count stays at one. A checkpoint
    that is lost again is no progress."""
    run = tmp_path / "run"

    def fail():
        return count_failure(run, "run", "killed", 3, lambda: [{"run_id": "run"}])

    assert (fail().count, fail().count) == (1, 2)
    for tick in range(0, 1000, 100):
        (run / "checkpoints" / str(tick)).mkdir(parents=True)
        assert fail().count == 1 and not read_failures(run).given_up
    (run / "checkpoints" / "900").rmdir()
    assert fail().count == 2 and read_failures(run).tick == 900
    (run / "checkpoints" / "950.orbax-checkpoint-tmp").mkdir()
    last = fail()
    assert last.count == 3 and last.given_up and last.endpoints == ({"run_id": "run"},)
    assert read_failures(run) == last


def test_a_damaged_count_is_none(tmp_path):
    count_failure(tmp_path, "run", "killed", 1, lambda: [{"run_id": "run"}])
    path = tmp_path / failures.FILE
    path.write_text(path.read_text().replace("killed", "cilled"))
    assert read_failures(tmp_path) == failures.Failures()


def abandon(folder, names):
    """A process takes leases and is killed."""
    code = ("import sys, os, signal; from pathlib import Path\n"
            "from experiments.launch.leases import Leases\n"
            "leases = Leases(Path(sys.argv[1])); leases.claim(sys.argv[2:])\n"
            "os.kill(os.getpid(), signal.SIGKILL)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(folder / "leases"), *names], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL


def test_a_worker_that_dies_has_failed_its_runs(sweep):
    """Each death is counted once, whoever finds it; the third gives the run up."""
    tiny = sweep(2)
    for count in (1, 2):
        abandon(tiny.folder, [tiny.id(0)])
        with pytest.raises(Interrupted):
            tiny.train = lambda *_: (_ for _ in ()).throw(Interrupted("stop"))
            tiny.work()
        assert read_failures(tiny.runs[0].directory).count == count
    tiny.train = lambda *_: None
    abandon(tiny.folder, [tiny.id(0)])
    assert tiny.work() is False
    assert tiny.trained == [[0], [0], [1]], "two interrupted tries, and the other run"
    known = read_failures(tiny.runs[0].directory)
    assert known.given_up and "without a word" in known.reason and len(known.endpoints) == 2


def test_a_death_that_a_claim_in_vain_finds_is_not_lost(tmp_path, monkeypatch):
    """Of a group, whose second run somebody else is quicker to take."""
    abandon(tmp_path, ["a"])
    with Leases(tmp_path / "leases", heartbeat=3600) as mine:
        monkeypatch.setattr(mine, "_all_free", lambda names: None)
        with Leases(tmp_path / "leases", heartbeat=3600) as other:
            other.claim(["b"])
            with pytest.raises(Held):
                mine.claim(["a", "b"])
        monkeypatch.undo()
        first, second = mine.claim(["a", "b"])
        assert first.orphaned and not second.orphaned
        mine.release(first, done=False)
        (again,) = mine.claim(["a"])
        assert not again.orphaned, "counted once"


def test_a_run_that_was_finished_before_its_worker_died_has_not_failed(sweep, monkeypatch):
    """Between this worker's plan and its claim."""
    tiny = sweep(1)
    abandon(tiny.folder, [tiny.id(0)])
    monkeypatch.setattr(sharing, "look_afresh", lambda folder: tiny.finish(0))
    assert tiny.work() is True and tiny.trained == []
    assert not (tiny.runs[0].directory / failures.FILE).exists()


def test_failures_of_a_run_whose_worker_died_right_after_finishing_it_are_forgotten(sweep):
    """By the next launch, which has nothing to train; another run's are kept."""
    tiny = sweep(2)
    for seed in (0, 1):
        tiny.runs[seed].directory.mkdir(parents=True)
        count_failure(tiny.runs[seed].directory, tiny.id(seed), "killed", 3, list)
    tiny.finish(0)
    with beating(tiny.folder) as other:
        other.claim([tiny.id(1)])
        assert tiny.work() is True and tiny.trained == []
    assert [read_failures(run.directory).count for run in tiny.runs] == [0, 1]
    assert not (tiny.runs[0].directory / failures.FILE).exists()


def test_divergence_is_not_tried_again(sweep, monkeypatch):
    tiny = sweep(2)
    original = tiny.train_group

    def diverge(*arguments, **named):
        return [{**summary, "status": "diverged"} for summary in original(*arguments, **named)]

    monkeypatch.setattr(local, "train_group", diverge)
    assert tiny.work() is False and tiny.trained == [[0], [1]]


# The command


@pytest.fixture(scope="module")
def sweep_file(tiny_overrides, tmp_path_factory):
    file = tmp_path_factory.mktemp("sweeps") / "tiny.py"
    overrides = {**tiny_overrides, "launch.parallel": 1}
    del overrides["precision"]
    file.write_text(SWEEP.format(overrides=overrides))
    return file


def test_a_worker_trains_and_a_launch_collects(sweep_file, tmp_path, monkeypatch, capsys):
    """No table of the worker's; the collector trains nothing and has every endpoint."""
    flags = ["run", "--sweep", f"--config={sweep_file}", f"--workdir={tmp_path}"]
    assert main([*flags, "--worker"]) == 0
    assert "4 of 4 runs are finished" in capsys.readouterr().out
    folder = tmp_path / "tiny"
    assert sorted(p.name for p in folder.iterdir()) == ["leases", "runs"]
    assert os.listdir(folder / "leases") == []
    monkeypatch.setattr(local, "train_group", None)
    assert main(flags) == 0
    table = pd.read_parquet(folder / "endpoints.parquet")
    assert len(table) == 8 and (table["status"] == "ok").all()
    assert (folder / "report.html").exists()


def test_what_workers_have_given_up_is_in_the_table(sweep_file, tmp_path, monkeypatch, capsys):
    """By `collect`, which does not try it again. The rest is complete."""
    flags = ["run", "--sweep", f"--config={sweep_file}", f"--workdir={tmp_path}", "--worker",
             "--config.launch.failures=2"]  # fmt: skip
    original, tries = local.train_group, []

    def train_group(jobs, *rest, **named):
        tries.append(jobs[0].spec.run_id)
        if jobs[0].spec.size.startswith("56k"):
            raise RuntimeError("no memory")
        return original(jobs, *rest, **named)

    monkeypatch.setattr(local, "train_group", train_group)
    assert main(flags) == 1
    assert len(tries) == 6 and capsys.readouterr().out.count("FAILED: no memory") == 2
    table = collect(tmp_path / "tiny")
    assert len(table) == 8 and (table["status"] == "failed").sum() == 4
    assert set(table[table["status"] == "failed"]["size"].str[:3]) == {"56k"}
    assert main(flags) == 0 and len(tries) == 6, "nothing is left for a further worker"


def test_a_worker_that_is_told_to_stop(sweep_file, tmp_path, monkeypatch, capsys):
    """143, saved, its lease let go; the next one goes on, and no failure is counted."""
    flags = ["run", "--sweep", f"--config={sweep_file}", f"--workdir={tmp_path}", "--worker"]
    original = local.train_group

    def stopped(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(local, "train_group", stopped)
        assert main(flags) == 143
    assert "all is saved" in capsys.readouterr().out
    assert main(flags) == 0
    assert not list(tmp_path.glob("tiny/runs/*/failures.json"))
    assert len(list(tmp_path.glob("tiny/runs/*/summary.json"))) == 4


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--worker"], "--worker: only a sweep"),
        (["--launcher=slurm"], "--launcher=slurm: only a sweep"),
        (["--sweep", "--launcher=slrum"], "launcher='slrum' is unknown; choose from local, slurm"),
        (["--sweep", "--status"], "--status: only jobs have it"),
        (["--sweep", "--cancel"], "--cancel: only jobs have it"),
        (["--sweep", "--launcher=slurm", "--status", "--cancel"], "--status, --cancel: they"),
        (["--sweep", "--launcher=slurm", "--cancel", "--dry_run"], "--cancel, --dry_run: they"),
        (["--sweep", "--launcher=slurm", "--worker"], "--worker: it trains here"),
        (["--launcher=k8s"], "--launcher=k8s: only a sweep"),
        (["--sweep", "--launcher=k8s", "--status", "--cancel"], "--status, --cancel: they"),
        (["--sweep", "--launcher=k8s", "--worker"], "--worker: it trains here"),
        (["--reproduce=x", "--worker"], "--worker: it does not go with --reproduce"),
        (["--reproduce=x", "--launcher=slurm"], "--launcher=slurm: it does not go with"),
        (["--sweep", "--config.launch.failures=0"], "launch.failures=0: it must be at least 1"),
    ],
    ids=" ".join,
)
def test_mistakes(sweep_file, tmp_path, capsys, flags, names):
    config = [] if "--reproduce=x" in flags else [f"--config={sweep_file}"]
    assert main(["run", *flags, *config, f"--workdir={tmp_path / 'w'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and names in error
    assert not list(tmp_path.iterdir())


WORKERS = HARNESS.replace(
    "len(local.train_all(plan, show, lambda tick: False))",
    "int(not local.work(plan, show, lambda tick: False))",
)


@pytest.mark.slow
def test_two_workers_share_the_runs(tiny_overrides, tmp_path, monkeypatch):
    """20 runs, each trained once, in well under the time of one worker after the other. The runs
    wait instead of computing, so that the bound holds on a busy machine too; `experiments.benchmark
    --suite=workers` measures runs that keep a core busy."""
    assert "local.work(" in WORKERS
    monkeypatch.setattr(test_launch_together, "HARNESS", WORKERS)
    found = together(tmp_path / "tiny", tiny_overrides, 0.5, runs=20, launchers=2, kills=0)
    assert sorted(found["begun"]) == sorted(found["ids"])
    assert found["wall"] - found["startup"] <= 0.8 * 20 * 0.5


@pytest.mark.slow
def test_two_workers_give_what_one_gives(sweep_file, tmp_path):
    """Real ones, at once: every line of every log, and the leases are gone."""
    flags = ["--sweep", f"--config={sweep_file}", "--worker"]
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"]}
    command = [sys.executable, "-m", "experiments.run", *flags, f"--workdir={tmp_path / 'two'}"]
    pair = [subprocess.Popen(command, cwd=ROOT, env=os.environ | cache) for _ in range(2)]
    assert [process.wait(300) for process in pair] == [0, 0]
    assert main(["run", *flags, f"--workdir={tmp_path / 'one'}"]) == 0
    logs = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        paths = folder.glob("tiny/runs/*/metrics.jsonl")
        logs.append({path.parent.name: path.read_bytes() for path in paths})
    assert logs[0] == logs[1] and len(logs[0]) == 4
    tables = [collect(tmp_path / w / "tiny") for w in ("one", "two")]
    drop = ["wall_s", "git_commit"]
    pd.testing.assert_frame_equal(*(table.drop(columns=drop) for table in tables))
    assert os.listdir(tmp_path / "two" / "tiny" / "leases") == []
