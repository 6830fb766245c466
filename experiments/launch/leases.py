"""Leases on runs, so that launchers that share a sweep's folder never train one run twice at once.

A lease is the file `<run>.<generation>` in `<sweep>/leases/`. To claim a run is to create the
generation after the highest one there, which the file system grants to one claimant alone, also
over NFS. The holder's heartbeat rewrites a counter in it and a lock of the kernel's stays on it for
as long as the process lives. A claimant succeeds a holder that

- released the run; or
- runs on this machine no more: the lock is free, and the record is of this boot and device; or
- let its counter stand still for TIMEOUT seconds of the *claimant's* clock, while it watched.

No time is ever written, so clocks may differ. A holder that was suspended and succeeded finds a
higher generation at its next `check`, which belongs before everything it writes. (Between that look
and the write lies a moment that only the storage itself could guard.)

While a run is unfinished its highest generation stays, released or not: were it deleted, a claimant
that has read it and one that has not would create different files. Of a finished run none stays.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from bitnet_jax.errors import ConfigError

TIMEOUT = 60.0  # seconds that a counter stands still before its holder counts as gone
HEARTBEAT = 5.0  # seconds between counts

_FILE = re.compile(r"(.*)\.([1-9][0-9]{0,14})", re.DOTALL)
_LONGEST_RECORD = 4096  # bytes; what is longer is not one of ours
_LONGEST_STEM = 200  # characters; a file name has room for 255


class LeaseLost(Exception):
    """Another launcher has taken the run over; nothing of it may be written any more."""


class Held(Exception):
    """Another launcher has the run. The message says which: host and process.

    moved: when its counter was last seen to move, by the clock of the Leases that looked.
    """

    def __init__(self, who: str, moved: float = -math.inf):
        super().__init__(who)
        self.moved = moved


@dataclasses.dataclass(eq=False)
class Lease:
    """A claim to one run. descriptor: of its open file, which carries the lock.

    orphaned: the holder before has ended, or has fallen silent, without letting the run go.
    """

    name: str
    generation: int
    path: Path
    descriptor: int
    record: dict[str, Any]
    orphaned: bool = False
    lost: bool = False


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What another's lease held when it was looked at; by the watcher's clock since when it has,
    and when its counter moved."""

    generation: int
    content: bytes
    since: float
    moved: float


