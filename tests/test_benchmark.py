"""The benchmark command: how it times and divides, its JSON contract, and what it refuses."""

import json
import sys

import pytest

from bitnet_jax import tracking
from bitnet_jax.files import read_json
from bitnet_jax.ladder import LADDER
from bitnet_jax.precision import PRECISIONS
from experiments.benchmark import __main__ as command
from experiments.benchmark import environment as facts
from experiments.benchmark import peak, table, timing
from experiments.benchmark.environment import environment
from experiments.benchmark.result import Result
from experiments.benchmark.timing import Ratio, interleave, ratio, spread
from experiments.benchmark.workload import Workload


class Clock:
    """A clock that only its cases move, and what they did in turn."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def case(self, name, *durations):
        """Takes so many seconds, call by call; the last number from there on."""
        left = list(durations)

        def call():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


# Timing


def test_rounds_rotate_and_the_first_call_is_not_counted(clock):
    cases = {
        "a": clock.case("a", 9.0, 1.0, 2.0, 3.0, 4.0),
        "b": clock.case("b", 9.0, 5.0),
        "c": clock.case("c", 9.0, 7.0),
    }
    seconds = interleave(cases, repeats=4)
    assert "".join(clock.calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert seconds == {"a": [1.0, 2.0, 3.0, 4.0], "b": [5.0] * 4, "c": [7.0] * 4}


def test_short_cases_are_called_as_often_as_it_takes(clock):
    """By the second call: 0.3 s need four calls of 0.1, whose mean counts, and one of 5."""
    cases = {"short": clock.case("s", 9.0, 0.1, 0.1, 0.2, 0.3, 0.6), "long": clock.case("l", 5.0)}
    seconds = interleave(cases, repeats=1, at_least=0.301)
    assert "".join(clock.calls) == "sl" + "sl" + "ssss" + "l"
    assert seconds == {"short": [pytest.approx(0.3)], "long": [pytest.approx(5.0)]}


def test_a_ratio_is_formed_within_each_round():
    """2, 3 and 1; the medians' ratio would be 1.5, and the goal is an upper bound."""
    found = ratio([2.0, 6.0, 3.0], [1.0, 2.0, 3.0], goal=2.0)
    assert found == Ratio(median=2.0, min=1.0, max=3.0, goal=2.0)
    assert found.met and not found._replace(goal=1.9).met
    assert spread([4.0, 1.0]) == Ratio(2.5, 1.0, 4.0, None) and spread([1.0]).met is None
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


# The command


def one(workload, say):
    """A suite with one ratio and one row, which depend on the flags."""
    say("measuring")
    row = {"suite": "one", "case": workload.arms[0], "seconds": 0.25, "rounds_seconds": [0.25]}
    row |= {"peak_bytes": None, "tokens_per_s": 2.5e6, "peak_share": 0.5, "layers": workload.layers}
    return Result({"step_time/a/b": Ratio(1.25, 1.0, 1.5, 1.0)}, [row], ["a note"])


def two(workload, say):
    row = {"suite": "two", "case": "x", "seconds": 2e-5}
    return Result({"batch_time/x/y": Ratio(0.5, 0.25, 1.0)}, [row], ["a note", "another"])


@pytest.fixture
def suites(monkeypatch):
    monkeypatch.setattr(command, "SUITES", {"one": one, "two": two})


def refuse_constant(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_the_json_contract(suites, tmp_path, capsys):
    out = tmp_path / "benchmark.json"
    arguments = ["--suite=one,two", "--arms=bf16", "--layers=3", "--json", f"--out={out}"]
    assert command.main(arguments) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out, parse_constant=refuse_constant)
    assert set(document) == {"environment", "ratios", "measurements", "notes"}
    assert document["ratios"] == {
        "step_time/a/b": {"median": 1.25, "min": 1.0, "max": 1.5, "goal": 1.0},
        "batch_time/x/y": {"median": 0.5, "min": 0.25, "max": 1.0, "goal": None},
    }
    rows = document["measurements"]
    assert [row["suite"] for row in rows] == ["one", "two"]
    assert rows[0]["case"] == "bf16" and rows[0]["layers"] == 3
    assert document["notes"] == ["a note", "another"]
    said = "python -m experiments.benchmark " + " ".join(arguments)
    assert document["environment"]["command"] == said
    assert read_json(out) == document
    assert list(tmp_path.iterdir()) == [out]


