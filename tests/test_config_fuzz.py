"""Whatever the command line or a sweep says: a run of sane numbers, or one line and status 2.

Seeded: input i is the same on every machine. What the fuzzer once found stands below by name.
"""

import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from bitnet_jax.configs import default
from bitnet_jax.errors import ConfigError, shown
from experiments import device_memory, estimate, run
from experiments.command_line import _keys
from experiments.plan import make_plan

ROOT = Path(__file__).parent.parent
KEYS = list(_keys(default.get_config()))
SECONDS = 5
FLOAT32_MAX = 3.4028235e38

NUMBERS = [
    "0", "-1", "1", "2", "16", "128", "4096", "100000", "1e12", "1000000000000", "0.5", "1.5",
    "0.9999999999", "-0.0", "nan", "inf", "-inf", "1e400", "1e308", "1e39", "1e-46", "1e-320",
    "1_000", "0x10", "١٢", "½", "true", "false", "None",
]  # fmt: skip
NUMBERS += ["9" * 30, "9" * 320, "9" * 5000, "-" + "9" * 30, "0x" + "f" * 5000]
WORDS = ["", "ternary", "adamw", "wsd", "none", "bf16", "group", "sin2", "int4_absmax", "fp16"]
TEXTS = ["x" * 300, "x" * 100_000, "ünïcödé", "\U0001f600", "a\0b", "a\nb", "\udcff", "[red]x",
         "[/x]", ":x:", "<script>", "%s%n", "--config", "-h "]  # fmt: skip
PATHS = ["../../x", "..", ".", "/etc", "/etc/passwd", "~", "/dev/stdin", "x/../..", "${HOME}"]
CODE = [
    '__import__("os").system("touch PWNED")',
    '(lambda: __import__("os").system("touch PWNED"))()',
    "$(touch PWNED)", "`touch PWNED`", "(lambda: 0)()", "(1)(2)", '"\\d"', "1 if 1 else 2",
]  # fmt: skip
TUPLES = [
    "()", "(1,'a')", "((1,),)", "(None,)", "(True,)", "(1j,)", "{1:2}", "{1000000:2}", "b'x'",
    "{2560}", "[2560]", "(2560,5120)", "(2560.5,)", "(nan,)", "(1e400,)", "(1e15,)", "(1e30,)",
    f"({'9' * 400},)", "{'a':{'b':1}}", "...", "(" * 300, "[" * 5000, "-" * 20000 + "1",
    "1," * 5000, "(2560,", "0" * 50 + "1",
]  # fmt: skip
VALUES = NUMBERS + WORDS + TEXTS + PATHS + CODE + TUPLES
SWEEPS = ["quickstart", "seeds", "learning_rate", "isoflop", "presets"]


class Slow(BaseException):
    """Not an Exception, lest what is tested catch it."""


@contextmanager
def limited():
    def stop(*_):
        raise Slow(f"more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


DONE: list[str] = []  # what Python's auditor saw while it was to look
LOOKING = False


ACTS = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "os.mkdir",
        "os.rename", "os.remove", "os.symlink", "os.rmdir"}  # fmt: skip


def _audit(event, arguments):
    if LOOKING and (event in ACTS or (event == "open" and _makes(arguments[2]))):
        DONE.append(f"{event} {arguments}")


def _makes(flags):
    return isinstance(flags, int) and bool(flags & os.O_CREAT)


sys.addaudithook(_audit)


@contextmanager
def audited():
    global LOOKING
    DONE.clear()
    LOOKING = True
    try:
        yield DONE
    finally:
        LOOKING = False


