"""FINDINGS.md says what its commands print: each is run again on the tables of the repository.

A block ```console has commands, `$ python -m analysis.NAME ...`, with what they print. A line `...`
stands for any lines. Numbers may differ by a unit of their last digit, or by a hundredth: intervals
are of resampled fits, whose last digits depend on the machine.
"""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "FINDINGS.md").read_text()
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def blocks(text):
    """(command, its lines) of all blocks."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            command, *lines = part.rstrip("\n").split("\n")
            found.append((" ".join(command.split()), [line.rstrip() for line in lines]))
    return found


COMMANDS = blocks(TEXT)


def alike(expected, line):
    """The same words, and numbers that are nearly the same."""
    if NUMBER.sub("#", expected).split() != NUMBER.sub("#", line).split():
        return False
    pairs = zip(NUMBER.finditer(expected), NUMBER.finditer(line), strict=True)
    return all(near(a[0], b[0]) for a, b in pairs)


def near(a, b):
    digits = a.lower().partition("e")[0].partition(".")[2]
    exponent = int(a.lower().partition("e")[2] or 0)
    unit = 10.0 ** (exponent - len(digits)) if digits or exponent else 0.0
    return abs(float(a) - float(b)) <= max(1.001 * unit, 0.01 * abs(float(a)))


def fits(expected, lines):
    """Whether lines are as expected, where `...` may be any of them."""
    if not expected:
        return not lines
    if expected[0].strip() == "...":
        return any(fits(expected[1:], lines[at:]) for at in range(len(lines) + 1))
    return bool(lines) and alike(expected[0], lines[0]) and fits(expected[1:], lines[1:])


def test_there_are_commands_and_they_only_read():
    assert len(COMMANDS) >= 5
    for command, lines in COMMANDS:
        assert re.match(r"python -m analysis\.\w+ ", command), command
        assert "--out" not in command and "--plot" not in command, command
        assert lines, f"{command}: what does it print?"


@functools.cache
def printed(command):
    """Its lines; some commands are shown twice, for different lines."""
    arguments = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return [line.rstrip() for line in done.stdout.rstrip("\n").split("\n")]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "expected"), COMMANDS)
def test_a_command_prints_what_is_said(command, expected):
    lines = printed(command)
    assert fits(expected, lines), f"{command} prints\n" + "\n".join(lines)


def test_the_figures_are_there():
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", TEXT)
    assert len(shown) == 3
    for path in shown:
        assert (ROOT / path).stat().st_size > 5000, path


@pytest.mark.parametrize(
    ("expected", "line", "same"),
    [("rho 0.36 [0.30, 0.39]", "rho  0.361 [0.30, 0.40]", True),
     ("rho 0.36 [0.30, 0.39]", "rho 0.38 [0.30, 0.39]", False),
     ("rho 0.36", "mu 0.36", False), ("p 0.005, yes", "p 0.01, yes", False),
     ("12 runs", "13 runs", False), ("1.2e+06", "1.3e+06", True), ("1.2e+06", "1.4e+06", False),
     ("-0.01", "+0.01", False), ("a 1 b", "a 1", False)],
)  # fmt: skip
def test_what_counts_as_the_same(expected, line, same):
    assert alike(expected, line) is same


def test_dots_stand_for_lines():
    assert fits(["...", "b 1", "..."], ["a", "b 1", "c"])
    assert fits(["a", "..."], ["a"])
    assert not fits(["b 1"], ["a", "b 1"])
    assert not fits(["...", "b 2"], ["a", "b 1"])
