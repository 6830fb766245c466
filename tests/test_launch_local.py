"""How a plan's runs are put into groups and trained side by side, what a person sees of them, and
sweeps of groups."""

import dataclasses
import io
import itertools
import json
import signal
import threading
import time
import types

import pandas as pd
import pytest
from rich.console import Console
from run_files import write_summary

from bitnet_jax import train
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.files import write_json
from bitnet_jax.member import Member
from bitnet_jax.train import Interrupted, Report, train_and_evaluate
from experiments import display
from experiments.launch import local
from experiments.launch.local import grouped
from experiments.plan import Plan, PlannedRun
from experiments.run import main


@pytest.fixture
def planned(tiny_config, tiny_corpus, tmp_path):
    """A run of these overrides, in a directory that is not there."""

    def make(group, seed, overrides=None):
        config = tiny_config({"launch.group": group, "seed": seed, **(overrides or {})})
        spec = resolve(config, tiny_corpus)
        return PlannedRun(spec, config, tmp_path / spec.run_id)

    return make


def names(groups, runs):
    return [[runs.index(run) for run in group] for group in groups]


def test_runs_of_one_group_train_together(planned):
    """Up to the size, in order, by shape and arm, wherever in the plan they stand."""
    arms = ("fp32", "ternary", "fp32", "fp32", "ternary", "fp32", "fp32", "fp32")
    runs = [planned(3, seed, {"precision": arm}) for seed, arm in enumerate(arms)]
    assert names(grouped(runs), runs) == [[0, 2, 3], [1, 4], [5, 6, 7]]
    rates = [planned(4, 0, {"optim.peak_lr": lr, "optim.weight_decay": lr}) for lr in (0.1, 0.2)]
    seeds = [planned(4, 0, {"seeds.data": 1}), planned(4, 0, {"seeds.init": 1})]
    assert names(grouped(rates + seeds), rates + seeds) == [[0, 1, 2, 3]]


def test_a_cpu_trains_one_run_after_another(planned):
    runs = [planned(None, seed) for seed in range(3)]
    assert names(grouped(runs), runs) == [[0], [1], [2]]


def test_finished_runs_are_left_out_and_no_place_is_kept_for_them(planned):
    runs = [planned(2, seed) for seed in range(5)]
    for i in (0, 3):
        write_summary(runs[i].directory, runs[i].spec)
    assert names(grouped(runs), runs) == [[1, 2], [4]]
    assert grouped(runs[:1]) == []


@pytest.mark.parametrize(
    "option, value",
    [("log.every", 5), ("eval.every", 3), ("log.layers", False), ("log.gradient_sample", 4),
     ("checkpoint.seconds", 1.0), ("checkpoint.keep_model", False), ("launch.dispatch", 2),
     ("launch.resident_bytes", 0), ("tracking.wandb", "offline"), ("tracking.project", "other")],
)  # fmt: skip
def test_runs_of_other_options_are_not_mixed(planned, option, value):
    """A group is launched with the options of its first run; they must be everyone's."""
    runs = [planned(4, seed, {option: value} if seed % 2 else {}) for seed in range(4)]
    assert names(grouped(runs), runs) == [[0, 2], [1, 3]]


def begun(run, group):
    """As a launch leaves it that was killed in its first steps."""
    run.directory.mkdir(parents=True)
    write_json(run.directory / "config.json", {"group": [each.spec.run_id for each in group]})


def test_an_interrupted_group_stays_what_it_was(planned):
    """Be it that only one of it had been begun, or that some of it are finished: programs of other
    numbers of runs round otherwise, so no two groups are mixed, and none is parted."""
    runs = [planned(3, seed) for seed in range(9)]
    begun(runs[1], runs[:3])
    assert names(grouped(runs), runs) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    begun(runs[4], [runs[3], runs[4], runs[7]])
    assert names(grouped(runs), runs) == [[0, 1, 2], [3, 4, 7], [5, 6, 8]]
    for i in (0, 2):
        begun(runs[i], runs[:3])
        write_summary(runs[i].directory, runs[i].spec)
    assert names(grouped(runs), runs) == [[1], [3, 4, 7], [5, 6, 8]]


