"""The main command: plans, mistakes, sweeps end to end, failures and interruptions."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from test_collect import CONTRACT

from bitnet_jax import programs
from bitnet_jax.data import prepare
from bitnet_jax.programs import compiled_steps
from experiments import display
from experiments.launch import local
from experiments.run import main

ROOT = Path(__file__).parent.parent
SWEEP = """
from bitnet_jax.configs import default
from sweeps.grid import axis, product


def get_config(arg=None):
    c = default.get_config()
    c.update_from_flattened_dict({overrides!r})
    c.sweep.sizes = ("27k", "56k")
    c.sweep.precisions = ("ternary", "fp16")
    return c


def sweep(c):
    return product(axis("model.size", c.sweep.sizes), axis("precision", c.sweep.precisions))
"""


@pytest.fixture(scope="module")
def sweep_file(tiny_overrides, tmp_path_factory):
    """A sweep of sizes that differ in name alone, so that each arm compiles once."""
    file = tmp_path_factory.mktemp("sweeps") / "tiny.py"
    overrides = {**tiny_overrides, "train.tokens": (1280, 2560, 5120)}
    del overrides["precision"]
    file.write_text(SWEEP.format(overrides=overrides))
    return file


@pytest.fixture
def single(tiny_overrides):
    """The tiny run's overrides as flags."""
    return [f"--config.{key}={value}" for key, value in tiny_overrides.items()]


@pytest.fixture
def trained(monkeypatch):
    """The run ids that are trained from here on."""
    ids = []
    original = local.train_group

    def spy(jobs, *args, **kwargs):
        ids.extend(job.spec.run_id for job in jobs)
        return original(jobs, *args, **kwargs)

    monkeypatch.setattr(local, "train_group", spy)
    return ids


def run(*arguments):
    return main(["run", *map(str, arguments)])


def table_of(workdir):
    return pd.read_parquet(workdir / "tiny" / "endpoints.parquet")


# The plan


def test_dry_run_prints_the_plan_and_writes_nothing(single, tmp_path, capsys):
    assert run(*single, f"--workdir={tmp_path / 'w'}", "--dry_run") == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "memory" in line or " fp32 " in line]
    header, row, title, needs = lines
    assert title.startswith("what a run needs of a device's memory, which is ")
    assert " 26 kB " in needs and " yes " in needs, "6496 parameters of four bytes"
    for column in ("params", "non-emb.", "tokens", "FLOPs", "memory", "time"):
        assert column in header
    # 6496 parameters, 2400 of them not embeddings; 44 steps of 128 tokens.
    for value in ("6.5k", "2.4k", "2.56k, 5.12k", "234M", "GB", "0:0", "0.01", "new"):
        assert value in row
    assert "total 234M FLOPs, still to do 234M" in out
    assert not list(tmp_path.iterdir())


def test_dry_run_of_the_sweep(sweep_file, tmp_path, capsys):
    arguments = ("--sweep", f"--config={sweep_file}", f"--workdir={tmp_path / 'w'}", "--dry_run")
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    runs = out.partition("what a run needs")[0]
    assert "tiny: 4 runs" in runs and runs.count("ternary") == runs.count("fp16") == 2
    assert not list(tmp_path.iterdir())


