"""Quantization after training: the command's numbers, its calibration, and what it refuses."""

import contextlib
import dataclasses
import io
import json
import math
import shutil

import jax
import numpy as np
import pytest
from run_files import write_summary

from bitnet_jax.checkpoint import save_model
from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.data import train_batches
from bitnet_jax.evaluate import held_out_loss
from bitnet_jax.files import write_json
from bitnet_jax.loss import bits_per_byte
from bitnet_jax.model import linear_layers
from bitnet_jax.train import train_and_evaluate
from experiments import quantize
from experiments.quantize import calibrate, main
from experiments.runs import load_run

STEPS = 12


@pytest.fixture(scope="module")
def directory(tiny_config, tiny_corpus, tmp_path_factory):
    """The tiny run in float32, trained."""
    path = tmp_path_factory.mktemp("run")
    config = tiny_config()
    spec = resolve(config, tiny_corpus)
    train_and_evaluate(spec, tiny_corpus, path, loop_options(config), config.to_dict())
    return path


@pytest.fixture(scope="module")
def run(directory):
    return load_run(directory)


@pytest.fixture
def pretended(run, tiny_config, tiny_corpus, tmp_path):
    """A function that writes the directory of another run, with the parameters of this one."""

    def make(**overrides):
        config = tiny_config(overrides)
        spec = resolve(config, tiny_corpus)
        header = {"run_id": spec.run_id, "config": config.to_dict()}
        write_json(tmp_path / "config.json", header)
        write_summary(tmp_path, spec, model=save_model(tmp_path, run.params))
        return tmp_path

    return make


def document_of(path, *arguments):
    """What --json prints; constants that JSON lacks are mistakes."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([f"--run={path}", "--json", *arguments]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(out.getvalue(), parse_constant=refuse)


@pytest.fixture(scope="module")
def measured(directory):
    """(what the command printed, what its calibrations gave, by granularity)."""
    calibrated = {}

    def spy(run, kind, *arguments):
        calibrated[kind] = calibrate(run, kind, *arguments)
        return calibrated[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "calibrate", spy)
        arguments = "--weights=int8_absmax,ternary_absmean", f"--steps={STEPS}"
        return document_of(directory, *arguments), calibrated


@pytest.fixture(scope="module")
def document(measured):
    return measured[0]


@pytest.fixture(scope="module", params=["tensor", "channel"])
def calibration(request, measured, run):
    """(granularity, arm, parameters before, parameters after)."""
    arm, before = calibrate(run, request.param, "none", 0)
    found, after = measured[1][request.param]
    assert found == arm
    return request.param, arm, before, after


def row_of(document, weights, granularity=None):
    (row,) = (
        row
        for row in document["results"]
        if (row["weights"], row["granularity"]) == (weights, granularity)
    )
    return row


# The numbers


def test_rows(document, run):
    """As trained; every quantizer at every granularity; calibrated ones at the end."""
    assert document["run_id"] == run.spec.run_id and document["calibration_steps"] == STEPS
    found = [(r["weights"], r["granularity"], r["calibrated"]) for r in document["results"]]
    assert found == [
        ("as trained", None, False),
        *((w, g, False) for g in ("tensor", "channel") for w in ("int8_absmax", "ternary_absmean")),
        ("ternary", "tensor", True),
        ("ternary", "channel", True),
    ]
    assert {row["activations"] for row in document["results"]} == {"none"}


def test_as_trained_is_the_runs_own_endpoint(document, directory):
    """To the last bit."""
    last = json.loads((directory / "summary.json").read_text())["endpoints"][-1]
    row = row_of(document, "as trained")
    for key in ("loss", "loss_stderr", "bits_per_byte"):
        assert row[key] == last[key]


def test_eight_bits_cost_nothing_and_trits_do(document):
    eight = row_of(document, "int8_absmax", "channel")["difference"]
    assert 0 < abs(eight) < 5e-3
    for kind in ("tensor", "channel"):
        ternary = row_of(document, "ternary_absmean", kind)["difference"]
        assert ternary > 20 * abs(eight) and ternary > 0.02


def test_differences_and_bits(document, run):
    base = document["results"][0]["loss"]
    assert document["results"][0]["difference"] == 0
    for row in document["results"]:
        assert row["difference"] == row["loss"] - base
        bits = bits_per_byte(row["loss"], run.corpus.valid_bytes_per_token)
        assert row["bits_per_byte"] == bits
        assert 0 < row["loss_stderr"] < row["loss"]


def test_table(directory, document, capsys):
    """The same numbers for people; without steps nothing is calibrated."""
    arguments = "--weights=int8_absmax", "--granularity=channel", "--steps=0"
    assert main([f"--run={directory}", *arguments]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "│" in line]
    assert len(lines) == 2 and "calibrated" not in out
    assert document["run_id"] in out
    trained, eight = row_of(document, "as trained"), row_of(document, "int8_absmax", "channel")
    assert f"{trained['loss']:.4f}" in lines[0] and "+0.0000" in lines[0] and " - " in lines[0]
    assert f"{eight['difference']:+.4f}" in lines[1] and "direct" in lines[1]
    assert f"{eight['bits_per_byte']:.3f}" in lines[1]


def test_activations(directory, document):
    """Codes a token beside the weights' own: a further error, and said in its column."""
    arguments = "--weights=int8_absmax", "--granularity=channel", "--steps=0"
    found = document_of(directory, *arguments, "--activations=int4_absmax")
    assert [row["activations"] for row in found["results"]] == ["none", "int4_absmax"]
    without = row_of(document, "int8_absmax", "channel")
    assert found["results"][1]["loss"] != without["loss"]


