"""How a plan's runs are put into groups, what a person sees of one, and a sweep of groups."""

import json

import pandas as pd
import pytest
from rich.console import Console

from bitnet_jax.configs.resolve import resolve
from bitnet_jax.train import Report
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
        runs[i].directory.mkdir()
        (runs[i].directory / "summary.json").touch()
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


SWEEP = """
from bitnet_jax.configs import default
from sweeps.grid import axis, product


def get_config(arg=None):
    c = default.get_config()
    c.update_from_flattened_dict({overrides!r})
    return c


def sweep(c):
    return product(axis("seed", (0, 1)), axis("optim.peak_lr", (0.01, 0.003)))
"""


@pytest.mark.slow
def test_a_sweep_in_groups_of_two(tiny_overrides, tmp_path, monkeypatch, capsys):
    """Four runs, two programs' worth of work; one alone is failed with its group, not with all."""
    overrides = {**tiny_overrides, "train.tokens": (1280, 2560), "log.layers": False}
    del overrides["optim.peak_lr"]
    (tmp_path / "tiny.py").write_text(SWEEP.format(overrides=overrides))
    arguments = ["run", "--sweep", f"--config={tmp_path / 'tiny.py'}",
                 "--config.launch.group=2", f"--workdir={tmp_path / 'w'}"]  # fmt: skip
    sizes, original = [], local.train_group

    def train_group(jobs, *rest, **named):
        sizes.append(len(jobs))
        if len(sizes) == 1:
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
