"""Whole runs: resumption to the bit, endpoints of one trunk, divergence, and what is written."""

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import STOCHASTIC

from bitnet_jax import programs, trajectory
from bitnet_jax.checkpoint import Checkpointer, load_model
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.data import train_batches, validation_rows
from bitnet_jax.data.batches import TrainBatches
from bitnet_jax.files import SCHEMA_VERSION, read_json
from bitnet_jax.fingerprint import fingerprint
from bitnet_jax.gradient_check import estimator_cosine
from bitnet_jax.member import SKIPS_TO_DIVERGE
from bitnet_jax.model import linear_layers
from bitnet_jax.programs import compiled_steps
from bitnet_jax.train import Interrupted, train_and_evaluate
from bitnet_jax.train_step import compiled_eval_step, compiled_init, compiled_train_step

# The tiny run: trunk [0, 16), decay [16, 20), trunk [16, 32), decay [32, 40). In ticks:
FIRST_DECAY, SECOND_TRUNK, SECOND_DECAY, END = 16, 20, 36, 44

# A shorter one: trunk [0, 8), decay [8, 10), trunk [8, 16), decay [16, 20), in 22 ticks.
SHORT = {"train.tokens": (10 * 128, 20 * 128), "log.every": 3}
# All that can change on the way: quantization grows over 5 steps, and the last tenth of each budget
# (from step 9, and from 18) has other activations.
PHASED = {
    **SHORT,
    "precision": "ternary",
    "quantization.warmup": "linear",
    "quantization.warmup_fraction": 0.5,
    "quantization.late_activations": "int4_absmean",
    "quantization.late_fraction": 0.1,
    "loss.regularizer": "sin2",
    "loss.regularizer_weight": 0.1,
    "log.gradient_sample": 3,
    "eval.every": 4,
}
# No second try for a run that diverges.
ONCE = {"train.rollbacks": 0}
# All that is random.
RANDOM = {**SHORT, **STOCHASTIC, "precision": "ternary"}


@pytest.fixture(scope="module")
def launch(tiny_config, tiny_corpus):
    """Train, or go on, in a directory: the summary, or None where it was stopped at a tick."""

    def run(directory, overrides=None, stop=None, watch=lambda report: None):
        config = tiny_config(overrides)
        spec = resolve(config, tiny_corpus)
        options = loop_options(config)
        try:
            return train_and_evaluate(
                spec, tiny_corpus, directory, options, config.to_dict(), watch, lambda t: t == stop
            )
        except Interrupted:
            return None

    return run


@pytest.fixture(scope="module")
def undisturbed(launch, tmp_path_factory):
    """A finished run's directory, by its overrides."""
    known = {}

    def get(**overrides):
        key = json.dumps(overrides)
        if key not in known:
            known[key] = tmp_path_factory.mktemp("undisturbed")
            launch(known[key], overrides)
        return known[key]

    return get


def summary(directory):
    return read_json(directory / "summary.json")


def endpoints(directory):
    """The endpoints without what a clock says, and the commit, lest an edit in between matter."""
    return [
        {key: value for key, value in row.items() if key not in ("wall_s", "git_commit")}
        for row in summary(directory)["endpoints"]
    ]


def metrics(directory, kind=None):
    """The lines, of one kind or of all; the header is none of them."""
    _, *lines = [
        json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]
    return [line for line in lines if kind in (None, line["kind"])]


def checkpoint(directory, spec):
    """(leaves of the state, leaves of the stash, progress without its clock)."""
    checkpointer = Checkpointer(directory / "checkpoints")
    state, stash, progress = checkpointer.restore_latest(compiled_init(spec.step)(0))
    checkpointer.close()
    for moment in (progress, progress["anchor"]):
        del moment["wall_s"]
        for endpoint in moment["endpoints"]:
            del endpoint["wall_s"]
    return jax.tree.leaves(state), jax.tree.leaves(stash), progress