@pytest.mark.slow
def test_a_group_killed_while_it_begins_comes_to_the_same_bits(
    planned, tiny_corpus, tmp_path, monkeypatch
):
    """One of three has its config.json, and they are trained as three all the same."""
    logs = []
    for name in ("undisturbed", "killed"):
        seeds = (planned(3, seed, {"train.tokens": (1280,), "log.every": 3}) for seed in range(3))
        runs = tuple(
            dataclasses.replace(run, directory=tmp_path / name / run.spec.run_id) for run in seeds
        )
        plan = Plan("tiny", tmp_path / name, tiny_corpus, runs)
        show, original = display.SweepDisplay(Console(file=io.StringIO()), plan), Member.open

        def kill(member, group, original=original, first=runs[0]):
            if member.spec != first.spec:
                raise KeyboardInterrupt
            original(member, group)

        if name == "killed":
            with monkeypatch.context() as patch:
                patch.setattr(Member, "open", kill)
                with pytest.raises(KeyboardInterrupt):
                    local.train_all(plan, show, lambda tick: False)
            assert [run.started for run in runs] == [True, False, False]
        assert local.train_all(plan, show, lambda tick: False) == {}
        logs.append([(run.directory / "metrics.jsonl").read_bytes() for run in runs])
    assert logs[0] == logs[1]


def test_a_run_that_does_not_say_with_whom_it_was_begun(planned):
    """By an earlier version, or of a damaged file: with others of that kind."""
    runs = [planned(3, seed) for seed in range(4)]
    for i in (0, 2):
        runs[i].directory.mkdir(parents=True)
    write_json(runs[0].directory / "config.json", {"run_id": "of no group"})
    (runs[2].directory / "config.json").write_bytes(b"{")
    assert names(grouped(runs), runs) == [[0, 2], [1, 3]]


def test_each_run_keeps_to_its_own_size(planned):
    """Where a sweep sets the size itself: no group is larger than any of its runs wants."""
    runs = [planned(size, seed) for seed, size in enumerate((4, 4, 4, 2, 1, 4))]
    for group in grouped(runs):
        assert len(group) <= min(run.config.launch.group for run in group)


def test_what_is_shown_of_a_group(planned, tmp_path, tiny_corpus, monkeypatch):
    """Its first run and how many more; its FLOPs are those of all, and each leaves a line."""
    runs = tuple(planned(3, seed) for seed in range(4))
    plan = Plan("tiny", tmp_path, tiny_corpus, runs)
    screen = Console(width=200, record=True, force_terminal=False, quiet=False)
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    show = display.SweepDisplay(screen, plan)
    with show.live():
        three, one = show.start(runs[:3]), show.start(runs[3:])
        three.watch(Report(22, 44, 3.0, 1e5))
        for run in runs[:3]:
            three.finish(run, "done")
        one.watch(Report(11, 44, None, None))
        one.finish(runs[3], "DIVERGED")
    half, *three, quarter, last = screen.export_text().splitlines()
    assert f"[1/4] {runs[0].spec.run_id} and 2 more" in half
    assert "50%  step 22/44  loss 3.000 nats  100k tok/s" in half
    for i, line in enumerate(three):
        assert line.startswith(f"[{i + 1}/4] {runs[i].spec.run_id}  done")
    assert "[4/4]" in quarter and "more" not in quarter and "loss not finite" in quarter
    assert "[4/4]" in last and "DIVERGED" in last
    # Three of four runs half done: as much again is 5/3 of what it took.
    assert sum(show._done.values()) == show._todo == 4 * runs[0].spec.total_flops


# Side by side. What stands in for training waits for what must happen first, at most so long.

