"""Checkpoints of a run through orbax: asynchronous, atomic, the last two kept, and none believed
that is not what was saved."""

import contextlib
import errno
import gc
import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from bitnet_jax import hosts
from bitnet_jax.files import DIGEST, SCHEMA_VERSION, NewerFile, sealed, unsealed
from bitnet_jax.fingerprint import fingerprint
from bitnet_jax.train_step import TrainState

ROOM_BESIDE = 2**20  # bytes that a checkpoint takes beside its arrays
# Of the saved JSON, beside the progress itself.
_KINDS = ("state", "stash")
_OWN = ("schema_version", "fingerprints")

# Orbax counts its operations by process: two threads that begin one at once await each other's
# folders, and fail (FileExistsError with orbax 0.12.8). What is silenced is the process's, too.
_ORBAX = threading.Lock()


class DamagedCheckpoint(Exception):
    """A checkpoint is not what was saved, or not of this run; the message says what of it."""


class Checkpointer:
    """Saves and restores a run at a tick.

    A checkpoint is the training state, the trunk's state set aside while a branch decays (if one
    does), and the progress, a JSON object, sealed, with the fingerprints of both states.
    """

    def __init__(self, directory: Path):
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        with _quiet():
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._troubled = False  # by the last save

    def save(self, tick: int, state: TrainState, stash: TrainState | None, progress: dict) -> None:
        """Copy the state off the device and write it in the background.

        What the writing of an earlier checkpoint raised is raised here; after that, this waits for
        the writing, so that no run goes on for long without a checkpoint.

        Raises:
          OSError: ENOSPC where the disk has no room for it.
        """
        if self._manager.latest_step() == tick:
            return
        self._check_room((state, stash))
        try:
            self._manager.check_for_errors()
            if self._troubled and hosts.first():
                for torn in self._directory.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(torn)
            self._save(tick, state, stash, progress)
            if self._troubled:
                self._manager.wait_until_finished()
        except Exception:
            self._troubled = True
            raise
        self._troubled = False

    def _check_room(self, state: Any) -> None:
        """A disk that fills up while orbax writes leaves it with pieces."""
        if not hosts.first():
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(state)) + ROOM_BESIDE
        if shutil.disk_usage(self._directory).free < needed:
            raise OSError(errno.ENOSPC, "No space left for a checkpoint", str(self._directory))

    def _save(self, tick: int, state: TrainState, stash: TrainState | None, progress: dict) -> None:
        states = {"state": state} if stash is None else {"state": state, "stash": stash}
        prints = {kind: fingerprint(tree) for kind, tree in states.items()}
        header = {"schema_version": SCHEMA_VERSION, "fingerprints": prints}
        items = {kind: ocp.args.StandardSave(tree) for kind, tree in states.items()}
        items["progress"] = ocp.args.JsonSave(sealed({**header, **progress}))
        with _ORBAX:
            self._manager.save(tick, args=ocp.args.Composite(**items), force=True)

    def ticks(self) -> list[int]:
        """Those that have a checkpoint."""
        return list(self._manager.all_steps())

    def forget(self, tick: int) -> None:
        """Remove a checkpoint."""
        self._manager.delete(tick)

    def forget_after(self, tick: int) -> None:
        """Remove the checkpoints of later ticks, from which the run will not go on."""
        for later in self.ticks():
            if later > tick:
                self.forget(later)

    def restore_latest(self, like: TrainState) -> tuple[TrainState, TrainState | None, dict] | None:
        """`restore` of the newest checkpoint, or None where there is none."""
        tick = self._manager.latest_step()
        return None if tick is None else self.restore(tick, like)

    def restore(self, tick: int, like: TrainState) -> tuple[TrainState, TrainState | None, dict]:
        """(state, stash, progress) of a checkpoint.

        like: a state of the same shapes, which gives structure, dtypes and placement.

        Raises:
          DamagedCheckpoint: any of it is not what was saved.
          NewerFile: a later version saved it.
        """
        progress = self._progress(tick)
        prints = progress.get("fingerprints")
        if prints is None:  # from before there were any
            prints = dict.fromkeys(_KINDS if progress.get("has_stash") else _KINDS[:1])
        states = {kind: self._state(tick, kind, like, prints[kind]) for kind in prints}
        rest = {key: value for key, value in progress.items() if key not in _OWN}
        return states["state"], states.get("stash"), rest

    def _progress(self, tick: int) -> dict[str, Any]:
        saved = self._restore(tick, "progress", ocp.args.JsonRestore())
        if isinstance(saved, dict) and not saved.keys() & {DIGEST, "schema_version"}:
            return saved  # from before there were digests
        try:
            return unsealed(saved, self._directory / str(tick))
        except NewerFile:
            raise
        except ValueError as error:
            raise DamagedCheckpoint(f"progress: {error}") from error

    def _state(self, tick: int, kind: str, like: TrainState, expected: str | None) -> TrainState:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = self._restore(tick, kind, ocp.args.StandardRestore(abstract))
        if _layout(state) != _layout(like):
            raise DamagedCheckpoint(f"{kind}: arrays of other shapes or types")
        if expected is not None and fingerprint(state) != expected:
            raise DamagedCheckpoint(f"{kind}: its fingerprint is not that of what was saved")
        return state

    def _restore(self, tick: int, kind: str, how: Any) -> Any:
        with _quiet():
            try:
                return self._manager.restore(tick, args=ocp.args.Composite(**{kind: how}))[kind]
            except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
                raise  # the machine's fault, not the checkpoint's
            except Exception as error:  # orbax and its readers raise many kinds
                problem = _line(error)
            gc.collect()  # while it is quiet
        raise DamagedCheckpoint(f"{kind}: it cannot be read ({problem})")

    def wait(self) -> None:
        """Until the last save is on disk. Raises what its writing did."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last save; only then is it on disk."""
        self.wait()
        self._manager.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Where a file is damaged orbax drops what it had begun, each part of which would complain at
    length; one line says it all."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    with _ORBAX:
        hook, levels = sys.unraisablehook, [logger.level for logger in loggers]
        try:
            sys.unraisablehook = lambda _: None
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            sys.unraisablehook = hook
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _layout(state: TrainState) -> tuple:
    return jax.tree.structure(state), [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


def _line(error: Exception, most: int = 100) -> str:
    """An exception in one short line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:most]}" if first else type(error).__name__


def save_model(run_dir: Path, params: dict) -> str:
    """Write an endpoint's parameters to `<run_dir>/model`, in place of what is there.

    Returns their fingerprint, which the run's summary keeps.
    """
    with _ORBAX, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(_model_path(run_dir), params, force=True)
    return fingerprint(params)


def load_model(run_dir: Path, like: dict) -> dict:
    """The parameters that `save_model` wrote. like: a tree of the same shapes and dtypes.

    Raises:
      FileNotFoundError: the run kept no model, or has not finished.
    """
    path = _model_path(run_dir)
    if not path.exists():
        raise FileNotFoundError(
            f"{run_dir}: it holds no model; train it to its end with checkpoint.keep_model=True"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))


def _model_path(run_dir: Path) -> Path:
    return run_dir.absolute() / "model"
