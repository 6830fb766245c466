"""A finished run, trained afresh from its config.json alone: does it come out the same to the bit?

The reproduction lies in `<workdir>/reproduced/runs/<run_id>`, or in `reproduced-2` and so on where
that has been made before; nothing is written where the original lies. It has no Weights & Biases
run, since that would have the original's id. One that was interrupted goes on when the same command
is given again, if neither code nor device has changed meanwhile.

Equality is promised on one machine by one version of the code of what was trained alone, beside
others or not, in however many launches. The reproduction trains alone, too: as a part of a larger
program, which trains a group, a run's sums are rounded otherwise (losses agree to about 1e-5). Two
things are not known of the original: the changes of a commit marked `-dirty`, and from which step
on a batch was cut for want of memory, which is taken to be the first.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bitnet_jax.errors import ConfigError, clipped
from bitnet_jax.files import SCHEMA_VERSION, DamagedFile, read_json, write_json
from bitnet_jax.tracking import JOINED, provenance
from experiments.differences import described, differences
from experiments.plan import Plan, PlannedRun, make_plan
from experiments.runs import Description, describe, verified_params, verified_summary

NAME = "reproduced"
PROVENANCE = ("git_commit", "jax_version", "python_version", "device")
ORIGINS = (*PROVENANCE, "group")
NOT_PROMISED = ("wall_s", *PROVENANCE)  # among an endpoint's columns
COUNTS = ("status", "skipped_steps", "rollbacks", "microbatches", "total_flops")
LOSSES = ("loss", "valid_loss")
UNKNOWN = "unknown"
SHOWN = 3  # differing values of one line or endpoint


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run has come to. log: its metrics.jsonl."""

    summary: dict[str, Any]
    log: bytes


@dataclasses.dataclass(frozen=True)
class Original:
    """The run to make again, as its files were found."""

    directory: Path
    run: Description
    result: Result


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One thing that was compared.

    loss_difference: the largest absolute one, in nats, where there are losses on both sides.
    first: the first difference in words, where there is one.
    """

    what: str
    loss_difference: float | None
    first: str | None

    @property
    def equal(self) -> bool:
        return self.first is None


# Before


def read_original(directory: Path) -> Original:
    """Read a run directory, all of it verified.

    Raises:
      ConfigError: not a run directory, an unfinished run, damaged files, those of another version,
        or a config that no longer resolves to the same run.
      DataError: its corpus is gone.
    """
    run = describe(directory)
    result = read_result(directory, run)
    for name, document in (("config.json", run.document), ("summary.json", result.summary)):
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"{directory / name}: schema_version={version}: only runs of version "
                f"{SCHEMA_VERSION} can be reproduced; use the code that wrote it"
            )
    return Original(directory, run, result)


def read_result(directory: Path, run: Description) -> Result:
    """What a run's directory holds beside its config. Raises ConfigError as `read_original`."""
    summary = verified_summary(directory, run.spec)
    if summary.get("model") is not None:
        verified_params(directory, run.spec)
    return Result(summary, (directory / "metrics.jsonl").read_bytes())


def make_reproduction(original: Original, workdir: Path) -> Plan:
    """A plan of the one run, in a directory that is new, or half done by this very code.

    Raises:
      ConfigError: the workdir lies in the original, or cannot be.
    """
    run = original.run
    if workdir.resolve().is_relative_to(original.directory.resolve()):
        raise ConfigError(
            f"workdir={str(workdir)!r}: it lies in the run to reproduce, where nothing is written; "
            "give --workdir another directory"
        )
    for number in itertools.count(1):
        config = run.config.copy_and_resolve_references()
        config.name = NAME if number == 1 else f"{NAME}-{number}"
        config.tracking.wandb = "disabled"
        plan = make_plan(config, [{}], run.corpus, workdir)
        (planned,) = plan.runs
        if _may_train(planned):
            break
    microbatches = original.result.summary["microbatches"]
    return dataclasses.replace(
        plan, runs=(dataclasses.replace(planned, microbatches=microbatches),)
    )


def _may_train(run: PlannedRun) -> bool:
    """Whether a directory has nothing yet, or the beginning of what would be made there."""
    if run.state == "new":
        return True
    try:
        document = read_json(run.directory / "config.json")
    except (OSError, DamagedFile):
        return False
    origin = provenance(run.spec.step.mesh)
    wanted = {**origin, "config": json.loads(json.dumps(run.config.to_dict()))}
    same = all(document.get(key) == value for key, value in wanted.items())
    return same and run.state == "resume"


# After


def compare(original: Result, reproduction: Result) -> list[Comparison]:
    """All that is promised to be equal."""
    old, new = original.summary, reproduction.summary
    return [
        _compare_endpoints(old["endpoints"], new["endpoints"]),
        _compare_logs(original.log, reproduction.log),
        _compare_values("model", old, new, {"model": "fingerprint"}),
        _compare_values("summary", old, new, {key: key for key in COUNTS}),
    ]


def _compare_values(
    what: str, old: Mapping[str, Any], new: Mapping[str, Any], names: Mapping[str, str]
) -> Comparison:
    """Some keys of two summaries, by the names that they are shown under."""
    pair = ({name: summary.get(key) for key, name in names.items()} for summary in (old, new))
    return Comparison(what, None, described(differences(*pair), SHOWN) or None)


