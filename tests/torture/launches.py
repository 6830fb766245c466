"""Launchers as processes of their own: most are forked, since to start Python and JAX anew takes
seconds, and the others are started as a user would."""

import atexit
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments import run

ROOT = Path(__file__).parent.parent.parent


@dataclasses.dataclass
class Launch:
    """A launcher's process, the leader of its process group. log: what it says, both streams."""

    pid: int
    log: Path
    process: subprocess.Popen | None = None
    status: int | None = None

    def ended(self) -> bool:
        """Whether it has; `status` is then its exit status, or minus the signal that killed it."""
        if self.status is None and self.process is not None:
            self.status = self.process.poll()
        elif self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def signal(self, number: int) -> None:
        """To the launcher and all that it has started. Its leader is not yet waited for."""
        os.killpg(self.pid, number)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


def fork(arguments: Sequence[str], log: Path) -> Launch:
    """`experiments.run` in a fork of this process, which must not have used JAX's backend."""
    pid = in_fork(lambda: run.main(["run", *arguments]), log)
    return Launch(pid, log)


def start(arguments: Sequence[str], log: Path) -> Launch:
    """`python -m experiments.run`."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.run", *arguments],
            cwd=ROOT, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    return Launch(process.pid, log, process)


def in_fork(action: Callable[[], int], log: Path) -> int:
    """The process that does it, in a group of its own, and exits with what it gives."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # here, too, so that a signal finds the group
            os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = action()
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
