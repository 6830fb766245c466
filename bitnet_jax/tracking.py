"""What a run leaves behind: config.json, metrics.jsonl, summary.json, and Weights & Biases.

The local files are the truth. `metrics.jsonl` holds only what the config determines, so that two
runs of one config on one machine write the same bytes, interrupted or not; times and rates go to
the summary and to Weights & Biases.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from bitnet_jax.files import SCHEMA_VERSION
from bitnet_jax.sharding import ONE_DEVICE, MeshShape

WANDB_LINES = 10_000  # that may wait to be sent
WANDB_SECONDS = 30.0  # that a run waits, at its end, for them

JOINED = " + "  # between the values of provenance of a run that went on under another


class MetricsLog:
    """Appends JSON lines to a file, which is first cut back to what the checkpoint knew of.

    After a crash the file may hold lines later than the checkpoint, and half a line: resuming from
    byte `keep` makes them again, equal. The first line, written with the one that follows it, is
    the header: the schema version, and whose log it is.
    """

    def __init__(self, path: Path, run_id: str, keep: int = 0):
        path.touch()
        os.truncate(path, min(keep, path.stat().st_size))  # never padded with NULs
        kept = path.read_bytes()
        self._path, self._run_id, self._hash = path, run_id, hashlib.sha256(kept)
        self._file, self.bytes = open(path, "ab", buffering=0), len(kept)

    def write(self, record: dict[str, Any]) -> None:
        """A line, whole or not at all; OSError where there is no room for it."""
        header = {"kind": "header", "schema_version": SCHEMA_VERSION, "run_id": self._run_id}
        records = [record] if self.bytes else [header, record]
        lines = "".join(json.dumps(each, allow_nan=False) + "\n" for each in records).encode()
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self.bytes)
            raise
        self._hash.update(lines)
        self.bytes += len(lines)

    @property
    def digest(self) -> str:
        """Of all that it holds."""
        return self._hash.hexdigest()

    def sync(self) -> None:
        """What has been written is on disk, whatever happens."""
        os.fsync(self._file.fileno())

    def cut(self, keep: int) -> None:
        """Forget what was written after byte `keep`."""
        self._file.truncate(keep)
        self._hash, self.bytes = hashlib.sha256(self._path.read_bytes()), keep

    def close(self) -> None:
        self.sync()
        self._file.close()


class NoLog:
    """What a process has that writes nothing (`hosts.py`), in place of a log."""

    bytes, digest = 0, ""

    def write(self, record: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, float], step: int) -> None: ...

    def sync(self) -> None: ...

    def cut(self, keep: int) -> None: ...

    def close(self) -> None: ...


def log_begins(path: Path, size: int, digest: str | None) -> bool:
    """Whether a file begins with so many bytes of that SHA-256, or of any where none is given."""
    try:
        with open(path, "rb") as file:
            start = file.read(size)
    except FileNotFoundError:
        start = b""
    return len(start) == size and digest in (None, hashlib.sha256(start).hexdigest())


class Wandb:
    """One Weights & Biases run, or nothing where the mode is `disabled`.

    mode: the config's `tracking.wandb`; where that is unset, $WANDB_MODE; else `offline`.
    It is a copy of what the local files hold: a thread of its own feeds it, so that no step waits
    for it; if it fails or does not answer, the run warns and goes on without it.
    """

    _unreachable = threading.Event()  # once it has not answered, later runs do not try it

    def __init__(self, mode: str | None, project: str, run_id: str, directory: Path, config: dict):
        mode = mode or os.environ.get("WANDB_MODE") or "offline"
        self._waiting: queue.Queue = queue.Queue(WANDB_LINES)
        self._thread: threading.Thread | None = None
        if mode != "disabled" and not self._unreachable.is_set():
            start = functools.partial(_start_wandb, mode, project, run_id, directory, config)
            self._thread = threading.Thread(target=self._feed, args=(start,), daemon=True)
            self._thread.start()

    def _feed(self, start: Callable[[], Any]) -> None:
        try:
            run = start()
            while (item := self._waiting.get()) is not None:
                run.log(item[0], step=item[1])
            run.finish()
        except Exception as error:  # whatever it is, the training matters more
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"warning: Weights & Biases is off for this run: {reason}", file=sys.stderr)

    def log(self, metrics: dict[str, float], tick: int) -> None:
        if self._thread and self._thread.is_alive():
            with contextlib.suppress(queue.Full):  # it is far behind: the local files have it
                self._waiting.put_nowait((metrics, tick))

    def close(self) -> None:
        """Hand over what is left, and wait for it, but not for long."""
        if not self._thread:
            return
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=WANDB_SECONDS)
        self._thread.join(WANDB_SECONDS)
        if self._thread.is_alive():
            self._unreachable.set()
            print("warning: Weights & Biases does not answer; it is left alone", file=sys.stderr)
        self._thread = None


def _start_wandb(mode: str, project: str, run_id: str, directory: Path, config: dict) -> Any:
    import wandb  # imported here: it is slow, and many runs do not want it

    return wandb.init(
        project=project,
        id=run_id,
        name=run_id,
        dir=directory,
        config=config,
        mode=mode,  # type: ignore[arg-type]
        resume="allow" if mode == "online" else None,
        reinit="create_new",  # other runs may be open, of this group or beside it
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )


def provenance(mesh: MeshShape = ONE_DEVICE) -> dict[str, str]:
    """Where results come from: code, versions, device, and how a run was cut over several."""
    cut = "" if mesh == ONE_DEVICE else f", {mesh}"
    return {
        "git_commit": git_commit(),
        "jax_version": jax.__version__,
        "python_version": platform.python_version(),
        "device": f"{jax.device_count()}x {_device_name()}{cut}",
    }


def git_commit() -> str:
    """The commit of this source tree, with `-dirty` where files differ from it; outside of git
    $BITNET_JAX_COMMIT, which a container's image has, or `unknown`."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BITNET_JAX_COMMIT") or "unknown"


def _device_name() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"
