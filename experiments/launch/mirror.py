"""A sweep whose workdir is a URL: it trains in a folder here, and its objects are kept like it.

The store is the truth. Before a run that this launcher has claimed goes on, its folder becomes what
the store has (`pull_run`); whenever the run has saved a checkpoint, and at its end, the store gets
what is new (`push_run`), in an order in which any beginning of it is a run to go on with: the log
before the checkpoint that counts its lines, the newest checkpoint before older ones go, the summary
last. So a worker that vanishes is succeeded by one that has never seen its disk.

What is alike on both sides is not sent again: an index beside the sweep remembers, of each file,
the object's version and the file's size and time.
"""

import contextlib
import re
import threading
import uuid
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from bitnet_jax.errors import ConfigError, shown
from bitnet_jax.files import TORN, DamagedFile, read_json, replacing, write_json
from experiments.launch import lease_objects
from experiments.launch.leases import Leases
from experiments.launch.store import Store

INDEX = ".mirror.json"
RUNS, CHECKPOINTS, SUMMARY, LOG = "runs", "checkpoints", "summary.json", "metrics.jsonl"
LARGE = (CHECKPOINTS, "model", "wandb")  # of a run; nobody but who trains it needs them
AT_ONCE = 8  # requests

# Orbax writes it last.
_MARKER = "_CHECKPOINT_METADATA"


