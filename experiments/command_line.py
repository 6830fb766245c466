"""The main command's flags, by absl and ml_collections, with errors of one line.

The flags live in a FlagValues of their own, not in absl's global one, so that `main` can be called
more than once in a process.
"""

import ast
import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from bitnet_jax.configs.check import check_keys
from bitnet_jax.errors import ConfigError, choose, clipped, shown
from experiments.launch.store import SCHEMES, is_url
from experiments.plan import load_config

ROOT = Path(__file__).parent.parent
DEFAULT_SWEEP = ROOT / "sweeps" / "quickstart.py"
DEFAULT_RUN = ROOT / "bitnet_jax" / "configs" / "default.py"
HELP = f"""
Flags: --sweep  --config=FILE.py[:ARG]  --config.KEY=VALUE  --workdir=DIR|URL  --scratch=DIR
       --dry_run [--planned=FILE.csv]
       --worker  --launcher=slurm|k8s [--dry_run | --status | --cancel]  --reproduce=RUN_DIR
       --distributed=auto|HOST:PORT [--processes=N --process=I]
Every key and what it means: {DEFAULT_RUN.relative_to(ROOT)}"""


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether the command line wants the usage text and nothing else."""
    return bool({"--help", "-help", "-h"} & set(argv))


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """sweep, dry_run, planned, worker, launcher, status, cancel, workdir, scratch, reproduce and
    config of a command line.

    Raises:
      ConfigError: a missing config file or one that lacks keys, an unknown flag or key, a value of
        the wrong type, what no file name can hold, or flags that do not go together.
    """
    _check_text(argv)
    configured = [a for a in argv[1:] if re.match("--?config", a)]
    argv = _with_config(list(argv))
    config = _check_keys(argv)
    values = flags.FlagValues()
    flags.DEFINE_bool("sweep", False, "run the sweep of the config file", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print the plan, train nothing", flag_values=values)
    flags.DEFINE_string("planned", None, "a table of planned endpoints", flag_values=values)
    flags.DEFINE_bool("worker", False, "train what others do not, then leave", flag_values=values)
    flags.DEFINE_string("launcher", "local", "who trains: local, slurm or k8s", flag_values=values)
    flags.DEFINE_bool("status", False, "show the launcher's jobs and the runs", flag_values=values)
    flags.DEFINE_bool("cancel", False, "cancel the launcher's jobs", flag_values=values)
    flags.DEFINE_string("distributed", None, "of several processes", flag_values=values)
    flags.DEFINE_integer("processes", 0, "how many there are", flag_values=values)
    flags.DEFINE_integer("process", -1, "which of them this is", flag_values=values)
    flags.DEFINE_string("workdir", "results", "where results go", flag_values=values)
    flags.DEFINE_string("scratch", None, "where to train for a URL", flag_values=values)
    flags.DEFINE_string("reproduce", None, "a run directory to make again", flag_values=values)
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own, on the style of a value's literals
            rest = values(argv)
    except (RecursionError, MemoryError) as error:  # Python's parser, of a value's brackets
        raise ConfigError("a value of the command line is nested too deeply") from error
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigError(_explain(error, config)) from error
    if not values.workdir:
        raise ConfigError("workdir='': give a directory, such as results")
    if len(rest) > 1:
        raise ConfigError(f"{shown(rest[1])}: unexpected argument; flags begin with --")
    _check_together(values, configured)
    return values


def _check_together(values: flags.FlagValues, configured: list[str]) -> None:
    """Refuse flags that do not go together. configured: those of the config."""
    choose("launcher", values.launcher, ("local", "slurm", "k8s"))
    _check_url(values)
    of_jobs = [name for name in ("status", "cancel") if values[name].value]
    of_sweeps = [*(["worker"] if values.worker else []), *of_jobs]
    if values.launcher != "local":
        of_sweeps.append(f"launcher={values.launcher}")
    elsewhere = values.launcher != "local" or values.reproduce is not None
    if values.planned is not None and (elsewhere or not values.dry_run):
        raise ConfigError("--planned: only with --dry_run, and neither --launcher nor --reproduce")
    if values.reproduce is not None:
        sweeping = ["--sweep"] if values.sweep else []
        for flag in (*sweeping, *(f"--{name}" for name in of_sweeps), *configured):
            right = "it does not go with --reproduce, which takes the run's own config.json"
            raise ConfigError(f"{clipped(flag)}: {right}")
    for name in of_sweeps:
        if not values.sweep:
            raise ConfigError(f"--{name}: only a sweep has workers and jobs; give --sweep, too")
    for name in of_jobs:
        if values.launcher == "local":
            raise ConfigError(f"--{name}: only jobs have it; give --launcher=slurm or k8s, too")
    one_of = [*of_jobs, *(name for name in ("dry_run", "worker") if values[name].value)]
    if len(one_of) > 1 and (of_jobs or values.launcher != "local"):
        given = ", ".join(f"--{name}" for name in one_of)
        raise ConfigError(f"{given}: they do not go together; give one of them")
    _check_distributed(values, [f"--{name}" for name in (*of_jobs, *_given(values, "dry_run"))])
    if values.worker and values.launcher != "local":
        raise ConfigError("--worker: it trains here; leave it out to submit jobs that are workers")


def _check_url(values: flags.FlagValues) -> None:
    """Refuse what needs a folder where a URL is given."""
    for name in ("reproduce", "scratch"):
        given = values[name].value or ""
        if is_url(given):
            copy = "copy it here first, with your provider's tool"
            right = copy if name == "reproduce" else "it must be a folder of this machine"
            raise ConfigError(f"{name}={clipped(given)!r}: {right}")
    scheme, _, bucket = values.workdir.partition(":")
    if scheme in SCHEMES and (not is_url(values.workdir) or bucket == "//"):
        right = f"give {scheme}://{'' if scheme == 'file' else 'BUCKET'}/PATH, or a folder"
        raise ConfigError(f"workdir={clipped(values.workdir)!r}: {right}")
    if scheme == "file" and values.launcher == "k8s":
        right = "each pod has files of its own; give k8s.claim, or a workdir in object storage"
        raise ConfigError(f"workdir={clipped(values.workdir)!r}: {right}")
    if not is_url(values.workdir):
        if values.scratch is not None:
            raise ConfigError("--scratch: only with a URL as --workdir; results go to the workdir")
        return
    needing = {
        "--reproduce": values.reproduce is not None,
        "--distributed": values.distributed is not None,
        "--launcher=slurm": values.launcher == "slurm",
    }
    for flag, is_given in needing.items():
        if is_given:
            right = "it needs a folder, which all of its processes share"
            raise ConfigError(f"workdir={clipped(values.workdir)!r}: with {flag} {right}")


def _given(values: flags.FlagValues, *names: str) -> list[str]:
    return [name for name in names if values[name].value]


def _check_distributed(values: flags.FlagValues, alone: list[str]) -> None:
    """Refuse what one process does, and places without others. alone: of the former."""
    of_places = [name for name in ("processes", "process") if values[name].present]
    if values.distributed is None:
        for name in of_places:
            raise ConfigError(f"--{name}: only with --distributed=HOST:PORT")
        return
    if values.distributed == "auto":
        for name in of_places:
            raise ConfigError(f"--{name}: --distributed=auto finds it; give HOST:PORT to say it")
    if values.launcher != "local":
        alone = [*alone, f"--launcher={values.launcher}"]
    for flag in [*alone, *(["--reproduce"] if values.reproduce is not None else [])]:
        raise ConfigError(f"{flag}: one process does it; leave --distributed out")


def overridden_keys(values: flags.FlagValues) -> list[str]:
    """The config keys that the command line set."""
    return list(config_flags.get_override_values(values["config"]))


def config_path(values: flags.FlagValues) -> str:
    """The config file, with its argument if it has one."""
    return config_flags.get_config_filename(values["config"])


def _check_text(argv: Sequence[str]) -> None:
    """The command goes into reports and its values into paths: both must be able to hold it. And
    all of it must be seen: absl has flags of its own, for a file of flags and to ignore some."""
    for argument in argv[1:]:
        if re.match("--?(flagfile|undefok)(=|$)", argument):
            raise ConfigError(f"{shown(argument)}: unknown flag; give every flag itself")
        if "\0" in argument or not _is_unicode(argument):
            raise ConfigError(f"{shown(argument)}: an argument must be UTF-8 without NUL")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a byte that was no UTF-8 stands there as half of a surrogate pair
        return False
    return True


def _with_config(argv: list[str]) -> list[str]:
    """`--config FILE` as `--config=FILE`, before its overrides; the default where none is named."""
    argv = [f"-{a}" if a.startswith("-config") else a for a in argv]  # absl takes one dash as two
    while "--config" in argv[:-1]:
        at = argv.index("--config")
        argv[at : at + 2] = [f"--config={argv[at + 1]}"]
    named = [a for a in argv if a.startswith("--config=")]
    if named:
        return [argv[0], *named, *(a for a in argv[1:] if a not in named)]
    sweeping = "--sweep" in argv or "--sweep=true" in argv
    return [argv[0], f"--config={DEFAULT_SWEEP if sweeping else DEFAULT_RUN}", *argv[1:]]


def _explain(error: Exception, config: ConfigDict) -> str:
    """absl's message in one line; for a value of the wrong type, what type is right."""
    said = error if isinstance(error, OSError) or not error.args else error.args[0]
    text = " ".join(str(said).split())
    wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", text)
    if not wrong:
        return clipped(text)
    key, value = wrong.groups()
    return f"config.{key}={shown(value)}: it must be of type {_type(config, key).__name__}"


