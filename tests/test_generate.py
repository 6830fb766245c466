"""Text from a model: the cache against the full forward pass, sampling, and the command."""

import contextlib
import dataclasses
import functools
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.configs.resolve import loop_options, resolve
from bitnet_jax.data.tokenizers import open_tokenizer, train_tokenizer
from bitnet_jax.deployed import deploy, deployed_logits
from bitnet_jax.export import packed
from bitnet_jax.files import DamagedFile
from bitnet_jax.generate import (
    LIKELIEST,
    Sampling,
    decode_step,
    decoder,
    generate,
    prefill,
    sample,
)
from bitnet_jax.granularity import Granularity
from bitnet_jax.model import TransformerConfig, init_params
from bitnet_jax.precision import get_precision, without_activation_quantization
from bitnet_jax.train import train_and_evaluate
from experiments.generate import main
from experiments.runs import load_run

CONFIG = TransformerConfig(vocab_size=13, layers=2, width=32, ff_width=48, heads=4, kv_heads=2)
LENGTH = 24
TOKENS = np.random.default_rng(0).integers(0, 13, (2, LENGTH), np.int32)

ARMS = {
    "ternary": get_precision("ternary"),
    "rotated": get_precision("ternary", rotate=True),
    "group": get_precision("ternary", granularity=Granularity("group", 16)),
    "no codes": without_activation_quantization(get_precision("ternary")),
    "int4": get_precision("bf16", weights="int4_absmax"),
    "fp32": get_precision("fp32"),
    "bf16": get_precision("bf16"),
}


@functools.cache
def models(arm, packing="2bit", **changes):
    """(config, precision, as deployed, as laid out), of initial values."""
    config, precision = dataclasses.replace(CONFIG, **changes), ARMS[arm]
    deployed = deploy(init_params(config, precision, jax.random.key(1)), precision)
    return config, precision, deployed, decoder(config, precision, deployed, packing)


# The cache


def through_the_cache(arm, first, packing="2bit", **changes):
    """Logits of all positions from `first` on, the first by prefill and each other by a step."""
    config, precision, deployed, model = models(arm, packing, **changes)
    start = jax.jit(functools.partial(prefill, config, precision), static_argnums=2)
    step = jax.jit(functools.partial(decode_step, config, precision))
    caches, logits = start(model, TOKENS[:, :first], LENGTH)
    found = [logits]
    for position in range(first, LENGTH):
        assert caches[0].length == position
        caches, logits = step(model, caches, TOKENS[:, position])
        found.append(logits)
    full = deployed_logits(config, precision, deployed, TOKENS)[:, first - 1 :]
    return np.stack(found, axis=1), np.asarray(full)


@pytest.mark.parametrize("packing", ["2bit", "base3", None])
@pytest.mark.parametrize("first", [1, 10])
def test_a_ternary_model_has_the_same_logits_to_the_bit(packing, first):
    """Integer products are exact, and what is rounded otherwise in float32 is rounded again, to
    bfloat16. It seldom shows there; where it does, a code may flip, and all after it moves."""
    found, full = through_the_cache("ternary", first, packing)
    np.testing.assert_array_equal(found, full)


@pytest.mark.parametrize("changes", [
    {"norms": "inside", "tied_embeddings": False}, {"gated": False, "activation": "gelu"},
])  # fmt: skip
def test_every_shape_of_a_block(changes):
    found, full = through_the_cache("ternary", 3, **changes)
    assert (found == full).mean() > 0.9
    assert np.abs(found - full).max() < 0.1 * full.std()


@pytest.mark.parametrize(
    "arm,within",
    [("rotated", 0.1), ("group", 0.2), ("no codes", 0.05), ("int4", 0.05), ("bf16", 0.05),
     ("fp32", 1e-5)],
)  # fmt: skip
def test_other_arms_are_as_near_as_their_rounding(arm, within):
    """As a share of the logits' standard deviation. In float32 it is rounding alone."""
    found, full = through_the_cache(arm, 5)
    assert np.abs(found - full).max() < within * full.std()


def test_a_step_sees_all_before_it_and_nothing_after():
    """Another first token changes every later logit; the room at the end changes none."""
    config, precision, _, model = models("fp32")
    start = jax.jit(functools.partial(prefill, config, precision), static_argnums=2)
    step = jax.jit(functools.partial(decode_step, config, precision))

    def last(tokens, positions):
        caches, _ = start(model, tokens[:, :4], positions)
        for position in range(4, 8):
            caches, logits = step(model, caches, tokens[:, position])
        return np.asarray(logits)

    base, other = last(TOKENS, 8), TOKENS.copy()
    other[0, 0] = (other[0, 0] + 1) % 13
    changed = last(other, 8)
    assert (changed[0] != base[0]).all() and (changed[1] == base[1]).all()
    np.testing.assert_allclose(last(TOKENS, 64), base, rtol=0, atol=1e-5)


# Sampling