PATIENCE = 20  # seconds; only a failing test takes them


@pytest.fixture
def launch(planned, tmp_path, tiny_corpus, monkeypatch):
    """Launch a lone run of each of these arms, with what stands in for training and compiling."""

    def run(train_one, arms=("fp32",) * 4, parallel=2, compile_ahead=lambda arm: None, done=()):
        runs = [
            planned(1, seed, {"precision": arm, "launch.parallel": parallel})
            for seed, arm in enumerate(arms)
        ]
        for index in done:
            write_summary(runs[index].directory, runs[index].spec)

        def train_group(jobs, corpus, options, watch, should_stop, guard):
            (job,) = jobs
            train_one(job.spec, options, should_stop)
            return [{"status": "ok", "endpoints": []}]

        monkeypatch.setattr(local, "train_group", train_group)
        monkeypatch.setattr(
            local, "compile_ahead", lambda spec, *rest: compile_ahead(spec.step.precision.name)
        )
        plan = Plan("tiny", tmp_path, tiny_corpus, tuple(runs))
        show = display.SweepDisplay(Console(file=io.StringIO()), plan)
        return local.train_all(plan, show, lambda tick: False)

    return run


def in_main():
    return threading.current_thread() is threading.main_thread()


def wait_for(happened):
    """An error unless it happens, which the launcher reports as a failed run."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("parallel", [1, 2, 3])
def test_every_unfinished_run_is_trained_once(launch, parallel):
    """So many at a time, and no more, one of them in the main thread."""
    together, trained, workers = threading.Barrier(parallel), [], set()

    def train_one(spec, options, should_stop):
        workers.add(threading.current_thread())
        trained.append(spec.seed_init)
        together.wait(PATIENCE)

    assert launch(train_one, ("fp32",) * 8, parallel, done=(0, 3)) == {}
    assert sorted(trained) == [1, 2, 4, 5, 6, 7]
    assert len(workers) == parallel and threading.main_thread() in workers


@pytest.mark.parametrize("runs, share", [(1, 1), (2, 2), (4, 3)])
def test_a_run_shares_the_machine_with_what_trains_beside_it(launch, runs, share):
    """Three may train side by side, where there are so many."""
    shares = []
    launch(lambda spec, options, _: shares.append(options.parallel), ("fp32",) * runs, 3)
    assert shares == [share] * runs


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_an_interrupt_of_one_worker_stops_all(launch, in_main_thread):
    """The other is told, and takes no further run even if this was the end of its own; nor is the
    program of a later one compiled."""
    both, begun, told, compiled = threading.Barrier(2), [], [], []

    def train_one(spec, options, should_stop):
        begun.append(spec.seed_init)
        both.wait(PATIENCE)
        if in_main() == in_main_thread:
            raise Interrupted(spec.run_id)
        wait_for(lambda: should_stop(0))
        told.append(spec.seed_init)

    with pytest.raises(Interrupted):
        launch(train_one, ("fp32", "fp32", "fp32", "ternary"), 2, compiled.append)
    assert sorted(begun) == [0, 1] and len(told) == 1 and compiled == []


@pytest.mark.parametrize("waiting", [False, True])
def test_a_keyboard_interrupt_stops_the_other_worker(launch, monkeypatch, waiting):
    """While the main thread trains, or when nothing is left for it and it waits for the other."""
    both, told = threading.Barrier(2), []
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    def train_one(spec, options, should_stop):
        both.wait(PATIENCE)
        if in_main():
            if waiting:
                return
            raise KeyboardInterrupt
        if waiting:
            time.sleep(0.2)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        wait_for(lambda: should_stop(0))
        told.append(spec.seed_init)

    try:
        with pytest.raises(KeyboardInterrupt):
            launch(train_one, ("fp32",) * 2)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(told) == 1


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_a_failure_stops_nothing_else(launch, tmp_path, in_main_thread):
    both, failed, trained = threading.Barrier(2), [], []

    def train_one(spec, options, should_stop):
        both.wait(PATIENCE)
        if in_main() == in_main_thread and not failed:
            failed.append(spec)
            raise RuntimeError("no memory")
        trained.append(spec.seed_init)

    rows = launch(train_one)
    (spec,) = failed
    assert sorted([*trained, spec.seed_init]) == [0, 1, 2, 3]
    assert list(rows) == [spec.run_id]
    assert {row["status"] for row in rows[spec.run_id]} == {"failed"}
    assert "RuntimeError: no memory" in (tmp_path / spec.run_id / "failure.txt").read_text()


def test_a_program_is_compiled_ahead_once(launch):
    """While the run before it trains; the first one of all is the first run's own to compile."""
    arms = ("fp32", "ternary", "fp32", "ternary", "bf16", "bf16")
    compiled, trained = [], []

    def train_one(spec, options, should_stop):
        trained.append(spec.step.precision.name)
        if len(trained) < len(arms):
            wait_for(lambda: arms[len(trained)] in [*trained, *compiled])

    assert launch(train_one, arms, 1, compiled.append) == {}
    assert trained == list(arms) and compiled == ["ternary", "bf16"]


