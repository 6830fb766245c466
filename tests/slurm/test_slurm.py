"""Sweeps on a real Slurm: an array of workers that is killed, preempted and loses a node ends with
what an undisturbed launch ends with, to the bit."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pandas as pd
import pytest

from experiments.run import main

pytestmark = pytest.mark.slow
SWEEP = """
from bitnet_jax.configs import default
from sweeps.grid import axis, product


def get_config(arg=None):
    c = default.get_config()
    c.update_from_flattened_dict({overrides!r})
    return c


def sweep(c):
    return product(axis("precision", ("ternary", "fp16")), axis("seed", (0, 1, 2, 3)))
"""
STEPS = (400, 1000)


@pytest.fixture(scope="module")
def flags(tiny_overrides, tmp_path_factory):
    """Of a sweep of eight runs, each of which trains for some seconds."""
    file = tmp_path_factory.mktemp("sweeps") / "tiny.py"
    overrides = {**tiny_overrides, "train.tokens": tuple(128 * steps for steps in STEPS),
                 "log.every": 50, "checkpoint.seconds": 0.5, "launch.group": 1,
                 "launch.parallel": 1, "slurm.minutes": 10}  # fmt: skip
    del overrides["precision"]
    file.write_text(SWEEP.format(overrides=overrides))
    return ["run", "--sweep", f"--config={file}"]


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """What is compiled here is not compiled by every worker again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.values["jax_compilation_cache_dir"])
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        yield


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    more = ["--config.launch.parallel=2", "--config.checkpoint.seconds=60"]
    assert main([*flags, f"--workdir={workdir}", *more]) == 0
    return workdir


def slurm(command):
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait(happened, what, seconds=90):
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, f"{what}\n{slurm('squeue --array')}"
        time.sleep(0.1)
    return found


def jobs(array):
    """State, node, restarts and id of the array's jobs by place."""
    shown = slurm(f"scontrol --oneliner show job {array}")
    keys = r"JobId=(\d+) .*?ArrayTaskId=(\d+) .*?JobState=(\S+) .*?Restarts=(\d+)"
    pattern = keys + r" .*? NodeList=(\S*)"
    return {int(place): {"id": job, "state": state, "restarts": int(restarts), "node": node}
            for job, place, state, restarts, node in re.findall(pattern, shown)}  # fmt: skip


def training(folder, since=()):
    """(pid, bytes of its log) by run, of those that are held by a live worker and have a log; not
    the pids `since`."""
    found = {}
    for lease in folder.glob("leases/*-*.*"):
        record = json.loads(lease.read_bytes() or b"{}")
        run = folder / "runs" / lease.name.rpartition(".")[0]
        log = run / "metrics.jsonl"
        fresh = not record.get("released") and record.get("pid") not in since
        if fresh and log.exists() and not (run / "summary.json").exists():
            found[run.name] = record["pid"], log.stat().st_size
    return found


def grows(folder, since=()):
    """The pids of workers that are seen to train."""
    before = training(folder, since)
    time.sleep(0.3)
    after = training(folder, since)
    return {pid for run, (pid, size) in after.items() if run in before and size > before[run][1]}


def test_a_disturbed_sweep_ends_with_the_undisturbed_ones_endpoints(
    cluster, flags, undisturbed, tmp_path, capsys
):
    folder, began = tmp_path / "tiny", time.monotonic()
    given = [*flags, f"--workdir={tmp_path}", "--launcher=slurm", "--config.slurm.workers=2",
             f"--config.slurm.cpus={os.cpu_count()}"]  # fmt: skip
    assert main(given) == 0
    array = re.search(r"submitted array (\d+): 2 workers", capsys.readouterr().out)[1]
    seen = set()

    # A worker's process is killed: 137, requeued, gone on.
    pids = wait(lambda: grows(folder), "no worker trains")
    os.kill(victim := min(pids), signal.SIGKILL)
    seen.add(victim)
    wait(lambda: sum(job["restarts"] for job in jobs(array).values()) == 1, "not requeued")

    # A higher partition wants both nodes: all are stopped, saved, requeued.
    pids = wait(lambda: grows(folder, seen), "no worker trains after the kill")
    seen |= pids
    before = sum(job["restarts"] for job in jobs(array).values())
    high = slurm(f"sbatch --parsable --partition=high --nodes=2 --exclusive "
                 f"--output={tmp_path}/high.log --wrap 'sleep 1'").strip()  # fmt: skip
    wait(lambda: "JobState=COMPLETED" in slurm(f"scontrol show job {high}"), "not preempted")
    wait(lambda: sum(j["restarts"] for j in jobs(array).values()) > before, "not requeued")
    assert any("all is saved" in log.read_text() for log in folder.glob("slurm/*.log"))
    assert main([*given, "--status"]) == 0
    shown = capsys.readouterr().out
    assert f"{array}_0" in shown and f"{array}_1" in shown
    assert re.search(r"8 runs: \d done, \d running, \d waiting, 0 failed", shown)

    # A node goes down, and comes back.
    wait(lambda: grows(folder, seen), "no worker trains after the preemption")
    running = [job for job in jobs(array).values() if job["state"] == "RUNNING"]
    node, restarts = running[0]["node"], sum(job["restarts"] for job in jobs(array).values())
    slurm(f"scontrol update nodename={node} state=down reason=test")
    wait(lambda: sum(job["restarts"] for job in jobs(array).values()) > restarts, "not requeued")
    # It may have come back by itself, as Slurm's ReturnToService says.
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True)
    wait(lambda: "DOWN" not in slurm(f"scontrol show node {node}"), "the node is not back")

    wait(lambda: {j["state"] for j in jobs(array).values()} == {"COMPLETED"}, "not done", 120)
    assert len(list(folder.glob("runs/*/summary.json"))) == 8
    assert main([*given, "--status"]) == 0
    assert "8 runs: 8 done, 0 running, 0 waiting, 0 failed" in capsys.readouterr().out
    assert main(given) == 0 and "nothing to submit" in capsys.readouterr().out
    assert main([*flags, f"--workdir={tmp_path}"]) == 0
    tables = [pd.read_parquet(w / "tiny" / "endpoints.parquet") for w in (tmp_path, undisturbed)]
    drop = ["wall_s", "git_commit"]
    pd.testing.assert_frame_equal(*(table.drop(columns=drop) for table in tables))
    assert len(tables[0]) == 16 and (tables[0]["status"] == "ok").all()
    for path in undisturbed.glob("tiny/runs/*/metrics.jsonl"):
        twin = tmp_path / path.relative_to(undisturbed)
        assert twin.read_bytes() == path.read_bytes(), path.parent.name
    assert os.listdir(folder / "leases") == []
    assert not list(folder.glob("runs/*/failures.json"))
    print(f"submission to results: {time.monotonic() - began:.0f} s")