@pytest.fixture
def flags(tiny_overrides, tmp_path, monkeypatch):
    """The tiny run's flags, in an empty directory, without a product that times this machine."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(estimate, "_product_rate", lambda: 1e11)
    return [f"--config.{key}={value}" for key, value in tiny_overrides.items()]


@pytest.fixture
def plans(monkeypatch):
    """The plans that were made."""
    made = []

    def make(*arguments):
        made.append(make_plan(*arguments))
        return made[-1]

    monkeypatch.setattr(run, "make_plan", make)
    return made


def command(flags, number):
    """Input `number`: one to three strange overrides of the tiny run, or of a sweep; every key in
    turn, and now and then a flag, a section, an unknown key or the same key twice."""
    draw = random.Random(number)
    argv = list(flags)
    if draw.random() < 0.1:
        sweep = draw.choice(SWEEPS)
        argv = [
            a for a in argv if a.split("=")[0] in ("--config.data.source", "--config.eval.tokens")
        ]
        argv += [
            "--sweep",
            f"--config={ROOT}/sweeps/{sweep}.py{draw.choice(['', ':x', ':size=7'])}",
        ]
        axis = draw.choice(
            ["sizes", "precisions", "tokens", "shares", "seeds", "budgets", "presets"]
        )
        argv.append(f"--config.sweep.{axis}={draw.choice(VALUES)}")
    for i in range(draw.choice([1, 1, 2, 3])):
        key = KEYS[number % len(KEYS)] if i == 0 else draw.choice(KEYS)
        fitting = {
            bool: NUMBERS,
            int: NUMBERS,
            float: NUMBERS,
            tuple: TUPLES + NUMBERS,
            str: WORDS + PATHS,
        }
        kind = fitting.get(_type(key), VALUES)
        value = draw.choice(kind if draw.random() < 0.5 else VALUES)
        argv = [a for a in argv if a.split("=")[0] != f"--config.{key}" or draw.random() < 0.05]
        shape = draw.random()
        if shape < 0.9:
            argv.append(f"--config.{key}={value}")
        elif shape < 0.92:
            argv += [f"--config.{key}", value]
        elif shape < 0.94:
            argv.append(f"-config.{key}={value}")
        elif shape < 0.96:
            argv.append(f"--config.{key}{draw.choice(['.x', 's', '.', '..', ' '])}={value}")
        else:
            flag = draw.choice(
                ["workdir", "config", "flagfile", "undefok", "dry_run", "sweep", "x"]
            )
            argv.append(f"--{flag}={value}")
    return ["run", *argv, "--dry_run"]


def _type(key):
    config = default.get_config()
    *sections, last = key.split(".")
    for section in sections:
        config = config[section]
    return config.get_type(last)


def numbers_in(value):
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [n for item in value for n in numbers_in(item)]
    return [value] if isinstance(value, int | float) else []


def check_sane(plan, workdir):
    """What a plan that was accepted must hold of every run."""
    for planned in plan.runs:
        spec = planned.spec
        for number in numbers_in(spec):
            assert math.isfinite(number) and abs(number) <= FLOAT32_MAX, number
            assert isinstance(number, int) or number == 0 or abs(number) >= 1.1e-38, number
        assert all(0 < end < 2**31 for end in spec.ends) and list(spec.ends) == sorted(
            set(spec.ends)
        )
        assert 0 < spec.total_flops <= spec.independent_flops < 1e40
        assert 0 < device_memory.needed(planned) < 1e25
        assert 0 < spec.batch_tokens < 2**31 and spec.peak_lr > 0
        assert spec.segments[-1].end == spec.ends[-1]
        json.dumps(planned.config.to_dict(), allow_nan=False)
        place = planned.directory
        assert place.parent.parent.parent == workdir and len(place.name.encode()) < 256
        assert re.fullmatch(r"[\w.+=-]+", place.name), "a run's folder"
        inside = Path(os.path.normpath(place)).is_relative_to(os.path.normpath(workdir))
        assert inside and ".." not in place.relative_to(workdir).parts


def outcome(argv, capsys, plans):
    """'accepted' or 'refused'; an AssertionError tells what else happened."""
    plans.clear()
    with audited() as done, limited():
        status = run.main(argv)
    printed = capsys.readouterr()
    assert done == []
    if status == 0:
        assert printed.err == "" and len(plans) == 1
        named = [a.removeprefix("--workdir=") for a in argv if a.startswith("--workdir=")]
        check_sane(plans[0], Path(named[-1] if named else "results"))
        return "accepted"
    assert status == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.endswith("\n")
    assert printed.err[:-1].isprintable() and len(printed.err) < 1500, printed.err
    return "refused"


def test_a_thousand_strange_commands(flags, plans, capsys):
    """None ends in another exception, in more lines, or after long; nothing is written or run."""
    counts, failures = {"accepted": 0, "refused": 0}, []
    for number in range(1000):
        argv = command(flags, number)
        try:
            counts[outcome(argv, capsys, plans)] += 1
        except (Exception, Slow) as error:
            strange = [a[:80] for a in argv if a not in flags]
            failures.append(f"{number} {strange}: {type(error).__name__}: {str(error)[:200]}")
    assert failures == []
    assert counts["accepted"] > 30 and counts["refused"] > 500
    assert list(Path.cwd().parent.rglob("*")) == [Path.cwd()]


# What it found, by name


FOUND = {
    # A dict took the place of a whole section: AttributeError.
    "section": ("--config.loss={'a':{'b':1}}", "config.loss=", "set one of its keys, loss.KEY"),
    "tags": ("--config.tags={'a':{'b':1}}", "config.tags=", "a section"),
    # Python's parser gives up on brackets by errors of its own.
    "deep": ("--config.train.tokens=" + "-" * 20000 + "1", "", "nested too deeply"),
    # A system call's error, not an answer, for a path that is too long.
    "long source": ("--config.data.source=" + "x" * 5000, "data 'xxx", "neither a built-in"),
    "long name": ("--config.name=" + "x" * 300, "name='xxx", "plain folder name"),
    "long workdir": ("--workdir=" + "x" * 5000, "workdir='xxx", "cannot be read"),
    "long config": ("--config=" + "x" * 5000 + ".py", "--config=xxx", "no such config file"),
    # Numbers beyond what shows or trains them.
    "tokens": (f"--config.train.tokens=({'9' * 400},)", "train.tokens=", "below 2^63"),
    "steps": ("--config.train.tokens=(1e15,)", "train.tokens=", "at most 2^31"),
    "layers": ("--config.model.layers=" + "9" * 320, "model.layers=", "below 2^63"),
    "width": ("--config.model.ff_width=" + "9" * 18, "model.ff_width=", "at most 1e+13"),
    "hexadecimal": ("--config.seed=0x" + "f" * 5000, "seed=", "below 2^63"),
    "dispatch": ("--config.launch.dispatch=1000000000", "launch.dispatch=", "at most 65536"),
    # Finite in Python, but infinite, one or zero in the compiled program.
    "rate": ("--config.optim.peak_lr=1e39", "optim.peak_lr=1e+39", "finite in float32"),
    "epsilon": ("--config.optim.epsilon=1e-46", "optim.epsilon=1e-46", "0 in float32"),
    "beta": ("--config.optim.b2=0.9999999999", "optim.b2=0.9999999999", "[0, 1), in float32"),
    # Checked at the launch alone, after the directory was made.
    "group": ("--config.launch.group=0", "launch.group=0", "at least 1"),
    # Bytes, dicts and sets are iterable, and so became budgets.
    "bytes": ("--config.train.tokens=b'x'", "config.train.tokens=", "of type tuple"),
    "dict": ("--config.train.tokens={1000000:2}", "config.train.tokens=", "of type tuple"),
    "bool": ("--config.train.tokens=(True,)", "train.tokens=(True,)", "positive whole numbers"),
    # Names that no file, log or service takes.
    "surrogate": ("--config.name=\udcff", r"'--config.name=\udcff'", "UTF-8 without NUL"),
    "NUL": ("--workdir=a\0b", r"'--workdir=a\x00b'", "UTF-8 without NUL"),
    "line end": ("--config.name=a\nb", r"name='a\nb'", "plain folder name"),
    "project": ("--config.tracking.project=../../x", "tracking.project=", "Weights & Biases"),
    # absl's own flags: overrides from a file went past the checks; a missing one, to a traceback.
    "flag file": ("--flagfile=/nowhere", "'--flagfile=/nowhere'", "unknown flag"),
    "undefok": ("--undefok=x", "'--undefok=x'", "unknown flag"),
    # One dash is two to absl, and so went past the checks.
    "one dash": ("-config.optim.peek_lr=1", "config.optim.peek_lr='1'", "did you mean"),
}  # fmt: skip


@pytest.mark.parametrize(("argument", "names", "right"), FOUND.values(), ids=FOUND)
def test_found(flags, plans, capsys, argument, names, right):
    kept = [flag for flag in flags if flag.split("=")[0] != argument.split("=")[0]]
    with limited():
        assert run.main(["run", *kept, argument, "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {names}") and right in error
    assert error.count("\n") == 1 and len(error) < 1000
    assert plans == []


@pytest.mark.parametrize("value", ["(1)(2)", "1 is 2", '"\\d"'])
def test_python_does_not_comment_on_a_value(flags, capsys, recwarn, value):
    """Its warnings about the style of an expression went to stderr, before the one line."""
    assert run.main(["run", *flags, f"--config.train.tokens={value}", "--dry_run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [w for w in recwarn if w.category in (SyntaxWarning, DeprecationWarning)] == []


@pytest.mark.parametrize("name", ["[red]x", "[bold]", ":smile:", "[x]y[!x]"])
def test_names_are_not_markup(flags, capsys, name):
    """rich took brackets for colours and colons for pictures; a closing one was an error."""
    kept = [flag for flag in flags if not flag.startswith("--config.name=")]
    workdir = "--workdir=a/[/b]:x:"
    assert run.main(["run", *kept, f"--config.name={name}", workdir, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert f"{name}: 1 runs" in out and f"results would go to a/[/b]:x:/{name}" in out


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"status": "ok"}', "[" * 5000, "\0", '{"status": "ok", '
             '"wall_s": "1", "total_flops": 1}', '{"status":"ok","wall_s":NaN,"total_flops":1}']
)  # fmt: skip
def test_a_damaged_summary_of_another_sweep(flags, capsys, tmp_path, text):
    """The dry run looks there for this machine's speed; it knows no speed from a damaged one."""
    other = tmp_path / "w" / "other" / "runs" / "some-run"
    other.mkdir(parents=True)
    (other / "summary.json").write_text(text)
    assert run.main(["run", *flags, f"--workdir={tmp_path / 'w'}", "--dry_run"]) == 0
    assert "of a matrix product timed now" in capsys.readouterr().out


