"""Two processes of four made-up devices each, which train a run together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from bitnet_jax import hosts
from bitnet_jax.errors import ConfigError
from experiments.run import main

ROOT = Path(__file__).parent.parent
STEPS = 80  # enough of them that a signal comes in between
RUN = {"train.tokens": (128 * 20, 128 * STEPS), "log.every": 1, "log.layers": False,
       "model.kv_heads": 2, "mesh.data": 8, "precision": "fp32"}  # fmt: skip
PATIENCE = 300  # seconds; only a failing test takes them


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pair:
    """The main command in two processes."""

    def __init__(self, overrides, workdir, own=("", "")):
        port = free_port()
        self.folder = workdir / "single"
        self.processes = [
            start(overrides, workdir, 4, f"--distributed=127.0.0.1:{port}", "--processes=2",
                  f"--process={i}", *own[i].split())
            for i in (0, 1)
        ]  # fmt: skip

    def ended(self):
        self.texts = [process.communicate(timeout=PATIENCE)[1] for process in self.processes]
        return [process.returncode for process in self.processes]

    def log(self):
        (file,) = self.folder.glob("runs/*/metrics.jsonl")
        return file.read_bytes()

    def ticks(self):
        return sorted(int(p.name) for p in self.folder.glob("runs/*/checkpoints/*"))


def start(overrides, workdir, devices, *more):
    flags = [
        f"--config.{key}={value}" for key, value in {**overrides, **RUN}.items() if key != "name"
    ]
    made_up = f"--xla_force_host_platform_device_count={devices}"
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"]}
    cheap = f"{made_up} --xla_backend_optimization_level=0"
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", f"--workdir={workdir}", *flags, *more],
        cwd=ROOT, env={**os.environ, **cache, "XLA_FLAGS": cheap, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tiny_overrides, tmp_path_factory):
    pair = Pair(tiny_overrides, tmp_path_factory.mktemp("pair"))
    assert pair.ended() == [0, 0], pair.texts
    return pair


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_one_step_and_they_go_on_to_the_bit(
    undisturbed, tiny_overrides, tmp_path
):
    pair = Pair(tiny_overrides, tmp_path)
    deadline = time.monotonic() + PATIENCE
    while not list(pair.folder.glob("runs/*/metrics.jsonl")) or len(pair.log()) < 600:
        assert time.monotonic() < deadline and pair.processes[0].poll() is None
        time.sleep(0.02)
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.ended() == [143, 143], pair.texts
    (tick,) = pair.ticks()
    assert 0 < tick < STEPS and not list(pair.folder.glob("runs/*/summary.json"))
    pair = Pair(tiny_overrides, tmp_path)
    assert pair.ended() == [0, 0], pair.texts
    assert pair.log() == undisturbed.log()


@pytest.mark.slow
def test_two_processes_compute_what_one_does(undisturbed, tiny_overrides, tmp_path):
    """In float32, until its rounding grows: the first twenty steps. The summary says that
    there were eight devices."""
    alone = start(tiny_overrides, tmp_path, 8)
    assert alone.wait(PATIENCE) == 0
    (folder,) = (tmp_path / "single" / "runs").iterdir()
    logs = [(folder / "metrics.jsonl").read_bytes(), undisturbed.log()]
    losses = [[json.loads(line)["loss"] for line in log.splitlines()[1:21]] for log in logs]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    (other,) = (undisturbed.folder / "runs").iterdir()
    ours, theirs = (json.loads((p / "summary.json").read_text()) for p in (folder, other))
    assert ours["device"] == theirs["device"] and ours["device"].startswith("8x ")
    assert ours["run_id"] == theirs["run_id"] and ours["groups"] == theirs["groups"] == [1]


@pytest.mark.slow
def test_processes_that_disagree_train_nothing(tiny_overrides, tmp_path):
    pair = Pair(tiny_overrides, tmp_path, own=("", "--config.seed=3"))
    assert pair.ended() == [2, 2]
    for text in pair.texts:
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: the runs: the 2 processes of --distributed differ in it")
    assert not pair.folder.exists()


@pytest.mark.slow
def test_processes_that_share_no_folder_train_nothing(tiny_overrides, tmp_path):
    """Each would wait forever for the other's part of the first checkpoint."""
    pair = Pair(tiny_overrides, tmp_path, own=("", f"--workdir={tmp_path / 'other'}"))
    assert pair.ended() == [2, 2]
    for text in pair.texts:
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert "not all 2 processes see what the first one writes there" in line
    assert not list(tmp_path.glob("*/single/runs")) and not list(pair.folder.iterdir())


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--processes=2"], "--processes: only with --distributed=HOST:PORT"),
        (["--process=0"], "--process: only with --distributed=HOST:PORT"),
        (["--distributed=auto", "--process=0"], "--process: --distributed=auto finds it"),
        (["--distributed=here"], "--distributed='here': give auto, or HOST:PORT"),
        (["--distributed=:1"], "--distributed=':1': give auto, or HOST:PORT"),
        (["--distributed=a:65536"], "--distributed='a:65536': give auto, or HOST:PORT"),
        (["--distributed=a:1"], "--processes=0: say how many"),
        (["--distributed=a:1", "--processes=2"], "--process=-1: of 0 to 1"),
        (["--distributed=a:1", "--processes=2", "--process=2"], "--process=2: of 0 to 1"),
        (["--distributed=auto", "--dry_run"], "--dry_run: one process does it"),
        (["--distributed=auto", "--sweep", "--launcher=slurm"], "--launcher=slurm: one process"),
        (["--distributed=auto", "--reproduce=x"], "--reproduce: one process does it"),
    ],
    ids=" ".join,
)
def test_mistakes(tmp_path, capsys, flags, names):
    assert main(["run", *flags, f"--workdir={tmp_path / 'w'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and names in error
    assert not list(tmp_path.iterdir())


def test_a_process_alone_agrees_with_itself():
    assert hosts.first() and not hosts.several()
    assert hosts.any_of(True) and not hosts.any_of(False)
    assert hosts.told("grüße") == "grüße"
    hosts.check_equal("anything", "x")


def test_auto_where_nobody_says_who_there_is(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "TPU", "JAX_COORD", "CLOUD_TPU", "KUBERNETES")):
            monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="^--distributed='auto': "):
        hosts.start("auto", 0, -1)

    def initialize(**place):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)  # as it says in a new process
    with pytest.raises(ConfigError, match="^--distributed='auto': neither Slurm, a TPU pod, GKE"):
        hosts.start("auto", 0, -1)


def test_who_stays_away_is_waited_for_aloud(monkeypatch, capfd):
    monkeypatch.setattr(hosts, "PATIENCE", 0.05)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: time.sleep(0.5))
    hosts.start("a:1", 2, 0)
    assert capfd.readouterr().err == "waiting for all 2 processes at a:1, for 300 s at most\n"
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    hosts.start("a:1", 2, 0)
    time.sleep(0.2)
    assert capfd.readouterr().err == ""
