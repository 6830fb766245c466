"""A folder of one's own, to train in what a URL keeps."""

import fcntl
import hashlib
import itertools
import os
from pathlib import Path
from typing import IO

from bitnet_jax.errors import ConfigError

_held: dict[Path, IO[str]] = {}  # open, and so locked, for as long as the process lives


def own_folder(url: str, scratch: str | None) -> Path:
    """The first folder for this URL that no other process has; it is this one's until it ends.

    A later process finds there what it need not fetch again. scratch: where such folders lie;
    by default in the user's cache.

    Raises:
      ConfigError: it cannot be written.
    """
    place = _default() if scratch is None else Path(scratch)
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    for number in itertools.count():
        folder = place.absolute() / name / str(number)
        if folder in _held:
            return folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "a")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"scratch={str(place)!r}: cannot write there ({error.strerror}); give --scratch a "
                "folder on this machine's disk"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        except OSError as error:
            raise ConfigError(
                f"scratch={str(place)!r}: its file system has no locks ({error.strerror}); give "
                "--scratch a folder on this machine's disk"
            ) from error
        _held[folder] = lock
        return folder
    raise AssertionError("there is always a next number")


def _default() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bitnet_jax" / "scratch"