class Leases:
    """What one launcher holds, kept alive by one daemon thread, and what it has seen of others'.

    timeout, heartbeat: seconds. clock: monotonic seconds. machine: what the processes share whose
    locks this one can see.
    """

    def __init__(
        self,
        folder: Path,
        timeout: float = TIMEOUT,
        heartbeat: float = HEARTBEAT,
        clock: Callable[[], float] = time.monotonic,
        machine: str | None = None,
    ) -> None:
        self._folder, self._timeout, self.clock = folder, timeout, clock
        self._heartbeat, self._machine = heartbeat, machine or _this_machine()
        self._held: list[Lease] = []
        self._seen: dict[str, _Seen] = {}  # by name
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Leases":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Release what is still held, as unfinished."""
        self._closed.set()
        with self._lock:
            for lease in list(self._held):
                self.release(lease, done=False)
        if self._thread:
            self._thread.join()

    def claim(self, names: Collection[str]) -> list[Lease]:
        """Leases on all of these runs, in the order of their names, or on none.

        Raises:
          Held: another launcher has one of them.
          ConfigError: the folder cannot be written.
        """
        taken: list[Lease] = []
        with self._lock:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._all_free(names)
                for name in sorted(names):  # the one order of all launchers, so that one gets all
                    taken.append(self._take(name))
                self._keep_alive()
            except BaseException as error:
                for lease in taken:
                    lease.record["orphaned"] = lease.orphaned
                    self.release(lease, done=False)
                if isinstance(error, OSError):
                    raise ConfigError(
                        f"{self._folder}: cannot keep leases there ({error.strerror}); it must be "
                        "a folder that can be written"
                    ) from error
                raise
        return taken

    def check(self, leases: Iterable[Lease]) -> None:
        """Call it before anything of these runs is written.

        Raises:
          LeaseLost: one of them was taken over.
        """
        try:
            highest = self._highest()
        except OSError:  # somebody has deleted the folder
            highest = {}
        for lease in leases:
            succeeded = highest.get(_stem(lease.name), 0) != lease.generation
            own = _parse(_read(lease.path)).get("token") == lease.record["token"]
            lease.lost = lease.lost or succeeded or not own
            if lease.lost:
                raise LeaseLost(lease.name)

    def release(self, lease: Lease, done: bool) -> None:
        """Let the run go; nothing happens where that was done. done: it is finished."""
        with self._lock:
            if lease not in self._held:
                return
            self._held.remove(lease)
            try:
                self.check([lease])
                if done:
                    self._delete(lease.name, up_to=lease.generation)
                else:
                    lease.record["released"] = True
                    _write(lease)
            except (LeaseLost, OSError):
                pass  # taken over, or left for the next claimant to find dead
            finally:
                os.close(lease.descriptor)

    def holder(self, name: str) -> str | None:
        """Who has a run: host and process, be it that it has died on another machine; or None."""
        try:
            self._free(name)
        except Held as held:
            return str(held)
        except OSError:  # no folder
            return None
        return None

    def clear(self, finished: Iterable[str]) -> None:
        """Delete what launchers that died have left of finished runs."""
        try:
            known = self._highest()
        except OSError:  # no folder: nobody has left anything
            return
        for name in finished:
            if _stem(name) in known:
                with contextlib.suppress(Held):  # by one that is about to release it
                    (lease,) = self.claim([name])
                    self.release(lease, done=True)

    def beat(self) -> None:
        """One heartbeat of every lease held."""
        with self._lock:
            for lease in self._held:
                lease.record["beats"] += 1
                try:
                    _write(lease)
                except OSError:
                    continue  # the next one may succeed; if none does, the lease lapses

    def _keep_alive(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat_on, daemon=True, name="heartbeat")
            self._thread.start()

    def _beat_on(self) -> None:
        while not self._closed.wait(self._heartbeat):
            self.beat()

    def _all_free(self, names: Iterable[str]) -> None:
        """Raises Held where one is not, so that what cannot be had in whole is left alone."""
        refused = []
        for name in names:  # every one, since its counter is watched from the first look on
            try:
                self._free(name)
            except Held as held:
                refused.append(held)
        if refused:
            raise min(refused, key=lambda held: held.moved)

    def _take(self, name: str) -> Lease:
        """Create the next generation.

        Raises:
          Held: another launcher has the run, or was quicker.
          OSError: the folder cannot be written.
        """
        last, orphaned = self._free(name)
        generation = last + 1
        path = self._path(name, generation)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError as error:
            raise Held(_who(path)) from error
        lease = Lease(name, generation, path, descriptor, {}, orphaned)
        try:
            # Locked before the record says by whom, so that none who reads it finds the lock free.
            lease.record |= self._new_record(_locked(descriptor), os.fstat(descriptor).st_dev)
            _write(lease)
            highest = self._highest().get(_stem(name), 0)
            if highest > generation:  # the folder was read before others came and went
                raise Held(_who(self._path(name, highest)))
        except BaseException:
            path.unlink(missing_ok=True)  # before the lock goes, or it would look like a dead one's
            os.close(descriptor)
            raise
        # The last but one stays: a folder that is read while names come and go may show neither the
        # old one nor the new one.
        self._delete(name, up_to=generation - 2)
        self._held.append(lease)
        return lease

    def _new_record(self, locked: bool, device: int) -> dict[str, Any]:
        return {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            # Another mount of the same files may not show this one's locks.
            "locks": f"{self._machine} {device}" if locked else None,
            "beats": 0,
        }

    def _free(self, name: str) -> tuple[int, bool]:
        """The highest generation of a run, which may be succeeded, and whether it is orphaned; 0
        if there is none.

        Raises:
          Held: it may not yet.
          OSError: the folder cannot be read.
        """
        generation = self._highest().get(_stem(name), 0)
        if generation == 0:
            return 0, False
        # Before the reading: this process may be suspended between the two.
        now = self.clock()
        path = self._path(name, generation)
        content = _read(path)
        record = _parse(content)
        if record.get("released") is True:
            return generation, record.get("orphaned") is True
        if self._dead(path, record):
            return generation, True
        seen = self._seen.get(name)
        if seen is None or (seen.generation, seen.content) != (generation, content):
            looked = self.clock()
            known = seen is not None and seen.generation == generation
            seen = _Seen(generation, content, looked, looked if known else -math.inf)
            self._seen[name] = seen
        elif now - seen.since >= self._timeout:
            return generation, True
        raise Held(_who(path), seen.moved)

    def _dead(self, path: Path, record: dict[str, Any]) -> bool:
        """Whether the holder's lock would be seen here, and is not there."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            if record.get("locks") != f"{self._machine} {os.fstat(descriptor).st_dev}":
                return False
            # Shared, so that two who look do not take each other for the holder.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def _highest(self) -> dict[str, int]:
        """The highest generation by stem."""
        look_afresh(self._folder)
        found: dict[str, int] = {}
        for file in os.listdir(self._folder):
            if match := _FILE.fullmatch(file):
                found[match[1]] = max(found.get(match[1], 0), int(match[2]))
        return found

    def _delete(self, name: str, up_to: int) -> None:
        """Delete a run's files of these generations, the highest last."""
        own = (match for file in os.listdir(self._folder) if (match := _FILE.fullmatch(file)))
        generations = (int(match[2]) for match in own if match[1] == _stem(name))
        for generation in sorted(g for g in generations if g <= up_to):
            try:
                self._path(name, generation).unlink()
            except OSError:
                continue  # somebody's folder of that name, or gone: neither is in the way

    def _path(self, name: str, generation: int) -> Path:
        return self._folder / f"{_stem(name)}.{generation}"