def test_tables(suites, capsys):
    assert command.main(["--suite=one,two"]) == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert all(text in lines["ternary"] for text in ("250 ms", "2.5M", "50.0%"))
    assert "20 us" in lines["x"]
    assert "1.250" in lines["step_time/a/b"] and "<= 1 " in lines["step_time/a/b"]
    assert "missed" in lines["step_time/a/b"]
    assert "met" not in lines["batch_time/x/y"] and "missed" not in lines["batch_time/x/y"]


def test_the_suites_are_those_of_the_help(capsys):
    assert set(command.SUITES) >= {"step", "parts", "data", "checkpoint", "startup"}
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "python -m experiments.benchmark --suite=step" in out
    for word in (*command.SUITES, "--peer", "--microbatches", "Exit status"):
        assert word in out


MISTAKES = {
    "--suite=speed": ("suite", "speed", *command.SUITES),
    "--suite=": ("suite", "step"),
    "--sizes=7m,8m": ("sizes", "8m", *LADDER),
    "--arms=octonary": ("arms", "octonary", *PRECISIONS),
    "--arms=ternary,": ("arms", "ternary"),
    "--arms=bf16,bf16": ("arms", "bf16,bf16", "once"),
    "--arms=ternary:int3": ("ternary:int3", "int8"),
    "--arms=bf16:int8": ("bf16:int8", "carrier"),
    "--sizes=": ("sizes", "at least one"),
    "--peer=keras": ("peer", "keras", "torch", "qwix"),
    "--repeats=0": ("repeats=0", "at least 1"),
    "--repeats=many": ("--repeats", "many"),
    "--layers=0": ("layers=0", "at least 1"),
    "--vocab=1": ("vocab=1", "at least 2"),
    "--sequence_length=1": ("sequence_length=1", "at least 2"),
    "--repeats=1000000000000000000000": ("repeats=1000000000000000000000", "at most 100000"),
    "--vocab=99999999999": ("vocab=99999999999", "at most 1048576"),
    "--batch_tokens=1000": ("batch_tokens=1000", "multiple of sequence_length=256"),
    "--batch_tokens=0": ("batch_tokens=0", "multiple"),
    "--microbatches=3": ("microbatches=3", "16 sequences"),
    "--microbatches=0": ("microbatches=0",),
    "--out=/nowhere/at/all.json": ("/nowhere/at/all.json", "cannot write"),
    "--tokens=3": ("--tokens=3",),
    "--size=7m": ("--size=7m",),  # no flag may be shortened
    "7m": ("7m",),
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_mistakes(argument, capsys):
    """One line that names it, before anything is measured."""
    assert command.main([argument]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not captured.out
    for word in MISTAKES[argument]:
        assert word in captured.err


@pytest.mark.parametrize(
    "suite, peer, right",
    [("data", "torch", "step"), ("decode", "torch", "step"), ("step", "llama.cpp", "decode")],
)
def test_a_peer_goes_with_its_suite(suite, peer, right, capsys):
    assert command.main([f"--suite={suite}", f"--peer={peer}"]) == 2
    error = capsys.readouterr().err
    assert f"peer='{peer}': it goes with --suite={right}" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "name, package, title, suite, install",
    [
        ("torch", "torch", "PyTorch", "step", "torch"),
        ("qwix", "qwix", "Qwix", "step", "qwix"),
        ("llama.cpp", "llama_cpp", "llama.cpp", "decode", "llama-cpp-python"),
    ],
)
def test_a_peer_that_is_not_installed(name, package, title, suite, install, monkeypatch, capsys):
    module = f"experiments.benchmark.peers.{package}_peer"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert command.main([f"--suite={suite}", f"--peer={name}"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: --peer={name}: {title} is not installed; pip install {install}\n"


def test_out_that_is_a_directory(tmp_path, capsys):
    assert command.main([f"--out={tmp_path}"]) == 2
    assert "cannot write there" in capsys.readouterr().err


# What is measured


def test_flags_become_steps():
    workload = Workload(("7m",), ("ternary:int8", "fp16"), layers=2, vocab=100, microbatches=4)
    ternary, fp16 = (workload.step("7m", arm) for arm in workload.arms)
    assert ternary.precision.carrier == "int8" and ternary.precision.name == "ternary"
    assert fp16.precision == PRECISIONS["fp16"] and fp16.microbatches == 4
    assert (ternary.model.layers, ternary.model.width, ternary.model.vocab_size) == (2, 256, 100)
    assert Workload().step("7m", "bf16").model.layers == LADDER["7m"].layers
    batch = workload.batch()
    assert (batch.shape, batch.dtype) == ((16, 257), "int32")
    assert (workload.batch_shape().shape, workload.batch_shape().dtype) == (batch.shape, "int32")
    assert batch.min() >= 0 and batch.max() == 99


@pytest.mark.parametrize(
    "arms, base",
    [(("bf16", "ternary"), "bf16"), (("ternary", "fp16"), "fp16"), (("fp32",), "fp32")],
)
def test_the_denominator_is_bf16_or_else_the_last(arms, base):
    assert Workload(arms=arms).base == base


def test_suffixes_tell_several_sizes():
    assert Workload(("7m",)).suffix("7m") == ""
    assert Workload(("7m", "24m")).suffix("24m") == "@24m"


# Where


def test_environment(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    found = environment(["--json", "--out=a b"])
    assert found.items() >= tracking.provenance().items()
    assert found["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"
    assert found["command"] == "python -m experiments.benchmark --json '--out=a b'"
    assert found["platform"] == "cpu" and found["device_count"] >= 1 and found["cores"] >= 1
    assert found["memory_bytes"] > 2**28
    assert found["driver_version"] is None and found["cuda_version"] is None
    assert found["date"].endswith("+00:00")
    assert found.keys() >= {"jaxlib_version", "python_version", "device_kind", "load_average"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


SMI = "+---\n| NVIDIA-SMI 575.1    Driver Version: 575.1    CUDA Version: 12.9     |\n+---"


@pytest.mark.parametrize(
    "table_text, query_text, cuda, driver",
    [(SMI, "575.1\n575.1", "12.9", "575.1"), (None, None, None, None), ("", "", None, None)],
)
def test_versions_of_a_gpu(table_text, query_text, cuda, driver, monkeypatch):
    def output(*arguments):
        return query_text if len(arguments) > 1 else table_text

    monkeypatch.setattr(facts, "_output", output)
    assert facts._gpu("gpu") == {"driver_version": driver, "cuda_version": cuda}
    assert facts._gpu("cpu") == {"driver_version": None, "cuda_version": None}


@pytest.mark.parametrize(
    "kind, rate",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_known_peaks(kind, rate):
    assert peak.known_peak(kind) == rate


def test_a_measured_peak_is_the_fastest_products(monkeypatch):
    def fake(cases, repeats):
        cases["product"]()
        return {"product": [2.0, 0.5, 1.0, 1.0, 1.0][:repeats]}

    monkeypatch.setattr(peak, "interleave", fake)
    assert peak._product_rate(64) == 2 * 64**3 / 0.5


@pytest.mark.parametrize(
    "key, value, text",
    [
        ("seconds", 1.5, "1.5 s"),
        ("step_seconds", 0.0125, "12.5 ms"),
        ("peak_bytes", 7.16e6, "7.16MB"),
        ("peak_bytes", None, "-"),
        ("flops_per_s", 2e11, "200B"),
        ("peak_share", 0.123, "12.3%"),
        ("rate_over_training", 66.66, "66.7"),
        ("layers", 12, "12"),
        ("case", "ternary", "ternary"),
    ],
)
def test_cells(key, value, text):
    assert table.cell(key, value) == text
