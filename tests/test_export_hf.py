"""Exports for transformers: the files, what is refused, and that transformers computes the run."""

import json

import numpy as np
import pytest
from export_models import described, of_symbols, rows, trained

from bitnet_jax.data.tokenizers import ByteTokenizer, train_tokenizer
from bitnet_jax.errors import ConfigError
from bitnet_jax.export import blocks, hf
from bitnet_jax.export.card import card
from bitnet_jax.export.clients import able
from bitnet_jax.export.model import linears
from bitnet_jax.export.verify import evaluate
from bitnet_jax.export.vocabulary import tokenizer_document
from bitnet_jax.granularity import Granularity

safetensors = pytest.importorskip("safetensors.numpy")
tokenizers = pytest.importorskip("tokenizers")

LAYOUTS = {
    "packed": hf.Layout(),
    "divides": hf.Layout("packed", "divides"),
    "master": hf.Layout("master"),
}


def written(model, directory, layout=None):
    hf.write(model, directory, layout or hf.Layout())
    return directory


def bits(packed, row, column, outputs):
    """The code at [row, column] of an [outputs, .] matrix, looked up as the format describes it."""
    byte = int(packed[row % (outputs // 4), column])
    return (byte // 4 ** (row // (outputs // 4))) % 4 - 1


def verdicts(model, directory, layout):
    return {c.what: c.holds for c in hf.verify(model, directory, layout, rows())}


# The files


def test_packed_rows_lie_where_the_format_says():
    codes = np.random.default_rng(0).integers(-1, 2, (12, 7)).astype(np.int8)
    packed = blocks.pack_rows(codes)
    assert packed.shape == (3, 7) and packed.dtype == np.uint8
    found = [[bits(packed, r, c, 12) for c in range(7)] for r in range(12)]
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(blocks.unpack_rows(packed), codes)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_tensors(tmp_path, name, tied):
    model = trained(tied_embeddings=tied)
    found = safetensors.load_file(written(model, tmp_path, LAYOUTS[name]) / "model.safetensors")
    assert ("lm_head.weight" in found) == (not tied)
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], model.params["embedding"])
    sub_norm = model.params["blocks"]["mlp"]["sub_norm"]["scale"]
    np.testing.assert_array_equal(found["model.layers.1.mlp.ffn_sub_norm.weight"], sub_norm[1])
    names = {"attention/q": "self_attn.q_proj", "mlp/down": "mlp.down_proj"}
    for linear in (m for m in linears(model) if m.name in names):
        tensor = found[f"model.layers.{linear.block}.{names[linear.name]}.weight"]
        if name == "master":
            kernel = model.params["blocks"][linear.name.split("/")[0]][linear.name.split("/")[1]]
            np.testing.assert_array_equal(tensor, np.asarray(kernel["kernel"])[linear.block].T)
            assert not any("weight_scale" in key for key in found)
            continue
        outputs = linear.codes.shape[0]
        assert tensor.dtype == np.uint8 and tensor.shape == (outputs // 4, linear.codes.shape[1])
        assert bits(tensor, outputs - 1, 3, outputs) == linear.codes[outputs - 1, 3]
        scale = found[f"model.layers.{linear.block}.{names[linear.name]}.weight_scale"]
        own = np.float32(np.abs(linear.master).mean())
        assert scale.shape == (1,) and scale.dtype == np.float32
        np.testing.assert_allclose(scale[0], 1 / own if name == "divides" else own, rtol=1e-6)


@pytest.mark.parametrize(
    "name,linear_class,mode",
    [
        ("packed", "autobitlinear", "offline"),
        ("divides", "bitlinear", "offline"),
        ("master", "autobitlinear", "online"),
    ],
)
def test_config_says_how_to_read_them(tmp_path, name, linear_class, mode):
    written(trained(), tmp_path, LAYOUTS[name])
    config = json.loads((tmp_path / "config.json").read_text())
    rule = config["quantization_config"]
    assert rule == {
        "quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode,
    }  # fmt: skip
    assert config["model_type"] == "bitnet" and config["hidden_act"] == "relu2"
    assert config["rope_theta"] == 500_000 and config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True and config["dtype"] == "float32"
    card = (tmp_path / "README.md").read_text()
    assert "some-run" in card and "| git_commit | abc |" in card and "ternary_absmean" in card


def test_a_16_bit_arm_is_float32_numbers_of_a_llama(tmp_path):
    model = trained("bf16", norms="pre", activation="silu")
    written(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama" and "quantization_config" not in config
    found = safetensors.load_file(tmp_path / "model.safetensors")
    assert {a.dtype for a in found.values()} == {np.dtype(np.float32)}
    assert not any("sub_norm" in name or "scale" in name for name in found)


def test_trits_under_16_bit_activations_are_the_numbers_they_stand_for(tmp_path):
    """TriLM's arm, whose scales may be several a matrix."""
    arm = {"activations": "none", "granularity": Granularity("channel")}
    model = trained(norms="pre", activation="silu", arm=arm)
    written(model, tmp_path)
    found = safetensors.load_file(tmp_path / "model.safetensors")
    linear = next(m for m in linears(model) if m.name == "attention/q")
    assert linear.scale.shape == (32, 1)
    np.testing.assert_array_equal(
        found["model.layers.0.self_attn.q_proj.weight"], linear.codes * linear.scale
    )


# The tokenizer


def test_ids_of_bytes_are_the_bytes():
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_document(trained())))
    assert tokenizer.get_vocab_size() == 256
    points = [*range(1, 0x250), 0x2028, 0x4E2D, 0xFFFD, 0x10348, 0x1F600]
    text = "".join(map(chr, points)) + "  two  spaces\r\n\n\tĀĢĠ<|endoftext|>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    own = ByteTokenizer().encode([type("Document", (), {"text": text.encode(), "where": ""})])[0]
    assert ids == own.tolist() == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_byte_has_its_id_and_end_of_text_is_0():
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_document(trained())))
    alphabet = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for byte in range(1, 256):
        # What the library itself makes of a character whose UTF-8 ends in this byte, if any does.
        token = tokenizer.id_to_token(byte)
        assert token is not None and tokenizer.token_to_id(token) == byte
    for character in ("A", "é", "€", "\U0001f600"):
        (pieces, _), *_ = alphabet.pre_tokenize_str(character)
        assert [tokenizer.token_to_id(p) for p in pieces] == list(character.encode())
    assert tokenizer.encode("a\0b").ids == [97, 0, 98]
    assert tokenizer.decode([97, 0, 98], skip_special_tokens=False) == "a\0b"
    assert tokenizer.decode([97, 0, 98], skip_special_tokens=True) == "ab"