def test_help(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert "--sweep" in out and "--dry_run" in out and "Exit status" in out


def test_a_flag_given_twice(sweep_file, tmp_path, capsys):
    """The last holds, as wrappers of commands expect; budgets, which absl would join, do not."""
    common = (f"--workdir={tmp_path / 'w'}", "--sweep", f"--config={sweep_file}", "--dry_run")
    assert run(*common, "--config.optim.peak_lr=0.5", "--config.optim.peak_lr=0.25") == 0
    assert capsys.readouterr().out.count(" 0.25 ") == 4
    budgets = [f"--config.train.tokens=({n},)" for n in (1280, 2560)]
    assert run(*common, *budgets) == 2
    error = "error: config.train.tokens='(2560,)': given twice; give it once\n"
    assert capsys.readouterr().err == error


def test_flags_in_any_order(sweep_file, tmp_path, capsys):
    """The config file may be named after its overrides, and without an equals sign."""
    first, last = "--config.optim.peak_lr=0.25", ("--config", sweep_file)
    assert run("--dry_run", first, *last, "--sweep", f"--workdir={tmp_path / 'w'}") == 0
    assert capsys.readouterr().out.count(" 0.25 ") == 4


# A user's mistakes


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory):
    """Corpora with which something is wrong, by name."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.txt").write_text("some text that is long enough for training on it " * 9)
    (folder / "other.txt").write_text("another text that is long enough to validate on " * 9)
    (folder / "short.txt").write_text("ten bytes.")
    for name, train_text, valid_text in (
        ("short_train", "short", "other"),
        ("short_valid", "text", "short"),
        ("empty_valid", "text", "other"),
        ("empty_train", "text", "other"),
        ("cut", "text", "other"),
    ):
        texts = folder / f"{train_text}.txt", folder / f"{valid_text}.txt"
        prepare([str(texts[0])], "bytes", folder / name, valid_sources=[str(texts[1])])
    for name, split in (("empty_valid", "valid"), ("empty_train", "train")):
        (folder / name / f"{split}.bin").write_bytes(b"")
        manifest = json.loads((folder / name / "manifest.json").read_text())
        manifest["splits"][split]["tokens"] = 0
        (folder / name / "manifest.json").write_text(json.dumps(manifest))
    (folder / "cut" / "train.bin").write_bytes(b"half")
    return folder


MISTAKES = [
    ("--config.optim.peek_lr=1", "config.optim.peek_lr='1'", "did you mean optim.peak_lr?"),
    ("--config.optim.qqqqqqqq=1", "config.optim.qqqqqqqq='1'", "default.py"),
    ("--config.seeed=1", "config.seeed='1'", "did you mean seed"),
    ("--config.model.layers=two", "config.model.layers='two'", "int"),
    ("--config.model.layers=2.5", "config.model.layers='2.5'", "int"),
    ("--config.optim.peak_lr=fast", "config.optim.peak_lr='fast'", "float"),
    ("--config.model.remat=perhaps", "config.model.remat='perhaps'", "bool"),
    ("--config.train.tokens=many", "train.tokens=", "whole numbers"),
    ("--config.train.tokens=(5120,2560)", "train.tokens=(5120, 2560)", "increasing"),
    ("--config.train.tokens=(2560,2560)", "train.tokens=(2560, 2560)", "increasing"),
    ("--config.train.tokens=(1e400,)", "train.tokens=(inf,)", "whole numbers"),
    ("--config.precision=fp17", "precision='fp17'", "ternary, binary, fp16, bf16, fp32"),
    ("--config.model.size=28k", "model.size='28k'", "27k"),
    ("--config.model.width=15", "model.width=15", "divide by model.heads=2"),
    ("--config.log.every=0", "log.every=0", "at least 1"),
    ("--config.tracking.wandb=maybe", "tracking.wandb='maybe'", "offline"),
    ("--config.name=../elsewhere", "name='../elsewhere'", "folder name"),
    ("--config=nowhere.py", "--config=nowhere.py", "no such config file"),
    ("--config=README.md", "--config=README.md", "no such config file"),
    ("--config={root}/sweeps/grid.py", "--config={root}/sweeps/grid.py", "no get_config()"),
    ("--config={root}/sweeps/isoflop.py:size=27k", "size='27k'", "take 160k"),
    ("--config={root}/sweeps/isoflop.py:siez=27k", "'siez=27k'", "size="),
    ("--config", "config", ""),
    ("--config.data.source=nowhere", "'nowhere'", "prepare"),
    ("--config.data.source={bad}/text.txt", "text.txt", "not a prepared corpus"),
    ("--config.data.source={bad}/short_train", "data.sequence_length=16", "only 10 tokens"),
    ("--config.data.source={bad}/short_valid", "data.sequence_length=16", "only 10 tokens"),
    ("--config.data.source={bad}/empty_train", "train.bin", "prepare the corpus again"),
    ("--config.data.source={bad}/empty_valid", "valid.bin", "prepare the corpus again"),
    ("--config.data.source={bad}/cut", "train.bin", "prepare the corpus again"),
    ("--workdir={bad}/text.txt", "workdir='{bad}/text.txt'", "writable"),
    ("--workdir=s3:/bucket/x", "workdir='s3:/bucket/x'", "give s3://BUCKET/PATH, or a folder"),
    ("--workdir=gs://", "workdir='gs://'", "give gs://BUCKET/PATH, or a folder"),
    ("--workdir=file:/x", "workdir='file:/x'", "give file:///PATH, or a folder"),
    ("--workdir={bad}/text.txt/under/it", "workdir='{bad}/text.txt/under/it'", "writable"),
    ("--bogus", "bogus", ""),
    ("--bogus=3", "bogus", ""),
    ("--dry_run=perhaps", "dry_run", ""),
    ("quickstart", "'quickstart'", "unexpected argument"),
]


# A dry run refuses the same; but it writes nowhere, so it does not mind the workdir.
DRY = [(False, *row) for row in MISTAKES] + [(True, *m) for m in MISTAKES if "workdir" not in m[0]]


@pytest.mark.parametrize(("dry", "argument", "names", "right"), DRY, ids=str)
def test_mistakes(single, bad_data, tmp_path, monkeypatch, capsys, dry, argument, names, right):
    """Status 2 and one line that names the setting and what would be right; nothing written."""
    monkeypatch.chdir(tmp_path)
    places = {"bad": bad_data, "root": ROOT}
    before = sorted(bad_data.rglob("*"))
    argument, names = argument.format(**places), names.format(**places)
    # A flag that is given twice would be joined with the first (tuples), so the first goes.
    kept = [flag for flag in single if flag.split("=")[0] != argument.split("=")[0]]
    extra = ["--dry_run"] if dry else []
    assert run(*kept, *extra, argument) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert names in captured.err and right in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert not list(tmp_path.iterdir()) and sorted(bad_data.rglob("*")) == before


def test_a_config_file_without_a_sweep(tiny_corpus_path, tmp_path, capsys):
    config = f"--config={ROOT / 'bitnet_jax' / 'configs' / 'default.py'}"
    assert run("--sweep", config, f"--workdir={tmp_path / 'w'}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {config}: it declares no sweep") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "names", "right"),
    [
        ("--config.precision=fp16", "precision='fp16'", "config.sweep"),
        ("--config.model.size=56k", "model.size='56k'", "config.sweep"),
        ("--config.sweep.sizes=()", "sweep='tiny'", "no points"),
        ("--config.sweep.sizes=('27k','27k')", "sweep='tiny'", "occurs twice"),
        ("--config.sweep.sizes=('27k','28k')", "model.size='28k'", "choose from"),
        ("--config.sweep.size=('27k',)", "config.sweep.size", "did you mean sweep.sizes?"),
        ("--config.sweep.precisions=('ternary','fp15')", "precision='fp15'", "choose from"),
    ],
)
def test_mistakes_with_a_sweep(sweep_file, tmp_path, capsys, argument, names, right):
    arguments = ("--sweep", f"--config={sweep_file}", f"--workdir={tmp_path / 'w'}", argument)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert names in error and right in error
    assert not list(tmp_path.iterdir())


# A sweep, end to end


@pytest.fixture(scope="module")
def finished(sweep_file, tmp_path_factory):
    """The workdir of a finished sweep, and its exit status."""
    workdir = tmp_path_factory.mktemp("results")
    return workdir, run("--sweep", f"--config={sweep_file}", f"--workdir={workdir}")


def test_sweep_leaves_table_fits_figure_and_report(finished):
    workdir, status = finished
    assert status == 0
    table = table_of(workdir)
    assert [column for column in table if column in CONTRACT] == CONTRACT
    assert len(table) == 12 and (table["status"] == "ok").all()
    assert table[CONTRACT].notna().all().all()
    assert set(table["tokens"]) == {1280, 2560, 5120} and set(table["sweep"]) == {"tiny"}
    for _, curve in table.groupby("run_id"):
        assert curve.sort_values("tokens")["loss"].is_monotonic_decreasing
    folder = workdir / "tiny"
    for path in ("figures/loss_vs_compute.png", "report.html", "ngrams.json"):
        assert (folder / path).stat().st_size > 100
    document = json.loads((folder / "fits.json").read_text())
    assert set(document["fits"]) == {"ternary", "fp16"}
    power = document["fits"]["fp16"]["power"]
    assert power["n_points"] == 6 and power["objective"] == "huber"
    assert "byte trigram (Witten-Bell)" in document["references"]
    assert "experiments.run --sweep" in document["facts"]["command"]
    rows = [row for p in folder.glob("runs/*/summary.json") for row in
            json.loads(p.read_text())["endpoints"]]  # fmt: skip
    merged = table.merge(pd.DataFrame(rows), on=["run_id", "tokens"], suffixes=("", "_summary"))
    assert len(merged) == 12 and (merged["loss"] == merged["loss_summary"]).all()


def test_second_launch_trains_nothing(finished, sweep_file, trained, capsys):
    workdir, _ = finished
    before = table_of(workdir)
    times = {p: p.stat().st_mtime_ns for p in workdir.glob("tiny/runs/*/*")}
    assert len(times) >= 16
    assert run("--sweep", f"--config={sweep_file}", f"--workdir={workdir}") == 0
    assert trained == []
    assert {p: p.stat().st_mtime_ns for p in workdir.glob("tiny/runs/*/*")} == times
    pd.testing.assert_frame_equal(table_of(workdir), before)
    out = capsys.readouterr().out
    assert "\x1b" not in out, "no escapes in a pipe"
    for text in ("tiny: endpoints", "ternary", "bits/byte", "report.html", "loss_vs_compute.png",
                 "12 endpoints", "byte trigram", "points"):  # fmt: skip
        assert text in out


def test_dry_run_of_finished_runs(finished, sweep_file, capsys):
    workdir, _ = finished
    times = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    assert run("--sweep", f"--config={sweep_file}", f"--workdir={workdir}", "--dry_run") == 0
    out = capsys.readouterr().out
    assert out.count("done") == 4 and "still to do 0:" in out
    assert "median of 4 finished runs" in out
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == times


def test_adding_a_size_trains_only_the_new_one(finished, sweep_file, trained, capsys):
    workdir, _ = finished
    before = table_of(workdir)
    sizes = "--config.sweep.sizes=('27k','56k','95k')"
    assert run("--sweep", f"--config={sweep_file}", f"--workdir={workdir}", sizes) == 0
    assert len(trained) == 2 and all(run_id.startswith("95k") for run_id in trained)
    table = table_of(workdir)
    assert len(table) == 18
    kept = table[table["run_id"].isin(before["run_id"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before)
    # And taking it away again leaves its rows out of the table, not out of the workdir.
    assert run("--sweep", f"--config={sweep_file}", f"--workdir={workdir}") == 0
    pd.testing.assert_frame_equal(table_of(workdir), before)
    assert len(list(workdir.glob("tiny/runs/*"))) == 6


def test_a_failing_run_does_not_stop_the_others(
    finished, sweep_file, tmp_path, monkeypatch, capsys
):
    """One arm cannot compile: it is `failed`, the other arm is complete, and a retry mends it."""
    workdir, _ = finished
    arguments = ("--sweep", f"--config={sweep_file}", f"--workdir={tmp_path}")

    def compiled(config, *shape):
        if config.precision.quantized:
            raise RuntimeError("no kernel\nfor this")
        return compiled_steps(config, *shape)

    with monkeypatch.context() as patch:
        patch.setattr(programs, "compiled_steps", compiled)
        assert run(*arguments) == 1
    out = capsys.readouterr().out
    assert "FAILED: no kernel;" in out and "failure.txt" in out
    table = table_of(tmp_path)
    assert len(table) == 12
    failed = table[table["precision"] == "ternary"]
    assert (failed["status"] == "failed").all() and failed["loss"].isna().all()
    expected = table_of(workdir)
    others = table[table["precision"] == "fp16"]
    assert list(others["loss"]) == list(expected[expected["precision"] == "fp16"]["loss"])
    assert "6 of 12 endpoints did not finish" in (tmp_path / "tiny" / "report.html").read_text()
    (failure, _) = tmp_path.glob("tiny/runs/*/failure.txt")
    assert "RuntimeError: no kernel" in failure.read_text()
    assert run(*arguments) == 0
    assert list(table_of(tmp_path)["loss"]) == list(expected["loss"])


@pytest.mark.parametrize("sweeping", [False, True])
def test_divergence_is_status_one(single, sweep_file, tmp_path, capsys, sweeping):
    config = ["--sweep", f"--config={sweep_file}"] if sweeping else single
    arguments = (*config, "--config.optim.peak_lr=1e30", f"--workdir={tmp_path}")
    assert run(*arguments) == 1
    assert "DIVERGED" in capsys.readouterr().out
    table = table_of(tmp_path)
    assert set(table["status"]) == {"diverged"} and len(table) == (12 if sweeping else 2)
    assert run(*arguments) == 1, "and stays so, without training again"
    assert (tmp_path / "tiny" / "report.html").exists() == sweeping


def test_one_run_without_sweep(single, tmp_path, capsys):
    assert run(*single, f"--workdir={tmp_path}") == 0
    table = table_of(tmp_path)
    assert list(table["tokens"]) == [2560, 5120] and set(table["precision"]) == {"fp32"}
    out = capsys.readouterr().out
    assert "2 endpoints" in out and str(tmp_path / "tiny") in out
    assert not (tmp_path / "tiny" / "report.html").exists()


def test_the_default_sweep_is_the_quickstart(tiny_corpus_path, tmp_path, capsys):
    data = f"--config.data.source={tiny_corpus_path}"
    assert run("--sweep", data, f"--workdir={tmp_path / 'w'}", "--dry_run") == 0
    assert "quickstart: " in capsys.readouterr().out


# Interruption


def test_stop_request_and_dry_run_of_an_interrupted_run(single, tmp_path, monkeypatch, capsys):
    """A signal during the run: 143 for SIGTERM, and the next launch goes on."""
    original = local.train_group

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    arguments = (*single, f"--workdir={tmp_path}")
    with monkeypatch.context() as patch:
        patch.setattr(local, "train_group", interrupted)
        assert run(*arguments) == 143
    assert {s: signal.getsignal(s) for s in handlers} == handlers, "as they were before"
    assert "To go on, give the same command again" in capsys.readouterr().out
    assert run(*arguments, "--dry_run") == 0
    assert " resume " in capsys.readouterr().out
    assert not (tmp_path / "tiny" / "endpoints.parquet").exists()
    assert run(*arguments) == 0
    assert (table_of(tmp_path)["status"] == "ok").all()


@pytest.mark.parametrize("when", ["quiet_libraries", "make_plan", "collect"])
def test_ctrl_c_before_and_after_the_training(single, tmp_path, monkeypatch, capsys, when):
    """One line and its status, whenever it comes."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"experiments.run.{when}", interrupted)
    assert run(*single, f"--workdir={tmp_path}") == 130
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("interrupted; all is saved")


