"""Times that can be compared: every case in one process, a round of all of them at a time.

A machine's speed drifts (other users, temperature, a governor), and what runs first in a round may
find another cache than what runs last. So each round times every case once, in an order rotated
from round to round, and ratios are formed within a round.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Case = Callable[[], object]  # does its work and returns when that is finished


class Ratio(NamedTuple):
    """A ratio over the rounds, or the seconds of a name that says so; the goal is an upper bound.

    Where there is nothing to reach, the goal is None.
    """

    median: float
    min: float
    max: float
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.median <= self.goal


def interleave(
    cases: Mapping[str, Case], repeats: int, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds a call of every case, one number a round.

    at_least: seconds that a case is timed in a round; a short one is called as often as it takes,
      by what its second call took, and its number is the mean. 0: one call a round.
    A first call of each, and with `at_least` a second one, is not counted.
    """
    for case in cases.values():
        case()
    calls = dict.fromkeys(cases, 1)
    if at_least:
        calls = {
            name: max(1, math.ceil(at_least / _seconds(case, 1))) for name, case in cases.items()
        }
    names, seconds = list(cases), {name: [0.0] * repeats for name in cases}
    for turn in range(repeats):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            seconds[name][turn] = _seconds(cases[name], calls[name])
    return seconds


def _seconds(case: Case, calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        case()
    return (time.perf_counter() - began) / calls


def ratio(
    numerator: Sequence[float], denominator: Sequence[float], goal: float | None = None
) -> Ratio:
    """Of the seconds of two cases, round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)], goal)


def spread(values: Sequence[float], goal: float | None = None) -> Ratio:
    """Median and range of numbers that are ratios already, or that stand for themselves."""
    return Ratio(statistics.median(values), min(values), max(values), goal)
