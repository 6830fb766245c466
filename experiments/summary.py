"""A run's summary.json, believed only if it is what was written, and by the run it lies with."""

from pathlib import Path
from typing import Any

from bitnet_jax.errors import ConfigError
from bitnet_jax.files import DamagedFile, read_json, within
from bitnet_jax.tracking import log_begins

NEEDED = {"run_id", "seed", "precision", "params_non_embedding", "tokens", "loss", "status"}


def read_summary(run_directory: Path) -> dict[str, Any]:
    """The summary of a finished run, whose directory is `<sweep>/runs/<run_id>`.

    Raises:
      FileNotFoundError: the run has not finished.
      DamagedFile: it is not what was written, or nothing like a summary.
      ConfigError: it is another run's, of a later version, or lies out of the sweep.
    """
    path = run_directory / "summary.json"
    within(run_directory.parent.parent, run_directory, path)
    summary = read_json(path)
    endpoints = summary.get("endpoints")
    rows = endpoints if isinstance(endpoints, list) else []
    if not rows or not all(isinstance(row, dict) and row.keys() >= NEEDED for row in rows):
        raise DamagedFile(path, "it is no summary")
    for run_id in [row["run_id"] for row in rows] + [summary.get("run_id", rows[0]["run_id"])]:
        if run_id != run_directory.name:
            raise ConfigError(
                f"{path}: it is the summary of {run_id}; move it to that run's directory, or "
                "delete it"
            )
    return summary


def verified_log(run_directory: Path, summary: dict[str, Any]) -> Path:
    """The metrics.jsonl that a summary belongs to; one of schema version 1 does not say which.

    Raises:
      DamagedFile: it is not the one.
    """
    path, known = run_directory / "metrics.jsonl", summary.get("metrics")
    if known is not None:
        whole = path.is_file() and path.stat().st_size == known["bytes"]
        if not whole or not log_begins(path, known["bytes"], known["sha256"]):
            raise DamagedFile(path, "it is not the log that summary.json was written with")
    return path
