"""How a bad value is refused: one line that names the key, its value and what would be right."""

import math
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from bitnet_jax.errors import ConfigError


def require(condition: bool, key: str, value: Any, right: str) -> None:
    """Raises ConfigError where the condition does not hold."""
    if not condition:
        raise ConfigError(f"{key}={value!r}: {right}")


def choose(key: str, value: Any, known: Iterable[str]) -> None:
    """Raises ConfigError where the value is not among the known ones, and lists them."""
    known = list(known)
    if value not in known:
        raise ConfigError(f"{key}={value!r} is unknown; choose from {', '.join(known)}")


def check_finite(config: ConfigDict, prefix: str = "") -> None:
    """No number of a config may be infinite; NaN fails the bounds of each key."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            check_finite(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            require(not math.isinf(value), prefix + key, value, "it must be finite")