def assert_same_results(directory, expected):
    assert endpoints(directory) == endpoints(expected)
    assert (directory / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    same = ("status", "skipped_steps", "total_flops", "run_id")
    assert {k: summary(directory)[k] for k in same} == {k: summary(expected)[k] for k in same}


# Resumption


def test_what_a_killed_launch_has_left_is_cleared_away(launch, undisturbed, tmp_path):
    """Temporaries of JSON files, and checkpoints and a model that were torn: at the latest with the
    launch that finishes the run, which writes the last two anew."""
    launch(tmp_path, SHORT, stop=12)
    torn = [f".config.json.{'0' * 32}", f".summary.json.{'f' * 32}"]
    for name in torn:
        (tmp_path / name).write_text("{")
    for name in ("model", "checkpoints/9", "checkpoints/22"):
        (tmp_path / f"{name}.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    launch(tmp_path, SHORT)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {path.name for path in undisturbed(**SHORT).iterdir()}
    assert all(path.name.isdecimal() for path in (tmp_path / "checkpoints").iterdir())
    assert_same_results(tmp_path, undisturbed(**SHORT))


@pytest.mark.parametrize(
    "stops",
    [
        (0,),
        (5,),
        (FIRST_DECAY,),
        (FIRST_DECAY + 2,),
        (SECOND_TRUNK,),
        (SECOND_TRUNK, SECOND_TRUNK),
        (SECOND_DECAY + 1,),
        (5, FIRST_DECAY + 3, SECOND_TRUNK + 1, SECOND_DECAY, END - 2),
    ],
)
def test_resumed_equals_undisturbed(launch, undisturbed, tiny_config, tiny_corpus, tmp_path, stops):
    """Endpoints, metrics and the whole state at the last tick, bit for bit."""
    for stop in stops:
        assert launch(tmp_path / "resumed", stop=stop) is None
        assert not (tmp_path / "resumed" / "summary.json").exists()
    launch(tmp_path / "resumed", stop=END - 1)
    launch(tmp_path / "straight", stop=END - 1)
    spec = resolve(tiny_config(), tiny_corpus)
    found, expected = (checkpoint(tmp_path / d, spec) for d in ("resumed", "straight"))
    assert found[2] == expected[2] and found[2]["tick"] == END - 1
    for part in (0, 1):
        assert len(found[part]) == len(expected[part]) > 10
        for a, b in zip(found[part], expected[part], strict=True):
            np.testing.assert_array_equal(a, b)
    launch(tmp_path / "resumed")
    assert_same_results(tmp_path / "resumed", undisturbed())


@pytest.mark.parametrize("precision", ["ternary", "fp16"])
def test_resumed_equals_undisturbed_in_both_arms(launch, undisturbed, tmp_path, precision):
    arm = {"precision": precision}
    for stop in (7, FIRST_DECAY + 1, SECOND_DECAY + 5):
        assert launch(tmp_path, arm, stop) is None
    launch(tmp_path, arm)
    assert_same_results(tmp_path, undisturbed(**arm))


@pytest.mark.parametrize("overrides", [PHASED, RANDOM], ids=["phased", "random"])
def test_interrupted_at_every_tick(
    launch, undisturbed, tiny_config, tiny_corpus, tmp_path, overrides
):
    """Phases, telemetry, draws and bfloat16 latents: rows, metrics and the model, to the bit."""
    for stop in range(22):
        assert launch(tmp_path, overrides, stop) is None
    launch(tmp_path, overrides)
    expected = undisturbed(**overrides)
    assert_same_results(tmp_path, expected)
    params = compiled_init(resolve(tiny_config(overrides), tiny_corpus).step)(0).params
    found, expected = (jax.tree.leaves(load_model(d, params)) for d in (tmp_path, expected))
    assert {leaf.dtype.name for leaf in found} == {leaf.dtype.name for leaf in expected}
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


@pytest.mark.parametrize("schedule", ["cosine", "two_stage", "trilm"])
def test_resumed_equals_undisturbed_on_other_schedules(launch, undisturbed, tmp_path, schedule):
    single = {"schedule.name": schedule, "train.tokens": (2560,)}
    assert launch(tmp_path, single, 13) is None
    launch(tmp_path, single)
    assert_same_results(tmp_path, undisturbed(**single))
    (row,) = endpoints(tmp_path)
    assert row["schedule"] == schedule and row["loss"] < 4


class PowerCut(Exception):
    """Ends a run without a word to its checkpoint."""


@pytest.mark.parametrize(
    ("seconds", "at", "tail"),
    [
        (0.0, FIRST_DECAY, ""),
        (0.0, SECOND_TRUNK + 5, '{"kind": "train", "step": 9'),
        (0.0, SECOND_TRUNK + 12, '{"kind": "train"}\n' * 30),
        (1e9, SECOND_TRUNK + 5, '{"kind": "train", "step": 9'),
    ],
)
def test_metrics_after_a_crash_are_made_again(launch, undisturbed, tmp_path, seconds, at, tail):
    """From a checkpoint at every log step, or from none, with later lines or half a line behind.

    Evaluations on the way fall on the steps of the checkpoints, and must not be lost.
    """
    often = {"eval.every": 7, "checkpoint.seconds": seconds}

    def cut(report):
        if report.tick >= at:
            raise PowerCut

    with pytest.raises(PowerCut):
        launch(tmp_path, often, watch=cut)
    assert not (tmp_path / "summary.json").exists()
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert bool(saved) == (seconds == 0.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    launch(tmp_path, often)
    assert_same_results(tmp_path, undisturbed(**{"eval.every": 7}))


SCRIPT = """
import json, sys
from pathlib import Path
from bitnet_jax.configs import default
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.data import load
from bitnet_jax.train import Interrupted, train_and_evaluate

overrides, directory, stop = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
config = default.get_config()
config.update_from_flattened_dict({**overrides, "train.tokens": tuple(overrides["train.tokens"])})
corpus = load(config.data.source)
arguments = resolve(config, corpus), corpus, directory, loop_options(config), config.to_dict()
try:
    train_and_evaluate(*arguments, should_stop=lambda tick: tick == stop)
except Interrupted:
    sys.exit(9)
"""


@pytest.mark.slow
def test_resumed_in_a_fresh_process(undisturbed, tiny_overrides, tmp_path):
    """Draws are the same in every process."""
    for stop, status in ((9, 9), (-1, 0)):
        arguments = [json.dumps({**tiny_overrides, **RANDOM}), str(tmp_path), str(stop)]
        command = [sys.executable, "-c", SCRIPT, *arguments]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
    assert_same_results(tmp_path, undisturbed(**RANDOM))


# One trunk, several endpoints


def reference_loss(spec, corpus, rows, end):
    """Held-out loss of an endpoint, by a loop that knows nothing of segments and stashes."""
    state = compiled_init(spec.step)(spec.seed_init)
    batches = train_batches(corpus.train, 16, 8, spec.seed_data)
    start = end - round(0.2 * end)
    warmup = round(0.1 * spec.ends[0])
    for step in range(end):
        factor = min(1.0, (step + 1) / warmup)
        if step >= start:
            factor = 1 - (step - start) / (end - start)
        lr = np.float32(factor * spec.peak_lr)
        state, _ = compiled_train_step(spec.step)(state, batches[step], lr, np.float32(0.1))
    padded = np.concatenate([rows, np.zeros((-len(rows) % 8, 17), np.int32)])
    evaluate = compiled_eval_step(spec.step)
    nats = np.concatenate([evaluate(state.params, b) for b in padded.reshape(-1, 8, 17)])
    return nats[: len(rows)].astype(np.float64)


@pytest.mark.parametrize("overrides", [{}, {"seeds.data": 5}, {"seeds.init": 5}])
def test_endpoints_equal_a_plain_loop(launch, tiny_config, tiny_corpus, tmp_path, overrides):
    """Every endpoint is what training it alone gives: batches, rates, weights and evaluation."""
    launch(tmp_path, overrides)
    spec = resolve(tiny_config(overrides), tiny_corpus)
    total = (len(tiny_corpus.valid) - 1) // 16
    starts = [i * total // 29 * 16 for i in range(29)]
    rows = np.array([tiny_corpus.valid[s : s + 17] for s in starts], np.int32)
    for row, end in zip(endpoints(tmp_path), spec.ends, strict=True):
        nats = reference_loss(spec, tiny_corpus, rows, end)
        assert row["loss"] == pytest.approx(nats.mean(), rel=1e-7)
        assert row["loss_stderr"] == pytest.approx(nats.std(ddof=1) / math.sqrt(29), rel=1e-6)
        assert row["tokens"] == end * 128
        bits = nats.mean() / math.log(2)  # a token is a byte
        assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-7)


@pytest.mark.parametrize("overrides", [{}, PHASED, RANDOM], ids=["plain", "phased", "random"])
def test_first_endpoint_does_not_know_of_the_second(launch, undisturbed, tmp_path, overrides):
    """Bit-equal to a run with only that budget, whose warm-up is the same."""
    budget = overrides.get("train.tokens", (2560,))[0]
    launch(tmp_path, {**overrides, "train.tokens": (budget,)})
    (alone,), (first, _) = endpoints(tmp_path), endpoints(undisturbed(**overrides))
    assert alone.pop("run_id") != first.pop("run_id")
    assert alone == first


FP32_OPTIONS = [{"log.every": 1}, {"log.every": 50}, {"eval.every": 3}, {"checkpoint.seconds": 0.0}]
TERNARY_OPTIONS = [
    {"log.every": 1}, {"log.layers": False}, {"checkpoint.keep_model": False}, {"eval.every": 0},
    {"log.gradient_sample": 0},
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides, options", [({}, FP32_OPTIONS), (PHASED, TERNARY_OPTIONS)], ids=["plain", "phased"]
)
def test_options_cannot_change_a_result(launch, undisturbed, tmp_path, overrides, options):
    """What the identity leaves out, `train_loss` included."""
    for i, option in enumerate(options):
        launch(tmp_path / str(i), {**overrides, **option})
        assert endpoints(tmp_path / str(i)) == endpoints(undisturbed(**overrides)), option


def by_hand(spec, corpus, end, visit=lambda done, params: None):
    """The state at an endpoint of the short run: its rates, programs and strengths spelt out.

    visit: called with the parameters before the first step and after each.
    """
    base, start = spec.step, end - end // 5
    state = compiled_init(base)(spec.seed_init)
    batches = train_batches(corpus.train, 16, 8, spec.seed_data)
    visit(0, state.params)
    for step in range(end):
        lr = 0.01 if step < start else 0.01 * (1 - (step - start) / (end - start))
        program, strength = base, 1.0
        if spec.phases.warmup != "none" and step < 5:
            program, strength = dataclasses.replace(base, warming=True), step / 5
        if spec.phases.late and step >= end - end // 10:
            late = dataclasses.replace(base.precision, activations="int4_absmean")
            program = dataclasses.replace(base, precision=late)
        rates = map(np.float32, (lr, 0.1, strength))
        state, _ = compiled_train_step(program)(state, batches[step], *rates)
        visit(step + 1, state.params)
    return state


def held_out(config, params, corpus):
    """Mean loss over the held-out rows of the tiny run."""
    rows = validation_rows(corpus.valid, 16, 29 * 16)
    padded = np.concatenate([rows, np.zeros((3, 17), np.int32)]).reshape(-1, 8, 17)
    nats = np.concatenate([compiled_eval_step(config)(params, batch) for batch in padded])
    return nats[:29].astype(np.float64).mean()


@pytest.mark.parametrize("overrides", [PHASED, RANDOM], ids=["phased", "random"])
def test_phases_and_draws_equal_a_plain_loop(undisturbed, tiny_config, tiny_corpus, overrides):
    """Each endpoint alone, every step's program chosen by hand; the late arm is evaluated."""
    spec = resolve(tiny_config(overrides), tiny_corpus)
    late = dataclasses.replace(spec.step.precision, activations="int4_absmean")
    deployed = dataclasses.replace(spec.step, precision=late) if spec.phases.late else spec.step
    for row, end in zip(endpoints(undisturbed(**overrides)), (10, 20), strict=True):
        params = by_hand(spec, tiny_corpus, end).params
        assert row["loss"] == pytest.approx(held_out(deployed, params, tiny_corpus), rel=1e-7)
        assert row["precision"] == spec.step.precision.name
        if spec.phases.late:
            assert row["loss"] != pytest.approx(held_out(spec.step, params, tiny_corpus), rel=1e-5)


def test_evaluation_on_the_way_is_of_the_arm_of_that_step(undisturbed, tiny_config, tiny_corpus):
    """Fully quantized though quantization still grows; with the late activations once they are."""
    spec = resolve(tiny_config(PHASED), tiny_corpus)
    lines = {
        (line["step"], line["decay_to"]): line for line in metrics(undisturbed(**PHASED), "eval")
    }
    assert list(lines) == [(4, None), (12, None)], "8 and 16 are where trunks end"
    known = {}

    def evaluate(done, params):
        if done in (4, 12):
            known[done] = held_out(spec.step, params, tiny_corpus)

    by_hand(spec, tiny_corpus, 20, evaluate)
    for done, loss in known.items():
        assert lines[done, None]["valid_loss"] == pytest.approx(loss, rel=1e-7)


def test_evaluation_within_the_late_part(launch, tiny_config, tiny_corpus, tmp_path):
    launch(tmp_path, {**PHASED, "eval.every": 19})
    (line,) = metrics(tmp_path, "eval")
    spec = resolve(tiny_config(PHASED), tiny_corpus)
    known = {}

    def evaluate(done, params):
        if done == 19:
            known[done] = held_out(spec.deployed, params, tiny_corpus)

    by_hand(spec, tiny_corpus, 20, evaluate)
    assert (line["step"], line["decay_to"]) == (19, 2560)
    assert line["valid_loss"] == pytest.approx(known[19], rel=1e-7)


@pytest.mark.parametrize("precision", ["ternary", "binary", "fp16", "bf16", "fp32"])
def test_every_arm_learns(launch, tmp_path, precision):
    launch(tmp_path, {"precision": precision, "train.tokens": (30 * 128,)})
    first, *_, last = [line["loss"] for line in metrics(tmp_path, "train")]
    (row,) = endpoints(tmp_path)
    assert first > 4.5 and last < 3 and row["loss"] < 3
    assert row["status"] == "ok" and row["precision"] == precision


@pytest.mark.parametrize("name, rate", [("lion", 3e-3), ("muon", 1e-2), ("bop", 1e-2)])
def test_every_optimizer_learns(launch, tmp_path, name, rate):
    """And its codes move: Bop's are all that its kernels are."""
    arm = {"precision": "ternary", "optim.name": name, "optim.peak_lr": rate}
    launch(tmp_path, {**arm, "train.tokens": (60 * 128,)})
    lines = metrics(tmp_path, "train")
    (row,) = endpoints(tmp_path)
    assert lines[0]["loss"] > 4.5 and lines[-1]["loss"] < 3.2 and row["loss"] < 3.2
    assert sum(line["latent_flips_since"] for line in lines) > 0.02


@pytest.mark.slow
def test_carriers_train_to_the_same_bits(launch, undisturbed, tmp_path):
    """int8 and bfloat16 codes make one run, and share a run id."""
    launch(tmp_path, {"precision": "ternary", "matmul.carrier": "int8"})
    assert_same_results(tmp_path, undisturbed(precision="ternary"))


# Divergence


@pytest.fixture
def poison(monkeypatch):
    """Makes the gradients of some ticks NaN; with `lasting`, the parameters stay NaN."""

    def install(ticks, lasting=False):
        calls = iter(range(10**6))

        def compiled(*program):
            step = compiled_steps(*program)

            def poisoned(state, *rest):
                if next(calls) not in ticks:
                    return step(state, *rest)
                healthy = jax.tree.map(jnp.copy, state.params)
                nan = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
                after, found = step(nan, *rest)
                return (after if lasting else after.replace(params=healthy)), found

            return poisoned

        monkeypatch.setattr(programs, "compiled_steps", compiled)

    return install


def is_diverged(row):
    nothing = ("loss", "loss_stderr", "bits_per_byte", "train_loss")
    return row["status"] == "diverged" and all(row[key] is None for key in nothing)


@pytest.mark.parametrize("lr", [1e4, 1e30])
def test_absurd_learning_rate_is_a_recorded_status(launch, tmp_path, lr):
    """Even where fewer steps remain than it takes to call a trunk diverged."""
    result = launch(tmp_path, {"optim.peak_lr": lr, "train.rollbacks": 1})
    assert result["rollbacks"] == 1
    assert result == summary(tmp_path) and result["status"] == "diverged"
    assert [row["tokens"] for row in result["endpoints"]] == [2560, 5120]
    assert is_diverged(result["endpoints"][1])
    assert result["skipped_steps"] > 10


def test_diverged_trunk_takes_every_later_endpoint_with_it(launch, poison, tmp_path):
    """Poisoned in the trunk between the first decay and the second: it stops soon after."""
    budgets = {"train.tokens": (20 * 128, 100 * 128, 120 * 128), "train.rollbacks": 0}
    poison({SECOND_TRUNK + 4}, lasting=True)
    result = launch(tmp_path, budgets)
    first, second, third = result["endpoints"]
    assert first["status"] == "ok" and first["loss"] < 4
    assert is_diverged(second) and is_diverged(third)
    assert (second["tokens"], third["tokens"]) == (12800, 15360)
    last = metrics(tmp_path, "train")[-1]
    assert last["loss"] is None and last["step"] <= 20 + SKIPS_TO_DIVERGE + 7
    assert result["status"] == "diverged" and not (tmp_path / "model").exists()
    assert result["skipped_steps"] == last["skipped_steps"] >= SKIPS_TO_DIVERGE
    json.dumps(result, allow_nan=False)


def test_diverged_decay_leaves_the_trunk_alone(launch, poison, undisturbed, tmp_path):
    """A long decay that is NaN is given up early; the trunk goes on from where it branched."""
    long = {"train.tokens": (5120, 6400), "schedule.decay_fraction": 0.75, "train.rollbacks": 0}
    expected = endpoints(undisturbed(**long))
    poison(range(10, 12), lasting=True)  # the first decay is steps 10 to 39
    launch(tmp_path, long)
    first, second = endpoints(tmp_path)
    assert is_diverged(first)
    assert second == expected[1]
    steps = [line["step"] for line in metrics(tmp_path, "train") if line["decay_to"] == 5120]
    assert steps[-1] in range(10 + SKIPS_TO_DIVERGE, 40), "given up before its end"


def test_decay_of_skipped_steps_is_not_an_endpoint(launch, poison, undisturbed, tmp_path):
    """Parameters are intact and the loss is finite, but nothing has decayed."""
    poison(range(FIRST_DECAY, SECOND_TRUNK))
    result = launch(tmp_path, ONCE)
    assert is_diverged(result["endpoints"][0])
    assert endpoints(tmp_path)[1] == endpoints(undisturbed(**ONCE))[1]
    assert result["skipped_steps"] == 4


def test_a_diverged_endpoint_leaves_no_model(launch, poison, tmp_path):
    """Nothing was evaluated, so there is nothing to deploy."""
    poison(range(SECOND_DECAY, END))
    result = launch(tmp_path, ONCE)
    assert [row["status"] for row in result["endpoints"]] == ["ok", "diverged"]
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("every", [1, 7, 50])
def test_skips_are_counted_wherever_the_log_steps_lie(launch, poison, tmp_path, every):
    """A run of skips ends a trunk at the 25th, and not at the 24th, though all is well after."""
    budget = {"train.tokens": (50 * 128,), "log.every": every, **ONCE}
    poison(range(3, 3 + SKIPS_TO_DIVERGE - 1))
    healthy = launch(tmp_path / "healthy", budget)
    assert healthy["status"] == "ok"
    assert healthy["skipped_steps"] == SKIPS_TO_DIVERGE - 1
    assert metrics(tmp_path / "healthy", "train")[-1]["skipped_steps"] == SKIPS_TO_DIVERGE - 1
    poison(range(3, 3 + SKIPS_TO_DIVERGE))
    assert launch(tmp_path / "diverged", budget)["status"] == "diverged"


@pytest.mark.parametrize("stop", [2 + SKIPS_TO_DIVERGE, 35])
def test_skips_survive_a_resumption(launch, poison, tmp_path, stop):
    """Stopped before the last of 25, and after all of them but before any log step."""
    budget = {"train.tokens": (50 * 128,), "log.every": 50, **ONCE}
    poison(range(3, 3 + SKIPS_TO_DIVERGE))
    assert launch(tmp_path, budget, stop) is None
    result = launch(tmp_path, budget)
    assert (result["status"], result["skipped_steps"]) == ("diverged", SKIPS_TO_DIVERGE)


# Going back


def moved_on(monkeypatch, steps, first=0):
    """A run that sees the data of `steps` later, from step `first` on."""
    starts = TrainBatches.starts
    monkeypatch.setattr(
        TrainBatches,
        "starts",
        lambda self, step, count: starts(self, step + (steps if step >= first else 0), count),
    )


def test_a_trunk_that_diverges_goes_back_and_sees_other_data(launch, poison, tmp_path, monkeypatch):
    """From where it last branched, on rows that lie the whole run further on."""
    long = {"train.tokens": (20 * 128, 60 * 128)}
    with monkeypatch.context() as patch:
        moved_on(patch, 60, first=16)
        launch(tmp_path / "expected", long)
    poison(range(SECOND_TRUNK + 3, SECOND_TRUNK + 3 + SKIPS_TO_DIVERGE))
    result = launch(tmp_path / "run", long)
    assert (result["status"], result["rollbacks"], result["skipped_steps"]) == ("ok", 1, 0)
    (line,) = metrics(tmp_path / "run", "rollback")
    assert line == {"kind": "rollback", "step": 16, "tokens": 16 * 128, "decay_to": None,
                    "cause": "diverged", "rollbacks": 1}  # fmt: skip
    assert endpoints(tmp_path / "run")[1] == endpoints(tmp_path / "expected")[1]
    assert endpoints(tmp_path / "run")[0] != endpoints(tmp_path / "expected")[0]
    steps = [line["step"] for line in metrics(tmp_path / "run", "train")]
    assert steps == sorted(steps) and len(set(steps)) == len(steps), "no line twice"


@pytest.mark.parametrize("every", [1, 7, 50])
def test_what_a_rollback_leads_to_does_not_depend_on_the_log_steps(
    launch, poison, tmp_path, monkeypatch, every
):
    """The run goes back to the last anchor before it diverged, wherever that is noticed."""
    budget = {"train.tokens": (100 * 128,), "log.every": every}
    monkeypatch.setattr(trajectory, "ANCHOR_STEPS", 30)
    with monkeypatch.context() as patch:
        moved_on(patch, 100, first=30)
        launch(tmp_path / "expected", {**budget, **ONCE})
    poison(range(31, 31 + SKIPS_TO_DIVERGE))
    launch(tmp_path / "run", budget)
    expected, found = (endpoints(tmp_path / name)[0] for name in ("expected", "run"))
    assert {**found, "run_id": expected["run_id"]} == expected
    assert metrics(tmp_path / "run", "rollback")[0]["step"] == 30


@pytest.mark.parametrize("stop", [None, FIRST_DECAY, FIRST_DECAY + 4, FIRST_DECAY + 6])
def test_a_decay_that_diverges_is_tried_again_beside_its_trunk(
    launch, poison, undisturbed, tmp_path, monkeypatch, stop
):
    """Its endpoint is of other data; the trunk does not know. Interrupted or not."""
    with monkeypatch.context() as patch:
        moved_on(patch, 40, first=16)
        launch(tmp_path / "expected", {"train.tokens": (20 * 128,), **ONCE})
    poison(range(FIRST_DECAY, SECOND_TRUNK))
    if stop:
        assert launch(tmp_path / "run", stop=stop) is None
    result = launch(tmp_path / "run")
    assert (result["status"], result["rollbacks"]) == ("ok", 1)
    first, second = endpoints(tmp_path / "run")
    assert first["loss"] == endpoints(tmp_path / "expected")[0]["loss"]
    assert second == endpoints(undisturbed())[1]
    assert [line["decay_to"] for line in metrics(tmp_path / "run", "rollback")] == [2560]


def test_a_run_goes_back_no_more_often_than_it_may(launch, poison, tmp_path):
    poison(range(10**6))
    result = launch(tmp_path, {"train.rollbacks": 3})
    assert (result["status"], result["rollbacks"]) == ("diverged", 3)
    assert [line["rollbacks"] for line in metrics(tmp_path, "rollback")] == [1, 2, 3]
    assert len(result["endpoints"]) == 2


def test_a_loss_scale_that_collapses_is_no_divergence(launch, tmp_path, monkeypatch):
    """Every loss is finite, and no scale keeps the gradients so."""
    compiled = programs.compiled_steps

    def overflowing(*program):
        step = compiled(*program)
        return lambda state, *rest: step(
            state.replace(loss_scale=jnp.full_like(state.loss_scale, 3e38)), *rest
        )

    monkeypatch.setattr(programs, "compiled_steps", overflowing)
    result = launch(tmp_path, {"precision": "fp16", "train.rollbacks": 1})
    assert result["status"] == "collapsed"
    assert {row["status"] for row in result["endpoints"]} == {"collapsed"}
    assert metrics(tmp_path, "rollback")[0]["cause"] == "collapsed"


# Memory


def out_of_memory_above(monkeypatch, rows, runs=10**6):
    """A machine on which a program with larger microbatches, or for more runs, does not fit."""
    compiled = programs.compiled_steps

    def limited(config, members, length):
        step = compiled(config, members, length)

        def run(state, tokens, starts, *rest):
            if starts.shape[-1] // config.microbatches > rows or members > runs:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 GiB")
            return step(state, tokens, starts, *rest)

        return run

    monkeypatch.setattr(programs, "compiled_steps", limited)


def test_out_of_memory_cuts_the_microbatch(launch, undisturbed, tmp_path, monkeypatch, capsys):
    """From 8 rows to 2: what was asked for as 4 microbatches gives the same bits."""
    expected = endpoints(undisturbed(**{"train.microbatches": 4}))
    whole = endpoints(undisturbed())
    out_of_memory_above(monkeypatch, rows=2)
    result = launch(tmp_path)
    assert result["microbatches"] == 4
    found = endpoints(tmp_path)
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    assert [row["run_id"] for row in found] == [row["run_id"] for row in whole]
    for mine, other in zip(found, whole, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-3)
    assert capsys.readouterr().err.count("out of memory") == 2


def test_out_of_memory_in_the_middle_goes_on_from_the_checkpoint(launch, tmp_path, monkeypatch):
    """And a later launch keeps to the smaller microbatches, though the memory is back."""
    with monkeypatch.context() as patch:
        out_of_memory_above(patch, rows=4)
        assert launch(tmp_path / "run", stop=30) is None
    assert launch(tmp_path / "run")["microbatches"] == 2
    launch(tmp_path / "expected", {"train.microbatches": 2})
    found, expected = (endpoints(tmp_path / name) for name in ("run", "expected"))
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]


def test_out_of_memory_with_one_row_is_a_failure(launch, tmp_path, monkeypatch):
    out_of_memory_above(monkeypatch, rows=0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        launch(tmp_path)


# Files


def test_metrics_lines(undisturbed):
    """Documented keys, places in order, and nothing that a clock says."""
    place = {"kind", "step", "tokens", "decay_to"}
    train = {"loss", "grad_norm", "learning_rate", "weight_decay", "skipped_steps"}
    latent = {f"latent_{name}" for name in STATISTICS}
    extra = {"fp32": set(), "ternary": latent, "fp16": {"loss_scale"}}
    for precision, more in extra.items():
        arm = {} if precision == "fp32" else {"precision": precision}
        lines = metrics(undisturbed(**arm))
        known = {
            "train": train | more,
            "endpoint": {"valid_loss", "valid_loss_stderr"},
            "layers": {"layers"},
        }
        for line in lines:
            assert line.keys() == place | known[line["kind"]]
            assert line["tokens"] == line["step"] * 128
        places = [(line["kind"], line["step"], line["decay_to"]) for line in lines]
        expected = [
            *(("train", step, None) for step in (7, 14, 16)),
            *(("train", 20, 2560), ("endpoint", 20, 2560)),
            *(("train", step, None) for step in (21, 28, 32)),
            *(("train", 35, 5120), ("train", 40, 5120), ("endpoint", 40, 5120)),
        ]
        assert [p for p in places if p[0] != "layers"] == expected
        layers = [p[1:] for p in places if p[0] == "layers"]
        assert layers == [p[1:] for p in expected if p[0] == "train" and precision == "ternary"]
        rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
        assert rates == pytest.approx(
            [0.01, 0.01, 0.01, 0.0025, 0.01, 0.01, 0.01, 0.00625 + 0.00125, 0.00125]
        )
    ternary = metrics(undisturbed(precision="ternary"), "train")
    assert all(0.2 < line["latent_zero"] < 0.45 for line in ternary)
    fp16 = metrics(undisturbed(precision="fp16"), "train")
    assert all(line["loss_scale"] == 2**15 for line in fp16)


STATISTICS = [
    "negative", "zero", "positive", "entropy", "flips", "flips_since", "oscillations", "distance",
    "near", "beyond",
]  # fmt: skip
SIZES = {
    "attention/q": 256, "attention/k": 128, "attention/v": 128, "attention/out": 256,
    "mlp/gate": 512, "mlp/up": 512, "mlp/down": 512,
}  # fmt: skip


def test_layers_lines(launch, undisturbed, tmp_path):
    """Every statistic of every projection and block; the train line beside it has their means."""
    arm = {"precision": "ternary"}
    lines = [line for line in metrics(undisturbed(**arm)) if line["kind"] in ("layers", "train")]
    for layers, train in zip(lines[::2], lines[1::2], strict=True):
        assert (layers["kind"], train["kind"]) == ("layers", "train")
        assert layers["layers"].keys() == SIZES.keys()
        for name in STATISTICS:
            rows = {key: layer[name] for key, layer in layers["layers"].items()}
            assert all(len(row) == 1 for row in rows.values())
            mean = sum(SIZES[key] * row[0] for key, row in rows.items()) / sum(SIZES.values())
            assert train[f"latent_{name}"] == pytest.approx(mean, rel=1e-4, abs=1e-7)
    launch(tmp_path, {**arm, "log.layers": False})
    without = [line for line in metrics(undisturbed(**arm)) if line["kind"] != "layers"]
    assert metrics(tmp_path) == without


def trits(params):
    """Codes of every projection, in numpy."""
    kernels = {k: np.asarray(v["kernel"], np.float64) for k, v in linear_layers(params).items()}
    return {k: np.where(abs(w) > abs(w).mean() / 2, np.sign(w), 0) for k, w in kernels.items()}


@pytest.fixture(scope="module")
def trajectories(tiny_config, tiny_corpus):
    """Codes before the first step and after each, on the way to each endpoint of the short run."""
    spec = resolve(tiny_config({**SHORT, "precision": "ternary"}), tiny_corpus)
    paths = {}
    for end in (10, 20):
        paths[end] = []
        by_hand(spec, tiny_corpus, end, lambda _, params, p=paths[end]: p.append(trits(params)))
    return paths


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_flips_are_those_of_the_last_steps(launch, trajectories, tmp_path, every):
    """By codes after every single step, however seldom the loop looks: of the last step, of the
    last two, and since the line before, which for a decay's first line is the trunk's last."""
    launch(tmp_path, {**SHORT, "precision": "ternary", "log.every": every})
    lines = metrics(tmp_path, "layers")
    seen = 0
    for end, path in trajectories.items():
        trunk = [
            line for line in lines if line["decay_to"] is None and line["step"] <= end - end // 5
        ]
        before = 0
        for line in trunk + [line for line in lines if line["decay_to"] == end * 128]:
            done = line["step"]
            assert done > before
            for name, layer in line["layers"].items():
                now, last, logged = (path[step][name] for step in (done, done - 1, before))
                earlier = path[max(0, done - 2)][name]
                flips = np.mean(now != last)
                back = np.mean((now != last) & (now == earlier))
                expected = {
                    "flips": flips, "flips_since": np.mean(now != logged), "oscillations": back,
                    "negative": np.mean(now < 0), "zero": np.mean(now == 0),
                    "positive": np.mean(now > 0),
                }  # fmt: skip
                for key, value in expected.items():
                    assert layer[key] == [pytest.approx(value, rel=1e-4)], (done, name, key)
                seen += (flips > 0) + (back > 0)
            before = done
    assert seen > 10


def test_values_of_a_moment_do_not_depend_on_the_lines_between(launch, undisturbed, tmp_path):
    launch(tmp_path, {**PHASED, "log.every": 1})
    often = {(line["step"], line["decay_to"]): line for line in metrics(tmp_path, "train")}
    seldom = metrics(undisturbed(**PHASED), "train")
    assert len(often) == 22 and len(seldom) == 11
    sums = {"loss", "latent_flips_since"}
    for line in seldom:
        same = often[line["step"], line["decay_to"]]
        assert line.keys() == same.keys()
        for key in line.keys() - sums:
            assert line[key] == same[key], key


def test_strength_and_regularizer_are_logged(undisturbed, tiny_config, tiny_corpus):
    """Those of the last step: strength by hand, the regularizer from the weights before it."""
    lines = metrics(undisturbed(**PHASED), "train")
    places = [(line["step"], line["decay_to"]) for line in lines]
    assert places == [
        *((3, None), (6, None), (8, None), (9, 1280), (10, 1280)),
        *((9, None), (12, None), (15, None), (16, None), (18, 2560), (20, 2560)),
    ]
    strengths = [line["strength"] for line in lines]
    assert strengths == pytest.approx([min(1, (line["step"] - 1) / 5) for line in lines])
    assert strengths[0] == 0.4
    spec = resolve(tiny_config(PHASED), tiny_corpus)
    before = {}

    def remember(done, params):
        kernels = [np.float64(layer["kernel"]) for layer in linear_layers(params).values()]
        waves = [np.sin(np.pi * w / abs(w).mean()) ** 2 for w in kernels]
        before[done] = np.mean(np.concatenate([wave.ravel() for wave in waves]))

    by_hand(spec, tiny_corpus, 20, remember)
    for line in lines:
        if line["decay_to"] is None:
            assert line["regularizer"] == pytest.approx(before[line["step"] - 1], rel=1e-5)
    plain = metrics(undisturbed(precision="ternary"), "train")
    assert not any("strength" in line or "regularizer" in line for line in plain)


def test_gradient_cosine_of_each_endpoint(undisturbed, tiny_config, tiny_corpus):
    """Of the deployed arm, at the endpoint's own weights, on the first held-out rows."""
    spec = resolve(tiny_config(PHASED), tiny_corpus)
    lines = metrics(undisturbed(**PHASED), "endpoint")
    rows = validation_rows(tiny_corpus.valid, 16, 29 * 16)[:8]
    for line, end in zip(lines, (10, 20), strict=True):
        params = by_hand(spec, tiny_corpus, end).params
        expected = estimator_cosine(spec.deployed, 3, params, rows, spec.seed_init)
        assert line["gradient_cosine"] == pytest.approx(expected, rel=1e-6)
        assert 0 < abs(line["gradient_cosine"]) <= 1
    for arm in ({}, {"precision": "ternary"}):
        assert "gradient_cosine" not in metrics(undisturbed(**arm), "endpoint")[0]


def test_gradient_cosine_needs_quantized_weights(launch, tmp_path):
    launch(tmp_path, {**SHORT, "log.gradient_sample": 3})
    assert "gradient_cosine" not in metrics(tmp_path, "endpoint")[0]


@pytest.mark.parametrize("overrides", [{}, PHASED, RANDOM], ids=["plain", "phased", "random"])
def test_the_model_left_behind_is_the_last_endpoints(
    undisturbed, tiny_config, tiny_corpus, overrides
):
    """Evaluated again, in the arm that it is deployed as, it has that endpoint's loss."""
    spec = resolve(tiny_config(overrides), tiny_corpus)
    like = compiled_init(spec.step)(0).params
    params = load_model(undisturbed(**overrides), like)
    first, last = endpoints(undisturbed(**overrides))
    loss = held_out(spec.deployed, params, tiny_corpus)
    assert loss == pytest.approx(last["loss"], rel=1e-12) and loss < first["loss"]


def test_no_model_is_kept_where_none_is_wanted(launch, tmp_path):
    launch(tmp_path, {"checkpoint.keep_model": False, "train.tokens": (1280,)})
    assert (tmp_path / "summary.json").exists() and not (tmp_path / "model").exists()


def test_logged_loss_is_the_mean_since_the_line_before(launch, undisturbed, tmp_path):
    launch(tmp_path, {"log.every": 1})
    each = [line["loss"] for line in metrics(tmp_path, "train")]
    means = [line["loss"] for line in metrics(undisturbed(), "train")]
    edges = [0, 7, 14, 16, 20, 21 - 16 + 20, 28 - 16 + 20, 36, 39, 44]
    for mean, begin, end in zip(means, edges, edges[1:], strict=False):
        assert mean == pytest.approx(np.mean(each[begin:end]), rel=1e-12)
    assert len(each) == 44 and len(means) == 9
    first, second = endpoints(undisturbed())
    assert first["train_loss"] == pytest.approx(np.mean(each[16:20]), rel=1e-12)
    assert second["train_loss"] == pytest.approx(np.mean(each[36:44]), rel=1e-12)


def test_evaluation_on_the_way(undisturbed):
    lines = metrics(undisturbed(**{"eval.every": 7}), "eval")
    places = [(line["step"], line["decay_to"]) for line in lines]
    assert places == [(7, None), (14, None), (21, None), (28, None), (35, 5120)]
    losses = [line["valid_loss"] for line in lines]
    assert losses == sorted(losses, reverse=True) and 2 < losses[-1] < losses[0] < 5.6
    assert metrics(undisturbed(), "eval") == []


def test_config_and_summary(launch, tiny_config, tiny_corpus, tmp_path):
    result = launch(tmp_path)
    config = read_json(tmp_path / "config.json")
    spec = resolve(tiny_config(), tiny_corpus)
    assert config["identity"] == json.loads(json.dumps(spec.identity()))
    assert config["config"]["optim"]["peak_lr"] == 0.01
    assert config["config"]["train"]["tokens"] == [2560, 5120]
    origin = {"git_commit", "jax_version", "python_version", "device"}
    header = {"schema_version", "run_id"} | origin
    assert config.keys() == header | {"identity", "config", "group"}
    assert config["group"] == [spec.run_id]
    assert config["run_id"] == result["run_id"] == spec.run_id
    assert result.keys() == header | {
        "status", "skipped_steps", "rollbacks", "microbatches", "groups", "wall_s",
        "total_flops", "metrics", "model", "endpoints",
    }  # fmt: skip
    assert result["schema_version"] == config["schema_version"] == SCHEMA_VERSION
    log = (tmp_path / "metrics.jsonl").read_bytes()
    assert result["metrics"] == {"bytes": len(log), "sha256": hashlib.sha256(log).hexdigest()}
    first = {"kind": "header", "schema_version": SCHEMA_VERSION, "run_id": spec.run_id}
    assert json.loads(log.splitlines()[0]) == first
    model = load_model(tmp_path, compiled_init(spec.step)(0).params)
    assert result["model"] == fingerprint(model)
    assert result == summary(tmp_path)
    assert result["status"] == "ok" and result["skipped_steps"] == 0 and result["groups"] == [1]
    assert result["total_flops"] == 44 * 128 * spec.flops_per_token
    assert [row["flops"] for row in result["endpoints"]] == [
        end * 128 * spec.flops_per_token for end in (20, 40)
    ], "an endpoint costs its own trajectory, whoever shared the trunk"
    assert 0 < result["endpoints"][0]["wall_s"] <= result["endpoints"][1]["wall_s"]
    assert result["endpoints"][1]["wall_s"] <= result["wall_s"] < 600
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "model", "summary.json",
    ]  # fmt: skip


def test_unique_tokens_stop_at_the_corpus(launch, tiny_corpus, tmp_path):
    epoch = (len(tiny_corpus.train) - 1) // 16 * 16
    budget = -(-epoch // 128) * 128 + 1280
    (row,) = launch(tmp_path, {"train.tokens": (budget,)})["endpoints"]
    assert (row["tokens"], row["unique_tokens"]) == (budget, epoch)


def test_watcher_is_told_at_log_steps(launch, tmp_path):
    reports = []
    launch(tmp_path, watch=reports.append)
    assert [r.tick for r in reports] == [7, 14, 16, 20, 25, 32, 36, 39, 44]
    assert {r.total_ticks for r in reports} == {44}
    assert reports[0].tokens_per_s is None, "the first interval holds compilation"
    assert all(r.tokens_per_s > 0 for r in reports[1:])
    assert [r.loss for r in reports] == [line["loss"] for line in metrics(tmp_path, "train")]


@pytest.mark.slow
def test_wandb_offline_writes_a_directory_and_changes_nothing(launch, undisturbed, tmp_path):
    launch(tmp_path, {"tracking.wandb": "offline"})
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert_same_results(tmp_path, undisturbed())


def test_wandb_disabled_writes_none(undisturbed):
    assert not (undisturbed() / "wandb").exists()