def rank(number, folder):
    """The pid of a process of the gang that trains in a folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        mine = f"--workdir={folder.parent}".encode() in command and command[0] != b"srun"
        if mine and f"SLURM_PROCID={number}".encode() in environment:
            return int(process.name)
    return None


def test_a_gang_goes_on_when_one_of_its_processes_is_killed(cluster, tiny_overrides, tmp_path):
    """A process on each of two nodes; to the bits of two started by hand and left alone."""
    file = tmp_path / "gang.py"
    overrides = {**tiny_overrides, "train.tokens": (128 * 40, 128 * 80),
                 "log.every": 2, "checkpoint.seconds": 1.0, "mesh.data": 2}  # fmt: skip
    file.write_text(SWEEP.format(overrides=overrides).replace("(0, 1, 2, 3)", "(0,)").replace(
        '("ternary", "fp16")', '("ternary",)'))  # fmt: skip
    sweep = ["--sweep", f"--config={file}"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"--distributed=127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "experiments.run", *sweep, "--worker", address,
               "--processes=2", f"--workdir={tmp_path / 'alone'}"]  # fmt: skip
    pair = [subprocess.Popen([*command, f"--process={i}"]) for i in (0, 1)]
    assert [process.wait(240) for process in pair] == [0, 0]
    folder = tmp_path / "slurm" / "tiny"
    given = ["run", *sweep, f"--workdir={folder.parent}", "--launcher=slurm",
             "--config.slurm.processes=2", "--config.slurm.nodes=2",
             "--config.slurm.minutes=10"]  # fmt: skip
    assert main(given) == 0
    wait(lambda: grows(folder), "the gang does not train")
    os.kill(rank(1, folder), signal.SIGKILL)
    wait(lambda: list(folder.glob("runs/*/summary.json")), "it does not go on", 240)
    logs = [next(place.glob("runs/*/metrics.jsonl")).read_bytes()
            for place in (folder, tmp_path / "alone" / "tiny")]  # fmt: skip
    assert logs[0] == logs[1] and logs[0].count(b"\n") > 80 / 2
    wait(lambda: not list(folder.glob("leases/*")), "it does not end")


def test_cancel_takes_the_sweeps_jobs_and_no_others(cluster, flags, tmp_path, capsys):
    """While they train: they stay away, though a worker that is stopped is otherwise requeued."""
    given = [*flags, f"--workdir={tmp_path / 'a'}", "--launcher=slurm", "--config.slurm.workers=3",
             f"--config.slurm.cpus={os.cpu_count()}"]  # fmt: skip
    name = "bitnet_jax.tiny.00000000"
    other = slurm(f"sbatch --parsable --hold --job-name={name} --wrap 'sleep 99'").strip()
    assert main(given) == 0
    array = re.search(r"submitted array (\d+)", capsys.readouterr().out)[1]
    elsewhere = [flag.replace(f"{tmp_path}/a", f"{tmp_path}/b") for flag in given]
    assert main([*elsewhere, "--cancel"]) == 0
    assert "no jobs" in capsys.readouterr().out
    wait(lambda: grows(tmp_path / "a" / "tiny"), "no worker trains")
    assert main([*given, "--cancel"]) == 0
    assert "cancelled 3 jobs" in capsys.readouterr().out
    wait(lambda: not slurm(f"squeue --noheader --job={array}"), "not cancelled")
    time.sleep(7)  # more than a requeued job waits
    assert {job["state"] for job in jobs(array).values()} == {"CANCELLED"}
    assert "PENDING" in slurm(f"squeue --noheader --job={other} --format=%T")
    slurm(f"scancel {other}")


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.slurm.partition=bogus", "slurm.partition='bogus': unknown to this cluster; "
         "choose from high, low"),
        ("--config.slurm.minutes=61", "slurm.minutes=61: partition low allows 60"),
        ("--config.slurm.gpus=2", "sbatch: "),
    ],
)  # fmt: skip
def test_what_this_cluster_does_not_have(cluster, flags, tmp_path, capsys, flag, says):
    """Refused in one line, be it by Slurm; no job is there then."""
    before = slurm("squeue --noheader --format=%i")
    assert main([*flags, f"--workdir={tmp_path}", "--launcher=slurm", flag]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says}") and error.count("\n") == 1
    assert slurm("squeue --noheader --format=%i") == before
