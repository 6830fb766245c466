"""A real Slurm of two nodes on this machine's loopback addresses, for the tests of this folder."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
UP = Path(__file__).parent / "up.sh"


def missing():
    """Why there can be no Slurm here, or nothing."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"  # where Debian has the daemons
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.name == "posix" and Path("/proc").is_dir() else "no Linux"


def free_port():
    """The first of three in a row."""
    for port in range(20_000 + os.getpid() % 1000 * 10, 32_000, 3):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for i in range(3):
                sock = stack.enter_context(socket.socket())
                sock.bind(("", port + i))
            return port
    raise OSError("no free ports")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Brings it up, for this process's commands, too, and takes it down."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    up = subprocess.run([UP, folder, str(free_port())], capture_output=True, text=True, timeout=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            if up.returncode:
                log = folder / "log" / "slurmctld.log"
                said = log.read_text()[-2000:] if log.exists() else ""
                pytest.fail(f"Slurm does not come up:\n{up.stdout}{up.stderr}{said}")
            yield
        finally:
            down(folder)


def down(folder):
    """Jobs, nodes, controller, munged, in this order; what does not end by itself is killed."""
    pids = [int(path.read_text()) for path in folder.glob("run/slurm*.pid")]
    munged = [int(path.read_text()) for path in folder.glob("run/munged.pid")]
    subprocess.run(["scancel", "--user", str(os.getuid())], capture_output=True)
    ended(lambda: not subprocess.run(["squeue", "--noheader"], capture_output=True).stdout)
    subprocess.run(["scontrol", "shutdown"], capture_output=True)
    ended(lambda: not any(alive(pid) for pid in pids))
    for number, own in ((signal.SIGKILL, pids), (signal.SIGTERM, munged)):
        for pid in own:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def ended(happened, seconds=15):
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.1)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
