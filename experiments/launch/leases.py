"""Leases on runs, so that launchers that share a sweep's folder never train one run twice at once.

A lease is the record `<run>.<generation>` in `<sweep>/leases/`: a file (`lease_files.py`) or, where
the workdir is a URL, an object (`lease_objects.py`). To claim a run is to create the generation
after the highest one there, which the file system grants to one claimant alone, also over NFS, and
an object store by a conditional write. The holder's heartbeat rewrites a counter in it, and a lock
of the kernel's stays on a file for as long as the process lives. A claimant succeeds a holder that

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
from typing import Any, Protocol

from bitnet_jax.errors import ConfigError
from experiments.launch.lease_files import LeaseFiles
from experiments.launch.lease_files import look_afresh as look_afresh
from experiments.launch.store import Unreachable

TIMEOUT = 60.0  # seconds that a counter stands still before its holder counts as gone
HEARTBEAT = 5.0  # seconds between counts

_FILE = re.compile(r"(.*)\.([1-9][0-9]{0,14})", re.DOTALL)
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


class Handle(Protocol):
    """A record that is one's own."""

    def write(self, record: dict[str, Any]) -> None:
        """In place of what it holds, whatever now has its name."""

    def close(self) -> None:
        """Leave it as it is; nothing else says any more that its holder lives."""


class Records(Protocol):
    """Where leases lie. All but `read` and `dead` raise OSError where they cannot.

    looking_is_cheap: a look costs less than what it guards; elsewhere it takes a request.
    """

    looking_is_cheap: bool

    def prepare(self) -> None:
        """Before the first record."""

    def names(self) -> list[str]:
        """All that is there."""

    def create(self, name: str, record: dict[str, Any]) -> Handle:
        """A new one, of one's own; `record` also gets what tells of the holder's death.

        Raises:
          FileExistsError: there is one.
        """

    def read(self, name: str) -> bytes:
        """Empty where there is none to read. Raises Unreachable where that is not known."""

    def dead(self, name: str, record: dict[str, Any]) -> bool:
        """Whether the holder has surely ended."""

    def delete(self, name: str) -> None:
        """One's own, or of who is gone."""