class Mirror:
    """Of one sweep. folder: its local one, which no other process may use. store: its objects.

    Each method that asks the store raises Unreachable where that fails; what is done so far is of
    use, and the method may be called again.
    """

    def __init__(self, store: Store, folder: Path):
        self.store, self.folder = store, folder
        self._lock = threading.Lock()  # of the index
        self._turns: dict[str, threading.Lock] = {}  # of pushes, by run
        self._index: dict[str, list] = self._read_index()

    def leases(self) -> Leases:
        """On its runs, as objects beside them."""
        records = lease_objects.LeaseObjects(self.store)
        return Leases(records, lease_objects.TIMEOUT, lease_objects.HEARTBEAT)

    def probe(self) -> None:
        """Raises Unreachable where nothing can be written."""
        name = f".probe-{uuid.uuid4().hex}"
        self.store.write(name, b"")
        self.store.delete([name])

    # From the store

    def pull_small(self) -> None:
        """All but what only the training of a run needs; in one listing, whatever the runs."""
        self._pull("", lambda name: not _is_large(name))

    def pull_run(self, run_id: str) -> None:
        """All of a run. For who has its lease."""
        self._pull(f"{RUNS}/{run_id}", lambda name: True)

    def _pull(self, prefix: str, wanted: Callable[[str], bool]) -> None:
        listed = self.store.names(prefix)
        there = {name: tag for name, tag in listed.items() if wanted(name) and _is_ours(name)}
        for name in there:
            check_name(name)
        for name in self._here(prefix):
            if wanted(name) and name not in there:
                self._path(name).unlink(missing_ok=True)
        changed = [name for name, tag in there.items() if not self._is_alike(name, tag)]
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda name: self._fetch(name, there[name]), changed))
        finally:
            self._write_index()
        _remove_empty(self._path(prefix))

    def _fetch(self, name: str, tag: str) -> None:
        path = self._path(name)
        content = self.store.read(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(content)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise ConfigError(
                f"{self.store.url}/{name}: an object that is a folder, too; delete one of both"
            ) from error
        self._note(name, tag)

    # To the store

    def push_run(self, run_id: str, check: Callable[[], None]) -> None:
        """What is new of a run. check: raises LeaseLost where another launcher has it now."""
        with self._lock:
            turn = self._turns.setdefault(run_id, threading.Lock())
        with turn:
            check()
            prefix = f"{RUNS}/{run_id}"
            names = self._here(prefix)  # before the log is read, which then has all they count
            *rest, summary = _in_order(names, prefix)
            try:
                self._send(rest)
                check()
                self._send([summary] if summary in names else [])
                gone = set(self.store.names(prefix)) - set(names)
                if gone := {name for name in gone if not self._path(name).exists()}:
                    self.store.delete(sorted(gone))
            finally:
                self._write_index()

    def push_results(self) -> None:
        """What is written of all runs together. For who has the lease on that."""
        self._send([name for name in self._here("") if not name.startswith(f"{RUNS}/")])
        self._write_index()

    def _send(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._path(name)
            try:
                before, content = _stamp(path), path.read_bytes()
            except FileNotFoundError:
                continue  # a checkpoint that has made room for a newer one
            if self._index.get(name, [None])[1:] != before:
                tag = self.store.write(name, content)
                with self._lock:
                    self._index[name] = [tag, *before]

    # Here

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _here(self, prefix: str) -> list[str]:
        """Names of the files under a prefix, without links and what is not finished."""
        root = self._path(prefix)
        found = []
        for path in sorted(root.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            parts = PurePosixPath(name).parts
            torn = name == INDEX or any(TORN.fullmatch(part) for part in parts)
            if not torn and path.is_file() and not _through_link(path, root):
                found.append(name)
        return found

    def _is_alike(self, name: str, tag: str) -> bool:
        try:
            return self._index.get(name) == [tag, *_stamp(self._path(name))]
        except OSError:
            return False

    def _note(self, name: str, tag: str) -> None:
        with self._lock:
            self._index[name] = [tag, *_stamp(self._path(name))]

    def _read_index(self) -> dict[str, list]:
        """What is not there or damaged is sent again."""
        with contextlib.suppress(OSError, DamagedFile, KeyError):
            return dict(read_json(self.folder / INDEX)["files"])
        return {}

    def _write_index(self) -> None:
        with self._lock:
            self._index = {
                name: entry for name, entry in self._index.items() if self._path(name).exists()
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / INDEX, {"schema_version": 1, "files": self._index})

    def ticks(self, run_id: str) -> set[str]:
        """The checkpoints of a run that are whole here."""
        folder = self._path(f"{RUNS}/{run_id}/{CHECKPOINTS}")
        if not folder.is_dir():
            return set()
        return {path.name for path in folder.iterdir() if not TORN.fullmatch(path.name)}


def check_name(name: str) -> None:
    """Refuse an object's name that is no plain path below the sweep.

    Raises:
      ConfigError: it leads elsewhere, or no file can have it.
    """
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)
    if not plain or not name.isprintable() or "\\" in name:
        raise ConfigError(f"{shown(name)}: an object whose name is no file's; delete it")


def _is_ours(name: str) -> bool:
    """Of what a sweep's folder has here: not the leases, which are read where they are."""
    return not name.startswith(f"{lease_objects.FOLDER}/") and name != INDEX


def _is_large(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == RUNS and len(parts) > 3 and parts[2] in LARGE


def _in_order(names: Collection[str], prefix: str) -> list[str]:
    """A run's files in the order in which they are sent; the summary's name ends it."""
    summary = f"{prefix}/{SUMMARY}"

    def place(name: str) -> tuple:
        inner = name.removeprefix(f"{prefix}/")
        parts = inner.split("/")
        if parts[0] != CHECKPOINTS:
            return (0 if len(parts) == 1 else 2, 0, False, name)
        tick = int(parts[1]) if re.fullmatch("[0-9]{1,15}", parts[1]) else -1
        return (1, -tick, parts[-1] == _MARKER, name)

    return [*sorted((name for name in names if name != summary), key=place), summary]


def _stamp(path: Path) -> list[int]:
    known = path.stat()
    return [known.st_size, known.st_mtime_ns]


def _through_link(path: Path, root: Path) -> bool:
    return path.is_symlink() or any(
        parent.is_symlink() for parent in path.parents if parent.is_relative_to(root)
    )


def _remove_empty(folder: Path) -> None:
    """Folders of which no file is left: orbax takes each in `checkpoints/` for a checkpoint."""
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
