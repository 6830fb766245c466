"""What to run next of a study: its parts as they stand, and the command that goes on."""

import shlex

import pytest
from run_files import write_summary

from experiments import command_line, next_part
from experiments.next_part import main, read_parts, that_fit

SWEEP = '''
"""A study of two parts."""
from bitnet_jax.configs import default

PARTS = ("first", "second")


def get_config(arg=None):
    words = dict(word.split("=") for word in arg.split(","))
    c = default.get_config()
    c.name = words["part"]
    c.seed = int(words.get("seed", 0))
    return c


def sweep(config):
    return [{"seed": config.seed + i} for i in range(3 if config.name == "first" else 2)]
'''


@pytest.fixture
def arguments(tmp_path, tiny_overrides, monkeypatch):
    """Of a study in a file, of the tiny run."""
    path = tmp_path / "study.py"
    path.write_text(SWEEP)
    overrides = {key: value for key, value in tiny_overrides.items() if key != "name"}
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    # A hundredth of a run's FLOPs a second: a run takes a hundred seconds.
    flops = read_parts([f"--config={path}", *flags])[0].left[0]
    monkeypatch.setattr(next_part, "flops_per_second", lambda plan: (flops / 100, "given"))
    return [f"--config={path}", *flags, f"--workdir={tmp_path / 'w'}"]


def finish(part, count):
    for run in part.plan.runs[:count]:
        run.directory.mkdir(parents=True, exist_ok=True)
        write_summary(run.directory, run.spec)


def printed_command(capsys):
    printed = capsys.readouterr()
    assert printed.err == ""
    *above, command = printed.out.splitlines()
    return " ".join(above), shlex.split(command)


def test_the_first_part_that_is_not_finished(arguments, capsys):
    """Of three runs two are left; four minutes hold both, and two minutes one of them."""
    first, second = read_parts(arguments)
    assert [part.name for part in (first, second)] == ["first", "second"]
    finish(first, 1)
    assert main(["--minutes=4", *arguments]) == 0
    text, command = printed_command(capsys)
    assert "next: first" in text and "all of it" in text and command[0] == "python"
    assert main(["--minutes=2", *arguments]) == 0
    text, command = printed_command(capsys)
    assert "1 of its 2 runs" in text
    assert command[:3] == ["timeout", "--signal=TERM", "2m"]


def test_the_command_trains_the_part(arguments, capsys):
    """Its arguments give the very plan: the part's runs, at the same place."""
    first, second = read_parts(arguments)
    finish(first, 3)
    assert main(["--minutes=60", *arguments]) == 0
    _, command = printed_command(capsys)
    assert command[1:3] == ["-m", "experiments.run"]
    flags = command_line.parse(command[2:])
    assert flags.sweep and flags.config.name == "second"
    assert str(second.plan.directory.parent) == flags.workdir
    assert command_line.config_path(flags).endswith("study.py:part=second")


def test_an_argument_beside_the_part(arguments):
    path, *rest = arguments
    parts = read_parts([f"{path}:seed=7", *rest])
    assert [run.spec.seed_init for run in parts[1].plan.runs] == [7, 8]


def test_all_done(arguments, capsys):
    for part in read_parts(arguments):
        finish(part, 3)
    assert main(["--minutes=1", *arguments]) == 1
    assert capsys.readouterr().out.endswith("all parts are done\n")


def test_how_many_fit():
    """In their order: a small one behind one that does not fit waits for it."""
    assert that_fit([3, 4, 5], 12) == 3
    assert that_fit([3, 4, 5], 11.9) == 2
    assert that_fit([9, 1], 5) == 0
    assert that_fit([], 5) == 0


@pytest.mark.parametrize(
    "change,message",
    [
        (["--minutes=0"], "minutes=0.0: it must be positive"),
        (["--minutes=nan"], "minutes=nan: it must be positive"),
        (["--minutes=5"], "--config: name one sweep file"),
        (["--minutes=5", "--config=none.py"], "no such config file"),
        (["--minutes=5", "--config=sweeps/isoflop.py"], "it declares no PARTS"),
        (["--minutes=5", "--config=sweeps/study.py:part=grid"], "leave part out"),
        (["--minutes=5", "--config=sweeps/study.py", "--what"], "what"),
    ],
)
def test_mistakes(change, message, capsys):
    assert main(change) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ")
    assert message in printed.err and printed.err.count("\n") == 1