def test_more_than_the_memory_is_refused_before_it_is_taken(flags, capsys, tmp_path):
    """By a dry run, too, unless the plan is for another machine. Linux would kill the process."""
    argv = ["run", *flags, "--config.model.ff_width=1000000000", f"--workdir={tmp_path / 'w'}"]
    assert run.main([*argv, "--dry_run", "--config.launch.device_memory_gb=10000"]) == 0
    capsys.readouterr()
    for also in ([], ["--dry_run"]):
        assert run.main([*argv, *also]) == 2
        error = capsys.readouterr().err
        assert "ff_width1000000000" in error and "GB, where a device has" in error
        assert error.count("\n") == 1 and not (tmp_path / "w").exists()


# What sweeps and config files set, which are Python


POINT_VALUES = [
    None, True, False, 0, 1, -1, 2.5, 1e6, math.nan, math.inf, 10**30, 10**5000, "", "x", "3", b"x",
    (), (1,), (True,), (None,), [2560], (2560, 5120), (math.nan,), (10**400,), ((1,),), {},
    {"a": 1}, {"size": "95k"}, {"a": {"b": 1}}, 1j, {1, 2}, object(), "\ud800", "a\0b", range(3),
    default.get_config(), "95k", "fp16",
]  # fmt: skip
POINT_KEYS = [*KEYS, "", ".", "model.", ".model", "a.b.c", "model.size.x", "seed.x", "tags.x",
              "tags.a.b", "sweep.x", "train.tokens.0", 3, None, ("a",)]  # fmt: skip