def test_one_row_of_text_is_still_json(pretended):
    """A single held-out row has no standard error: null, for JSON has no NaN."""
    path = pretended(**{"eval.tokens": 16})
    found = document_of(path, "--weights=int8_absmax", "--granularity=channel", "--steps=0")
    assert [row["loss_stderr"] for row in found["results"]] == [None, None]
    assert all(math.isfinite(row["difference"]) for row in found["results"])


def test_a_rotated_run_stays_rotated(pretended, document):
    """Kernels that were trained on rotated inputs still get them: `none` changes nothing."""
    path = pretended(**{"quantization.rotate": True})
    found = document_of(path, "--weights=none", "--granularity=tensor", "--steps=0")
    assert [row["difference"] for row in found["results"]] == [0, 0]
    assert found["results"][0]["loss"] != document["results"][0]["loss"]


# Calibration


def test_calibration_lowers_the_training_loss(run, calibration):
    """On the batches that it saw, below where it started."""
    _, arm, *ends = calibration
    spec = run.spec
    batches = train_batches(
        run.corpus.train, spec.data.sequence_length, spec.batch_size, spec.seed_data
    )
    rows = np.concatenate([batches[step] for step in range(STEPS)])
    program = dataclasses.replace(spec.step, precision=arm)
    before, after = (held_out_loss(program, params, rows, spec.batch_size)[0] for params in ends)
    assert after < before - 1e-3


def test_calibration_moves_scales_alone(run, calibration):
    kind, arm, start, end = calibration
    assert arm.weight_quantizer.ternary and arm.granularity.kind == kind
    for params in (start, end):
        kept = jax.tree_util.tree_leaves_with_path(params)
        kept = {path: leaf for path, leaf in kept if path[-1].key != "step"}
        trained = dict(jax.tree_util.tree_leaves_with_path(run.params))
        assert kept.keys() == trained.keys()
        for path, leaf in kept.items():
            assert leaf.dtype == trained[path].dtype
            np.testing.assert_array_equal(leaf, trained[path])
    layers, before = linear_layers(end), linear_layers(start)
    assert len(layers) == 7
    for name, layer in layers.items():
        outputs = layer["kernel"].shape[2] if kind == "channel" else 1
        assert layer["step"].shape == (1, 1, 1, outputs)
        assert (np.asarray(layer["step"]) > 0).all()
        moved = np.log(layer["step"] / before[name]["step"])
        assert np.abs(moved).max() > 0.01
        assert np.abs(moved).max() < 1.5 * quantize.CALIBRATION_RATE * STEPS


def test_calibration_starts_at_the_least_squares(calibration):
    """1.224 root mean squares of a kernel, or of each of its columns."""
    kind, _, start, _ = calibration
    for layer in linear_layers(start).values():
        (kernel,) = np.asarray(layer["kernel"], np.float64)
        square = np.mean(np.square(kernel), axis=0 if kind == "channel" else None)
        expected = 1.224 * np.sqrt(np.atleast_1d(square))
        np.testing.assert_allclose(layer["step"][0, 0, 0], expected, rtol=1e-5)


def test_the_run_is_as_it_was(run, directory, document):
    """Nothing was written, and the parameters read again are the same."""
    again = load_run(directory)
    assert all("step" not in layer for layer in linear_layers(run.params).values())
    for one, other in zip(*map(jax.tree.leaves, (run.params, again.params)), strict=True):
        np.testing.assert_array_equal(one, other)


# Refusals


@pytest.fixture
def idle(monkeypatch):
    """A mistake is met before anything is evaluated."""

    def evaluate(*arguments):
        raise AssertionError("it evaluates")

    monkeypatch.setattr(quantize, "held_out_loss", evaluate)


def refused(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not captured.out
    return captured.err


@pytest.mark.parametrize(
    "argument, named, right",
    [
        ("--weights=int8_absmax,ternary_best", "'ternary_best'", "ternary_absmean"),
        ("--weights=", "weights=''", "choose from"),
        ("--weights=ternary_lsq", "weights='ternary_lsq'", "--steps"),
        ("--weights=ternary_stretched", "weights='ternary_stretched'", "learned"),
        ("--granularity=tensor,row", "'row'", "channel"),
        ("--granularity=group", "group", "tensor, channel"),
        ("--activations=int9", "activations='int9'", "int8_absmax"),
        ("--activations=ternary_lsq", "activations='ternary_lsq'", "learned"),
        ("--steps=-1", "steps=-1", "negative"),
    ],
)
def test_bad_values(directory, idle, capsys, argument, named, right):
    error = refused(capsys, f"--run={directory}", argument)
    assert named in error and right in error


def test_not_a_run(tmp_path, directory, idle, capsys):
    for path in (tmp_path, tmp_path / "nowhere", directory / "config.json"):
        assert "not a run directory" in refused(capsys, f"--run={path}")


def test_a_run_without_a_model(directory, tmp_path, idle, capsys):
    shutil.copy(directory / "config.json", tmp_path)
    error = refused(capsys, f"--run={tmp_path}")
    assert "holds no model" in error and "checkpoint.keep_model=True" in error


def test_a_quantized_run(pretended, idle, capsys):
    path = pretended(precision="ternary")
    error = refused(capsys, f"--run={path}")
    assert "ternary_absmean already" in error and "fp16, bf16 or fp32" in error


def test_a_corpus_that_has_gone(directory, tmp_path, idle, capsys):
    document = json.loads((directory / "config.json").read_text())
    document["config"]["data"]["source"] = str(tmp_path / "gone")
    write_json(tmp_path / "config.json", document)
    assert str(tmp_path / "gone") in refused(capsys, f"--run={tmp_path}")


@pytest.mark.parametrize("arguments", [[], ["--run=x", "--steps=many"], ["--run=x", "--bits=2"]])
def test_bad_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: " in capsys.readouterr().err
