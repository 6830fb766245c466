"""What the commands of the analysis share: a mistake is one line on stderr and status 2."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax

from analysis.tables import AnalysisError

PROGRAMS = Path.home() / ".cache" / "bitnet_jax" / "fits"  # a search compiles for some seconds


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are AnalysisErrors, not usage texts."""

    def error(self, message: str) -> NoReturn:
        raise AnalysisError(message)


def status(command: Callable[[], None]) -> int:
    """Run a command; 0, or 2 for what the user can mend."""
    keep_programs()
    try:
        command()
    except (AnalysisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def keep_programs() -> None:
    """Keep compiled searches between commands, unless the user has said where."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