def test_a_thousand_strange_points(tiny_config, tiny_corpus, tmp_path):
    """Values are any Python objects: ConfigDict checks the types of no placeholder."""
    counts, failures = {"accepted": 0, "refused": 0}, []
    for number in range(1000):
        draw = random.Random(number)
        point = {draw.choice(POINT_KEYS): draw.choice(POINT_VALUES)}
        try:
            with limited():
                plan = make_plan(tiny_config(), [point], tiny_corpus, tmp_path / "w")
                check_sane(plan, tmp_path / "w")
            counts["accepted"] += 1
        except ConfigError as error:
            if str(error).isprintable() and len(str(error)) < 600:
                counts["refused"] += 1
            else:
                failures.append(f"{number}: {str(error)[:200]}")
        except (Exception, Slow) as error:
            failures.append(f"{number} {list(point)}: {type(error).__name__}: {error}")
    assert failures == []
    assert counts["accepted"] > 20 and counts["refused"] > 800
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("point", "names", "right"),
    [
        ({"seeds.init": 2.5}, "seeds.init=2.5", "of type int"),
        ({"quantization.rotate": "no"}, "quantization.rotate='no'", "of type bool"),
        ({"launch.group": 2.5}, "launch.group=2.5", "of type int"),
        ({"model.layers": True}, "model.layers=True", "of type int"),
        ({"model": {"size": "95k"}}, "model.", "is missing"),
        ({"optim": None}, "optim=None", "a section"),
        ({"data.source": "other"}, "data.source='other'", "all runs of a sweep share it"),
        ({"name": "other"}, "name='other'", "all runs of a sweep share it"),
        ({"tags": {"a": {"b": 1}}}, "tags.'a'=", "a word or a number"),
        ({3: 1}, "sweep='tiny'", "a dict of keys"),
        (7, "sweep='tiny'", "a dict of keys"),
    ],
    ids=str,
)
def test_points_found(tiny_config, tiny_corpus, tmp_path, point, names, right):
    with pytest.raises(ConfigError) as error:
        make_plan(tiny_config(), [point], tiny_corpus, tmp_path)
    assert str(error.value).startswith(names) and right in str(error.value)
    assert str(error.value).isprintable()


