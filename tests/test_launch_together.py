"""Several launchers on one sweep: each run is trained once, by whoever has its lease."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from test_launch_local import write_sweep

from bitnet_jax import member as member_module
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.files import SCHEMA_VERSION, write_json
from bitnet_jax.member import Job
from bitnet_jax.train import Interrupted, train_and_evaluate, train_group
from experiments import display
from experiments.launch import local
from experiments.launch.leases import TIMEOUT, Held, LeaseLost, Leases
from experiments.plan import Plan, PlannedRun
from experiments.run import main
from experiments.summary import NEEDED

ROOT = Path(__file__).parent.parent
PATIENCE = 20  # seconds; only a failing test takes them


def summary_of(run):
    """What a stand-in for training says of a run."""
    row = dict.fromkeys(NEEDED, 0) | {"run_id": run.spec.run_id, "bits_per_byte": 2.5}
    return {"schema_version": SCHEMA_VERSION, "status": "ok", "endpoints": [row]}


class Sweep:
    """Runs of a plan, what stands in for training them, and what a launcher says of it."""

    def __init__(self, config, corpus, folder, group, runs):
        self.folder, self.trained, self.text = folder, [], io.StringIO()
        planned = []
        for seed in range(runs):
            own = config({"launch.group": group, "launch.parallel": 1, "seed": seed})
            spec = resolve(own, corpus)
            planned.append(PlannedRun(spec, own, folder / "runs" / spec.run_id))
        self.runs = tuple(planned)
        self.plan = Plan("tiny", folder, corpus, self.runs)

    def id(self, seed):
        return self.runs[seed].spec.run_id

    def finish(self, seed):
        run = self.runs[seed]
        run.directory.mkdir(parents=True, exist_ok=True)
        write_json(run.directory / "summary.json", summary_of(run))

    def train_group(self, jobs, corpus, options, watch, should_stop, guard):
        seeds = [job.spec.seed_init for job in jobs]
        self.trained.append(seeds)
        self.train(seeds, should_stop, guard)
        guard()
        for seed in seeds:
            self.finish(seed)
        return [summary_of(self.runs[seed]) for seed in seeds]

    def train(self, seeds, should_stop, guard):
        """A test's own."""

    def launch(self, should_stop=lambda tick: False):
        screen = Console(file=self.text, width=200)
        return local.train_all(self.plan, display.SweepDisplay(screen, self.plan), should_stop)

    @property
    def lines(self):
        return self.text.getvalue().splitlines()


