"""The one error that is the user's to mend, and how a bad value is refused with it: one line that
names the key, its value and what would be right."""

from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A setting cannot work. The message is one line: key, value and what would be right."""


def require(condition: bool, key: str, value: Any, right: str) -> None:
    """Raises ConfigError where the condition does not hold."""
    if not condition:
        raise ConfigError(f"{key}={value!r}: {right}")


def choose(key: str, value: Any, known: Iterable[str]) -> None:
    """Raises ConfigError where the value is not among the known ones, and lists them."""
    known = list(known)
    if value not in known:
        raise ConfigError(f"{key}={value!r} is unknown; choose from {', '.join(known)}")
