"""Several processes that train every run of a plan together (`bitnet_jax/hosts.py`).

The first one launches as any launcher does: it holds the leases, writes and shows. Before it trains
a group it tells the others which; they follow until it says that it is done. They cannot know what
has failed in one of them alone, so what fails there ends that process, and who started them ends
the others (`srun --kill-on-bad-exit`, or JAX's coordinator after a while): a gang is restarted.
"""

import contextlib
import json
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import jax

from bitnet_jax import hosts
from bitnet_jax.configs.resolve import loop_options
from bitnet_jax.errors import ConfigError, require
from bitnet_jax.member import Job
from bitnet_jax.tracking import git_commit
from bitnet_jax.train import Interrupted, train_group
from experiments.plan import Plan, PlannedRun

DONE, STOPPED = "done", "stopped"
SEEN = 15.0  # seconds in which what one host writes is seen by all that share its folder


def check(plan: Plan) -> None:
    """Before anything trains: that all processes have the same runs and code, and that the devices
    are there which a run is cut over: all of them, where there are several processes.

    Raises:
      ConfigError: naming what differs.
    """
    ids = " ".join(f"{run.spec.run_id} {run.spec.group}" for run in plan.runs)
    hosts.check_equal("the runs", ids)
    hosts.check_equal("the git commit", git_commit() if hosts.several() else "")
    there = jax.device_count()
    for run in plan.runs:
        mesh = run.spec.step.mesh
        devices = f"there are {there} devices"
        if hosts.several():
            right = f"{devices} in the {jax.process_count()} processes; cut each run over all"
            require(mesh.size == there, "mesh.data * mesh.tensor", mesh.size, right)
        require(mesh.size <= there, "mesh.data * mesh.tensor", mesh.size, devices)


def check_folder(plan: Plan) -> None:
    """Before anything trains: that all processes write into the folder of the first one. Else each
    would wait forever for the others' parts of the first checkpoint. The folder is there.

    Raises:
      ConfigError: in every process, where one does not see what the first has written.
    """
    if not hosts.several():
        return
    probe = plan.directory / hosts.told(f".probe.{uuid.uuid4().hex}")
    if hosts.first():
        probe.touch()
    hosts.meet()
    seen = hosts.all_of(_appears(probe))
    if hosts.first():
        probe.unlink(missing_ok=True)
    if not seen:
        raise ConfigError(
            f"workdir={str(plan.directory.parent)!r}: not all {jax.process_count()} processes see "
            "what the first one writes there; give --workdir a folder that their hosts share"
        )


def _appears(path: Path) -> bool:
    """Whether it is there soon. Listed, not asked for, since NFS remembers what was not there."""
    deadline = time.monotonic() + SEEN
    while True:
        with contextlib.suppress(OSError):
            if path.name in os.listdir(path.parent):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def jobs_of(group: list[PlannedRun]) -> list[Job]:
    """What `train_group` trains."""
    return [Job(run.spec, run.directory, run.config.to_dict(), run.microbatches) for run in group]


def lead(group: list[PlannedRun]) -> None:
    """Tell the others what is trained next."""
    if hosts.several():
        hosts.told(json.dumps([run.spec.run_id for run in group]))


@contextlib.contextmanager
def led() -> Iterator[None]:
    """Inside, groups are trained; afterwards the others are let go."""
    last = STOPPED
    try:
        yield
        last = DONE
    finally:
        if hosts.several():
            hosts.told(last)


def follow(plan: Plan, should_stop: Callable[[int], bool]) -> None:
    """Train what the first process trains, until it is done.

    Raises:
      Interrupted: a process was asked to stop.
    """
    runs = {run.spec.run_id: run for run in plan.runs}
    while (message := hosts.told()) not in (DONE, STOPPED):
        group = [runs[run_id] for run_id in json.loads(message)]
        try:
            with contextlib.suppress(Interrupted):  # as in the first, which says so
                options = loop_options(group[0].config)
                train_group(jobs_of(group), plan.corpus, options, should_stop=should_stop)
        except Exception:
            fail()
    if message == STOPPED:
        raise Interrupted("by the first process")


def fail() -> NoReturn:
    """End this process at once, without the farewell for which JAX would await the others. Called
    while an error is handled."""
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