@dataclasses.dataclass(eq=False)
class Lease:
    """A claim to one run.

    orphaned: the holder before has ended, or has fallen silent, without letting the run go.
    """

    name: str
    generation: int
    handle: Handle
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

    where: a folder, or other records. timeout, heartbeat: seconds. clock: monotonic seconds.
    machine: what the processes share whose locks this one can see.
    """

    def __init__(
        self,
        where: Path | Records,
        timeout: float = TIMEOUT,
        heartbeat: float = HEARTBEAT,
        clock: Callable[[], float] = time.monotonic,
        machine: str | None = None,
    ) -> None:
        self._records = LeaseFiles(where, machine) if isinstance(where, Path) else where
        self._where, self._timeout, self.clock = where, timeout, clock
        self._heartbeat = heartbeat
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
                self._records.prepare()
                self._all_free(names)
                for name in sorted(names):  # the one order of all launchers, so that one gets all
                    taken.append(self._take(name))
                self._keep_alive()
            except BaseException as error:
                self.give_back(taken)
                if isinstance(error, Unreachable):
                    raise Held(str(error)) from error  # to be tried again
                if isinstance(error, OSError):
                    raise ConfigError(
                        f"{self._where}: cannot keep leases there ({error.strerror}); it must be "
                        "a folder that can be written"
                    ) from error
                raise
        return taken

    def check(self, leases: Iterable[Lease]) -> None:
        """Call it before anything of these runs is written where others see it.

        Raises:
          LeaseLost: one of them was taken over.
          Unreachable: whether one was is not known.
        """
        try:
            highest = self._highest()
        except Unreachable:
            raise
        except OSError:  # somebody has deleted the folder
            highest = {}
        for lease in leases:
            succeeded = highest.get(_stem(lease.name), 0) != lease.generation
            record = _parse(self._records.read(_name(lease.name, lease.generation)))
            own = record.get("token") == lease.record["token"]
            lease.lost = lease.lost or succeeded or not own
            if lease.lost:
                raise LeaseLost(lease.name)

    def guard(self, leases: Iterable[Lease]) -> None:
        """`check`, or where that takes a request, whether one has found a lease lost.

        Raises:
          LeaseLost: one of them was taken over.
        """
        leases = list(leases)
        if self._records.looking_is_cheap:
            self.check(leases)
        for lease in leases:
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
                    lease.handle.write(lease.record)
            except (LeaseLost, OSError):
                pass  # taken over, or left for the next claimant to find dead
            finally:
                lease.handle.close()

    def give_back(self, leases: Iterable[Lease]) -> None:
        """Release what was claimed and not begun: the next claimant is told what this one was."""
        for lease in leases:
            lease.record["orphaned"] = lease.orphaned
            self.release(lease, done=False)

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
                    lease.handle.write(lease.record)
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
        record: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beats": 0,
        }
        try:
            handle = self._records.create(_name(name, generation), record)
        except FileExistsError as error:
            raise Held(self._who(name, generation)) from error
        lease = Lease(name, generation, handle, record, orphaned)
        try:
            highest = self._highest().get(_stem(name), 0)
            if highest > generation:  # the folder was read before others came and went
                raise Held(self._who(name, highest))
        except BaseException:
            # Before the lock goes, or it would look like a dead one's.
            with contextlib.suppress(OSError):
                self._records.delete(_name(name, generation))
            handle.close()
            raise
        # The last but one stays: a folder that is read while names come and go may show neither the
        # old one nor the new one.
        self._delete(name, up_to=generation - 2)
        self._held.append(lease)
        return lease

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
        content = self._records.read(_name(name, generation))
        record = _parse(content)
        if record.get("released") is True:
            return generation, record.get("orphaned") is True
        if self._records.dead(_name(name, generation), record):
            return generation, True
        seen = self._seen.get(name)
        if seen is None or (seen.generation, seen.content) != (generation, content):
            looked = self.clock()
            known = seen is not None and seen.generation == generation
            seen = _Seen(generation, content, looked, looked if known else -math.inf)
            self._seen[name] = seen
        elif now - seen.since >= self._timeout:
            return generation, True
        raise Held(_who(record, _name(name, generation)), seen.moved)

    def _highest(self) -> dict[str, int]:
        """The highest generation by stem."""
        found: dict[str, int] = {}
        for each in self._records.names():
            if match := _FILE.fullmatch(each):
                found[match[1]] = max(found.get(match[1], 0), int(match[2]))
        return found

    def _delete(self, name: str, up_to: int) -> None:
        """Delete a run's records of these generations, the highest last."""
        own = (match for each in self._records.names() if (match := _FILE.fullmatch(each)))
        generations = (int(match[2]) for match in own if match[1] == _stem(name))
        for generation in sorted(g for g in generations if g <= up_to):
            with contextlib.suppress(OSError):  # somebody's folder of that name, or gone
                self._records.delete(_name(name, generation))

    def _who(self, name: str, generation: int) -> str:
        record = _parse(self._records.read(_name(name, generation)))
        return _who(record, _name(name, generation))


def _name(name: str, generation: int) -> str:
    """Of a record, which is never a path."""
    return f"{_stem(name)}.{generation}"


def _stem(name: str) -> str:
    """A run's name as a file's: never a path, and never two names' the same."""
    stem = urllib.parse.quote(name, safe="+=,")
    if len(stem) <= _LONGEST_STEM:
        return stem
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{stem[: _LONGEST_STEM - len(digest)]}{digest}"


def _parse(content: bytes) -> dict[str, Any]:
    """A lease's record; empty where the content is not one."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _who(record: dict[str, Any], name: str) -> str:
    """The holder in words, of a record that anybody may have written."""
    host, pid = record.get("host"), record.get("pid")
    if isinstance(host, str) and host.isprintable() and type(pid) is int:
        return f"{host[:64]} pid {pid}"
    return f"an unknown holder ({name})"
