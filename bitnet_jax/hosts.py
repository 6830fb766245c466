"""Several processes that train one run, each with devices of its own.

All of them run the same code and must ask the devices for the same things in the same order; so
whatever one process alone can know (a signal, a clock, what a file holds) is agreed upon before it
decides anything. The first process writes; the others write nothing but their parts of checkpoints.
"""

import hashlib
import os
import re
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from bitnet_jax.errors import ConfigError, require, shown

PATIENCE = 10  # seconds after which it is said who is waited for
TIMEOUT = 300  # seconds that the processes wait for each other at the start: images may be fetched


def start(distributed: str, processes: int, process: int) -> None:
    """Join the other processes. Before anything asks for devices.

    distributed: `auto`, where Slurm, a TPU pod, GKE or MPI says who there is; else HOST:PORT of the
      first process, with how many there are and which this is.

    Raises:
      ConfigError: what is said does not fit together, or the others cannot be reached.
    """
    place: dict[str, object] = {"local_device_ids": _slurm_devices()}
    if distributed != "auto":
        host, colon, port = distributed.rpartition(":")
        right = "give auto, or HOST:PORT of the first process"
        reachable = bool(host and colon) and port.isdecimal() and 0 < int(port[:9]) < 2**16
        require(reachable, "--distributed", distributed, right)
        right = "say how many there are, and --process=I which this is"
        require(processes >= 1, "--processes", processes, right)
        require(0 <= process < processes, "--process", process, f"of 0 to {processes - 1}")
        place = {"coordinator_address": distributed, "num_processes": processes,
                 "process_id": process}  # fmt: skip
    waiting = threading.Timer(PATIENCE, _say_waiting, (distributed, processes))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(**place, initialization_timeout=TIMEOUT)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if distributed == "auto" and "coordinator_address" in reason:
            reason = "neither Slurm, a TPU pod, GKE nor MPI started this process; give HOST:PORT"
        raise ConfigError(f"--distributed={shown(distributed)}: {reason}") from error
    finally:
        waiting.cancel()


def _say_waiting(distributed: str, processes: int) -> None:
    """JAX is silent, and ends the process where somebody stays away."""
    who = "the others" if distributed == "auto" else f"all {processes} processes at {distributed}"
    print(f"waiting for {who}, for {TIMEOUT} s at most", file=sys.stderr, flush=True)


def _slurm_devices() -> list[int] | None:
    """All GPUs of a node for the one process that Slurm started there; JAX would give it the first.

    None where JAX knows, and where there are no GPUs.
    """
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    alone = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return list(range(int(gpus))) if alone and gpus.isdecimal() else None


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this one writes."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether it holds in any process. All must ask."""
    return bool(multihost_utils.process_allgather(np.array(flag)).any()) if several() else flag


def all_of(flag: bool) -> bool:
    """Whether it holds in every process. All must ask."""
    return not any_of(not flag)


def told(text: str = "") -> str:
    """What the first process says. All must ask."""
    if not several():
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(data), np.int32)))
    filled = np.resize(data, size) if first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(filled)).tobytes().decode()


def meet() -> None:
    """Wait until all are here."""
    any_of(False)


def check_equal(what: str, value: str) -> None:
    """Before anything trains: that all processes mean the same.

    Raises:
      ConfigError: one has another value; in every process.
    """
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    if several() and not (multihost_utils.process_allgather(digest) == digest).all():
        raise ConfigError(
            f"{what}: the {jax.process_count()} processes of --distributed differ in it; give "
            "each the same command and the same code"
        )
