"""The suites: what each measures, on a model that compiles soon; and their names and goals."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import cost, ladder
from bitnet_jax.train import Report
from experiments.benchmark import compilation, data, parts, peers, startup, step
from experiments.benchmark.peak import Peak
from experiments.benchmark.timing import Ratio
from experiments.benchmark.workload import Workload

TINY = Workload(
    sizes=("27k",), arms=("ternary",), sequence_length=16, batch_tokens=64, vocab=32, repeats=2
)
PEAK = Peak(1e12, "a guess")


def silent(text):
    del text


@pytest.fixture(scope="module", autouse=True)
def small_ladder():
    """Two sizes; all tests that step the first share one program."""
    sizes = {"27k": ladder.Shape(1, 16, 32, 2, 1), "7m": ladder.Shape(1, 256, 512, 4, 4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "LADDER", sizes)
        for module in (step, parts):
            patch.setattr(module, "peak", lambda: PEAK)
        for module in (step, data):
            patch.setattr(module, "AT_LEAST", 0.0)
        patch.setattr(parts, "AT_LEAST", 0.0)
        yield


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """Half the time to compile; nothing here is about speed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# Compiling


@pytest.fixture
def cache(tmp_path):
    """JAX's persistent cache, as a user has it, that keeps everything."""
    keys = {
        "jax_compilation_cache_dir": str(tmp_path / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {key: jax.config.values[key] for key in keys}
    for key, value in keys.items():
        jax.config.update(key, value)
    compilation.compilation_cache.reset_cache()
    yield tmp_path / "cache"
    for key, value in before.items():
        jax.config.update(key, value)
    compilation.compilation_cache.reset_cache()


def test_compile_times_are_without_the_persistent_cache(cache):
    def compile_one(factor):
        jax.jit(lambda x: x * factor).lower(jnp.ones(3)).compile()

    with pytest.raises(ZeroDivisionError), compilation.no_compilation_cache():
        compile_one(2.5)
        raise ZeroDivisionError
    assert not cache.exists() or not list(cache.iterdir())
    compile_one(3.5)
    assert list(cache.iterdir())


def test_peak_memory_counts_a_donated_argument_once():
    plan = SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=70,
        temp_size_in_bytes=1000,
        alias_size_in_bytes=60,
    )
    program = SimpleNamespace(memory_analysis=lambda: plan)
    assert compilation.peak_bytes(program) == 100 + 70 + 1000 - 60


# step


def test_a_step_is_compiled_once_and_trains():
    config = TINY.step("27k", "ternary")
    compiled = step.compile_step(config, TINY.batch_shape())
    assert step.compile_step(config, TINY.batch_shape()) is compiled
    training = step.Training(config, compiled, TINY.batch())
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(training.state))
    assert compiled.seconds > 0.01 and compiled.peak_bytes > state_bytes
    before = jax.tree.map(np.asarray, training.state.params)
    for _ in range(2):
        training()
    assert training.state.steps == 2
    assert not np.array_equal(before["embedding"], training.state.params["embedding"])


@pytest.fixture
def scripted(monkeypatch):
    """Steps that are not made: seconds and bytes by case name; a peer that has both arms."""
    seconds = {
        "ternary": [2.0, 6.0, 3.0],
        "ternary:int8": [4.0, 4.0, 4.0],
        "bf16": [1.0, 2.0, 3.0],
        "fp32": [5.0, 5.0, 5.0],
        "torch_bf16": [0.5, 4.0, 6.0],
        "torch_ternary": [8.0, 8.0, 8.0],
    }
    memory = {"float32": 400, "int8": 250, "auto": 200, "bfloat16": 300}

    def compile_step(config, batch):
        p = config.precision
        key = p.carrier if p.quantized else np.dtype(p.compute_dtype).name
        return step.CompiledStep(lambda: None, 7.0, memory[key])

    def interleave(cases, repeats, at_least):
        del repeats, at_least
        return {name: seconds[name] for name in cases}

    def contenders(workload, size, tokens):
        del workload, size, tokens
        return {
            f"torch_{arm}": peers.Contender(arm, lambda: None, 9.0, goal=1.0, notes=("as is",))
            for arm in ("bf16", "ternary")
        }

    monkeypatch.setattr(step, "compile_step", compile_step)
    monkeypatch.setattr(step, "Training", lambda *arguments: lambda: None)
    monkeypatch.setattr(step, "interleave", interleave)
    monkeypatch.setattr(peers, "load", lambda name, workload: contenders)


