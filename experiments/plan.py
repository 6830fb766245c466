"""From a config (and the sweep it declares) to the runs that will be trained, all checked."""

import contextlib
import dataclasses
import importlib.util
import os
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from bitnet_jax.configs.resolve import failures_allowed, group_size, loop_options, resolve
from bitnet_jax.data import Corpus
from bitnet_jax.errors import ConfigError, clipped, one_line, shown
from bitnet_jax.files import DamagedFile, read_json, within
from bitnet_jax.member import WRITTEN_IN_PLACE
from bitnet_jax.spec import RunSpec
from experiments.summary import read_summary

if TYPE_CHECKING:
    from experiments.launch.mirror import Mirror

ABSENT = (FileNotFoundError, NotADirectoryError)  # where a workdir is no directory, too
EXAMPLE = "sweeps/isoflop.py:size=800k"
LONGEST_NAME = 200  # bytes; a file system takes 255, of which temporary names need some


ONE_A_SWEEP = ("name", "data.source", "slurm", "k8s")  # the table, the corpus, and who trains


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run: what the user's config became, and the spec resolved from it.

    microbatches: see `Job`.
    """

    spec: RunSpec
    config: ConfigDict
    directory: Path
    microbatches: int = 0

    @property
    def finished(self) -> bool:
        return self.state == "done"

    @property
    def started(self) -> bool:
        return (self.directory / "config.json").exists()

    @property
    def group(self) -> tuple[str, ...] | None:
        """The ids of the runs that it was begun with; () where that is not known, None of a
        run that is new."""
        try:
            group = read_json(self.directory / "config.json").get("group", ())
            return tuple(str(run_id) for run_id in group)
        except ABSENT:
            return None
        except (OSError, ValueError, TypeError):
            return ()

    @property
    def state(self) -> str:
        """What the next launch will do with it: skip it (done), go on from its newest checkpoint
        (resume; damaged, where its summary is not what was written), or begin it (new).

        Raises:
          ConfigError: its summary is of another run, or of a later version of this code.
        """
        try:
            read_summary(self.directory)
        except ABSENT:
            return "resume" if self.started else "new"
        except DamagedFile:
            return "damaged"
        return "done"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every run of one launch. `directory` is where the results table goes.

    mirror: keeps the directory at a URL, where the workdir is one.
    """

    name: str
    directory: Path
    corpus: Corpus
    runs: tuple[PlannedRun, ...]
    mirror: "Mirror | None" = None


def make_plan(
    config: ConfigDict,
    points: Iterable[dict[str, Any]],
    corpus: Corpus,
    workdir: Path,
    overridden: Iterable[str] = (),
) -> Plan:
    """Apply each point of a sweep to the config and resolve it. Nothing is written.

    overridden: keys that the command line set, which the sweep must not set again.

    Raises:
      ConfigError: a run that cannot be, the same run twice, a key set in both places, or a run's
        directory with another's summary or out of the sweep's.
    """
    directory = _readable(workdir) / safe_name(config.name)
    runs: dict[str, PlannedRun] = {}
    for point in points:
        if not isinstance(point, dict) or not all(isinstance(key, str) for key in point):
            right = f"a point is a dict of keys, not {shown(point)}"
            raise ConfigError(f"sweep={config.name!r}: {right}")
        clash = point.keys() & set(overridden)
        if clash:
            key = sorted(clash)[0]
            raise ConfigError(
                f"{key}={shown(config[key])}: the sweep sets this key itself; change the axis "
                "under config.sweep instead"
            )
        run_config = _with(config, point)
        spec = resolve(run_config, corpus)
        for key in ONE_A_SWEEP:
            if _plain(run_config[key]) != _plain(config[key]):
                right = "all runs of a sweep share it; set it outside of the sweep's points"
                raise ConfigError(f"{key}={shown(run_config[key])}: {right}")
        loop_options(run_config)  # its mistakes, too, are met before anything is written
        group_size(run_config)
        failures_allowed(run_config)
        if spec.run_id in runs:
            raise ConfigError(
                f"sweep={config.name!r}: {spec.run_id} occurs twice; points must differ"
            )
        run_directory = directory / "runs" / spec.run_id
        runs[spec.run_id] = PlannedRun(spec, run_config, run_directory)
    _check_directories(directory, runs.values())
    if not runs:
        raise ConfigError(f"sweep={config.name!r}: it has no points; fill in its axes")
    return Plan(config.name, directory, corpus, tuple(runs.values()))


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value


