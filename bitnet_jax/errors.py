"""The one error that is the user's to mend, and how a bad value is refused with it: one line that
names the key, its value and what would be right."""

from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A setting cannot work. The message is one line: key, value and what would be right."""


def shown(value: Any) -> str:
    """A value as an error quotes it: its repr, in one line and not too long."""
    try:
        text = repr(value)
    except ValueError:  # Python spells out no whole number of more than 4,300 digits
        text = "a number of thousands of digits"
    return clipped(" ".join(text.split()))


def clipped(text: str, most: int = 200) -> str:
    """A text, or as much of it as an error should quote."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def one_line(message: object) -> str:
    """A message in one line of characters that print, whatever names it quotes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))


def require(condition: bool, key: str, value: Any, right: str) -> None:
    """Raises ConfigError where the condition does not hold."""
    if not condition:
        raise ConfigError(f"{key}={shown(value)}: {right}")


def choose(key: str, value: Any, known: Iterable[str]) -> None:
    """Raises ConfigError where the value is not among the known ones, and lists them."""
    known = list(known)
    if value not in known:
        raise ConfigError(f"{key}={shown(value)} is unknown; choose from {', '.join(known)}")