def test_ratios_of_arms(scripted):
    """Over bf16, wherever it stands; of a round each; every arm but itself."""
    arms = ("ternary", "bf16", "ternary:int8", "fp32")
    result = step.run(Workload(("27k",), arms, repeats=3), silent)
    goal = 1.0
    assert result.ratios == {
        "step_time/ternary/bf16": Ratio(2.0, 1.0, 3.0, None),
        "peak_memory/ternary/bf16": Ratio(200 / 300, 200 / 300, 200 / 300, goal),
        "step_time/ternary:int8/bf16": Ratio(2.0, 4 / 3, 4.0, None),
        "peak_memory/ternary:int8/bf16": Ratio(250 / 300, 250 / 300, 250 / 300, None),
        "step_time/fp32/bf16": Ratio(2.5, 5 / 3, 5.0, None),
        "peak_memory/fp32/bf16": Ratio(400 / 300, 400 / 300, 400 / 300, None),
    }


def test_rows_of_the_suite_step(scripted):
    workload = Workload(("27k", "7m"), ("ternary", "bf16"), repeats=3)
    result = step.run(workload, silent)
    assert [(r["size"], r["case"]) for r in result.measurements] == [
        (size, arm) for size in ("27k", "7m") for arm in ("ternary", "bf16")
    ]
    assert {name.split("@")[1] for name in result.ratios} == {"27k", "7m"}
    row = result.measurements[2]
    flops = 4096 * cost.training_flops_per_token(workload.model("7m"), 256)
    expected = {
        "suite": "step",
        "width": 256,
        "seconds": 3.0,
        "min_seconds": 2.0,
        "max_seconds": 6.0,
        "tokens_per_s": 4096 / 3,
        "flops_per_s": flops / 3,
        "peak_share": flops / 3 / 1e12,
        "peak_bytes": 200,
        "compile_seconds": 7.0,
        "rounds_seconds": [2.0, 6.0, 3.0],
    }
    assert row.items() >= expected.items()
    assert any("a guess" in note for note in result.notes)


def test_peers_stand_beside_the_arm_that_they_match(scripted):
    arms = ("ternary", "ternary:int8", "bf16")
    result = step.run(Workload(("27k",), arms, repeats=3, peers=("torch",)), silent)
    found = {name: ratio for name, ratio in result.ratios.items() if "torch" in name}
    assert found == {
        "step_time/bf16/torch_bf16": Ratio(0.5, 0.5, 2.0, 1.0),
        "step_time/ternary/torch_ternary": Ratio(3 / 8, 0.25, 0.75, 1.0),
        "step_time/ternary:int8/torch_ternary": Ratio(0.5, 0.5, 0.5, None),
    }
    row = next(r for r in result.measurements if r["case"] == "torch_bf16")
    assert (row["compile_seconds"], row["peak_bytes"], row["seconds"]) == (9.0, None, 4.0)
    assert "as is" in result.notes


