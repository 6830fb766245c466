"""The rules by which differences become verdicts, and how verdicts are joined."""

import pytest

from analysis import verdicts
from analysis.verdicts import Excess, Finding, Verdict

HOLDS, FAILS, UNKNOWN, MISSING = Verdict


def excess(low, high, p):
    return Excess("x", "", 0.0, (low + high) / 2, low, high, p)


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [
        (0.03, 0.05, 0.001, (HOLDS, HOLDS, HOLDS)),
        (0.01, 0.05, 0.001, (HOLDS, HOLDS, UNKNOWN)),
        (0.01, 0.015, 0.001, (FAILS, HOLDS, FAILS)),
        (0.01, 0.05, 0.2, (UNKNOWN, UNKNOWN, UNKNOWN)),
        (-0.05, 0.01, 0.2, (FAILS, FAILS, FAILS)),
        (-0.05, -0.03, 0.001, (FAILS, FAILS, FAILS)),
    ],
)
def test_rules(low, high, p, expected):
    rules = (verdicts.needed, verdicts.helps, verdicts.clearly)
    assert tuple(rule(excess(low, high, p)) for rule in rules) == expected


@pytest.mark.parametrize(
    ("parts", "all_of", "any_of"),
    [
        ((HOLDS, HOLDS), HOLDS, HOLDS),
        ((HOLDS, FAILS), FAILS, HOLDS),
        ((FAILS, FAILS), FAILS, FAILS),
        ((HOLDS, UNKNOWN), UNKNOWN, HOLDS),
        ((FAILS, UNKNOWN), FAILS, UNKNOWN),
        ((UNKNOWN, MISSING), MISSING, MISSING),
        ((FAILS, MISSING), FAILS, MISSING),
        ((HOLDS, MISSING), MISSING, HOLDS),
    ],
)
def test_joining(parts, all_of, any_of):
    findings = [Finding(verdict, str(i)) for i, verdict in enumerate(parts)]
    assert verdicts.every(*findings) == Finding(all_of, "0; 1")
    assert verdicts.some(*findings).verdict == any_of
