"""What the commands of the analysis share: a mistake is one line on stderr and status 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from analysis.tables import AnalysisError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are AnalysisErrors, not usage texts."""

    def error(self, message: str) -> NoReturn:
        raise AnalysisError(message)


def status(command: Callable[[], None]) -> int:
    """Run a command; 0, or 2 for what the user can mend."""
    try:
        command()
    except (AnalysisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
