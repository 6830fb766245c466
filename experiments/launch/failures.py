"""How often a run has failed without getting on: `failures.json` in its directory.

A run fails when its training raises, or when who trains it ends without a word: a kill, a crash, a
node that goes down. Of the latter the lease that it leaves behind tells (`leases.py`). Where a
later checkpoint is there than at any failure before, the counting begins again: a run that is often
cut short but gets on is never given up, however often its worker is started anew.

Only who holds the run's lease writes the file; of a run that has finished none stays.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitnet_jax.errors import ConfigError
from bitnet_jax.files import SCHEMA_VERSION, read_json, write_json

FILE = "failures.json"


@dataclasses.dataclass(frozen=True)
class Failures:
    """count: without getting on. tick: of the newest checkpoint that there was at any of them; -1
    for none. given_up: workers leave the run alone. endpoints: its rows of the table, then.
    """

    count: int = 0
    tick: int = -1
    given_up: bool = False
    reason: str = ""
    endpoints: tuple[dict[str, Any], ...] = ()


def read_failures(run_directory: Path) -> Failures:
    """What is known of a run; nothing where the file is not there or not what was written."""
    try:
        document = read_json(run_directory / FILE)
        fields = {field.name: document[field.name] for field in dataclasses.fields(Failures)}
        return Failures(**{**fields, "endpoints": tuple(fields["endpoints"])})
    except (ConfigError, OSError, KeyError, TypeError):
        return Failures()


def count_failure(
    run_directory: Path,
    run_id: str,
    reason: str,
    most: float,
    rows: Callable[[], list[dict[str, Any]]],
) -> Failures:
    """Count one, and write it down; the one that makes `most` of them gives the run up.

    rows: of the table, asked for where it is given up.
    """
    before, tick = read_failures(run_directory), _newest_tick(run_directory)
    count = 1 if tick > before.tick else before.count + 1
    given_up = count >= most
    known = tuple(rows()) if given_up else ()
    now = Failures(count, max(tick, before.tick), given_up, reason, known)
    run_directory.mkdir(parents=True, exist_ok=True)
    document = {"schema_version": SCHEMA_VERSION, "run_id": run_id, **dataclasses.asdict(now)}
    write_json(run_directory / FILE, document)
    return now


def forget_failures(run_directory: Path) -> None:
    """Of a run that has finished."""
    (run_directory / FILE).unlink(missing_ok=True)


def _newest_tick(run_directory: Path) -> int:
    """Of the checkpoints; -1 without one."""
    try:
        names = os.listdir(run_directory / "checkpoints")
    except OSError:
        return -1
    return max((int(name) for name in names if name.isdecimal()), default=-1)
