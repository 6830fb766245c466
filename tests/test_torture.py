"""The torture of a sweep: a short one, and whether it would see what it looks for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_files import flipped
from test_train import SHORT

from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.files import read_json, write_json
from bitnet_jax.train import train_and_evaluate
from experiments.collect import collect
from tests.torture import watch
from tests.torture.compare import differences

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def undisturbed(tiny_config, tiny_corpus, tmp_path_factory):
    """A sweep of one run, as it is when it has finished."""
    config = tiny_config(SHORT)
    spec = resolve(config, tiny_corpus)
    sweep = tmp_path_factory.mktemp("undisturbed") / "tiny"
    directory = sweep / "runs" / spec.run_id
    train_and_evaluate(spec, tiny_corpus, directory, loop_options(config), config.to_dict())
    collect(sweep)
    return sweep


def nothing(sweep, run):
    """Leave it as it is."""


def another_clock(sweep, run):
    document = read_json(run / "summary.json")
    document["wall_s"] = document["endpoints"][0]["wall_s"] = 1e6
    document["endpoints"][1]["git_commit"] = "other"
    write_json(run / "summary.json", document)


def other_checkpoints(sweep, run):
    shutil.rmtree(next((run / "checkpoints").iterdir(), run / "none"), ignore_errors=True)
    (run / "checkpoints" / "12").mkdir()


def last_bit_of_a_loss(sweep, run):
    table = pd.read_parquet(sweep / "endpoints.parquet")
    table.loc[1, "loss"] = np.nextafter(table.loc[1, "loss"], 9)
    table.to_parquet(sweep / "endpoints.parquet", index=False)


def a_row_less(sweep, run):
    table = pd.read_parquet(sweep / "endpoints.parquet")
    table[:1].to_parquet(sweep / "endpoints.parquet", index=False)


def a_byte_of_the_log(sweep, run):
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b" ")


def another_model(sweep, run):
    document = read_json(run / "summary.json")
    write_json(run / "summary.json", {**document, "model": "0" * 16})


def a_bit_of_the_model(sweep, run):
    for path in (run / "model").rglob("d/*"):
        flipped(path)


def other_skips(sweep, run):
    write_json(run / "summary.json", {**read_json(run / "summary.json"), "skipped_steps": 1})


def a_lost_run(sweep, run):
    shutil.rmtree(run)


def a_temporary(sweep, run):
    (run / ".summary.json.0123").touch()


def a_torn_checkpoint(sweep, run):
    (run / "checkpoints" / "14.orbax-checkpoint-tmp" / "state").mkdir(parents=True)


def a_lease(sweep, run):
    (sweep / "leases").mkdir()
    (sweep / "leases" / f"{run.name}.1").touch()


@pytest.mark.parametrize("change", [nothing, another_clock, other_checkpoints])
def test_what_may_differ(undisturbed, tmp_path, change):
    sweep = tmp_path / "tiny"
    shutil.copytree(undisturbed, sweep)
    (run,) = sweep.glob("runs/*")
    change(sweep, run)
    assert differences(undisturbed, sweep) == []


@pytest.mark.parametrize(
    "change",
    [last_bit_of_a_loss, a_row_less, a_byte_of_the_log, another_model, a_bit_of_the_model,
     other_skips, a_lost_run, a_temporary, a_torn_checkpoint, a_lease],
)  # fmt: skip
def test_what_may_not(undisturbed, tmp_path, change):
    """Each is found; what is left behind is named once, not with all that lies in it."""
    sweep = tmp_path / "tiny"
    shutil.copytree(undisturbed, sweep)
    (run,) = sweep.glob("runs/*")
    change(sweep, run)
    found = differences(undisturbed, sweep)
    assert found and (change is not a_torn_checkpoint or len(found) == 1)


def test_steps_are_counted_by_what_logs_show(undisturbed):
    """The run is 22 ticks: trunk to 8, decay to 10, trunk to 16, decay to 20; a log cut back to its
    beginning shows that all before is made again, and one left alone that nothing is."""
    (run,) = undisturbed.glob("runs/*")
    log = (run / "metrics.jsonl").read_bytes()
    steps = watch.Steps(undisturbed)
    assert steps.look({run.name: len(log)}) and steps.made == {run.name: 22}
    assert not steps.look({run.name: len(log)}) and steps.repeated == {run.name: 0}
    assert not steps.look({run.name: 0}) and steps.repeated == {run.name: 0}
    lines = [json.loads(line) for line in log.splitlines()]
    decayed = next(i for i, line in enumerate(lines) if line.get("step") == 10)
    steps.look({run.name: sum(len(x) for x in log.splitlines(keepends=True)[: decayed + 1])})
    assert steps.made == {run.name: 22 + 10}


def test_a_moment_is_the_coming_of_a_name(tmp_path):
    (tmp_path / "runs" / "a" / "checkpoints" / "7").mkdir(parents=True)
    moment = watch.Moment("a checkpoint", 2, watch.names(tmp_path))
    assert not moment.look(watch.names(tmp_path), True)
    (tmp_path / "runs" / "a" / "checkpoints" / "14").mkdir()
    assert not moment.look(watch.names(tmp_path), False)
    (tmp_path / "runs" / "a" / "checkpoints" / "21.orbax-checkpoint-tmp").mkdir()
    assert not moment.look(watch.names(tmp_path), False)
    (tmp_path / "runs" / "a" / "checkpoints" / "21").mkdir()
    assert moment.look(watch.names(tmp_path), False)
    grows = watch.Moment(watch.LOG_GROWS, 1, set())
    assert not grows.look({"runs"}, False) and grows.look({"runs"}, True)


@pytest.mark.slow
def test_a_sweep_that_is_killed_four_times(tmp_path):
    """Nothing differs from an undisturbed one, nothing is left behind, and each launch ended as it
    should."""
    out = tmp_path / "torture.json"
    command = [sys.executable, "-m", "tests.torture", "--kills=4", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = read_json(out)
    assert found["stops"]["SIGKILL"] == 4 and found["differences"] == []
    assert found["runs"] == 16 * found["sweeps"] and found["environment"]["platform"] == "cpu"
