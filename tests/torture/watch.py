"""What launchers have written so far, seen from outside: names that come, and logs that grow."""

import bisect
import json
import os
import re
from pathlib import Path

# What a kill may wait for, and the names that tell of it, relative to the sweep's folder.
MOMENTS = {
    "a lease": r"leases/",
    "a config being written": r"runs/[^/]+/\.config\.json\.",
    "a checkpoint being written": r"runs/[^/]+/checkpoints/.*tmp",
    "a checkpoint": r"runs/[^/]+/checkpoints/\d+$",
    "a model being written": r"runs/[^/]+/model.*tmp",
    "a summary being written": r"runs/[^/]+/\.summary\.json\.",
    "a summary": r"runs/[^/]+/summary\.json$",
    "results being written": r"\.|figures|fits\.json|report\.html|endpoints\.parquet",
}
LOG_GROWS = "a log that grows"


def names(sweep: Path) -> set[str]:
    """Files and folders of a sweep, but for the insides of checkpoints and models."""
    found = _listed(sweep, "") | _listed(sweep, "leases/")
    for run in _listed(sweep, "runs/"):
        found |= {run} | _listed(sweep, f"{run}/") | _listed(sweep, f"{run}/checkpoints/")
    return found


def _listed(sweep: Path, folder: str) -> set[str]:
    try:
        return {folder + name for name in os.listdir(sweep / folder)}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def log_sizes(sweep: Path) -> dict[str, int]:
    """Bytes of each run's metrics.jsonl, by run id."""
    sizes = {}
    for run in _listed(sweep, "runs/"):
        try:
            sizes[run.removeprefix("runs/")] = (sweep / run / "metrics.jsonl").stat().st_size
        except FileNotFoundError:
            continue
    return sizes


class Steps:
    """Optimizer steps by run id, counted in what the logs of one launch after the other show.

    A launch cuts each log back to its checkpoint before it goes on, which is what `look` must see.
    Steps since a log's last line are not seen.
    """

    def __init__(self, undisturbed: Path):
        self._marks = {path.parent.name: _marks(path) for path in
                       undisturbed.glob("runs/*/metrics.jsonl")}  # fmt: skip
        self.made = dict.fromkeys(self._marks, 0)
        self._seen: dict[str, int] = {}

    def look(self, sizes: dict[str, int]) -> bool:
        """Take in what the logs are now; whether one has grown."""
        grown = False
        for run, size in sizes.items():
            before = self._seen.get(run, 0)
            if size > before:
                grown = True
                self.made[run] += self._tick(run, size) - self._tick(run, before)
            self._seen[run] = size
        return grown

    @property
    def repeated(self) -> dict[str, float]:
        """Steps made more than once, as a share of the run's own."""
        return {run: made / self._marks[run][1][-1] - 1 for run, made in self.made.items()}

    def _tick(self, run: str, size: int) -> int:
        ends, ticks = self._marks[run]
        return ticks[bisect.bisect_right(ends, size) - 1]


def _marks(log: Path) -> tuple[list[int], list[int]]:
    """Where each line of a log ends, and how many steps had been made by then."""
    ends, ticks, last = [0], [0], {}
    for line in log.read_bytes().splitlines(keepends=True):
        record = json.loads(line)
        tick = ticks[-1]
        if record["kind"] == "train":
            branch, step = record["decay_to"], record["step"]
            # A trunk goes on where it was; a decay begins where the trunk now is.
            before = last.get(branch, last.get(None, 0))
            tick, last[branch] = tick + step - before, step
        ends.append(ends[-1] + len(line))
        ticks.append(tick)
    return ends, ticks


class Moment:
    """Waits for the so-and-so-manieth coming of something."""

    def __init__(self, kind: str, count: int, before: set[str]):
        self._pattern, self._left, self._before = MOMENTS.get(kind), count, before

    def look(self, now: set[str], grown: bool) -> bool:
        """Whether it has come."""
        new = now - self._before
        self._before = now
        if self._pattern is None:
            self._left -= grown
        else:
            self._left -= any(re.match(self._pattern, name) for name in new)
        return self._left <= 0
