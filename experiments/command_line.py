"""The main command's flags, by absl and ml_collections, with errors of one line.

The flags live in a FlagValues of their own, not in absl's global one, so that `main` can be called
more than once in a process.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from bitnet_jax.errors import ConfigError
from experiments.plan import load_config

ROOT = Path(__file__).parent.parent
DEFAULT_SWEEP = ROOT / "sweeps" / "quickstart.py"
DEFAULT_RUN = ROOT / "bitnet_jax" / "configs" / "default.py"
HELP = f"""
Flags: --sweep  --config=FILE.py[:ARG]  --config.KEY=VALUE  --workdir=DIR  --dry_run
Every key and what it means: {DEFAULT_RUN.relative_to(ROOT)}"""


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether the command line wants the usage text and nothing else."""
    return bool({"--help", "-help", "-h"} & set(argv))


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """sweep, dry_run, workdir and config of a command line.

    Raises:
      ConfigError: a missing config file, an unknown flag or key, a value of the wrong type.
    """
    argv = _with_config(list(argv))
    config = _check_keys(argv)
    values = flags.FlagValues()
    flags.DEFINE_bool("sweep", False, "run the sweep of the config file", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print the plan, train nothing", flag_values=values)
    flags.DEFINE_string("workdir", "results", "where results go", flag_values=values)
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(_explain(error, config)) from error
    if not values.workdir:
        raise ConfigError("workdir='': give a directory, such as results")
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]!r}: unexpected argument; flags begin with --")
    return values


def overridden_keys(values: flags.FlagValues) -> list[str]:
    """The config keys that the command line set."""
    return list(config_flags.get_override_values(values["config"]))


def config_path(values: flags.FlagValues) -> str:
    """The config file, without its argument."""
    return config_flags.get_config_filename(values["config"])


def _with_config(argv: list[str]) -> list[str]:
    """`--config FILE` as `--config=FILE`, before its overrides; the default where none is named."""
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
    text = " ".join(str(error.args[0] if error.args else error).split())
    wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", text)
    if not wrong:
        return text
    key, value = wrong.groups()
    return f"config.{key}={value!r}: it must be of type {_type(config, key).__name__}"


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
    config: ConfigDict = load_config(next(v for flag, _, v in overrides if flag == "config"))
    known = list(_keys(config))
    for flag, _, value in overrides:
        key = flag.removeprefix("config").lstrip(".")
        if key and key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see bitnet_jax/configs/default.py"
            raise ConfigError(f"config.{key}={value!r}: unknown key; {hint}")
    return config


def _keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Every key of a config, sections included, as the command line spells it."""
    for key in config:
        yield prefix + key
        if isinstance(config[key], ConfigDict):
            yield from _keys(config[key], f"{prefix}{key}.")
