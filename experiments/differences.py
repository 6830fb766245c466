"""Where two JSON values differ, to the bit."""

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from bitnet_jax.errors import shown

ABSENT = object()  # stands for what only one of the two has


def differences(old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every leaf that differs, in the order of the old one's keys."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    for key in [*before, *(key for key in after if key not in before)]:
        pair = before.get(key, ABSENT), after.get(key, ABSENT)
        if not _same(*pair):
            yield (key, *pair)


def described(differing: Iterator[tuple[str, Any, Any]], most: int) -> str:
    """The first few in words, and how many more there are; empty where there is none."""
    texts = [
        f"{key}={_shown(old)}, now {_shown(new)}"
        for key, old, new in itertools.islice(differing, most)
    ]
    more = sum(1 for _ in differing)
    return "; ".join([*texts, *([f"{more} more"] if more else [])])


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Empty containers within others are leaves, so that one is not the same as none."""
    if isinstance(value, Mapping) and value:
        items: Any = value.items()
    elif isinstance(value, list | tuple) and value:
        items = enumerate(value)
    else:
        if prefix or not isinstance(value, Mapping | list | tuple):
            yield prefix, value
        return
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))


def _same(old: Any, new: Any) -> bool:
    """As JSON writes them: neither 0.0 and -0.0 nor 1 and 1.0 nor 1 and true are the same."""
    if old is ABSENT or new is ABSENT:
        return old is new
    return json.dumps(old) == json.dumps(new)


def _shown(value: Any) -> str:
    return "absent" if value is ABSENT else shown(value)