def drawn(sampling, logits, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    tokens = jax.vmap(lambda key: sample(jnp.asarray(logits, jnp.float32), key, sampling))(keys)
    return np.bincount(tokens, minlength=len(logits)) / count


LOGITS = np.log([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    "sampling,shares",
    [
        (Sampling(), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(temperature=0.5), np.array([1, 16, 0.25, 9, 2.25]) / 28.5),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_k=99), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(top_p=0.69), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_p=0.71), np.array([0, 4, 0, 3, 1.5]) / 8.5),
        (Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(temperature=0.5, top_k=3, top_p=0.9), np.array([0, 16, 0, 9, 0]) / 25),
        (LIKELIEST, [0, 1, 0, 0, 0]),
    ],
)  # fmt: skip
def test_shares_of_many_draws(sampling, shares):
    """By hand; four standard errors, and never one that should not come."""
    found, shares = drawn(sampling, LOGITS), np.asarray(shares)
    np.testing.assert_allclose(found, shares, rtol=0, atol=0.032)
    assert (found[shares == 0] == 0).all()


def test_equally_likely_ones():
    """Of three, two stay."""
    assert drawn(Sampling(top_k=2), [0.0, 0.0, 0.0])[2] == 0
    assert drawn(LIKELIEST, [1.0, 3.0, 3.0])[1] == 1


def test_greedy_is_the_full_forward_passes_choice():
    config, precision, deployed, model = models("ternary")
    prompt = TOKENS[0, :5]
    texts = generate(config, precision, model, prompt, 0, 12, 2, LIKELIEST, end_of_text=99)
    assert texts.shape == (2, 12) and (texts[0] == texts[1]).all()
    whole = np.concatenate([prompt, texts[0]])[None]
    full = deployed_logits(config, precision, deployed, whole)[0]
    np.testing.assert_array_equal(full.argmax(axis=1)[4:-1], texts[0])


def test_a_text_is_its_own_and_ends():
    """It depends on the seed and its number alone; after the end of text nothing else comes."""
    config, precision, _, model = models("fp32")
    run = functools.partial(generate, config, precision, model, TOKENS[0, :5])
    three, five = run(3, 14, 3, Sampling()), run(3, 14, 5, Sampling())
    np.testing.assert_array_equal(three, five[:3])
    assert len({tuple(row) for row in five.tolist()}) == 5
    assert (run(4, 14, 3, Sampling()) != three).any()
    np.testing.assert_array_equal(run(3, 6, 3, Sampling()), three[:, :6])
    end = int(three[0, 4])
    first = three[0].tolist().index(end)
    ended = run(3, 14, 3, Sampling(), end_of_text=end)
    np.testing.assert_array_equal(ended[0, : first + 1], three[0, : first + 1])
    assert (ended[0, first:] == end).all()


# The command


@pytest.fixture(scope="module")
def directory(tiny_config, tiny_corpus, tmp_path_factory):
    """A trained ternary run of 40 steps."""
    path = tmp_path_factory.mktemp("run")
    config = tiny_config({"precision": "ternary"})
    spec = resolve(config, tiny_corpus)
    train_and_evaluate(spec, tiny_corpus, path, loop_options(config), config.to_dict())
    return path


