"""The suite `decode`: what it counts, what it divides, and how it ends."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_models import trained

from bitnet_jax import cost
from bitnet_jax.deployed import deploy
from bitnet_jax.errors import ConfigError
from bitnet_jax.export import gguf
from bitnet_jax.export.verify import evaluate
from bitnet_jax.generate import decoder
from bitnet_jax.model import init_params
from bitnet_jax.precision import get_precision
from experiments.benchmark import decode, peers
from experiments.benchmark.environment import cores
from experiments.benchmark.workload import Workload

WORKLOAD = Workload(sizes=("27k",), layers=1, vocab=16, sequence_length=32, batch_tokens=32,
                    repeats=2)  # fmt: skip


@pytest.fixture(scope="module")
def result():
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "AT_LEAST", 0.0)
        patch.setattr(decode, "BANDWIDTH_BYTES", 2**18)
        return decode.run(WORKLOAD, said.append)


def test_rows_and_ratios(result):
    """Every case beside float32, within each round, and its floor."""
    assert [row["case"] for row in result.measurements] == list(decode.CASES)
    assert result.ratios.keys() == {
        *(f"decode_time/{name}/float32" for name in ("bfloat16", "2bit", "base3")),
        *(f"decode_floor/{name}" for name in decode.CASES),
    }
    rows = {row["case"]: row for row in result.measurements}
    for name, row in rows.items():
        assert len(row["rounds_seconds"]) == 2 and row["tokens_per_s"] == 1 / row["seconds"]
        assert row["bytes_per_s"] == row["weight_bytes"] / row["seconds"]
        assert row["floor_share"] == pytest.approx(row["floor_seconds"] / row["seconds"])
        if name != "float32":
            turns = zip(row["rounds_seconds"], rows["float32"]["rounds_seconds"], strict=True)
            found, quotients = (
                result.ratios[f"decode_time/{name}/float32"],
                [a / b for a, b in turns],
            )
            assert (found.min, found.max) == (min(quotients), max(quotients))
            assert found.goal is None  # a narrow model stays in a cache


def test_bytes_by_hand(result):
    """One block of width 32 and 96: each kernel's bytes, 32-bit scales, norms and head."""
    model = WORKLOAD.model("27k")
    kernels = cost.linear_shapes(model).values()
    rest = 4 * (3 * 32 + 96 + 32 + 16 * 32)
    found = {row["case"]: row["weight_bytes"] for row in result.measurements}
    weights = sum(n * p for n, p in kernels)
    assert found["float32"] == 4 * weights + rest
    assert found["bfloat16"] == 2 * weights + rest
    for name, codes in (("2bit", 4), ("base3", 5)):
        in_fours = sum(math.ceil(math.ceil(n / codes) / 4) * 4 * p for n, p in kernels)
        assert found[name] == in_fours + 4 * len(kernels) + rest


def test_the_goal_is_that_of_a_wide_model():
    seconds, decodings = {name: [1.0, 2.0] for name in decode.CASES}, {}
    wide = Workload(sizes=("60m",), repeats=2)
    ratios = decode._ratios(wide, "60m", seconds, decodings, [1.0, 1.0])
    goals = {name: ratio.goal for name, ratio in ratios.items()}
    on_cpu = jax.default_backend() == "cpu"
    assert goals["decode_time/2bit/float32"] == goals["decode_time/base3/float32"]
    assert goals["decode_time/2bit/float32"] == (0.5 if on_cpu else None)
    assert goals["decode_time/bfloat16/float32"] is None


def test_the_embedding_is_not_read_but_for_a_row():
    precision = get_precision("ternary")
    model = WORKLOAD.model("27k")
    laid_out = decoder(
        model, precision, deploy(init_params(model, precision, jax.random.key(0)), precision)
    )
    more = laid_out._replace(embedding=jnp.zeros((1000, 32)))
    assert decode.read_bytes(more) == decode.read_bytes(laid_out)