def _type(config: ConfigDict, key: str) -> type:
    *sections, last = key.split(".")
    for section in sections:
        config = config[section]
    return config.get_type(last)


def _check_keys(argv: list[str]) -> ConfigDict:
    """Meet a missing file and an unknown key before absl, whose messages name neither well.

    Returns the config before its overrides.
    """
    overrides = [a.removeprefix("--").partition("=") for a in argv if a.startswith("--config")]
    path = next(v for flag, _, v in overrides if flag == "config")
    config: ConfigDict = load_config(path)
    try:
        check_keys(config)
    except ConfigError as error:
        raise ConfigError(f"--config={path}: {error}") from error
    known, given = list(_keys(config)), set()
    for flag, _, value in overrides:
        key = flag.removeprefix("config").lstrip(".")
        if key in known:
            if key in given and _type(config, key) is tuple:  # absl would join them
                raise ConfigError(f"config.{key}={shown(value)}: given twice; give it once")
            given.add(key)
            _check_kind(config, key, value)
        elif key:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see bitnet_jax/configs/default.py"
            raise ConfigError(f"config.{clipped(key)}={shown(value)}: unknown key; {hint}")
    return config


def _check_kind(config: ConfigDict, key: str, value: str) -> None:
    """Meet what absl would take: a dict for a whole section, and one for a tuple, of its keys."""
    if _type(config, key) is ConfigDict:
        raise ConfigError(f"config.{key}={shown(value)}: a section; set one of its keys, {key}.KEY")
    if _type(config, key) is not tuple:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            literal = ast.literal_eval(value)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # absl's to refuse, or a word
    if not isinstance(literal, tuple | list | int | float | str):
        raise ConfigError(f"config.{key}={shown(value)}: it must be of type tuple")


def _keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Every key of a config, sections included, as the command line spells it."""
    for key in config:
        yield prefix + key
        if isinstance(config[key], ConfigDict):
            yield from _keys(config[key], f"{prefix}{key}.")