def test_a_tokenizer_file_is_copied(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "bpe.json"
    text.write_text("the cat sat on the mat. " * 50)
    train_tokenizer([str(text)], 266, out)
    directory = tmp_path / "model"
    directory.mkdir()
    written(trained(tokenizer=out, vocab_size=266), directory)
    copied = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    own = tokenizers.Tokenizer.from_file(str(out))
    assert copied.encode("the cat").ids == own.encode("the cat").ids
    names = json.loads((directory / "tokenizer_config.json").read_text())
    assert names["eos_token"] == "<|endoftext|>"


# What is refused


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"gated": False}, ["model.gated=False", "no client known here"]),
        ({"norms": "inside"}, ["model.norms='inside'", "pre or sub", "no client"]),
        ({"arm": {"rotate": True}}, ["quantization.rotate=True", "no client"]),
        ({"arm": {"activations": "int4_absmean"}}, ["activations='int4_absmean'", "int8_absmax"]),
        ({"arm": {"granularity": Granularity("channel")}}, ["granularity='channel'", "tensor"]),
        ({"arm": {"weights": "int4_absmax"}}, ["weights='int4_absmax'", "-1, 0 and 1"]),
    ],
)
def test_what_transformers_does_not_compute(tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        hf.write(described(**changes), tmp_path, hf.Layout())
    message = str(caught.value)
    assert "\n" not in message and "transformers" in message
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model,layout,words",
    [
        ({"arm": {"weights": "ternary_twn"}}, hf.Layout("master"), "ternary_twn; take --weights=p"),
        ({}, hf.Layout("master", "divides"), "leave --scale out"),
        ({"precision": "bf16"}, hf.Layout("packed"), "leave --weights out"),
        ({"width": 12, "heads": 6, "kv_heads": 3}, hf.Layout(), "k has 6; take --weights=master"),
    ],
)
def test_layouts_that_cannot_be(model, layout, words):
    with pytest.raises(ConfigError, match=words):
        hf.check(described(**model), layout)


def test_who_can_run_what():
    assert able(described()) == ["transformers", "bitnet.cpp"]
    assert able(described(activation="silu")) == ["transformers", "llama.cpp"]
    assert able(described(tied_embeddings=False)) == ["transformers"]
    assert able(described(activation="silu", norms="pre", tied_embeddings=False)) == [
        "transformers", "llama.cpp",
    ]  # fmt: skip
    assert able(described("bf16")) == ["transformers"]
    assert able(described("binary")) == ["transformers", "bitnet.cpp"]