def test_beside_a_peer(monkeypatch):
    """What it has built in is in our models, too; its times are in the rounds, by its own case."""
    made = []

    def rivals(workload, size):
        return {
            "other": peers.Rival("2bit", lambda: [1], 1000, 1.0, ("as is",)),
            "another": peers.Rival("float32", lambda: [1], 4000, None, ("as is",)),
        }

    def decoding(workload, size, held):
        made.append(decode.model_config(workload, size))
        return decode.Decoding(lambda: None, 500)

    def interleaved(cases, repeats, at_least):
        return {name: [float(1 + i), 4.0 + i] for i, name in enumerate(cases)}

    monkeypatch.setattr(peers, "load_decoding", lambda name, workload: rivals)
    monkeypatch.setattr(decode, "_decoding", decoding)
    monkeypatch.setattr(decode, "interleave", interleaved)
    monkeypatch.setattr(decode, "_reading", lambda: None)
    workload = Workload(sizes=("7m",), repeats=2, peers=("llama.cpp",))
    result = decode.run(workload, lambda text: None)
    assert {(config.activation, config.tied_embeddings) for config in made} == {("silu", True)}
    assert [row["case"] for row in result.measurements] == [*decode.CASES, "other", "another"]
    other = result.measurements[-2]
    assert other["bytes_per_s"] == 1000 / other["seconds"]
    ours, theirs = list(decode.CASES).index("2bit"), len(decode.CASES)
    quotients = sorted([(1 + ours) / (1 + theirs), (4 + ours) / (4 + theirs)])
    found = result.ratios["decode_time/2bit/other"]
    assert [found.min, found.max] == pytest.approx(quotients) and found.goal == 1
    assert result.ratios["decode_time/float32/another"].goal is None
    assert result.notes.count("as is") == 1
    assert any("SiLU" in note for note in result.notes)
    plain = decode.model_config(WORKLOAD, "27k")
    assert plain == WORKLOAD.model("27k") and plain.activation == "relu2"


def test_a_gpus_own_kernel_is_a_case_there(monkeypatch):
    made = []

    def decoding(workload, size, held):
        made.append(held)
        return decode.Decoding(lambda: None, 500)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(decode, "_decoding", decoding)
    monkeypatch.setattr(decode, "interleave", lambda cases, *_: dict.fromkeys(cases, [1.0, 2.0]))
    monkeypatch.setattr(decode, "_reading", lambda: None)
    result = decode.run(Workload(sizes=("60m",), repeats=2), lambda text: None)
    assert [held for held in made if held.products == "pallas"] == [
        ("ternary", "2bit", "pallas"), ("ternary", "base3", "pallas"),
    ]  # fmt: skip
    assert result.ratios["decode_time/2bit_pallas/float32"].goal is None
    assert {row["case"] for row in result.measurements} == {*decode.CASES, *decode.ON_GPU}


# llama.cpp itself


@pytest.fixture
def peer():
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp", reason="llama-cpp-python builds for minutes")
    return importlib.import_module("experiments.benchmark.peers.llama_cpp_peer")


@pytest.mark.slow
def test_llama_cpp_decodes_our_model(peer, tmp_path):
    """Greedily, by our own logits without quantized activations; each call from the prompt on."""
    model, prompt = trained(activation="silu"), [7, 100, 33]
    gguf.write(model, tmp_path / "model", gguf.Layout("F32"))
    engine = peer.Engine(tmp_path / "model", 64, prompt)
    tokens = np.array([[*prompt, engine._first, *engine()]], np.int32)
    logits = evaluate(model, tokens[:, :-1], quantized=False)
    assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == tokens[0, len(prompt) :].tolist()
    assert len(set(tokens[0].tolist())) > 4, "they tell one position from another"
    assert engine() == engine() == tokens[0, -decode.STEPS :].tolist()
    assert llama_threads(engine) == cores()


def llama_threads(engine):
    library = importlib.import_module("llama_cpp")
    return library.llama_n_threads(engine._engine.ctx)


@pytest.mark.slow
def test_llama_cpps_bytes_by_hand(peer):
    """Of every type beside the case of ours with as many: the codes, a scale a matrix, the rest."""
    workload = Workload(sizes=("7m",), layers=1, peers=("llama.cpp",), sequence_length=32,
                        batch_tokens=32)  # fmt: skip
    peer.check(workload)
    found = peer.rivals(workload, "7m")
    model = workload.model("7m")
    shapes = cost.linear_shapes(model).values()
    weights = sum(n * p for n, p in shapes)
    rest = 4 * (3 * 256 + 768 + 256 + 256 * 256 + len(shapes))
    bits = {"TQ2_0": 66 / 256, "TQ1_0": 54 / 256, "F16": 2, "F32": 4}
    cases = {"TQ2_0": "2bit", "TQ1_0": "base3", "F16": "bfloat16", "F32": "float32"}
    assert found.keys() == {f"llama.cpp_{name}" for name in bits}
    for name, size in bits.items():
        rival = found[f"llama.cpp_{name}"]
        assert rival.weight_bytes == size * weights + rest and rival.case == cases[name]
        assert len(rival.call()) == decode.STEPS and rival.goal is None


def test_what_llama_cpp_cannot_hold(peer, monkeypatch):
    for changes, words in {
        ("sizes", ("7m", "27k")): "--sizes=27k: .*multiple of 256, not of 32; .*7m",
        ("vocab", 16): "--vocab=16: .*256 bytes",
    }.items():
        with pytest.raises(ConfigError, match=words):
            peer.check(Workload(**{"sizes": ("7m",), changes[0]: changes[1]}))
    monkeypatch.setattr(peer.jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match="JAX runs on a gpu.*JAX_PLATFORMS=cpu"):
        peer.check(Workload())