def look_afresh(folder: Path) -> None:
    """Have NFS forget what it remembers of a folder, above all which names are not in it.

    It does whenever this machine changes the folder. Where that is not allowed, nothing happens.
    """
    try:
        os.utime(folder)
    except OSError:
        return


def _stem(name: str) -> str:
    """A run's name as a file's: never a path, and never two names' the same."""
    stem = urllib.parse.quote(name, safe="+=,")
    if len(stem) <= _LONGEST_STEM:
        return stem
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{stem[: _LONGEST_STEM - len(digest)]}{digest}"


def _this_machine() -> str:
    """This boot of this machine; where the system does not count boots, the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _locked(descriptor: int) -> bool:
    """Lock the file for as long as this process lives; False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _write(lease: Lease) -> None:
    """Write the record into the lease's own file, whatever now has its name."""
    content = json.dumps(lease.record).encode() + b"\n"
    os.pwrite(lease.descriptor, content, 0)
    os.truncate(lease.descriptor, len(content))
    # To close a descriptor is what makes NFS send what was written; the lock stays on the other.
    os.close(os.dup(lease.descriptor))


def _read(path: Path) -> bytes:
    """A lease's content; empty where there is none to read, be it somebody's folder or pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(descriptor, _LONGEST_RECORD)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _parse(content: bytes) -> dict[str, Any]:
    """A lease's record; empty where the content is not one."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _who(path: Path) -> str:
    """The holder in words, of a record that anybody may have written."""
    record = _parse(_read(path))
    host, pid = record.get("host"), record.get("pid")
    if isinstance(host, str) and host.isprintable() and type(pid) is int:
        return f"{host[:64]} pid {pid}"
    return f"an unknown holder ({path.name})"
