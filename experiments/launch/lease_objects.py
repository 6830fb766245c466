"""Leases as objects of a store: created by a conditional write, and seen by nobody's kernel."""

import contextlib
import json
from typing import Any

from experiments.launch.store import Store

FOLDER = "leases"
TIMEOUT = 120.0  # seconds that a counter stands still before its holder counts as gone
HEARTBEAT = 15.0  # seconds between counts, each of which is a request that is paid for


class LeaseObjects:
    """Records of leases (`leases.Records`) under `leases/` of a sweep's objects."""

    looking_is_cheap = False

    def __init__(self, store: Store):
        self._store = store

    def __str__(self) -> str:
        return f"{self._store.url}/{FOLDER}"

    def prepare(self) -> None:
        """There are no folders."""

    def names(self) -> list[str]:
        """Without the folder's."""
        return [name.removeprefix(f"{FOLDER}/") for name in self._store.names(FOLDER)]

    def create(self, name: str, record: dict[str, Any]) -> "LeaseObject":
        """Whole at once: it is never there without its record."""
        record["locks"] = None
        content = _content(record)
        try:
            self._store.create(_path(name), content)
        except FileExistsError:
            # By this very call, perhaps: it is sent again where the answer to it was lost.
            if self.read(name) != content:
                raise
        return LeaseObject(self._store, _path(name))

    def read(self, name: str) -> bytes:
        """Empty where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return self._store.read(_path(name))
        return b""

    def dead(self, name: str, record: dict[str, Any]) -> bool:
        """Only a counter that stands still tells."""
        return False

    def delete(self, name: str) -> None:
        """Whether or not it is there."""
        self._store.delete([_path(name)])


class LeaseObject:
    """The object of a lease."""

    def __init__(self, store: Store, path: str):
        self._store, self._path = store, path

    def write(self, record: dict[str, Any]) -> None:
        """Even where a successor has deleted it: a lower generation says nothing."""
        self._store.write(self._path, _content(record))

    def close(self) -> None:
        """Nothing is held open."""


def _content(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _path(name: str) -> str:
    return f"{FOLDER}/{name}"