def test_symbols_are_their_numbers(tmp_path):
    """Of a corpus that is no text: the tokenizer, the ends and the card say so."""
    model = of_symbols()
    written(model, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == model.config.vocab_size == 64
    assert tokenizer.encode("63 0  7\n12").ids == [63, 0, 7, 12]
    assert tokenizer.decode([63, 0, 7]) == "63 0 7"
    for word in ("64", "The", "-1"):
        with pytest.raises(Exception, match="no symbol|UNK"):
            tokenizer.encode(word)
    texts = {name: (tmp_path / name).read_text() for name in ("config.json", "README.md",
             "tokenizer_config.json", "generation_config.json")}  # fmt: skip
    for name in ("config.json", "generation_config.json"):
        ends = json.loads(texts[name])
        assert ends["bos_token_id"] is ends["eos_token_id"] is None
    assert not {"bos_token", "eos_token"} & json.loads(texts["tokenizer_config.json"]).keys()
    assert "symbols of synthetic" in texts["README.md"] and "bytes" not in texts["README.md"]
    assert 'tokenizer("0 1"' in texts["README.md"]
    assert "bytes of UTF-8" in card(trained())


# transformers itself


def client():
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    return pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("norms,activation", [("sub", "relu2"), ("pre", "silu"), ("sub", "gelu")])
def test_transformers_computes_trits(tmp_path, name, norms, activation):
    client()
    model = trained(norms=norms, activation=activation, tied_embeddings=norms == "sub")
    checks = list(hf.verify(model, written(model, tmp_path, LAYOUTS[name]), LAYOUTS[name], rows()))
    assert all(check.holds for check in checks), checks
    exact, quantized = checks[-2:]
    assert exact.found["largest"] < 2e-5 and exact.found["top1"] == 1
    assert quantized.found["largest"] < 2e-5 and quantized.found["flipped"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["sub", "pre"])
def test_transformers_computes_16_bit_arms(tmp_path, norms):
    client()
    model = trained("fp16", norms=norms, activation="silu")
    checks = list(hf.verify(model, written(model, tmp_path), hf.Layout(), rows()))
    assert all(check.holds for check in checks) and checks[-1].found["largest"] < 2e-5
    assert "not quantized" in checks[-1].what


@pytest.mark.slow
def test_transformers_tokenizes_and_continues(tmp_path):
    transformers = client()
    written(trained(), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("Zoë, 你好")["input_ids"] == list("Zoë, 你好".encode())
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.decode(list("Zoë  . 你".encode())) == "Zoë  . 你"
    with pytest.importorskip("torch").compiler.set_stance("force_eager"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        inputs = tokenizer("The", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert ids.shape == (1, 8)
    # Greedy by our own model, which is fed its own tokens.
    own = list(b"The")
    for _ in range(5):
        own.append(int(evaluate(trained(), np.array([own], np.int32))[0, -1].argmax()))
    assert ids[0].tolist() == own


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["code", "scale", "norm", "heads"])
def test_a_file_that_is_not_the_run_is_found(tmp_path, harm):
    client()
    model = trained()
    path = written(model, tmp_path) / "model.safetensors"
    tensors = safetensors.load_file(path)
    query = "model.layers.1.self_attn.q_proj"
    if harm == "code":
        tensors[f"{query}.weight"][0, 0] ^= 1 if tensors[f"{query}.weight"][0, 0] % 4 != 2 else 2
    elif harm == "scale":  # to which no logit is sensitive: a norm follows
        tensors["model.layers.0.self_attn.v_proj.weight_scale"] *= np.float32(1.0001)
    elif harm == "norm":
        tensors["model.norm.weight"][3] += np.float32(1e-6)
    else:
        order = np.arange(8).reshape(2, 2, 2).swapaxes(0, 1).reshape(-1)
        tensors[f"{query}.weight"] = tensors[f"{query}.weight"][order]
    safetensors.save_file(tensors, path, {"format": "pt"})
    found = verdicts(model, tmp_path, hf.Layout())
    key = {"code": "codes", "heads": "codes", "scale": "scales"}.get(harm, "embedding, head, norms")
    assert found[key] is False
    if harm == "heads":
        assert found["logits in transformers, activations not quantized"] is False


def test_without_the_client_the_content_is_compared(tmp_path, monkeypatch):
    model = trained()
    written(model, tmp_path)
    monkeypatch.setattr(hf, "installed", lambda name: name != "accelerate")
    *content, last = hf.verify(model, tmp_path, hf.Layout(), rows())
    assert all(check.holds for check in content) and len(content) == 3
    assert last.holds is None and "accelerate" in last.note and "[export]" in last.note


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    with pytest.raises(ConfigError, match=r"needs the package safetensors: .*bitnet_jax\[export\]"):
        hf.write(trained(), tmp_path, hf.Layout())


def test_online_codes_are_those_of_the_run():
    """transformers' formula against ours, on the masters of a larger matrix."""
    model = trained(width=128, ff_width=384)
    stored = {(m.block, m.name): hf.Matrix(m.master, None) for m in linears(model)}
    check = hf._online_codes(model, hf.Stored({}, stored))
    assert check.holds and check.found["different"] <= 1
    wrong = {key: hf.Matrix(m.numbers + np.float32(1e-3), None) for key, m in stored.items()}
    assert hf._online_codes(model, hf.Stored({}, wrong)).holds is False