def _check_directories(sweep: Path, runs: Iterable[PlannedRun]) -> None:
    """Refuse what would be written out of the sweep's directory, and what lies there wrongly."""
    for run in runs:
        inside = (run.directory / name for name in WRITTEN_IN_PLACE)
        within(sweep, run.directory, *inside)
        with contextlib.suppress(*ABSENT, DamagedFile):
            read_summary(run.directory)


def safe_name(name: str) -> str:
    """A single folder's name; it may not lead out of the workdir."""
    plain = name.isprintable() and name == Path(name).name and not name.startswith(".")
    if not name or not plain or len(name.encode()) > LONGEST_NAME:
        right = "it must be a plain folder name, such as 'quickstart'"
        raise ConfigError(f"name={shown(name)}: {right}")
    return name


def _readable(workdir: Path) -> Path:
    try:
        workdir.exists()
    except OSError as error:  # a path too long, or behind a folder that shuts others out
        raise ConfigError(
            f"workdir={shown(str(workdir))}: cannot be read ({error.strerror}); "
            "give --workdir a writable directory"
        ) from error
    return workdir


def _with(config: ConfigDict, point: dict[str, Any]) -> ConfigDict:
    copy = config.copy_and_resolve_references().lock()  # so that no key is made up
    for key, value in point.items():
        try:
            copy.update_from_flattened_dict({key: value})
        except KeyError as error:
            right = "the sweep sets an unknown key; see bitnet_jax/configs/default.py"
            raise ConfigError(f"{one_line(key)}={shown(value)}: {right}") from error
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            why = clipped(one_line(first_line(error)))
            raise ConfigError(f"{key}={shown(value)}: {why}") from error
    return copy


def load_config(path_and_arg: str) -> ConfigDict:
    """What `get_config` of `file.py` or `file.py:arg` returns. The file is Python and is run.

    Raises:
      ConfigError: no such file, one without get_config, or one that fails.
    """
    path, _, arg = path_and_arg.partition(":")
    get_config = getattr(_load(path), "get_config", None)
    if get_config is None:
        raise ConfigError(f"--config={path}: it has no get_config()")
    with _users_code(path):
        config = get_config(arg) if arg else get_config()
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={path}: get_config() must return a ConfigDict")
    return config


def load_points(path: str, config: ConfigDict) -> list[dict[str, Any]]:
    """The points that the `sweep` function of a config file yields for a config.

    Raises:
      ConfigError: the file declares no sweep, or it fails.
    """
    path = path.partition(":")[0]
    module = _load(path)
    if not hasattr(module, "sweep"):
        raise ConfigError(f"--config={path}: it declares no sweep(config); leave --sweep out")
    with _users_code(path):
        return list(module.sweep(config))


def load_parts(path: str) -> tuple[str, ...]:
    """The names of the parts that a sweep file declares as PARTS, in their order.

    Raises:
      ConfigError: no such file, or one without parts.
    """
    parts = getattr(_load(path), "PARTS", None)
    if not isinstance(parts, tuple) or not parts or not all(isinstance(p, str) for p in parts):
        raise ConfigError(f"--config={path}: it declares no PARTS, a tuple of names")
    return parts


def _load(path: str) -> ModuleType:
    if not path.endswith(".py") or not os.path.isfile(path):
        raise ConfigError(
            f"--config={clipped(path)}: no such config file; give a path such as {EXAMPLE}"
        )
    spec = importlib.util.spec_from_file_location("_config_file", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with _users_code(path):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _users_code(path: str) -> Iterator[None]:
    """What a config file raises, as one line that says where."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else "?"
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"--config={path}: line {line}: {reason}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    # A KeyError's text is quoted; an OSError's first argument is a number.
    plain = error.args and not isinstance(error, OSError)
    text = str(error.args[0]) if plain else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]