@pytest.fixture(scope="module")
def file(directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "tiny.packed"
    packed.write(load_run(directory).trained_model(), path)
    return path


def called(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(arguments)) == 0
    return out.getvalue()


def test_a_run_and_its_packed_file_say_the_same(directory, file):
    """And the file is verified against the run; the prompt's text comes first."""
    facts = packed.verify(load_run(directory).trained_model(), file)
    assert facts["exact"]
    of_run = json.loads(called(f"--run={directory}", "--prompt=the cat", "--json", "--count=2"))
    of_file = json.loads(called(f"--packed={file}", "--prompt=the cat", "--json", "--count=2"))
    assert of_run.pop("seconds") > 0 and of_file.pop("seconds") > 0
    assert of_run == of_file
    assert of_run["prompt_tokens"] == 7 and len(of_run["texts"]) == 2
    for text in of_run["texts"]:
        assert bytes(text["tokens"]).decode(errors="replace") == text["text"]
        assert text["ended"] or len(text["tokens"]) == 16 - 7
    printed = called(f"--run={directory}", "--prompt=the cat", "--count=2")
    assert printed == "".join(f"the cat{text['text']}\n\n" for text in of_run["texts"])


def test_options_reach_the_model(directory):
    def text(*more):
        found = json.loads(called(f"--run={directory}", "--prompt=the", "--json", *more))
        return found["texts"][0]["tokens"], found

    greedy, _ = text("--temperature=0")
    assert text("--temperature=0", "--seed=5")[0] == greedy
    assert text("--top_k=1")[0] == text("--top_p=1e-6")[0] == greedy
    assert text("--seed=1")[0] != text("--seed=2")[0]
    assert len(text("--tokens=3", "--temperature=0")[0]) <= 3
    assert text("--activations=none")[1]["precision"] == "ternary+activations=none"


def test_beyond_the_context_is_told(directory, capsys):
    called(f"--run={directory}", "--prompt=the", "--tokens=40", "--beyond", "--seed=1")
    assert "beyond the 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--tokens=0"], "tokens=0: it must be from 1"),
        (["--tokens=14"], "tokens=14: with the prompt's 3 more than the 16 positions"),
        (["--tokens=many"], "tokens"),
        (["--temperature=-1"], "temperature=-1.0: it must be 0 or more"),
        (["--temperature=nan"], "temperature=nan"),
        (["--top_p=0"], "top_p=0.0"),
        (["--top_p=1.5"], "top_p=1.5"),
        (["--top_k=0"], "top_k=0"),
        (["--count=-1"], "count=-1"),
        (["--seed=-1"], "seed=-1"),
        (["--activations=int8_absmax"], "activations='int8_absmax' is unknown; choose from none"),
        (["--prompt=" + 20 * "long"], "prompt: 80 tokens, and the model was trained on 16"),
        (["--prompt=a\0b"], "NUL byte"),
        (["--prompt=\udcff"], "prompt: it must be UTF-8"),
        (["--tokenizer=t.json"], "tokenizer='t.json': a run has its own"),
        (["--packed=f"], "not allowed with"),
        (["--size=7m"], "--size=7m"),
    ],
)
def test_bad_input_is_one_line(directory, capsys, arguments, message):
    assert main([f"--run={directory}", "--prompt=the", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err and not captured.out


def test_bad_sources(tmp_path, file, capsys):
    for arguments, message in (
        ([], "--run --packed"),
        ([f"--run={tmp_path}"], "not a run directory"),
        ([f"--packed={tmp_path / 'x'}"], "cannot be read"),
        ([f"--packed={file}", "--tokenizer=t.json"], "reads bytes; leave it out"),
    ):
        assert main([*arguments, "--prompt=the"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_tokenizer_file(tmp_path, capsys):
    """Only the very file that the model was trained with; its ids decode to the text."""
    pytest.importorskip("tokenizers")
    (tmp_path / "text.txt").write_text("the cat sees a tree. " * 200)
    train_tokenizer([str(tmp_path / "text.txt")], 270, tmp_path / "bpe.json")
    tokenizer = open_tokenizer(str(tmp_path / "bpe.json"))
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    params = init_params(config, get_precision("ternary"), jax.random.key(0))
    model = packed.TrainedModel(config, get_precision("ternary"), params, 16,
                                tmp_path / "bpe.json", tokenizer.eot_token, {})  # fmt: skip
    packed.write(model, tmp_path / "m")
    given = [f"--packed={tmp_path / 'm'}", "--prompt=the cat"]
    found = json.loads(called(*given, f"--tokenizer={tmp_path / 'bpe.json'}", "--json"))
    assert 0 < found["prompt_tokens"] < 7
    for text in found["texts"]:
        assert tokenizer.decode(text["tokens"]) == text["text"]
    assert main(given) == 2
    assert f"give --tokenizer=the file with sha256 {tokenizer.sha256}" in capsys.readouterr().err
    shutil.copy(tmp_path / "text.txt", tmp_path / "other.json")
    assert main([*given, f"--tokenizer={tmp_path / 'other.json'}"]) == 2
    assert "not the model's" in capsys.readouterr().err


def test_symbols_that_are_no_text(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, vocab_size=64)
    params = init_params(config, get_precision("ternary"), jax.random.key(0))
    model = packed.TrainedModel(config, get_precision("ternary"), params, 16, None, None, {},
                                "synthetic")  # fmt: skip
    packed.write(model, tmp_path / "m")
    found = packed.read(tmp_path / "m")
    assert found.tokenizer == {"name": "synthetic", "sha256": None} and found.end_of_text is None
    assert main([f"--packed={tmp_path / 'm'}", "--prompt=the"]) == 2
    assert "its tokens are symbols of 'synthetic' and no text" in capsys.readouterr().err
    # Bytes have an end of text.
    packed.write(dataclasses.replace(model, symbols=None), tmp_path / "bytes")
    with pytest.raises(DamagedFile, match="end_of_text"):
        packed.read(tmp_path / "bytes")


def test_the_way_of_products_is_checked_first(tmp_path, capsys):
    assert main([f"--packed={tmp_path}", "--prompt=the", "--products=triton"]) == 2
    error = capsys.readouterr().err
    assert "products='triton'" in error and "pallas" in error and error.count("\n") == 1


# Activations as they are


def test_the_arm_without_activation_quantization():
    for arm in (get_precision("ternary"), get_precision("binary"),
                get_precision("ternary", activations="int4_absmax", rotate=True)):  # fmt: skip
        found = without_activation_quantization(arm)
        assert found.activations == "none" and found.activation_estimator == "identity"
        assert (found.weights, found.rotate) == (arm.weights, arm.rotate)
        assert "+activations=none" in found.name and found.name.count("activations") == 1
        assert without_activation_quantization(found) is found
    assert without_activation_quantization(get_precision("fp16")) == get_precision("fp16")
