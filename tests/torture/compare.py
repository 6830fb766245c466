"""Whether a sweep has come to what the undisturbed one came to. Each function gives the
differences, a line each."""

from pathlib import Path
from typing import Any

import pandas as pd

from bitnet_jax.files import DIGEST, read_json
from experiments.runs import load_run

# What a clock says, and the commit, lest an edit in between matter.
NOT_COMPARED = {"wall_s", "git_commit", DIGEST}


def differences(undisturbed: Path, sweep: Path) -> list[str]:
    """All of them, of two sweeps' folders. Models are loaded: this takes JAX's backend."""
    found = _table(undisturbed, sweep) + _names(undisturbed, sweep)
    for expected in sorted(undisturbed.glob("runs/*")):
        run = sweep / "runs" / expected.name
        try:
            found += _run(expected, run)
        except Exception as error:  # a damaged file, or one that is not there
            found.append(f"{run.name}: {type(error).__name__}: {error}")
    return found


def _table(undisturbed: Path, sweep: Path) -> list[str]:
    expected, found = (
        pd.read_parquet(folder / "endpoints.parquet").drop(columns=list(NOT_COMPARED - {DIGEST}))
        for folder in (undisturbed, sweep)
    )
    try:
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    except AssertionError as error:
        return ["endpoints.parquet: " + " ".join(str(error).split())]
    return []


def _names(undisturbed: Path, sweep: Path) -> list[str]:
    """Nothing is missing and nothing is left behind. Which two checkpoints are kept is a clock's
    matter."""
    expected, found = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if not _inside(path, folder)}
        for folder in (undisturbed, sweep)
    )
    more = {name for name in found - expected if str(Path(name).parent) not in found - expected}
    missing = [f"missing: {name}" for name in sorted(expected - found)]
    return missing + [f"left behind: {name}" for name in sorted(more)]


def _inside(path: Path, folder: Path) -> bool:
    """Whether it is a checkpoint, whole, or lies inside of one or of a model."""
    parts = path.relative_to(folder).parts[2:]
    if parts[:1] == ("model",):
        return len(parts) > 1
    return parts[:1] == ("checkpoints",) and len(parts) > 1 and parts[1].isdecimal()


def _run(expected: Path, run: Path) -> list[str]:
    found = []
    if (run / "metrics.jsonl").read_bytes() != (expected / "metrics.jsonl").read_bytes():
        found.append(f"{run.name}: metrics.jsonl")
    for name in ("config.json", "summary.json"):
        if _plain(read_json(run / name)) != _plain(read_json(expected / name)):
            found.append(f"{run.name}: {name}")
    load_run(run)  # which holds the model against the fingerprint in the summary
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in NOT_COMPARED}
    return [_plain(item) for item in value] if isinstance(value, list) else value
