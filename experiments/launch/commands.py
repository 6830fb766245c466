"""A cluster's own commands: what they print, and their complaints in one line."""

import shutil
import subprocess
from collections.abc import Iterable

from bitnet_jax.errors import ConfigError, clipped, one_line

SECONDS = 60.0  # that a command may take
LONG = 200  # characters of a complaint


def ask(*command: str, given: str = "") -> str:
    """What a command prints. given: to its standard input.

    Raises:
      ConfigError: it complains, cannot be run, or takes longer than SECONDS.
    """
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True,
                              timeout=SECONDS)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]}: no answer from the cluster in {SECONDS:.0f} s") from error
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        if len(said) > LONG:  # their last line says it, those before are of each attempt
            said = done.stderr.strip().splitlines()[-1].strip()
        raise ConfigError(
            clipped(one_line(f"{command[0]}: {said.removeprefix(command[0] + ': ')}"))
        )
    return done.stdout


def check_there(commands: Iterable[str], right: str) -> None:
    """Raises ConfigError, with what would be right, where one of the commands is not installed."""
    for command in commands:
        if shutil.which(command) is None:
            raise ConfigError(f"{command}: not found; {right}")
