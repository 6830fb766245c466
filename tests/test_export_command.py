"""The export command: what it writes, prints and refuses, and that nothing half done stays."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.data import validation_rows
from bitnet_jax.export import blocks, gguf, hf, packed
from bitnet_jax.export.model import linears
from bitnet_jax.export.verify import evaluate
from bitnet_jax.train import train_and_evaluate
from experiments import export
from experiments.export import main
from experiments.runs import load_run

pytest.importorskip("safetensors")
pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def directory(tiny_config, tiny_corpus, tmp_path_factory):
    """The tiny run with trits and the block that llama.cpp has, trained."""
    path = tmp_path_factory.mktemp("run")
    config = tiny_config({"precision": "ternary", "model.activation": "silu"})
    spec = resolve(config, tiny_corpus)
    train_and_evaluate(spec, tiny_corpus, path, loop_options(config), config.to_dict())
    return path


@pytest.fixture
def alone(monkeypatch):
    """No client is installed, which takes seconds to load."""
    for module in (hf, gguf):
        monkeypatch.setattr(module, "installed", lambda name: False)


def run(*arguments):
    """(exit status, stdout, stderr) of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(a) for a in arguments])
    return status, out.getvalue(), err.getvalue()


def refused(*arguments):
    status, out, err = run(*arguments)
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_hf(directory, tmp_path, alone):
    out = tmp_path / "new" / "model"
    status, text, err = run(f"--run={directory}", "--format=hf", f"--out={out}")
    assert (status, err) == (0, "")
    assert {p.name for p in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "README.md",
    }  # fmt: skip
    assert [p.name for p in out.parent.iterdir()] == ["model"], "nothing else is left beside it"
    assert "clients that compute this model: transformers, llama.cpp" in text
    assert "different 0" in text and "not compared" in text
    model = load_run(directory).trained_model()
    stored = hf.read(model, out)
    for linear in linears(model):
        found = stored.matrices[linear.block, linear.name]
        np.testing.assert_array_equal(found.numbers, linear.codes)
        assert found.scale == linear.scale.item()
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_gguf_as_json(directory, tmp_path, alone):
    out = tmp_path / "model.gguf"
    status, text, _ = run(
        f"--run={directory}", "--format=gguf", "--type=F16", f"--out={out}", "--json"
    )
    document = json.loads(text)
    assert status == 0 and document["type"] == "F16" and document["embedding"] == "F32"
    assert document["bytes"] == out.stat().st_size and document["format"] == "gguf"
    assert document["run_id"] == load_run(directory).spec.run_id
    assert document["packages"]["gguf"]
    first = document["checks"][0]
    codes = sum(m.codes.size for m in linears(load_run(directory).trained_model()))
    assert first == {
        "what": "codes", "found": {"different": 0, "of": codes}, "allowed": {"different": 0},
        "holds": True, "note": "",
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("form,module", [("hf", hf), ("gguf", gguf)])
def test_a_wrong_file_is_removed(directory, tmp_path, alone, monkeypatch, form, module):
    """A mistake in the writer: the last row of a block becomes its first."""
    read = module.read

    def wrong(*arguments):
        stored = read(*arguments)
        key = (0, "mlp/up")
        matrix = stored.matrices[key]
        stored.matrices[key] = matrix._replace(numbers=np.roll(matrix.numbers, 1, axis=0))
        return stored

    monkeypatch.setattr(module, "read", wrong)
    out, reference = tmp_path / "model", tmp_path / "reference.npz"
    options = ["--type=F32"] if form == "gguf" else []
    status, text, err = run(
        f"--run={directory}", f"--format={form}", f"--out={out}", f"--reference={reference}",
        *options,
    )  # fmt: skip
    assert status == 1 and "WRONG" in text and err.count("\n") == 1 and str(out) in err
    assert not list(tmp_path.iterdir())


def test_a_wrong_encoder_is_found(directory, tmp_path, alone, monkeypatch):
    packed = blocks.pack_rows
    monkeypatch.setattr(blocks, "pack_rows", lambda codes: packed(-codes))
    assert run(f"--run={directory}", "--format=hf", f"--out={tmp_path / 'model'}")[0] == 1


def test_an_interrupted_export_leaves_nothing(directory, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(export.FORMATS, "hf", export.FORMATS["hf"]._replace(verify=interrupted))
    status, _, err = run(f"--run={directory}", "--format=hf", f"--out={tmp_path / 'model'}")
    assert status == 130 and "nothing is written" in err and not list(tmp_path.iterdir())


def test_the_reference_is_held_out_text_and_the_runs_logits(directory, tmp_path, alone):
    reference = tmp_path / "reference.npz"
    status, _, _ = run(
        f"--run={directory}", "--format=hf", f"--out={tmp_path / 'model'}",
        f"--reference={reference}",
    )  # fmt: skip
    assert status == 0
    found = np.load(reference)
    finished = load_run(directory)
    rows = np.asarray(validation_rows(finished.corpus.valid, 16, 29 * 16))
    np.testing.assert_array_equal(found["tokens"], rows[:, :-1])
    assert found["tokens"].dtype == np.int32 and found["logits"].dtype == np.float32
    assert found["logits"].shape == (29, 16, 256)
    model = finished.trained_model()
    np.testing.assert_array_equal(found["logits"], evaluate(model, found["tokens"]))
    plain = found["logits_activations_not_quantized"]
    np.testing.assert_array_equal(plain, evaluate(model, found["tokens"], quantized=False))
    assert np.abs(plain - found["logits"]).max() > 1e-3
    # The logits are of a model that has learned: the loss of text that it has not seen.
    shifted = found["logits"] - found["logits"].max(-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    assert -np.take_along_axis(logp, rows[:, 1:, None].astype(int), -1).mean() < np.log(256) - 1


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--format=onnx", "--out={new}"], "format='onnx' is unknown; choose from hf, gguf"),
        (["--format=hf", "--out={here}"], "it exists; remove it or name another"),
        (["--format=hf", "--out={new}", "--reference={here}"], "reference=.*it exists"),
        (["--format=hf", "--out={new}", "--type=F16"], "type='F16': it goes with --format=gguf"),
        (["--format=gguf", "--out={new}", "--scale=divides"], "it goes with --format=hf"),
        (["--format=gguf", "--out={new}", "--type=Q4_0"], "type='Q4_0' is unknown; .*TQ2_0, TQ1"),
        (["--format=hf", "--out={new}", "--weights=2bit"], "choose from packed, master"),
        (["--format=gguf", "--out={new}"], "model.width=16: .*256.*--type=F16"),
        (["--format=gguf", "--out={new}", "--type=I2_S"], "activation='silu': bitnet.cpp"),
        (["--format=hf"], "required: --out"),
        (["--format=hf", "--out={new}", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_refusals(directory, tmp_path, arguments, words):
    here, new = tmp_path / "here", tmp_path / "new"
    here.mkdir()
    filled = [a.format(here=here, new=new) for a in arguments]
    assert re.search(words, refused(f"--run={directory}", *filled))
    assert [p.name for p in tmp_path.iterdir()] == ["here"] and not list(here.iterdir())


def test_not_a_run(tmp_path):
    assert "no config.json" in refused(f"--run={tmp_path}", "--format=hf", f"--out={tmp_path}/x")


def test_an_unfinished_run(directory, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(directory, broken)
    shutil.rmtree(broken / "model")
    assert str(broken) in refused(f"--run={broken}", "--format=hf", f"--out={tmp_path / 'x'}")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_with_the_client(directory, tmp_path, form):
    """All of it, as a person runs it, on a trained model."""
    needs = {"hf": ("torch", "transformers", "accelerate"), "gguf": ("llama_cpp",)}
    for name in needs[form]:
        pytest.importorskip(name, reason=f"{name} is not installed")
    options = ["--type=F32"] if form == "gguf" else []
    status, text, err = run(
        f"--run={directory}", f"--format={form}", f"--out={tmp_path / 'model'}", "--json", *options
    )
    assert (status, err) == (0, "")
    checks = json.loads(text)["checks"]
    logits = [check for check in checks if check["what"].startswith("logits in")]
    assert len(logits) == (2 if form == "hf" else 1) and all(check["holds"] for check in logits)
    assert logits[0]["found"]["largest"] < 2e-5


def test_packed(directory, tmp_path):
    """What experiments.generate reads gives the run's codes; without the clients' packages."""
    out = tmp_path / "model.packed"
    arguments = f"--run={directory}", "--format=packed", f"--out={out}"
    status, text, err = run(*arguments, "--json")
    assert (status, err) == (0, "")
    document = json.loads(text)
    model = load_run(directory).trained_model()
    weights = sum(linear.codes.size for linear in linears(model))
    found = {check["what"]: check["found"] for check in document["checks"]}
    assert found["size"]["weights"] == weights and found["logits"] == {"of the deviation": 0.0}
    assert document["bytes"] == out.stat().st_size
    assert packed.read(out).packing == "base3"
    status, text, _ = run(*arguments[:2], f"--out={tmp_path / 'two'}", "--packing=2bit")
    assert status == 0 and packed.read(tmp_path / "two").packing == "2bit" and "ok" in text
    assert "it goes with --format=packed" in refused(
        f"--run={directory}", "--format=hf", f"--out={tmp_path / 'x'}", "--packing=2bit"
    )


def test_a_wrong_packed_file_is_removed(directory, tmp_path, monkeypatch):
    right = packed.to_bytes
    monkeypatch.setattr(packed, "to_bytes", lambda codes, *rest: right(-codes, *rest))
    out = tmp_path / "model.packed"
    status, text, err = run(f"--run={directory}", "--format=packed", f"--out={out}")
    assert status == 1 and "the codes of" in err and "was removed" in err
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_that_is_no_text(directory, tmp_path):
    """What its tokens are is said by the corpus, not guessed from a file that is not there."""
    own = load_run(directory)
    assert own.trained_model().symbols is None
    corpus = SimpleNamespace(
        path=tmp_path, name="some", manifest={"tokenizer": {"name": "synthetic"}, "eot_token": None}
    )
    model = dataclasses.replace(own, corpus=corpus).trained_model()
    assert (model.symbols, model.end_of_text, model.tokenizer) == ("synthetic", None, None)


# lm-evaluation-harness, by the documented command

QUESTIONS = [
    {"query": "the old", "choices": ["cat.", "dog sees", "qzx"], "gold": 0},
    {"query": "a grey", "choices": ["tree", "!!!!", "house ne"], "gold": 1},
    {"query": "cat", "choices": ["sees a", "likes", "0123"], "gold": 1},
    {"query": "dog likes", "choices": ["the", "old", "near a"], "gold": 2},
    {"query": "Zo\u00eb", "choices": ["near", "tree", "a"], "gold": 0},
]
TASK = """task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
def test_lm_evaluation_harness_reports_our_loglikelihoods(directory, tmp_path, alone):
    """Of every answer to a task made here, without a network.

    Both compute in float32, in sums of other orders. Where that moves an activation to the next
    int8 code, an answer is off by more; of the few there are here, one may.
    """
    for name in ("lm_eval", "torch", "transformers", "accelerate"):
        if importlib.util.find_spec(name) is None:  # imported in another process alone
            pytest.skip(f"{name} is not installed")
    out = tmp_path / "model"
    assert run(f"--run={directory}", "--format=hf", f"--out={out}")[0] == 0
    data = tmp_path / "animals.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "animals.yaml").write_text(TASK.format(data=data))
    reported, accuracy = lm_eval(out, tmp_path)
    expected = loglikelihoods(load_run(directory).trained_model())
    assert reported.shape == expected.shape == (len(QUESTIONS), 3)
    near = np.abs(reported - expected) <= 1e-4
    assert near.sum() >= near.size - 1, (reported, expected)
    right = expected.argmax(axis=1) == [question["gold"] for question in QUESTIONS]
    assert accuracy == pytest.approx(right.mean()) and 0 < accuracy < 1


def lm_eval(model, folder):
    """(loglikelihoods of the answers, a question a row; accuracy) of the task `animals`."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model}",
        "--tasks", "animals", "--device", "cpu", "--include_path", str(folder / "tasks"),
        "--log_samples", "--output_path", str(folder / "found"),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, **offline, "TORCHDYNAMO_DISABLE": "1"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (folder / "found").rglob("samples_animals_*.jsonl")
    (results,) = (folder / "found").rglob("results_*.json")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    found = [[float(answer[0]) for answer in row["filtered_resps"]] for row in rows]
    return np.array(found), json.loads(results.read_text())["results"]["animals"]["acc,none"]


def loglikelihoods(model):
    """Ours of every answer after its question, by bytes."""
    pairs = [
        (question["query"].encode(), f" {answer}".encode())
        for question in QUESTIONS
        for answer in question["choices"]
    ]
    assert max(len(query) + len(answer) for query, answer in pairs) <= model.context_length
    tokens = np.zeros((len(pairs), model.context_length), np.int32)
    for row, (query, answer) in zip(tokens, pairs, strict=True):
        row[: len(query) + len(answer)] = list(query + answer)
    logits = evaluate(model, tokens).astype(np.float64)
    likely = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    found = [
        sum(likely[i, len(query) + j - 1, byte] for j, byte in enumerate(answer))
        for i, (query, answer) in enumerate(pairs)
    ]
    return np.array(found).reshape(len(QUESTIONS), -1)