def test_a_worker_waits_for_a_program_that_is_being_compiled(launch):
    began, events = threading.Event(), []

    def compile_ahead(arm):
        began.set()
        time.sleep(0.2)
        events.append("compiled")

    def train_one(spec, options, should_stop):
        wait_for(began.is_set)
        events.append(spec.step.precision.name)

    assert launch(train_one, ("fp32", "fp32", "ternary"), 2, compile_ahead) == {}
    assert events == ["fp32", "fp32", "compiled", "ternary"]


def test_a_worker_that_waits_for_a_program_is_stopped_too(launch):
    """It does not begin its run when the program is there."""
    began, interrupted, trained = threading.Event(), threading.Event(), []

    def compile_ahead(arm):
        began.set()
        interrupted.wait(PATIENCE)
        time.sleep(0.1)

    def train_one(spec, options, should_stop):
        trained.append(spec.step.precision.name)
        wait_for(began.is_set)
        if in_main():
            time.sleep(0.1)  # the other takes the next run and waits
            interrupted.set()
            raise Interrupted(spec.run_id)

    with pytest.raises(Interrupted):
        launch(train_one, ("fp32", "fp32", "ternary"), 2, compile_ahead)
    assert trained == ["fp32", "fp32"]


def test_a_program_whose_compilation_has_not_begun_is_not_waited_for(launch):
    """The third arm's stands behind the second's, which here takes until the third is trained."""
    began, overtaken = threading.Event(), threading.Event()
    compiled, trained = [], []

    def compile_ahead(arm):
        began.set()
        overtaken.wait(PATIENCE)
        compiled.append(arm)

    def train_one(spec, options, should_stop):
        wait_for(began.is_set)
        trained.append(spec.step.precision.name)
        if trained[-1] == "bf16":
            overtaken.set()

    assert launch(train_one, ("fp32", "fp32", "ternary", "bf16"), 2, compile_ahead) == {}
    assert compiled == ["ternary"] and trained == ["fp32", "fp32", "bf16", "ternary"]


def test_seconds_are_a_share_of_the_machines(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    """By a clock that every look advances: of two programs each has half of the time."""
    seconds = {}
    for parallel in (1, 2):
        clock = itertools.count()
        monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda c=clock: next(c)))
        config = tiny_config({"launch.parallel": parallel})
        spec, options = resolve(config, tiny_corpus), loop_options(config)
        directory = tmp_path / str(parallel)
        summary = train_and_evaluate(spec, tiny_corpus, directory, options, {})
        seconds[parallel] = [summary["wall_s"], *(row["wall_s"] for row in summary["endpoints"])]
    assert seconds[1][-1] > 0 and seconds[1] == [2 * share for share in seconds[2]]