FILES = {
    "an empty config": ("return ConfigDict()", "checkpoint is missing"),
    "a section left out": ("c = default.get_config(); del c.optim; return c", "optim is missing"),
    "a key left out": ("c = default.get_config(); del c.optim.b1; return c", "optim.b1 is missing"),
    "another type": (
        "return ConfigDict({**default.get_config().to_dict(), 'precision': 3})",
        "precision=3: it must be of type str",
    ),
    "a section that is none": (
        "return ConfigDict({**default.get_config().to_dict(), 'model': '95k'})",
        "model='95k': it must be a section",
    ),
    "endless": ("return get_config()", "RecursionError"),
    "not a config": ("return {}", "must return a ConfigDict"),
    "many lines": ("raise ValueError('one' + chr(10) + 'two')", "line 4: ValueError: one"),
}


@pytest.mark.parametrize(("body", "right"), FILES.values(), ids=FILES)
def test_config_files(tmp_path, capsys, body, right):
    file = tmp_path / "mine.py"
    head = "from ml_collections import ConfigDict\nfrom bitnet_jax.configs import default\n"
    file.write_text(f"{head}def get_config():\n    {body}\n")
    assert run.main(["run", f"--config={file}", f"--workdir={tmp_path / 'w'}", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --config={file}: ") and right in error
    assert error.count("\n") == 1 and "--config" not in error.removeprefix("error: --config")


def test_a_value_is_quoted_in_a_line():
    assert shown("a\nb") == r"'a\nb'"
    assert shown("x" * 500) == f"'{'x' * 199}... (502 characters)"
    assert "digits" in shown((10**5000,))
    assert "\n" not in shown(default.get_config())


# As a person gives it


@pytest.mark.slow
def test_twenty_as_processes(flags, tmp_path):
    """Arguments as bytes, as a shell passes them; none may hold NUL there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    sample, number = [], 0
    while len(sample) < 20:
        argv = command(flags, 50 * number)
        number += 1
        if not any("\0" in a or len(a) > 100_000 for a in argv):
            sample.append(argv)
    for argv in sample:
        arguments = [os.fsencode(a) if "\udcff" in a else a.encode() for a in argv[1:]]
        python = [sys.executable.encode(), b"-m", b"experiments.run", *arguments]
        done = subprocess.run(python, capture_output=True, env=environment, timeout=120)
        error = done.stderr.decode()
        assert "Traceback" not in error, argv
        if done.returncode:
            assert done.returncode == 2 and error.count("\n") == 1, (argv, error)
            assert error.startswith("error: ") and done.stdout == b""
    assert list(Path.cwd().iterdir()) == []
