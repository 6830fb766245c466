"""Exports for llama.cpp and bitnet.cpp: blocks of trits, the file, and what llama.cpp computes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from export_models import WIDE, described, of_symbols, rows, trained

from bitnet_jax.data.tokenizers import train_tokenizer
from bitnet_jax.errors import ConfigError
from bitnet_jax.export import blocks, forward, gguf
from bitnet_jax.export.model import linears
from bitnet_jax.export.parts import Matrix, Stored, parts, values
from bitnet_jax.export.verify import evaluate
from bitnet_jax.export.vocabulary import byte_characters
from bitnet_jax.granularity import Granularity
from bitnet_jax.ladder import LADDER

library = pytest.importorskip("gguf")

SILU = {"activation": "silu"}
SIZES = [name for name, shape in LADDER.items() if not (shape.width % 256 or shape.ff_width % 256)]


def written(model, directory, *layout):
    path = directory / "model.gguf"
    gguf.write(model, path, gguf.Layout(*layout))
    return path


def codes_of(rows_, inputs, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, (rows_, inputs)).astype(np.int8)


# Decoders of their own, value by value, as the formats are described.


def tq2_0(block):
    """The 256 values of 66 bytes."""
    scale = float(np.frombuffer(bytes(block[64:66]), "<f2")[0])
    return [
        (int(block[32 * (j // 128) + j % 32]) // 4 ** (j % 128 // 32) % 4 - 1) * scale
        for j in range(256)
    ]


def tq1_0(block):
    """The 256 values of 54 bytes. A byte holds ceil(v 256 / 243): the table has all of them."""
    number_of = {-(-256 * v // 243): v for v in range(243)}
    scale = float(np.frombuffer(bytes(block[52:54]), "<f2")[0])

    def digit(byte, place):
        return number_of[int(block[byte])] // 3 ** (4 - place) % 3

    found = [digit(j % 32, j // 32) for j in range(160)]
    found += [digit(32 + j % 16, j // 16) for j in range(80)]
    found += [digit(48 + j % 4, j // 4) for j in range(16)]
    return [(value - 1) * scale for value in found]


def i2_s(data, count):
    """(the values, the scale) of a matrix."""
    values_ = [
        int(data[32 * (j // 128) + j % 32]) // 4 ** (3 - j % 128 // 32) % 4 - 1
        for j in range(count)
    ]
    return values_, float(np.frombuffer(bytes(data[count // 4 : count // 4 + 4]), "<f4")[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["TQ2_0", "TQ1_0", "I2_S"])
def test_blocks_of_every_shape_of_the_ladder(name, size):
    """Two rows of a matrix with as many inputs as each projection of the size has."""
    for inputs in {LADDER[size].width, LADDER[size].ff_width}:
        codes = codes_of(2, inputs, seed=inputs)
        if name == "I2_S":
            data = blocks.encode_i2_s(codes, 0.37)
            assert len(data) == 2 * inputs // 4 + 32
            found, scale = i2_s(data, codes.size)
            assert scale == np.float32(0.37) and not data[2 * inputs // 4 + 4 :].any()
            again = blocks.decode_i2_s(data, codes.shape)[0]
        else:
            encode, decode, size_, one = {
                "TQ2_0": (blocks.encode_tq2_0, blocks.decode_tq2_0, 66, tq2_0),
                "TQ1_0": (blocks.encode_tq1_0, blocks.decode_tq1_0, 54, tq1_0),
            }[name]
            data = encode(codes)
            assert data.shape == (2, inputs // 256 * size_)
            found = [v for block in data.reshape(-1, size_) for v in one(block)]
            again, scales = decode(data)
            assert (scales == 1).all()
        np.testing.assert_array_equal(np.reshape(found, codes.shape), codes)
        np.testing.assert_array_equal(again, codes)


@pytest.mark.parametrize("name", ["TQ2_0", "TQ1_0"])
def test_blocks_are_the_librarys(name):
    """Byte for byte, where no block is all zeros, whose scale the library makes 0."""
    quants, kind = pytest.importorskip("gguf.quants"), library.GGMLQuantizationType[name]
    codes = codes_of(7, 512)
    data = getattr(blocks, f"encode_{name.lower()}")(codes)
    np.testing.assert_array_equal(data, quants.quantize(codes.astype(np.float32), kind))
    np.testing.assert_array_equal(quants.dequantize(data, kind), codes)


def test_every_five_trits_come_back_from_a_byte():
    codes = np.array(np.meshgrid(*[[-1, 0, 1]] * 5)).reshape(5, -1).astype(np.int8)
    block = np.zeros((243, 256), np.int8)
    block[:, 0:160:32] = codes.T
    found = blocks.decode_tq1_0(blocks.encode_tq1_0(block))[0]
    np.testing.assert_array_equal(found, block)
    assert len({*blocks.encode_tq1_0(block)[:, 0]}) == 243


# The file


@pytest.mark.parametrize("name", ["TQ2_0", "TQ1_0", "F16", "F32"])
def test_trits_and_their_scales_are_kept_apart(tmp_path, name):
    model = trained(**WIDE, **SILU)
    path = written(model, tmp_path, name)
    reader = library.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == 2 + 2 * (4 + 2 * 7) and "output.weight" not in found
    dequantize = pytest.importorskip("gguf.quants").dequantize
    names = {"attention/k": "attn_k", "attention/out": "attn_output", "mlp/gate": "ffn_gate"}
    for linear in (m for m in linears(model) if m.name in names):
        tensor = found[f"blk.{linear.block}.{names[linear.name]}.weight"]
        assert tensor.tensor_type.name == name
        numbers = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(numbers.reshape(linear.codes.shape), linear.codes)
        scale = found[f"blk.{linear.block}.{names[linear.name]}.scale"].data
        assert scale.dtype == np.float32 and scale.shape == (1,)
        np.testing.assert_array_equal(scale, linear.scale.reshape(1))
    np.testing.assert_array_equal(found["token_embd.weight"].data, model.params["embedding"])


def test_the_header(tmp_path):
    model = trained(**WIDE, **SILU)
    fields = library.GGUFReader(written(model, tmp_path)).fields
    found = {key: field.contents() for key, field in fields.items()}
    expected = {
        "general.architecture": "bitnet", "general.file_type": 37, "general.name": "some-run",
        "bitnet.context_length": 64, "bitnet.embedding_length": 256, "bitnet.block_count": 2,
        "bitnet.feed_forward_length": 512, "bitnet.attention.head_count": 4,
        "bitnet.attention.head_count_kv": 2, "bitnet.rope.freq_base": 500_000,
        "bitnet.vocab_size": 256, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False, "bitnet_jax.git_commit": "abc",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["bitnet.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens = found["tokenizer.ggml.tokens"]
    assert tokens == ["<|endoftext|>", *byte_characters()[1:]]
    assert found["tokenizer.ggml.token_type"] == [3] + [1] * 255


def test_i2_s_bakes_the_scale_in(tmp_path):
    model = trained(**WIDE)
    found = gguf._tensors(written(model, tmp_path, "I2_S"))
    assert not any(name.endswith(".scale") for name in found)
    linear = next(m for m in linears(model) if m.name == "mlp/down" and m.block == 1)
    number, shape, data = found["blk.1.ffn_down.weight"]
    assert (number, shape) == (36, (256, 512))
    numbers, scale = i2_s(data, linear.codes.size)
    np.testing.assert_array_equal(np.reshape(numbers, shape), linear.codes)
    assert scale == linear.scale.item()


def test_llama_cpp_rotates_neighbouring_pairs_of_a_llama(tmp_path):
    """Row 2i of a head is our row i, and row 2i + 1 is our row i + H/2, of q and k alone."""
    model = trained("fp16", norms="pre", **SILU, tied_embeddings=False)
    found = {t.name: t.data for t in library.GGUFReader(written(model, tmp_path, "F32")).tensors}
    kernels = {name: model.params["blocks"]["attention"][name]["kernel"] for name in "qkv"}
    for name in "qk":
        own, stored = np.asarray(kernels[name][1]).T, found[f"blk.1.attn_{name}.weight"]
        for head in range(own.shape[0] // 8):
            for i in range(4):
                np.testing.assert_array_equal(stored[8 * head + 2 * i], own[8 * head + i])
                np.testing.assert_array_equal(stored[8 * head + 2 * i + 1], own[8 * head + 4 + i])
    np.testing.assert_array_equal(found["blk.1.attn_v.weight"], np.asarray(kernels["v"][1]).T)
    np.testing.assert_array_equal(found["output.weight"], model.params["head"])


@pytest.mark.parametrize("embedding", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("name", list(gguf.TYPES))
def test_what_is_read_back_is_the_run(tmp_path, monkeypatch, name, embedding):
    monkeypatch.setattr(gguf, "installed", lambda name: False)
    model = trained(**WIDE, **({} if name == "I2_S" else SILU))
    path = written(model, tmp_path, name, embedding)
    *content, logits = gguf.verify(model, path, gguf.Layout(name, embedding), rows())
    assert [check.what for check in content] == ["codes", "scales", "embedding, head, norms"]
    assert all(check.holds for check in content) and logits.holds is None
    assert (content[2].found["largest"] == 0) == (embedding == "F32")


@pytest.mark.parametrize("harm", ["code", "scale", "missing scale", "embedding", "nan"])
def test_a_file_that_is_not_the_run_is_found(tmp_path, monkeypatch, harm):
    monkeypatch.setattr(gguf, "installed", lambda name: False)
    model = trained(**WIDE, **SILU)
    stored = gguf.read(model, written(model, tmp_path, "TQ1_0"))
    key = 1, "attention/v"
    numbers, scale = stored.matrices[key]
    if harm == "code":
        numbers[3, 200] = (numbers[3, 200] + 2) % 3 - 1
    elif harm == "embedding":
        stored.parts[None, "embedding"][1, 1] += 1e-6
    else:
        wrong = {"scale": scale * (1 + 1e-6), "missing scale": 1.0, "nan": np.nan}[harm]
        stored.matrices[key] = Matrix(numbers, wrong)
    monkeypatch.setattr(gguf, "read", lambda *arguments: stored)
    found = {c.what: c.holds for c in gguf.verify(model, tmp_path, gguf.Layout("TQ1_0"), rows())}
    expected = {"code": "codes", "embedding": "embedding, head, norms"}.get(harm, "scales")
    assert [what for what, holds in found.items() if holds is False] == [expected]


# What is refused


@pytest.mark.parametrize(
    "model,layout,words",
    [
        ({}, ["TQ2_0"], "model.activation='relu2': llama.cpp .*silu.*bitnet.cpp .--format=gguf -"),
        ({**WIDE, **SILU}, ["I2_S"], "'silu': bitnet.cpp has relu2.*llama.cpp .--format=gguf"),
        ({**SILU, "tied_embeddings": False}, ["F16"], "tied_embeddings=False.*transformers .--"),
        ({**WIDE, "norms": "pre"}, ["I2_S"], "model.norms='pre': bitnet.cpp .*model.norms=sub"),
        ({**WIDE, "precision": "bf16"}, ["I2_S"], "activations='none': bitnet.cpp .*int8_absmax"),
        ({**SILU, "precision": "bf16"}, ["TQ2_0"], "TQ2_0.*weights none.*take --type=F16"),
        (SILU, ["TQ2_0"], "model.width=32: .*multiple of 256, the next is 256; --type=F16"),
        ({**WIDE, **SILU, "ff_width": 640}, ["TQ1_0"], "ff_width=640: .*the next is 768"),
        ({"width": 192, "ff_width": 512}, ["I2_S"], "width=192: .*the next is 256; --format=hf"),
        ({**SILU, "width": 48}, ["F16", "Q8_0"], "width=48: .*take --embedding=F16"),
        (
            {**SILU, "arm": {"granularity": Granularity("channel")}},
            ["F16"],
            "granularity='channel': llama.cpp has one scale a matrix",
        ),
    ],
)
def test_refusals(tmp_path, model, layout, words):
    with pytest.raises(ConfigError, match=words) as caught:
        written(described(**model), tmp_path, *layout)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_which_sizes_hold_trits():
    """From 7m up all of them; below none: the ladder's small widths are no multiples of 128."""
    assert list(LADDER)[list(LADDER).index("7m") :] == SIZES
    small = [shape for name, shape in LADDER.items() if name not in SIZES]
    assert all(shape.width % 128 or shape.ff_width % 128 for shape in small)


