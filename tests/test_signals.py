"""A second signal, sent while the first is being answered: the process ends at once, and what it
has saved before is whole. The first alone is in `test_run.py`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from experiments.run import main

ROOT = Path(__file__).parent.parent
SWEEP = """
from bitnet_jax.configs import default
from sweeps.grid import axis


def get_config(arg=None):
    c = default.get_config()
    c.update_from_flattened_dict({overrides!r})
    return c


def sweep(c):
    return axis("optim.peak_lr", (0.01, 0.02))
"""
# Two runs side by side. Both have a checkpoint when the signal comes; neither ever comes to the end
# of the save that it asks for.
CHILD = """
import os, pathlib, signal, sys, threading, time
number, marks = getattr(signal, sys.argv[1]), pathlib.Path(sys.argv[2])

from bitnet_jax.member import Member
from experiments.run import main

save, both, seen = Member.save, threading.Barrier(2), set()


def saved(self, *states):
    if signal.getsignal(number) == signal.SIG_DFL:
        (marks / self.spec.run_id).touch()
        while True:
            time.sleep(1)
    save(self, *states)
    self.checkpointer.wait()
    if self.spec.run_id not in seen:
        seen.add(self.spec.run_id)
        if both.wait(60) == 0:
            os.kill(os.getpid(), number)


Member.save = saved
sys.exit(main(["run", *sys.argv[3:]]))
"""


@pytest.fixture(scope="module")
def sweep_flags(tiny_overrides, tmp_path_factory):
    file = tmp_path_factory.mktemp("sweeps") / "two.py"
    overrides = {**tiny_overrides, "launch.parallel": 2, "launch.group": 1, "checkpoint.seconds": 0}
    file.write_text(SWEEP.format(overrides=overrides))
    return ["--sweep", f"--config={file}"]


@pytest.fixture(scope="module")
def undisturbed(sweep_flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert main(["run", *sweep_flags, f"--workdir={workdir}"]) == 0
    return logs(workdir)


def logs(workdir):
    return {p.parent.name: p.read_bytes() for p in workdir.glob("tiny/runs/*/metrics.jsonl")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_ends_it_at_once(sweep_flags, undisturbed, tmp_path, capsys, name):
    """Whatever each thread is doing. A shell calls that status 130 or 143."""
    marks, workdir = tmp_path / "marks", tmp_path / "w"
    marks.mkdir()
    flags = [*sweep_flags, f"--workdir={workdir}"]
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"]}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, name, str(marks), *flags],
        cwd=ROOT, env=os.environ | cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(list(marks.iterdir())) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        number = getattr(signal, name)
        process.send_signal(number)
        process.communicate(timeout=10)
        assert process.returncode == -number
    finally:
        process.kill()
    checkpoints = list(workdir.glob("tiny/runs/*/checkpoints/*"))
    assert len(checkpoints) >= 2 and not list(workdir.glob("tiny/runs/*/summary.json"))
    capsys.readouterr()
    assert main(["run", *flags, "--dry_run"]) == 0
    assert capsys.readouterr().out.count(" resume ") == 2
    assert main(["run", *flags]) == 0
    assert "warning" not in capsys.readouterr().err, "it goes on from what was saved"
    assert logs(workdir) == undisturbed and len(undisturbed) == 2
