"""Groups spread over eight devices, made up on a CPU, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Runs of ten steps of the tiny shape: half the compilation's time goes without LLVM's
# optimizations, and the process keeps its programs from one launch to the next.
SHORT = {"train.tokens": (640, 1280), "log.every": 3}
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

SCRIPT = """
import json, sys
from pathlib import Path

import jax
import numpy as np

from bitnet_jax import programs
from bitnet_jax.configs import default
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.data import load
from bitnet_jax.member import Job
from bitnet_jax.train import Interrupted, train_group

overrides, workdir = json.loads(sys.argv[1]), Path(sys.argv[2])
assert jax.device_count() == 8
corpus = load(overrides["data.source"])


def launch(folder, members, stop=None):
    jobs = []
    for i in members:
        config = default.get_config()
        config.update_from_flattened_dict(overrides)
        config.train.tokens = tuple(overrides["train.tokens"])
        config.seed, config.optim.peak_lr = i, 0.01 / (i + 1)
        spec = resolve(config, corpus)
        jobs.append(Job(spec, workdir / folder / str(i), config.to_dict()))
    try:
        train_group(jobs, corpus, loop_options(config), should_stop=lambda tick: tick == stop)
    except Interrupted:
        pass
    return jobs[0].spec


def program(spec, runs):
    "Text of the compiled steps, and on how many devices and in what parts the states lie."
    states = programs.compiled_init(spec.step, runs)(np.arange(runs, dtype=np.int32))
    starts = np.zeros((runs, 1, spec.batch_size), np.int32)
    rates = np.full((runs, 1), 0.01, np.float32)
    schedule = programs.Schedule(rates, rates, np.ones(1, np.float32), np.zeros(1, bool))
    steps = programs.compiled_steps(spec.step, runs, spec.data.sequence_length)
    arguments = states, np.asarray(corpus.train), starts, schedule, np.int32(1)
    text = steps.lower(*arguments).compile().as_text()
    embedding = states.params["embedding"]
    parts = [shard.data.shape[0] for shard in embedding.addressable_shards]
    evaluate = programs.compiled_eval(spec.step, runs)
    rows = np.zeros((spec.batch_size, spec.data.sequence_length + 1), np.int32)
    return [text + evaluate.lower(states.params, rows).compile().as_text(), parts]


spec = launch("eight", range(8))
found = {"8": program(spec, 8)}
for stop in (3, 5, 8):
    launch("resumed", range(8), stop)
launch("resumed", range(8))
launch("four", range(4))
found["4"] = program(spec, 4)
for i in (0, 3):
    launch("lone", [i])
(workdir / "programs.json").write_text(json.dumps(found))
"""

COLLECTIVES = (
    "all-reduce", "all-gather", "all-to-all", "collective-permute", "collective-broadcast",
    "reduce-scatter", "partition-id", "replica-id",
)  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tiny_overrides, tmp_path_factory):
    """What a process with eight devices has left behind."""
    directory = tmp_path_factory.mktemp("sharded")
    overrides = json.dumps({**tiny_overrides, **SHORT})
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, overrides, str(directory)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory


def results(directory):
    """Bytes of the metrics, and endpoints without clocks."""
    rows = json.loads((directory / "summary.json").read_text())["endpoints"]
    for row in rows:
        del row["wall_s"], row["git_commit"]
    return (directory / "metrics.jsonl").read_bytes(), rows


@pytest.mark.slow
@pytest.mark.parametrize("runs", [8, 4])
def test_each_device_computes_its_own_runs_and_tells_no_other(workdir, runs):
    """No collective in the programs of steps and of evaluation, and a run on each device."""
    text, parts = json.loads((workdir / "programs.json").read_text())[str(runs)]
    assert text.count("ENTRY") == 2 and "dot(" in text
    assert [name for name in COLLECTIVES if name in text] == []
    assert parts == [1] * runs


@pytest.mark.slow
def test_runs_are_what_they_are_alone(workdir):
    """To float32's rounding over ten steps, on whichever device, in a group of eight or of four."""
    for i in (0, 3):
        lone, four, eight = (results(workdir / name / str(i)) for name in ("lone", "four", "eight"))
        for found in (four, eight):
            assert len(found[0].splitlines()) == len(lone[0].splitlines())
            for row, other in zip(found[1], lone[1], strict=True):
                assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
                assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
                assert row["run_id"] == other["run_id"]
    losses = {results(workdir / "eight" / str(i))[1][1]["loss"] for i in range(8)}
    assert len(losses) == 8


@pytest.mark.slow
def test_a_spread_group_is_resumed_to_the_bit(workdir):
    for i in range(8):
        assert results(workdir / "resumed" / str(i)) == results(workdir / "eight" / str(i))
