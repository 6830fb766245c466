"""Where a benchmark ran: without this its seconds mean nothing to anybody else."""

import datetime
import os
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib

from bitnet_jax.tracking import provenance

# Variables that change the speed of the same program.
VARIABLES = ("XLA_FLAGS", "GLIBC_TUNABLES", "JAX_PLATFORMS", "OMP_NUM_THREADS")


def environment(arguments: Sequence[str]) -> dict[str, Any]:
    """Commit, versions, device, memory in bytes, variables, date and command. JSON values only.

    What this machine cannot tell is None.
    """
    device = jax.devices()[0]
    return {
        **provenance(),
        "jaxlib_version": jaxlib.__version__,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "device_memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        **_gpu(device.platform),
        "cores": cores(),
        "memory_bytes": _memory(),
        "load_average": _load(),
        **{name: os.environ.get(name) for name in VARIABLES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "experiments.benchmark", *arguments]),
    }


def _gpu(platform: str) -> dict[str, str | None]:
    """Versions of the driver and of the newest CUDA that it serves, by nvidia-smi."""
    return {
        "driver_version": _nvidia_smi("driver_version") if platform == "gpu" else None,
        "cuda_version": _cuda_version() if platform == "gpu" else None,
    }


def _nvidia_smi(field: str) -> str | None:
    text = _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader")
    return text.splitlines()[0].strip() if text else None


def _cuda_version() -> str | None:
    """There is no such field to query: it stands in the table's first lines."""
    _, found, rest = (_output("nvidia-smi") or "").partition("CUDA Version:")
    return rest.split()[0] if found else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cores() -> int:
    """Those that this process may use, as many as XLA's CPU backend has threads."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _load() -> float | None:
    """How many processes wanted to run, the mean of the minute before the benchmark."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None