@pytest.mark.parametrize(
    "pair, platform, width, goal",
    [
        ("ternary/bf16", "cpu", 256, 0.85),
        ("ternary/bf16", "cpu", 255, None),
        ("ternary/bf16", "gpu", 1024, 1.0),
        ("ternary/bf16", "gpu", 1023, None),
        ("ternary/bf16", "tpu", 4096, None),
        ("ternary/fp32", "cpu", 4096, None),
        ("ternary:int8/bf16", "cpu", 4096, None),
    ],
)
def test_goals_of_a_step(pair, platform, width, goal, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert step.time_goal(pair, width) == goal


# parts


@pytest.fixture(scope="module")
def taken_apart(small_ladder):
    return parts.run(TINY, silent)


def test_the_parts_of_a_step(taken_apart):
    """Each of the model's products thrice, by its shape; 2 microbatches' worth would be doubled."""
    rows = {row["part"]: row for row in taken_apart.measurements}
    labels = {"q,k,v 16x32": 16 * 32, "out 16x16": 256, "gate,up 16x64": 16 * 64, "down 32x16": 512}
    for label, size in labels.items():
        for which in ("forward", "dx", "dw"):
            row = rows[f"{label} {which}"]
            assert row["calls"] == 1 and row["within"] is None
            assert row["flops_per_s"] * row["step_seconds"] == pytest.approx(2 * 64 * size)
            assert row["peak_share"] == pytest.approx(row["flops_per_s"] / 1e12)
        for which in ("quantize x", "quantize w"):
            assert rows[f"{label} {which}"]["within"] == f"{label} forward"
    assert rows["norm 16 forward"]["calls"] == 4 and rows["norm 32 backward"]["calls"] == 1
    for name in ("rotary", "attention"):
        assert {f"{name} forward", f"{name} backward"} <= rows.keys()
    assert {"head and loss, both ways", "optimizer", "whole step"} <= rows.keys()
    assert rows["optimizer"]["flops_per_s"] is None


def test_flops_of_the_parts_are_the_steps(taken_apart):
    """As `cost.py` counts them: linear layers, attention, head, forward and back."""
    flops = sum(
        r["flops_per_s"] * r["step_seconds"] for r in taken_apart.measurements if r["flops_per_s"]
    )
    assert flops == pytest.approx(64 * cost.training_flops_per_token(TINY.model("27k"), 16))


def test_the_sum_of_the_parts(monkeypatch):
    """Of what a step does of each, without those that lie within others, over the whole's round."""
    found = [
        parts.Part("a", lambda: None, calls=3, flops=50),
        parts.Part("b", lambda: None, calls=3, within="a"),
        parts.Part("c", lambda: None, calls=1),
    ]
    seconds = {"a": [1.0, 2.0, 5.0], "b": [0.5] * 3, "c": [4.0] * 3, parts.WHOLE: [14.0, 5.0, 19.0]}
    monkeypatch.setattr(parts, "list_parts", lambda workload, config: found)
    monkeypatch.setattr(parts, "compile_step", lambda config, batch: None)
    monkeypatch.setattr(parts, "Training", lambda config, step, tokens: None)
    monkeypatch.setattr(parts, "interleave", lambda cases, repeats, at_least: seconds)
    result = parts.run(TINY, silent)
    assert result.ratios == {"step_time/parts/ternary": Ratio(1.0, 0.5, 2.0, None)}
    rows = {row["part"]: row for row in result.measurements}
    assert rows["a"]["rounds_seconds"] == [3.0, 6.0, 15.0] and rows["a"]["step_seconds"] == 6.0
    assert rows["a"]["flops_per_s"] == 150 / 6 and rows["a"]["peak_share"] == 25e-12
    assert rows["a"]["step_share"] == 15 / 19
    assert rows["b"]["within"] == "a" and rows["b"]["flops_per_s"] is None
    assert rows["sum of the parts"]["rounds_seconds"] == [7.0, 10.0, 19.0]
    assert rows["whole step"]["step_seconds"] == 14.0


def test_microbatches_repeat_the_parts(monkeypatch):
    """All but the optimizer, on rows that are as many fewer; float arms have no quantizers."""
    monkeypatch.setattr(
        parts, "initial_state", lambda config: SimpleNamespace(params={}, opt_state={})
    )
    monkeypatch.setattr(
        parts,
        "_forward_and_backward",
        lambda name, f, operands, calls, *rest: [
            parts.Part(f"{name} {which}", lambda: None, calls) for which in ("forward", *rest[0])
        ],
    )
    workload = Workload(
        ("27k",), ("bf16",), sequence_length=16, batch_tokens=64, layers=3, microbatches=2
    )
    found = {p.name: p for p in parts.list_parts(workload, workload.step("27k", "bf16"))}
    assert found["q,k,v 16x32 dx"].calls == 6 and found["norm 16 forward"].calls == 20
    assert found["head and loss, both ways"].calls == 2 and found["optimizer"].calls == 1
    assert found["head and loss, both ways"].flops == 6 * 32 * 16 * 256
    assert not any("quantize" in name for name in found)


# data


def test_batches_beside_training():
    result = data.run(TINY, silent)
    *batches, training = result.measurements
    assert [row["batch_tokens"] for row in batches] == [16, 64, 256, 1024]
    assert training["case"] == "training 27k ternary" and training["batch_tokens"] == 64
    assert training["rate_over_training"] == 1.0
    for row in batches:
        assert row["tokens_per_s"] == pytest.approx(row["batches_per_s"] * row["batch_tokens"])
        share = row["tokens_per_s"] / training["tokens_per_s"]
        assert row["rate_over_training"] == pytest.approx(share)
    same = np.divide(batches[1]["rounds_seconds"], training["rounds_seconds"])
    ratio = result.ratios["batch_time/data/27k"]
    assert ratio == pytest.approx((np.median(same), same.min(), same.max(), None))


def test_batches_are_those_of_the_pipeline():
    """The next one at every call, of tokens as small as a corpus's."""
    draw = data._batches(TINY, rows=4)
    first, second = draw(), draw()
    assert first.shape == (4, 17) and first.max() < 32 and not np.array_equal(first, second)


# startup


@pytest.fixture
def pretended(monkeypatch):
    """Runs that report their steps and do nothing else: the first after 9, 3, 2 seconds by a clock
    of their own, the others a second each. Processes that take no time."""
    runs, commands, now = [], [], [0.0]

    def train(spec, corpus, directory, options, config, watch):
        runs.append((spec, options, directory))
        for tick in range(1, startup.STEPS + 1):
            now[0] += [9.0, 3.0, 2.0][len(runs) - 1] if tick == 1 else 1.0
            watch(Report(tick, startup.STEPS, 1.0, None))

    def process(command, workdir, cache):
        commands.append((command, workdir, cache))
        return startup.Waited(4.0 / len(commands), 5.0)

    monkeypatch.setattr(startup.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(startup, "train_and_evaluate", train)
    monkeypatch.setattr(startup, "run_process", process)
    monkeypatch.setattr(startup, "_import", lambda: 3.0)
    return runs, commands


def test_startup(pretended):
    """The second and third run of one program; then two processes with one cache."""
    runs, commands = pretended
    workload = Workload(sizes=("27k",), arms=("ternary:int8", "bf16"))
    result = startup.run(workload, silent)
    specs = [spec for spec, _, _ in runs]
    assert [spec.seed_init for spec in specs] == [0, 1, 2]
    assert len({spec.step for spec in specs}) == 1 and len({d for _, _, d in runs}) == 3
    spec, options, _ = runs[0]
    assert spec.step.precision.name == "ternary" and spec.step.precision.carrier == "int8"
    assert spec.size == "27k" and spec.ends == (startup.STEPS,) and options.log_every == 1
    rows = result.measurements
    assert [row["first_step_seconds"] for row in rows[:3]] == [9.0, 3.0, 2.0]
    assert [row["end_seconds"] for row in rows[:3]] == [13.0, 7.0, 6.0]
    assert result.ratios["startup/second_run_seconds"] == Ratio(2.5, 2.0, 3.0, goal=1.0)
    assert [row["end_seconds"] for row in rows[3:]] == [3.0] * 3 + [5.0] * 2
    assert result.ratios["startup_time/warm_cache/empty_cache"].median == 0.5
    (cold, first, cache), (warm, second, same) = commands
    assert cache == same and first != second and cold[:-1] != warm
    assert cold[1:3] == ["-m", "experiments.run"] and "--config.precision=ternary" in cold
    assert "--config.matmul.carrier=int8" in cold and f"--workdir={first}" in cold


CHILD = """
import os, pathlib, sys, time
run = pathlib.Path(sys.argv[1], "single", "runs", "x")
run.mkdir(parents=True)
(run / "metrics.jsonl").touch()
time.sleep(0.2)
(run / "metrics.jsonl").write_text(os.environ["JAX_COMPILATION_CACHE_DIR"])
time.sleep(0.2)
sys.exit(int(sys.argv[2]))
"""


def test_a_process_has_stepped_once_its_log_has_a_line(tmp_path):
    workdir, cache = tmp_path / "work", tmp_path / "cache"
    command = [sys.executable, "-c", CHILD, str(workdir)]
    waited = startup.run_process([*command, "0"], workdir, cache)
    assert 0.2 <= waited.first_step <= waited.end - 0.15
    assert (workdir / "single/runs/x/metrics.jsonl").read_text() == str(cache)
    with pytest.raises(RuntimeError, match="FileExistsError"):
        startup.run_process([*command, "0"], workdir, cache)
    with pytest.raises(RuntimeError):
        startup.run_process([*command, "3"], tmp_path / "other", cache)


@pytest.mark.slow
def test_startup_for_real():
    result = startup.run(Workload(arms=("fp32",), sizes=("27k",)), silent)
    first, second = result.measurements[:2]
    assert second["first_step_seconds"] < first["first_step_seconds"]
    cold, warm = result.measurements[-2:]
    assert cold["case"].endswith("empty cache") and warm["case"].endswith("warm cache")
    assert result.ratios["startup/second_run_seconds"].max < first["first_step_seconds"]
