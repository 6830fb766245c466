"""Combinators for sweeps. A point is a dict of config keys to values; a sweep is a list of points.

product(axis("seed", [0, 1]), axis("precision", ["ternary", "fp16"]))   # 4 points
zipit(axis("model.size", sizes), axis("train.tokens", budgets))         # side by side
chain(first, second)                                                    # one after the other
"""

import itertools
from collections.abc import Iterable
from typing import Any

from bitnet_jax.errors import ConfigError

Point = dict[str, Any]


def axis(key: str, values: Iterable[Any]) -> list[Point]:
    """One config key over its values."""
    return [{key: value} for value in values]


def product(*sweeps: Iterable[Point]) -> list[Point]:
    """Every combination; the last sweep varies fastest.

    Raises:
      ConfigError: two sweeps set the same key.
    """
    return [_merge(points) for points in itertools.product(*sweeps)]


def zipit(*sweeps: Iterable[Point]) -> list[Point]:
    """Point by point, side by side.

    Raises:
      ConfigError: lengths differ, or two sweeps set the same key.
    """
    lists = [list(sweep) for sweep in sweeps]
    if len({len(points) for points in lists}) > 1:
        lengths = [
            f"{len(points)} of {', '.join(points[0]) if points else '?'}" for points in lists
        ]
        raise ConfigError(
            f"the sweep's axes go side by side, so give equally many: {', '.join(lengths)}"
        )
    return [_merge(points) for points in zip(*lists, strict=True)]


def chain(*sweeps: Iterable[Point]) -> list[Point]:
    """One sweep after the other."""
    return list(itertools.chain(*sweeps))


def tags(**words: str) -> Point:
    """Words that stand beside a run's results, in columns `tag_...`, and change nothing."""
    return {f"tags.{key}": word for key, word in words.items()}


def _merge(points: Iterable[Point]) -> Point:
    merged: Point = {}
    for point in points:
        shared = merged.keys() & point.keys()
        if shared:
            raise ConfigError(f"two axes of the sweep set {', '.join(sorted(shared))}")
        merged.update(point)
    return merged


def parse_arg(arg: str | None, **defaults: str) -> dict[str, str]:
    """What follows the colon of `--config=file.py:key=value,key=value`, over its defaults.

    Raises:
      ConfigError: a key that the sweep does not have.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, equals, value = item.partition("=")
        if key not in defaults or not equals:
            known = ", ".join(f"{key}=" for key in defaults) or "no argument"
            raise ConfigError(f"config argument {item!r} is unknown; this sweep takes {known}")
        values[key] = value
    return values