@pytest.fixture
def sweep(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    def make(runs, group=1):
        made = Sweep(tiny_config, tiny_corpus, tmp_path / "tiny", group, runs)
        monkeypatch.setattr(local, "train_group", made.train_group)
        monkeypatch.setattr(local, "compile_ahead", lambda *_: None)
        monkeypatch.setattr(local, "POLL", 0.05)
        return made

    return make


@pytest.fixture
def other(tmp_path):
    """Another launcher's leases."""
    with Leases(tmp_path / "tiny" / "leases") as leases:
        yield leases


def later(action, until=lambda: True):
    """Do it in a thread, once this holds."""

    def wait_and_act():
        deadline = time.monotonic() + PATIENCE
        while not until() and time.monotonic() < deadline:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def test_what_another_trains_is_waited_for_and_taken(sweep, other):
    """After all else is trained; it is said who has it and what came of it."""
    tiny = sweep(4)
    (lease,) = other.claim([tiny.id(1)])

    def end():
        tiny.finish(1)
        other.release(lease, done=True)

    thread = later(end, lambda: "waiting" in tiny.text.getvalue())
    assert tiny.launch() == {}
    thread.join()
    assert tiny.trained == [[0], [2], [3]]
    waiting = [line for line in tiny.lines if "waiting" in line]
    assert len(waiting) == 1 and waiting[0].endswith(f"{os.uname().nodename} pid {os.getpid()}")
    assert tiny.lines.index(waiting[0]) == 3
    assert tiny.lines[-1] == f"[2/4] {tiny.id(1)}  2.500 bits a byte, by another launcher"
    assert os.listdir(tiny.folder / "leases") == []


def test_what_another_has_failed_or_left_is_trained_here(sweep, other):
    tiny = sweep(2)
    (lease,) = other.claim([tiny.id(0)])
    thread = later(
        lambda: other.release(lease, done=False), lambda: "waiting" in tiny.text.getvalue()
    )
    assert tiny.launch() == {}
    thread.join()
    assert tiny.trained == [[1], [0]]


def test_what_fails_here_is_not_tried_again_here(sweep):
    tiny, calls = sweep(2), []

    def train(seeds, should_stop, guard):
        calls.append(seeds)
        if seeds == [0]:
            raise RuntimeError("no memory")

    tiny.train = train
    assert list(tiny.launch()) == [tiny.id(0)] and calls == [[0], [1]]
    assert list(tiny.launch()) == [tiny.id(0)] and calls == [[0], [1], [0]]


def test_a_sweep_that_is_done_has_no_leases(sweep):
    tiny = sweep(3)
    for seed in range(3):
        tiny.finish(seed)
    assert tiny.launch() == {} and tiny.trained == []
    assert not (tiny.folder / "leases").exists()


def test_a_group_is_trained_in_whole_or_left(sweep, other):
    """A run of the first is with another launcher: the second goes first. That run done, the first
    is trained without it."""
    tiny = sweep(6, group=3)
    (lease,) = other.claim([tiny.id(1)])

    def end():
        tiny.finish(1)
        other.release(lease, done=True)

    thread = later(end, lambda: "waiting" in tiny.text.getvalue())
    assert tiny.launch() == {}
    thread.join()
    assert tiny.trained == [[3, 4, 5], [0, 2]]


def test_what_another_has_begun_does_not_go_back_to_the_start(sweep, other):
    """It is trained by itself, since the rest of its group is new."""
    tiny = sweep(3, group=3)
    (lease,) = other.claim([tiny.id(1)])

    def begin():
        tiny.runs[1].directory.mkdir(parents=True)
        (tiny.runs[1].directory / "config.json").touch()
        other.release(lease, done=False)

    thread = later(begin, lambda: "waiting" in tiny.text.getvalue())
    assert tiny.launch() == {}
    thread.join()
    assert sorted(tiny.trained) == [[0, 2], [1]]


@pytest.mark.parametrize("late", [False, True])
def test_what_is_taken_over_is_neither_written_nor_failed(sweep, tmp_path, late):
    """It waits with the rest, and its new holder's result is taken; `late`: from an error that came
    of the other's writing beside it."""
    tiny, clock = sweep(2), [0.0]
    with Leases(tiny.folder / "leases", clock=lambda: clock[0], machine="elsewhere") as successor:

        def train(seeds, should_stop, guard):
            if seeds != [0]:
                return
            with pytest.raises(Held):
                successor.claim([tiny.id(0)])
            clock[0] = TIMEOUT  # no heartbeat comes between, so this launcher counts as gone
            (lease,) = successor.claim([tiny.id(0)])

            def end():
                tiny.finish(0)
                successor.release(lease, done=True)

            threads.append(later(end, lambda: "waiting" in tiny.text.getvalue()))
            if late:
                with pytest.raises(LeaseLost):
                    guard()
                raise RuntimeError("no such checkpoint")

        threads = []
        tiny.train = train
        assert tiny.launch() == {}
        for thread in threads:
            thread.join()
    assert tiny.trained == [[0], [1]], "it was not trained twice"
    assert any(tiny.id(0) in line and "taken over" in line for line in tiny.lines)
    assert tiny.lines[-1].endswith("by another launcher")
    assert not list(tiny.folder.glob("runs/*/failure.txt"))


@pytest.mark.parametrize("wanted", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_waiting_ends_at_once(
    tiny_overrides, tmp_path, monkeypatch, capsys, wanted
):
    """With its status, within a poll, and with nothing of the other's touched."""
    write_sweep(tmp_path / "tiny.py", tiny_overrides, ("optim.peak_lr", (0.01, 0.003)))
    arguments = ["run", "--sweep", f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path}"]
    plans, began = [], []
    original = local.train_all

    def train_all(plan, *rest):
        plans.append(plan)
        other.claim([run.spec.run_id for run in plan.runs])
        began.append(time.monotonic())
        threading.Timer(0.5, lambda: os.kill(os.getpid(), wanted)).start()
        return original(plan, *rest)

    with Leases(tmp_path / "tiny" / "leases") as other:
        monkeypatch.setattr("experiments.run.train_all", train_all)
        assert main(arguments) == 128 + wanted
        assert time.monotonic() - began[0] < 0.5 + 2 * local.POLL
    out = capsys.readouterr().out
    assert f"pid {os.getpid()}" in out and "To go on, give the same command again" in out
    assert not any(run.directory.exists() for run in plans[0].runs)


def test_a_stop_is_asked_for_while_waiting(sweep, other):
    tiny = sweep(1)
    other.claim([tiny.id(0)])
    with pytest.raises(Interrupted):
        tiny.launch(lambda tick: True)
    assert tiny.trained == []


# What is written once the lease is gone


def tree(folder):
    """Every file's content, but for checkpoints that are still on their way to the disk."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "-tmp" not in str(p)}


@pytest.mark.parametrize(
    ("lost_at", "seconds"),
    [*((tick, 1e9) for tick in (0, 3, 6, 16, 20, 36, 43, 44)), (17, 0.0), (42, 0.0)],
)
def test_nothing_is_written_after_the_lease_is_lost(
    tiny_config, tiny_corpus, tmp_path, monkeypatch, lost_at, seconds
):
    """Lost before the call of a tick, or after the last: the files stay as they were then, and a
    further launch makes of them what an undisturbed one would have made."""
    config = tiny_config({"eval.every": 4, "checkpoint.seconds": seconds, "log.every": 7})
    spec, options = resolve(config, tiny_corpus), loop_options(config)
    job, files, saved = Job(spec, tmp_path / "a", {}), [], []
    original = member_module.Member.save

    def save(member, *state):
        assert not files, "a checkpoint after the loss"
        original(member, *state)
        member.checkpointer._manager.wait_until_finished()
        saved.append(member.progress.tick)

    monkeypatch.setattr(member_module.Member, "save", save)

    def lose(tick):
        if tick >= lost_at and not files:
            files.append(tree(tmp_path))
        return False

    def watch(report):
        if report.tick == report.total_ticks == lost_at:
            lose(lost_at)

    def guard():
        if files:
            raise LeaseLost(spec.run_id)

    with pytest.raises(LeaseLost):
        train_group([job], tiny_corpus, options, watch, lose, guard)
    assert tree(tmp_path) == files[0] and bool(saved) == (seconds == 0 and lost_at > 7)
    monkeypatch.undo()
    ends = [
        train_and_evaluate(spec, tiny_corpus, tmp_path / name, options, {})["endpoints"]
        for name in "ab"
    ]
    for rows in ends:
        for row in rows:
            del row["wall_s"]
    assert ends[0] == ends[1]
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab"]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("after", ["nothing", "made", "forgot", "report", "stop", "closed"])
def test_nothing_is_written_after_a_loss_between_ticks(
    tiny_config, tiny_corpus, tmp_path, monkeypatch, after
):
    """Lost before anything is there, once the run's folder is made, once its later checkpoints are
    forgotten, at the report by which it has diverged, with the request to stop, or at the end."""
    rate = 1e30 if after == "report" else 0.01
    config = tiny_config({"optim.peak_lr": rate, "checkpoint.seconds": 1e9})
    spec, options = resolve(config, tiny_corpus), loop_options(config)
    lost = []

    def lose():
        lost.append(lost[0] if lost else tree(tmp_path))

    def then_lose(owner, name):
        original = getattr(owner, name)

        def call(*arguments):
            assert name == "close" or not lost, "a change after the loss"
            original(*arguments)
            if called.get(name) == after:
                lose()

        called = {"__init__": "made", "forget_after": "forgot", "close": "closed"}
        monkeypatch.setattr(owner, name, call)

    then_lose(member_module.Member, "__init__")
    then_lose(member_module.Checkpointer, "forget_after")
    then_lose(member_module.Checkpointer, "save")
    then_lose(member_module.Member, "close")

    def watch(report):
        if after == "report" and report.tick == 20:  # the end of a decay without a finite step
            lose()

    def should_stop(tick):
        if after == "stop" and tick == 5:
            lose()
        return bool(lost)

    def guard():
        if lost:
            raise LeaseLost(spec.run_id)

    if after == "nothing":
        lose()
    job = Job(spec, tmp_path / "run", {})
    with pytest.raises(LeaseLost):
        train_group([job], tiny_corpus, options, watch, should_stop, guard)
    assert tree(tmp_path) == lost[0]


# Launchers that are processes. A harness without threads forks them, since to start Python and JAX
# anew takes seconds.

HARNESS = """
import io, json, os, random, signal, sys, time
from pathlib import Path

from rich.console import Console

from bitnet_jax.configs import default
from bitnet_jax.configs.resolve import resolve
from bitnet_jax import data
from bitnet_jax.files import SCHEMA_VERSION, write_json
from bitnet_jax.train import Interrupted
from experiments import display
from experiments.launch import local
from experiments.plan import Plan, PlannedRun
from experiments.summary import NEEDED

folder, overrides, seconds = Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
runs, launchers, kills = (int(word) for word in sys.argv[4:7])
overrides["train.tokens"] = tuple(overrides["train.tokens"])
corpus = data.load(overrides["data.source"])
planned = []
for seed in range(runs):
    config = default.get_config()
    own = {**overrides, "seed": seed, "launch.group": 1, "launch.parallel": 1}
    config.update_from_flattened_dict(own)
    spec = resolve(config, corpus)
    planned.append(PlannedRun(spec, config, folder / "runs" / spec.run_id))
plan = Plan("tiny", folder, corpus, tuple(planned))


def note(file, text):
    descriptor = os.open(folder / file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (text + "\\n").encode())
    os.close(descriptor)


def train_group(jobs, corpus, options, watch, should_stop, guard):
    (job,) = jobs
    job.run_dir.mkdir(parents=True, exist_ok=True)
    note("begun", job.spec.run_id)
    for _ in range(5):
        time.sleep(seconds / 5)
        guard()
    row = dict.fromkeys(NEEDED, 0) | {"run_id": job.run_dir.name, "bits_per_byte": 2.5}
    summary = {"schema_version": SCHEMA_VERSION, "status": "ok", "endpoints": [row]}
    write_json(job.run_dir / "unfinished", summary)
    guard()
    note("completed", job.spec.run_id)
    (job.run_dir / "unfinished").rename(job.run_dir / "summary.json")
    return [summary]


local.train_group = train_group
local.compile_ahead = lambda *_: None


def launch(plan):
    pid = os.fork()
    if pid:
        return pid
    status = 3
    try:
        show = display.SweepDisplay(Console(file=io.StringIO()), plan)
        status = len(local.train_all(plan, show, lambda tick: False))
    finally:
        os._exit(status)


def wait_all(alive):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in alive]


own = folder / "lone" / "runs" / planned[0].spec.run_id
alone = PlannedRun(planned[0].spec, planned[0].config, own)
lone = Plan("tiny", folder / "lone", corpus, (alone,))
folder.mkdir()
began, work, seconds = time.monotonic(), seconds, 0.0
assert wait_all([launch(lone)]) == [0]
startup, seconds = time.monotonic() - began, work
(folder / "begun").unlink()
(folder / "completed").unlink()

draw, began, started = random.Random(runs), time.monotonic(), time.time()
alive = [launch(plan) for _ in range(launchers)]
for _ in range(kills):
    time.sleep(draw.uniform(0.0, 1.5 * seconds))
    victim = draw.randrange(launchers)
    os.kill(alive[victim], signal.SIGKILL)
    os.waitpid(alive[victim], 0)
    alive[victim] = launch(plan)
status = wait_all(alive)
wall = time.monotonic() - began
last = max(file.stat().st_mtime for file in folder.glob("runs/*/summary.json")) - started
words = {name: (folder / name).read_text().split() for name in ("begun", "completed")}
print(json.dumps({"startup": startup, "wall": wall, "last": last, "status": status, **words,
                  "ids": [run.spec.run_id for run in planned],
                  "finished": [run.finished for run in planned],
                  "leases": sorted(os.listdir(folder / "leases"))}))
"""


def together(folder, overrides, seconds, runs, launchers, kills):
    """What came of so many launchers on so many runs of so many seconds."""
    arguments = (folder, json.dumps(overrides), seconds, runs, launchers, kills)
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, *map(str, arguments)],
        cwd=ROOT, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == [0] * launchers
    assert sorted(found["completed"]) == sorted(found["ids"]), "each once"
    assert all(found["finished"]) and found["leases"] == []
    return found


def test_launchers_that_are_killed_and_started_again_train_each_run_once(tiny_overrides, tmp_path):
    """Sixteen of them, by SIGKILL; a run that one was at is begun again, and completed once."""
    found = together(tmp_path / "tiny", tiny_overrides, 0.3, runs=24, launchers=4, kills=16)
    assert len(found["begun"]) > 24


@pytest.mark.slow
def test_launchers_share_the_work(tiny_overrides, tmp_path):
    """Four need a quarter of the time, and 15 % of it at most for finding their runs; in that is
    the second until those that are done see that the last one is."""
    found = together(tmp_path / "tiny", tiny_overrides, 3.0, runs=24, launchers=4, kills=0)
    assert sorted(found["begun"]) == sorted(found["ids"])
    share = (found["wall"] - found["startup"]) / (24 * 3.0 / 4)
    print(
        f"start-up {found['startup']:.2f} s, last run {found['last']:.2f} s, "
        f"wall {found['wall']:.2f} s, {share:.3f} of ideal"
    )
    assert share <= 1.15


@pytest.mark.slow
def test_two_launchers_give_what_one_gives(tiny_overrides, tmp_path):
    """Real ones: each run trained by one of them, every loss bit for bit and every line of the
    metrics byte for byte."""
    write_sweep(tmp_path / "tiny.py", tiny_overrides, ("precision", ("fp32", "ternary")))
    flags = ["--sweep", f"--config={tmp_path / 'tiny.py'}", "--config.launch.group=1",
             "--config.launch.parallel=1"]  # fmt: skip
    command = [sys.executable, "-m", "experiments.run", *flags, f"--workdir={tmp_path / 'two'}"]
    pair = [
        subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    own = [re.findall(r"^\[./4\] (\S+)  .* bits a byte  \(", out, re.M) for out, _ in outputs]
    shutil.copytree(tmp_path / "two" / "programs", tmp_path / "one" / "programs")
    assert main(["run", *flags, f"--workdir={tmp_path / 'one'}"]) == 0
    tables = [pd.read_parquet(tmp_path / w / "tiny" / "endpoints.parquet") for w in ("two", "one")]
    assert sorted(own[0] + own[1]) == sorted(tables[1]["run_id"].unique()) and own[0] and own[1]
    assert all("8 endpoints" in out for out, _ in outputs)
    drop = ["wall_s", "git_commit"]
    pd.testing.assert_frame_equal(*(table.drop(columns=drop) for table in tables))
    assert len(tables[0]) == 8 and tables[0]["loss"].nunique() == 8
    for path in (tmp_path / "one").glob("tiny/runs/*/metrics.jsonl"):
        twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert twin.read_bytes() == path.read_bytes()
    assert os.listdir(tmp_path / "two" / "tiny" / "leases") == []
