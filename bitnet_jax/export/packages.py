"""Packages that only exports need, imported when one is written."""

import importlib
import importlib.util
from typing import Any

from bitnet_jax.errors import ConfigError

INSTALL_EXTRA = "pip install 'bitnet_jax[export]'"


def package(name: str) -> Any:
    """A module of another package.

    Raises:
      ConfigError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        root = name.partition(".")[0]
        raise ConfigError(f"this needs the package {root}: {INSTALL_EXTRA}") from error


def installed(name: str) -> bool:
    """Whether a package is there, without importing it."""
    return importlib.util.find_spec(name) is not None
