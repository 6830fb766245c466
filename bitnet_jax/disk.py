"""Writes that wait while the disk is full, so that a run loses nothing to it."""

import errno
import sys
import time
from collections.abc import Callable
from typing import TypeVar

POLL = 5.0  # seconds between tries
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SAID = ("No space left on device", "Disk quota exceeded")

T = TypeVar("T")


class GaveUp(Exception):
    """The disk is still full, and the user wants to stop."""


def is_full(error: BaseException) -> bool:
    """Whether an error, or what it came of, says that there is no room."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(text in str(seen) for text in _SAID):  # tensorstore's are ValueErrors
            return True
        seen = seen.__cause__ or seen.__context__
    return False


class Patience:
    """Makes a write, again and again while the disk is full, until `should_stop`."""

    def __init__(self, should_stop: Callable[[], bool]):
        self._should_stop = should_stop

    def __call__(self, write: Callable[[], T]) -> T:
        """What `write` returns; it must be such that it can be made again.

        Raises:
          GaveUp: there was no room, and should_stop said so. What else `write` raises.
        """
        waiting = False
        while True:
            try:
                result = write()
            except Exception as error:
                if not is_full(error):
                    raise
                if self._should_stop():
                    raise GaveUp from error
                if not waiting:
                    _tell(f"the disk is full ({_first_line(error)}); waiting for room")
                waiting = True
                time.sleep(POLL)
            else:
                if waiting:
                    _tell("there is room again; going on")
                return result


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()[0]
    return text if len(text) < 200 else f"{text[:80]} ... {text[-100:]}"


def _tell(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
