"""Whether a sweep's report still stands: `report.json` says of what it was made, and what of it.

Fits and figures take most of the time of a launch that finds every run finished. They are made
again where the table, what was told, or the code that makes them is another, or where a file is not
what was written.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnet_jax.errors import ConfigError
from bitnet_jax.files import SCHEMA_VERSION, digest, read_json, write_json

FILE = "report.json"
TABLE = "endpoints.parquet"
_CODE = ("analysis/*.py", "experiments/report*.py")


def kept(directory: Path, told: Mapping[str, Any]) -> dict[str, Path] | None:
    """The paths of the last report by name; None where it has to be made again."""
    try:
        document = read_json(directory / FILE)
        files = {name: directory / path for name, path in document["files"].items()}
        whole = all(_sha256(files[name]) == value for name, value in document["digests"].items())
        same = document["made_of"] == _made_of(directory, told)
    except (ConfigError, OSError, KeyError, TypeError, AttributeError):
        return None
    return files if whole and same else None


def keep(directory: Path, told: Mapping[str, Any], paths: Mapping[str, Path]) -> None:
    """Write down a report that was just made. paths: within the directory."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "made_of": _made_of(directory, told),
        "files": {name: str(path.relative_to(directory)) for name, path in paths.items()},
        "digests": {name: _sha256(path) for name, path in paths.items()},
    }
    write_json(directory / FILE, document)


def _made_of(directory: Path, told: Mapping[str, Any]) -> str:
    root = Path(__file__).parent.parent
    code = sorted(path for pattern in _CODE for path in root.glob(pattern))
    sources = {path.name: _sha256(path) for path in (*code, directory / TABLE)}
    return digest({"told": told, "sources": sources})


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
