"""The endpoints that a plan will have, as a table: what `python -m analysis.predict` predicts."""

import csv
from pathlib import Path

from bitnet_jax.data import train_batches
from bitnet_jax.errors import ConfigError
from bitnet_jax.files import replacing
from bitnet_jax.results import endpoint_row
from bitnet_jax.tracking import provenance
from experiments.plan import Plan, PlannedRun

# What only training tells, and where it will be done.
_MEASURED = ("loss", "loss_stderr", "bits_per_byte", "train_loss", "wall_s")
_UNKNOWN = (*_MEASURED, "device", "jax_version", "git_commit")


def write_planned(plan: Plan, path: Path) -> int:
    """Write a row an endpoint, with the columns of endpoints.parquet that are known beforehand.

    Returns their number.

    Raises:
      ConfigError: the file cannot be written.
    """
    rows = [row for run in plan.runs for row in _rows(plan, run)]
    try:
        with replacing(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise ConfigError(f"--planned={path}: cannot be written ({error.strerror})") from error
    return len(rows)


def _rows(plan: Plan, run: PlannedRun) -> list[dict]:
    spec, found = run.spec, []
    length = spec.data.sequence_length
    batches = train_batches(plan.corpus.train, length, spec.batch_size, spec.seed_data)
    for end in spec.ends:
        known = {"end": end, "unique_tokens": batches.unique_tokens(end), "status": "planned"}
        row = endpoint_row(spec, {**known, **dict.fromkeys(_MEASURED)}, provenance(spec.step.mesh))
        found.append({key: value for key, value in row.items() if key not in _UNKNOWN})
    return found
