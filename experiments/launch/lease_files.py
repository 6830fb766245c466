"""Leases as files of a folder that the launchers share: a local disk, or NFS."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

_LONGEST_RECORD = 4096  # bytes; what is longer is not one of ours


class LeaseFiles:
    """Records of leases (`leases.Records`) in a folder.

    machine: what the processes share whose locks this one can see.
    """

    looking_is_cheap = True

    def __init__(self, folder: Path, machine: str | None = None):
        self._folder, self._machine = folder, machine or _this_machine()

    def prepare(self) -> None:
        """Make the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """As they are now."""
        look_afresh(self._folder)
        return os.listdir(self._folder)

    def create(self, name: str, record: dict[str, Any]) -> "LeaseFile":
        """A file that is locked before it says by whom, so that none who reads it finds the lock
        free."""
        path = self._folder / name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        file = LeaseFile(descriptor)
        try:
            # Another mount of the same files may not show this one's locks.
            seen_as = f"{self._machine} {os.fstat(descriptor).st_dev}"
            record["locks"] = seen_as if _locked(descriptor) else None
            file.write(record)
        except BaseException:
            path.unlink(missing_ok=True)  # before the lock goes, or it would look like a dead one's
            file.close()
            raise
        return file

    def read(self, name: str) -> bytes:
        """Empty where there is none to read, be it somebody's folder or pipe."""
        return _read(self._folder / name)

    def dead(self, name: str, record: dict[str, Any]) -> bool:
        """Whether the holder's lock would be seen here, and is not there."""
        try:
            descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_NONBLOCK)
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

    def delete(self, name: str) -> None:
        """Raises OSError where it is not there, or is no file."""
        (self._folder / name).unlink()


class LeaseFile:
    """The open file of a lease, which carries the lock."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def write(self, record: dict[str, Any]) -> None:
        """Into this very file, whatever now has its name."""
        content = json.dumps(record).encode() + b"\n"
        os.pwrite(self._descriptor, content, 0)
        os.truncate(self._descriptor, len(content))
        # To close a descriptor is what makes NFS send what was written; the lock stays on the other
        os.close(os.dup(self._descriptor))

    def close(self) -> None:
        """The lock goes with it."""
        os.close(self._descriptor)


def look_afresh(folder: Path) -> None:
    """Have NFS forget what it remembers of a folder, above all which names are not in it.

    It does whenever this machine changes the folder. Where that is not allowed, nothing happens.
    """
    try:
        os.utime(folder)
    except OSError:
        return


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


def _read(path: Path) -> bytes:
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