SWEEP = """
from bitnet_jax.configs import default
from sweeps.grid import axis, product


def get_config(arg=None):
    c = default.get_config()
    c.update_from_flattened_dict({overrides!r})
    return c


def sweep(c):
    return product(axis("seed", (0, 1)), axis{axis!r})
"""


def write_sweep(path, tiny_overrides, axis):
    """A sweep of two seeds and of this axis."""
    overrides = {**tiny_overrides, "train.tokens": (1280, 2560), "log.layers": False}
    del overrides[axis[0]]
    path.write_text(SWEEP.format(overrides=overrides, axis=axis))


@pytest.mark.slow
def test_a_sweep_in_groups_of_two(tiny_overrides, tmp_path, monkeypatch, capsys):
    """Four runs, two programs' worth of work; one alone is failed with its group, not with all."""
    write_sweep(tmp_path / "tiny.py", tiny_overrides, ("optim.peak_lr", (0.01, 0.003)))
    arguments = ["run", "--sweep", f"--config={tmp_path / 'tiny.py'}",
                 "--config.launch.group=2", f"--workdir={tmp_path / 'w'}"]  # fmt: skip
    sizes, failed, original = [], [], local.train_group

    def train_group(jobs, *rest, **named):
        sizes.append(len(jobs))
        if jobs[0].spec.seed_init == 0 and not failed:
            failed.append(jobs)
            raise RuntimeError("no memory")
        return original(jobs, *rest, **named)

    monkeypatch.setattr(local, "train_group", train_group)
    assert main(arguments) == 1
    assert capsys.readouterr().out.count("FAILED: no memory") == 2
    table = pd.read_parquet(tmp_path / "w" / "tiny" / "endpoints.parquet")
    assert len(table) == 8 and (table["status"] == "failed").sum() == 4
    assert set(table[table["status"] == "failed"]["seed"]) == {0}
    assert main(arguments) == 0
    assert sizes == [2, 2, 2], "only the failed ones were trained again"
    table = pd.read_parquet(tmp_path / "w" / "tiny" / "endpoints.parquet")
    assert len(table) == 8 and (table["status"] == "ok").all()
    assert table["loss"].nunique() == 8 and set(table["peak_lr"]) == {0.01, 0.003}
    for file in tmp_path.glob("w/tiny/runs/*/config.json"):
        written = json.loads(file.read_text())
        rows = table[table["run_id"] == written["run_id"]]
        assert set(rows["seed"]) == {written["config"]["seed"]}
        assert set(rows["peak_lr"]) == {written["config"]["optim"]["peak_lr"]}
    assert main(arguments) == 0 and sizes == [2, 2, 2]


@pytest.mark.slow
def test_a_sweep_side_by_side_gives_what_it_gives_one_by_one(tiny_overrides, tmp_path):
    """Two programs: every loss bit for bit, every line of the metrics byte for byte."""
    write_sweep(tmp_path / "tiny.py", tiny_overrides, ("precision", ("fp32", "ternary")))
    losses, files = {}, {}
    for parallel in (1, 2):
        workdir = tmp_path / str(parallel)
        arguments = ["run", "--sweep", f"--config={tmp_path / 'tiny.py'}", f"--workdir={workdir}",
                     "--config.launch.group=1", f"--config.launch.parallel={parallel}"]  # fmt: skip
        assert main(arguments) == 0
        table = pd.read_parquet(workdir / "tiny" / "endpoints.parquet")
        losses[parallel] = table.set_index(["run_id", "tokens"])["loss"].to_dict()
        runs = workdir / "tiny" / "runs"
        files[parallel] = {f.parent.name: f.read_bytes() for f in runs.glob("*/metrics.jsonl")}
    assert len(set(losses[1].values())) == 8 and losses[2] == losses[1]
    assert len(files[1]) == 4 and files[2] == files[1]