# Vocabularies


def test_a_tokenizer_file(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "bpe.json"
    text.write_text("the cat sat on the mat. " * 50)
    train_tokenizer([str(text)], 262, out)
    model = trained("bf16", norms="pre", **SILU, tokenizer=out, vocab_size=264)
    fields = library.GGUFReader(written(model, tmp_path, "F32")).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 264 and tokens[0] == "<|endoftext|>" and tokens[262] == "<unused262>"
    assert fields["tokenizer.ggml.token_type"].contents() == [3] + [1] * 261 + [5] * 2
    assert len(fields["tokenizer.ggml.merges"].contents()) == 5


def test_a_tokenizer_that_a_file_cannot_describe(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    out = tmp_path / "words.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0})).save(str(out))
    with pytest.raises(ConfigError, match="byte-level BPEs.*--format=hf"):
        written(trained(**SILU, tokenizer=out), tmp_path, "F32")


# The model once more, with the rounding of inputs that llama.cpp does


def own(model):
    """What a file would hold."""
    matrices = {(m.block, m.name): Matrix(values(m), None) for m in linears(model)}
    return Stored({(p.block, p.name): p.values for p in parts(model)}, matrices)


@pytest.mark.parametrize("norms,activation", [("sub", "relu2"), ("pre", "silu")])
def test_the_forward_pass_is_the_models(norms, activation):
    model = trained(norms=norms, activation=activation, tied_embeddings=norms == "sub")
    tokens = rows(3, 9)
    found = forward.forward(model, own(model), tokens)
    np.testing.assert_allclose(found, evaluate(model, tokens, quantized=False), atol=2e-5)
    assert found.dtype == np.float32


def test_inputs_by_blocks_are_a_tokens_where_a_block_is_a_row():
    """At width 256 llama.cpp's blocks are what the arm was trained with."""
    model = trained(**{**WIDE, "ff_width": 256})
    tokens = rows(64, 3)
    found = forward.forward(model, own(model), tokens, forward.int8_by_256)
    apart = np.abs(found - evaluate(model, tokens)).max(-1)
    assert np.median(apart) < 1e-5 and (apart > 1e-3).mean() < 0.1


@pytest.mark.parametrize("size,rounded", [(256, "int8_by_256"), (32, "int8_by_32")])
def test_rounding_of_inputs(size, rounded):
    x = np.random.default_rng(0).normal(size=(2, 512)).astype(np.float32)
    x[0, :size] = 0
    found = getattr(forward, rounded)(x)
    assert not found[0, :size].any()
    for start in range(size, 512, size):
        block = x[0, start : start + size]
        step = np.abs(block).max() / 127
        error = np.abs(found[0, start : start + size] - block)
        assert error.max() <= step * (0.5 + 127 * 2**-11 * (size == 32)) * 1.0001
    assert len(np.unique(np.round(found[1, :size] / np.abs(found[1, :size]).max() * 127, 3))) < 256


def test_symbols_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'synthetic'.*no text.*--format=hf or --format=packed"):
        gguf.write(of_symbols(**SILU), tmp_path / "model.gguf", gguf.Layout("F32"))
    assert not list(tmp_path.iterdir())


# llama.cpp itself


def engine(path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python builds for minutes")
    llama_cpp.llama_log_set(gguf._silence(), None)
    return llama_cpp.Llama(str(path), n_ctx=64, verbose=False)


@pytest.mark.slow
def test_llama_cpp_tokenizes_bytes(tmp_path):
    llama = engine(written(trained(**SILU), tmp_path, "F32"))
    for text in ("Zoë, 你好\n\n  two  spaces 123", "".join(map(chr, range(1, 0x250)))):
        assert llama.tokenize(text.encode(), add_bos=True) == list(text.encode())
    assert llama.detokenize(list("Zoë 你".encode())) == "Zoë 你".encode()
    assert llama.token_eos() == llama.token_bos() == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["ternary", "fp16"])
@pytest.mark.parametrize("norms", ["sub", "pre"])
def test_llama_cpp_computes_the_run(tmp_path, norms, precision):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python builds for minutes")
    model = trained(precision, norms=norms, tied_embeddings=norms == "sub", **SILU)
    path = written(model, tmp_path, "F32")
    check = list(gguf.verify(model, path, gguf.Layout("F32"), rows()))[-1]
    assert check.holds and check.found["largest"] < 2e-5 and check.found["top1"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [("TQ2_0", "F32"), ("TQ1_0", "F32"), ("TQ2_0", "Q8_0"), ("F16", "F16")]
)
@pytest.mark.parametrize("norms", ["sub", "pre"])
def test_llama_cpp_rounds_inputs_as_we_know(tmp_path, norms, layout):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python builds for minutes")
    model = trained(**WIDE, **SILU, norms=norms)
    path = written(model, tmp_path, *layout)
    check = list(gguf.verify(model, path, gguf.Layout(*layout), rows()))[-1]
    assert check.holds, check
    # And not as the arm was trained: the check can tell the two apart.
    trained_with = evaluate(model, rows()[:, :3])
    found = gguf.logits(path, rows()[:, :3])
    assert np.median(np.abs(found - trained_with).max(-1)) > check.allowed["median"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "norms,precision", [("sub", "ternary"), ("pre", "ternary"), ("pre", "fp16")]
)
def test_a_prebuilt_llama_cpp_computes_the_run(tmp_path, norms, precision):
    """Through a server's answers: the probability of every token, and greedy text."""
    xllamacpp = pytest.importorskip("xllamacpp")
    model = trained(precision, **SILU, norms=norms)
    params = xllamacpp.CommonParams()
    params.model.path = str(written(model, tmp_path, "F32"))
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 64, 1, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity, params.warmup = 0, False
    server = xllamacpp.Server(params)
    compared = 0
    for length in range(3, 16):
        tokens = list(b"The cats and dogs")[:length]
        logits = evaluate(model, np.array([tokens], np.int32), quantized=False)[0, -1]
        if not 0 < logits.argmax() < 128:  # a server is silent of end of text and half a character
            continue
        asked = {"prompt": tokens, "n_predict": 1, "temperature": 0, "n_probs": 256}
        answer = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]
        found = {entry["id"]: entry["logprob"] for entry in answer["top_logprobs"]}
        expected = logits - np.log(np.exp(logits).sum())
        assert len(found) == 256 and answer["id"] == logits.argmax()
        np.testing.assert_allclose([found[i] for i in range(256)], expected, atol=2e-5)
        compared += 1
    assert compared > 2


def test_evaluation_is_in_float32():
    model = trained()
    tokens = rows(2, 8)
    arm = dataclasses.replace(model.precision, compute_dtype=jnp.float32)
    same = dataclasses.replace(model, precision=arm)
    np.testing.assert_array_equal(evaluate(model, tokens), evaluate(same, tokens))
