"""Checkpoints of a run through orbax: asynchronous, atomic, the last two kept."""

import errno
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from bitnet_jax.train_step import TrainState

ROOM_BESIDE = 2**20  # bytes that a checkpoint takes beside its arrays


class Checkpointer:
    """Saves and restores a run at a tick.

    A checkpoint is the training state, the trunk's state set aside while a branch decays (if one
    does), and the progress, a JSON value.
    """

    def __init__(self, directory: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self._troubled = False  # by the last save

    def save(self, tick: int, state: TrainState, stash: TrainState | None, progress: Any) -> None:
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
            if self._troubled:
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
        needed = sum(x.nbytes for x in jax.tree.leaves(state)) + ROOM_BESIDE
        if shutil.disk_usage(self._directory).free < needed:
            raise OSError(errno.ENOSPC, "No space left for a checkpoint", str(self._directory))

    def _save(self, tick: int, state: TrainState, stash: TrainState | None, progress: Any) -> None:
        items = {"state": ocp.args.StandardSave(state), "progress": ocp.args.JsonSave(progress)}
        if stash is not None:
            items["stash"] = ocp.args.StandardSave(stash)
        self._manager.save(tick, args=ocp.args.Composite(**items), force=True)

    def ticks(self) -> list[int]:
        """Those that have a checkpoint."""
        return list(self._manager.all_steps())

    def forget_after(self, tick: int) -> None:
        """Remove the checkpoints of later ticks, from which the run will not go on."""
        for later in self.ticks():
            if later > tick:
                self._manager.delete(later)

    def restore_latest(self, like: TrainState) -> tuple[TrainState, TrainState | None, Any] | None:
        """`restore` of the newest checkpoint, or None where there is none."""
        tick = self._manager.latest_step()
        return None if tick is None else self.restore(tick, like)

    def restore(self, tick: int, like: TrainState) -> tuple[TrainState, TrainState | None, Any]:
        """(state, stash, progress) of a checkpoint.

        like: a state of the same shapes, which gives structure, dtypes and placement.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        progress = self._restore(tick, progress=ocp.args.JsonRestore())["progress"]
        restore = {"state": ocp.args.StandardRestore(abstract)}
        if progress["has_stash"]:
            restore["stash"] = ocp.args.StandardRestore(abstract)
        items = self._restore(tick, **restore)
        return items["state"], items.get("stash"), progress

    def _restore(self, tick: int, **items: Any) -> Any:
        return self._manager.restore(tick, args=ocp.args.Composite(**items))

    def close(self) -> None:
        """Wait for the last save; only then is it on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_model(run_dir: Path, params: dict) -> None:
    """Write an endpoint's parameters to `<run_dir>/model`, in place of what is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(_model_path(run_dir), params, force=True)


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
