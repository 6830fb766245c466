"""What holds of every key of a config, whatever it means: it is there, of its type, and a number
that a compiled program can hold. Sweeps and config files are Python and can set anything."""

import math
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bitnet_jax.configs import default
from bitnet_jax.errors import ConfigError, require, shown

LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
OPEN_SECTIONS = ("sweep", "tags")  # their keys are the sweeps' own
BEGIN = "let get_config() begin with that of bitnet_jax/configs/default.py"


def check_keys(config: ConfigDict) -> None:
    """Compare a config with the default one.

    Raises:
      ConfigError: a key that is missing or of another type; a number that is infinite or 0 in
        float32, or a whole one beyond 64 bits; a tag that is no text or number. NaN passes: it
        fails the bounds of each key.
    """
    _check_section(config, default.get_config(), "")
    for key, value in config.tags.items():
        fits = isinstance(key, str) and isinstance(value, str | int | float)
        if not fits or not f"{key}{value}".isprintable():
            raise ConfigError(f"tags.{shown(key)}={shown(value)}: a tag is a word or a number")


def _check_section(config: ConfigDict, known: ConfigDict, prefix: str) -> None:
    for key in known:
        name, usual = prefix + key, known[key]
        if key not in config:
            raise ConfigError(f"{name} is missing: {BEGIN}")
        value = config[key]
        if isinstance(usual, ConfigDict):
            require(isinstance(value, ConfigDict), name, value, f"it must be a section; {BEGIN}")
            if key not in OPEN_SECTIONS:
                _check_section(value, usual, f"{name}.")
        elif value is not None or usual is not None:  # None where the default is: to be derived
            _check_value(name, value, known.get_type(key))


def _check_value(key: str, value: Any, kind: type) -> None:
    # A bool is an int to Python, and a whole number is a float to a person.
    fits = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
    is_switch = kind is bool or not isinstance(value, bool)
    require(
        isinstance(value, fits) and is_switch, key, value, f"it must be of type {kind.__name__}"
    )
    if isinstance(value, int):
        require(abs(value) < 2**63, key, value, "it must lie below 2^63")
    elif isinstance(value, float):
        finite = math.isnan(value) or abs(value) <= LARGEST
        require(finite, key, value, f"it must be finite in float32: at most {LARGEST:.1e}")
        seen = value == 0 or not abs(value) < SMALLEST
        require(seen, key, value, f"it would be 0 in float32: give 0, or {SMALLEST:.1e} or more")