@pytest.mark.slow
def test_ctrl_c_then_the_printed_command(tiny_overrides, tmp_path):
    """130, how to go on, and by just that command the endpoints of an undisturbed run."""
    longer = {"train.tokens": (2000 * 128, 4000 * 128), "log.every": 20}
    flags = [f"--config.{key}={value}" for key, value in {**tiny_overrides, **longer}.items()]
    command = [sys.executable, "-m", "experiments.run", *flags]
    workdir = tmp_path / "a b"  # a name that a shell would split
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size for p in workdir.glob("tiny/runs/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error and "\x1b" not in out
    assert not list(workdir.glob("tiny/runs/*/summary.json")), "it was too late to interrupt"
    (hint,) = [line for line in out.splitlines() if "-m experiments.run" in line]
    again = shlex.split(hint)
    again[0] = sys.executable
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run(*flags, f"--workdir={tmp_path / 'c'}") == 0
    drop = ["wall_s", "git_commit"]
    pd.testing.assert_frame_equal(
        table_of(workdir).drop(columns=drop), table_of(tmp_path / "c").drop(columns=drop)
    )
    logs = [
        next(w.glob("tiny/runs/*/metrics.jsonl")).read_bytes() for w in (workdir, tmp_path / "c")
    ]
    assert logs[0] == logs[1]


# What a person reads


def test_numbers_for_people():
    assert [display.count(n) for n in (7, 999, 1310, 1.31e6, 2.5e9, 4e12)] == [
        "7", "999", "1.31k", "1.31M", "2.5B", "4T",
    ]  # fmt: skip
    assert [display.duration(s) for s in (0, 59.4, 59.6, 125, 3725)] == [
        "0:00", "0:59", "1:00", "2:05", "1:02:05",
    ]  # fmt: skip