def _compare_endpoints(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> Comparison:
    first, nothing = None, dict[str, Any]()
    for before, after in itertools.zip_longest(old, new, fillvalue=nothing):
        kept = [
            {key: value for key, value in row.items() if key not in NOT_PROMISED}
            for row in (before, after)
        ]
        text = described(differences(*kept), SHOWN)
        if text:
            first = f"endpoint of {(before or after).get('tokens')} tokens: {text}"
            break
    losses = [{i: row.get("loss") for i, row in enumerate(rows)} for rows in (old, new)]
    return Comparison(f"{len(old)} endpoints", _largest(*losses), first)


def _compare_logs(old: bytes, new: bytes) -> Comparison:
    """Byte for byte."""
    before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
    pairs = enumerate(itertools.zip_longest(before, after, fillvalue=b""), 1)
    first = next((_differing_line(i, *pair) for i, pair in pairs if pair[0] != pair[1]), None)
    difference = _largest(_losses(before), _losses(after))
    return Comparison(f"metrics.jsonl, {len(before)} lines", difference, first)


def _differing_line(number: int, old: bytes, new: bytes) -> str:
    before, after = _record(old), _record(new)
    if not before or not after or before == after:  # or the bytes alone differ
        return f"line {number}: {_text(old)}, now {_text(new)}"
    place = f"line {number} ({before.get('kind')}, step {before.get('step')})"
    return f"{place}: {described(differences(before, after), SHOWN)}"


def _text(line: bytes) -> str:
    return clipped(repr(line.decode(errors="replace"))) if line else "absent"


def _losses(lines: Iterable[bytes]) -> dict[tuple, Any]:
    """By kind, step and branch, so that a missing line does not shift the rest."""
    records = [_record(line) for line in lines]
    return {
        (*(record.get(key) for key in ("kind", "step", "decay_to")), name): record[name]
        for record in records
        for name in LOSSES
        if name in record
    }


def _record(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _largest(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> float | None:
    """The largest |old - new| of those that are numbers on both sides."""
    pairs = [(old[key], new[key]) for key in old if key in new]
    return max(
        (abs(a - b) for a, b in pairs if isinstance(a, float) and isinstance(b, float)),
        default=None,
    )


def origins(original: Result, reproduction: Result) -> dict[str, tuple[str, str, str]]:
    """Of each of ORIGINS: both values, and `same`, `differs` or `not known`."""
    old, new = (_values(result.summary) for result in (original, reproduction))
    return {key: (old[key], new[key], _mark(old[key], new[key])) for key in ORIGINS}


def _values(summary: Mapping[str, Any]) -> dict[str, str]:
    """Provenance, and how many runs the program trained that made the run."""
    group = JOINED.join(map(str, summary.get("groups", []))) or UNKNOWN
    return {**{key: summary[key] for key in PROVENANCE}, "group": group}


def _mark(old: str, new: str) -> str:
    if old == UNKNOWN or (old == new and old.endswith("-dirty")):
        return "not known"
    return "same" if old == new else "differs"


def verdict(compared: Iterable[Comparison], known: Mapping[str, tuple[str, str, str]]) -> str:
    """One sentence; it says when equality was not promised."""
    other = [key for key, (_, _, mark) in known.items() if mark != "same"]
    doubt = f"not the same, or not known to be: {', '.join(other)}"
    if all(one.equal for one in compared):
        return f"equal to the bit ({doubt})" if other else "equal to the bit"
    if other:
        return f"different; equality was not promised ({doubt})"
    return "different, though code, versions and device are the same"


def write(
    path: Path,
    original: Original,
    compared: Sequence[Comparison],
    known: Mapping[str, tuple[str, str, str]],
) -> None:
    """reproduction.json: the comparison, for programs."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "run_id": original.run.spec.run_id,
        "original": str(original.directory),
        "equal": all(one.equal for one in compared),
        "compared": [
            {
                "what": one.what,
                "equal": one.equal,
                "largest_loss_difference": one.loss_difference,
                "first_difference": one.first,
            }
            for one in compared
        ],
        "provenance": {
            key: {"original": old, "reproduction": new, "comparison": mark}
            for key, (old, new, mark) in known.items()
        },
        "verdict": verdict(compared, known),
    }
    write_json(path, document)


def show(
    screen: Console,
    compared: Sequence[Comparison],
    known: Mapping[str, tuple[str, str, str]],
) -> None:
    """Two small tables and what differs first."""
    table = Table("compared", "", title_justify="left")
    table.add_column("largest difference of loss", justify="right")
    for one in compared:
        difference = "-" if one.loss_difference is None else f"{one.loss_difference:.3g}"
        table.add_row(one.what, "equal" if one.equal else "DIFFERENT", difference)
    screen.print(table)
    for one in compared:
        if one.first:
            line = f"{one.what}: first difference: {one.first}"
            screen.print(line, soft_wrap=True, markup=False)
    table = Table("provenance", "original", "reproduction", "")
    for key, values in known.items():
        table.add_row(key, *values)
    screen.print(table)
    screen.print(verdict(compared, known), soft_wrap=True, markup=False)
