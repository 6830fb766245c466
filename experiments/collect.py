"""Endpoints of a sweep's runs into one table: `<sweep>/endpoints.parquet`.

    python -m experiments.collect results/quickstart
    python -m experiments.collect results/ingredients --latents    # and latents.csv beside it

latents.csv has a row a run: the statistics of the latent weights (`bitnet_jax/telemetry.py`) in the
last train line of its metrics.jsonl, and the gradient's cosine where its last endpoint has one.

A run that was planned but has no summary yet is not in the table; one that failed in this launch,
or that workers have given up, is, with status `failed` and no loss.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_jax.errors import ConfigError
from bitnet_jax.files import SCHEMA_VERSION, DamagedFile, NewerFile, replacing
from experiments.launch.failures import FILE, read_failures
from experiments.summary import read_summary, verified_log

if TYPE_CHECKING:  # a worker, which never collects, has no time for it
    import pandas as pd

WHO = ("run_id", "size", "precision", "seed", "tokens", "loss", "status")
FLOATS = ("loss", "loss_stderr", "bits_per_byte", "train_loss", "wall_s")


def collect(
    sweep_directory: Path,
    failures: Mapping[str, list[dict[str, Any]]] | None = None,
    tags: Mapping[str, Mapping[str, str]] | None = None,
) -> pd.DataFrame:
    """Read finished runs' rows, write the table atomically, and return it.

    failures: rows of runs that failed in this launch, by run id; left out where another launch has
      finished the run meanwhile. tags: of the runs that belong to the table, by run id, so that
      what an earlier config left in the same directory is not mixed in, and a run that another
      config has trained carries this one's tags; default all as they are.

    Raises:
      FileNotFoundError: no run has finished or failed.
      ConfigError: a summary that is damaged, another run's, or out of the sweep's directory.
    """
    import pandas as pd

    rows = []
    for path in sorted(sweep_directory.glob("runs/*/summary.json")):
        run_id = path.parent.name
        if tags is not None and run_id not in tags:
            continue
        endpoints = _summary(path)["endpoints"]
        if tags is not None:
            endpoints = [_tagged(row, tags[run_id]) for row in endpoints]
        rows += [{"sweep": sweep_directory.name, **row} for row in endpoints]
    finished = {row["run_id"] for row in rows}
    for run_id, failed in {**_given_up(sweep_directory, tags), **(failures or {})}.items():
        if run_id not in finished:
            rows += [{"sweep": sweep_directory.name, **row} for row in failed]
    if not rows:
        raise FileNotFoundError(f"{sweep_directory}: no run has finished")
    table = pd.DataFrame(rows)
    order = ["run_id", "sweep"]
    table = table[order + [column for column in table if column not in order]]
    table = table.astype(dict.fromkeys(FLOATS, "float64"))
    table = table.sort_values(["params_non_embedding", "tokens", "precision", "seed", "run_id"])
    table = table.reset_index(drop=True)
    with replacing(sweep_directory / "endpoints.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    return table


def _given_up(
    sweep_directory: Path, tags: Mapping[str, Any] | None
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the runs that workers have given up, by run id."""
    directories = sorted(path.parent for path in sweep_directory.glob(f"runs/*/{FILE}"))
    wanted = [path for path in directories if tags is None or path.name in tags]
    rows = {path.name: list(read_failures(path).endpoints) for path in wanted}
    return {run_id: own for run_id, own in rows.items() if own}


def _tagged(row: Mapping[str, Any], tags: Mapping[str, str]) -> dict[str, Any]:
    plain = {key: value for key, value in row.items() if not key.startswith("tag_")}
    return {**plain, **{f"tag_{key}": value for key, value in tags.items()}}


def _summary(path: Path) -> dict[str, Any]:
    try:
        return read_summary(path.parent)
    except DamagedFile as error:
        raise ConfigError(f"{error}; delete it to train the run again") from error


def collect_latents(sweep_directory: Path) -> pd.DataFrame:
    """A row a finished run that quantizes its weights: who it is, and its last statistics.

    Raises:
      FileNotFoundError: no such run has finished.
      ConfigError: a damaged summary, or a metrics file that does not belong to it.
    """
    import pandas as pd

    rows = []
    for path in sorted(sweep_directory.glob("runs/*/summary.json")):
        summary = _summary(path)
        endpoint = summary["endpoints"][-1]
        statistics = _last_statistics(_log(path.parent, summary), endpoint)
        if statistics:
            own = {k: v for k, v in endpoint.items() if k in WHO or k.startswith("tag_")}
            rows.append({**own, **statistics})
    if not rows:
        raise FileNotFoundError(f"{sweep_directory}: no run with quantized weights has finished")
    return pd.DataFrame(rows)


def _log(run_directory: Path, summary: dict[str, Any]) -> Path:
    try:
        return verified_log(run_directory, summary)
    except DamagedFile as error:
        raise ConfigError(f"{error}; delete the run to train again") from error


def _last_statistics(path: Path, endpoint: dict[str, Any]) -> dict[str, float | None]:
    """Of the last train line and the last endpoint, which is the summary's, save where the trunk
    diverged before it."""
    last: dict[str, dict[str, Any]] = {}
    try:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            last[record["kind"]] = record
        version = last.get("header", {}).get("schema_version", 1)
        if version > SCHEMA_VERSION:
            raise NewerFile(path, version)
        if endpoint["status"] == "ok" and last["endpoint"]["tokens"] != endpoint["tokens"]:
            raise ValueError("another run's")
    except NewerFile:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a run's metrics; delete the run to train again") from error
    return {
        key: value
        for kind in ("train", "endpoint")
        for key, value in last.get(kind, {}).items()
        if key.startswith(("latent_", "gradient_"))
    }


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.collect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep_directory", type=Path)
    parser.add_argument("--latents", action="store_true", help="write latents.csv, too")
    options = parser.parse_args(argv)
    directory = options.sweep_directory
    try:
        table = collect(directory)
        if options.latents:
            latents = collect_latents(directory)
            with replacing(directory / "latents.csv") as temporary:
                latents.to_csv(temporary, index=False)
            print(f"{directory / 'latents.csv'}: {len(latents)} runs")
    except (ConfigError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{directory / 'endpoints.parquet'}: {len(table)} endpoints")
    return 0


if __name__ == "__main__":
    sys.exit(main())
