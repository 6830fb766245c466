"""A packed model's file: what it holds, that it computes what the run computes, and refusals."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest
from run_files import flipped

from bitnet_jax import cost
from bitnet_jax.deployed import deploy, deployed_logits
from bitnet_jax.errors import ConfigError
from bitnet_jax.export import packed
from bitnet_jax.export.model import TrainedModel, linears
from bitnet_jax.export.tensors import read_tensors, write_tensors
from bitnet_jax.files import sealed
from bitnet_jax.granularity import Granularity
from bitnet_jax.ladder import LADDER
from bitnet_jax.model import TransformerConfig, apply_model, init_params, linear_layers
from bitnet_jax.packing import BASE_3, packed_size
from bitnet_jax.precision import get_precision

CONFIG = TransformerConfig(vocab_size=11, layers=2, width=16, ff_width=12, heads=4, kv_heads=2)
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 10), np.int32)

ARMS = {
    "ternary": get_precision("ternary"),
    "binary": get_precision("binary"),
    "int2": get_precision("ternary", weights="int2_absmax"),
    "learned": get_precision("ternary", weights="ternary_lsq"),
    "floats": get_precision("ternary", activations="none"),
    "rotated": get_precision("ternary", rotate=True),
    "16-bit base": get_precision("fp16", weights="ternary_absmean"),
    "channel": get_precision("ternary", granularity=Granularity("channel")),
    "group": get_precision("ternary", granularity=Granularity("group", 4)),
    "shard": get_precision("binary", granularity=Granularity("shard", 2)),
}


@functools.cache
def trained(arm="ternary", **changes):
    """Other values than a run begins with, so that norms and scales are not all ones."""
    config = dataclasses.replace(CONFIG, **changes)
    params = init_params(config, ARMS.get(arm) or get_precision(arm), jax.random.key(0))
    noise = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: np.asarray(x + noise.normal(0, 0.05, x.shape).astype(np.float32)), params
    )
    precision = ARMS.get(arm) or get_precision(arm)
    return TrainedModel(config, precision, params, 16, None, 0, {"run_id": "r", "tokens": "1"})


def written(path, arm="ternary", model=None, **how):
    file = path / "model.packed"
    packed.write(model or trained(arm), file, **how)
    return file


@pytest.fixture
def file(tmp_path):
    return written(tmp_path)


# What is in it


@pytest.mark.parametrize("arm,packing", [*((arm, None) for arm in ARMS), ("ternary", "2bit")])
def test_it_computes_what_the_run_computes(tmp_path, arm, packing):
    model = trained(arm)
    file = written(tmp_path, arm, packing=packing)
    found = packed.read(file)
    run = deployed_logits(
        model.config, model.precision, deploy(model.params, model.precision), TOKENS
    )
    again = deployed_logits(found.config, found.precision, found.model, TOKENS)
    np.testing.assert_array_equal(run, again)
    facts = packed.verify(model, file)
    assert facts["exact"] and facts["logit_difference"] == 0
    assert facts["weights"] == cost.count_parameters(model.config).quantized
    for linear in linears(model):
        group, name = linear.name.split("/")
        kernel = found.model.codes["blocks"][group][name]["kernel"]
        codes, scale = kernel.codes[linear.block], kernel.scale[linear.block]
        np.testing.assert_array_equal(codes.reshape(-1, codes.shape[2]).T, linear.codes)
        values = (codes.astype(np.float32) * scale).reshape(-1, codes.shape[2]).T
        np.testing.assert_array_equal(values, linear.codes * linear.scale)


@pytest.mark.parametrize("changes", [
    {"norms": "inside"}, {"norms": "pre", "gated": False, "activation": "silu"},
    {"tied_embeddings": False, "rope_theta": 1e4, "norm_epsilon": 1e-6},
])  # fmt: skip
def test_every_shape_of_a_model(tmp_path, changes):
    """And the logits of the training forward, whose one scale a tensor is made alike everywhere."""
    model = trained("ternary", **changes)
    found = packed.read(written(tmp_path, model=model))
    run = jax.jit(functools.partial(apply_model, model.config, model.precision))
    again = deployed_logits(found.config, found.precision, found.model, TOKENS)
    np.testing.assert_array_equal(run(model.params, TOKENS), again)
    assert found.config == model.config


def test_the_words_come_back(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    model = dataclasses.replace(trained(), tokenizer=tokenizer, end_of_text=7)
    found = packed.read(written(tmp_path, model=model))
    assert found.precision == model.precision and found.provenance == model.provenance
    assert (found.context_length, found.end_of_text, found.packing) == (16, 7, "base3")
    assert found.tokenizer == {
        "name": "tokenizer.json",
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    assert packed.read(written(tmp_path)).tokenizer == {"name": "bytes", "sha256": None}


def test_sizes_by_hand(tmp_path):
    """Each projection's blocks laid end to end: 2 * 16 * 16 trits are 103 bytes, and so on."""
    file = tmp_path / "m"
    sizes = packed.write(trained(), file)
    kernels = [2 * n * p for n, p in cost.linear_shapes(CONFIG).values()]
    assert sizes.weights == sum(kernels) and sizes.codes == sum(-(-n // 5) for n in kernels)
    assert sizes.scales == 4 * 2 * 7 and sizes.file == file.stat().st_size
    assert sizes.floats == 4 * (11 * 16 + 2 * (16 + 16 + 16 + 12) + 16)
    assert sizes == packed.read(file).sizes
    codes = np.concatenate([x.codes.reshape(-1) for x in linears(trained())])
    shares = np.array([np.mean(codes == code) for code in (-1, 0, 1)])
    assert sizes.entropy == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-9)
    assert sizes.entropy_coded == np.ceil(sizes.entropy * sizes.weights / 8)
    assert packed.write(trained(), file, "2bit").codes == sum(-(-n // 4) for n in kernels)


@pytest.mark.parametrize("size", ["7m", "60m", "1.2b", "70b"])
@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_bits_a_weight_of_the_ladder(size, kind):
    """At most 1.61 with the scales, where a scale is shared by 4,096 or more weights."""
    model = TransformerConfig(256, **LADDER[size]._asdict())
    shapes = cost.linear_shapes(model).values()
    codes = sum(packed_size(model.layers * n * p, BASE_3) for n, p in shapes)
    scales = sum(4 * model.layers * (1 if kind == "tensor" else p) for _, p in shapes)
    bits = 8 * (codes + scales) / cost.count_parameters(model).quantized
    assert 1.6 <= bits <= (1.61 if kind == "tensor" or size == "70b" else 1.8)


def test_other_readers_read_it(file):
    """The format is safetensors: its own library, where it is, finds the same arrays."""
    numpy = pytest.importorskip("safetensors.numpy")
    arrays, _ = read_tensors(file)
    theirs = numpy.load_file(file)
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array)


def test_a_header_by_hand(tmp_path):
    """The format's own description: length, JSON, arrays in the order of their offsets."""
    path = tmp_path / "f"
    write_tensors(path, {"b": np.uint8([7]), "a": np.float32([[1, 2]])}, {"k": "v"})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length]) == {
        "__metadata__": {"k": "v"},
        "a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [8, 9]},
    }
    assert content[8 + length :] == np.float32([1, 2]).tobytes() + b"\x07"
    assert (8 + length) % 64 == 0


@pytest.mark.parametrize("floats", ["bfloat16", "float16"])
def test_16_bit_floats_are_said_to_be_rounded(tmp_path, floats):
    """Trits and scales are still the run's; the logits are near."""
    file = written(tmp_path, floats=floats)
    facts = packed.verify(trained(), file)
    assert not facts["exact"] and 0 < facts["logit_difference"] < 0.5
    assert packed.read(file).floats == floats
    exact, small = packed.read(written(tmp_path)).sizes, packed.read(file).sizes
    assert exact.floats == 2 * packed.read(written(tmp_path, floats=floats)).sizes.floats
    assert small.scales == exact.scales


# What verify sees


def with_kernel(model, change):
    """The model with one kernel's values changed."""
    name, layer = next(iter(linear_layers(model.params).items()))
    kernel = layer["kernel"].copy()
    change(kernel)
    group, projection = name.split("/")
    blocks = model.params["blocks"]
    own = {**blocks[group][projection], "kernel": kernel}
    blocks = {**blocks, group: {**blocks[group], projection: own}}
    return dataclasses.replace(model, params={**model.params, "blocks": blocks})


def one_sign(kernel):
    kernel[0, 0, 0] = -kernel[0, 0, 0] if abs(kernel[0, 0, 0]) > 0.2 else 9


def one_embedding(model):
    embedding = np.ones((11, 16), np.float32)
    return dataclasses.replace(model, params={**model.params, "embedding": embedding})


def one_scale(kernel):
    kernel *= np.float32(1.0001)


@pytest.mark.parametrize(
    "other,what",
    [
        (lambda m: with_kernel(m, one_sign), "codes of blocks.attention"),
        (lambda m: with_kernel(m, one_scale), "scales of blocks.attention"),
        (one_embedding, "embedding"),
        (lambda m: dataclasses.replace(m, config=dataclasses.replace(CONFIG, rope_theta=9.0)),
         "logits"),
    ],
)  # fmt: skip
def test_verify_says_what_is_not_the_model(file, other, what):
    with pytest.raises(ConfigError, match=f"the {what}.* not those of the run"):
        packed.verify(other(trained()), file)


# Refusals


@pytest.mark.parametrize(
    "arm,how,message",
    [
        ("fp16", {}, "precision='fp16': .*not quantized.*--format=hf and --format=gguf"),
        ("fp32", {"packing": "base3"}, "precision='fp32': .*--format=hf"),
        ("int2", {"packing": "base3"}, "packing='base3': 4 levels; choose 2bit"),
        ("ternary", {"packing": "zip"}, "packing='zip' is unknown; choose from 2bit, base3"),
        ("ternary", {"floats": "float8"}, "floats='float8' is unknown; choose from float32"),
    ],
)  # fmt: skip
def test_what_is_not_written(tmp_path, arm, how, message):
    with pytest.raises(ConfigError, match=message):
        written(tmp_path, arm, **how)
    assert not list(tmp_path.iterdir())


def test_more_levels_than_fit(tmp_path):
    model = dataclasses.replace(
        trained(), precision=get_precision("ternary", weights="int4_absmax")
    )
    with pytest.raises(
        ConfigError, match="int4_absmax': its weights have 16 levels; 2 bits hold 4"
    ):
        written(tmp_path, model=model)


def test_a_diverged_run_is_not_written(tmp_path):
    model = with_kernel(trained(), lambda kernel: kernel.fill(np.nan))
    with pytest.raises(ConfigError, match="a scale is not finite"):
        written(tmp_path, model=model)


def test_a_path_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="cannot write there"):
        packed.write(trained(), tmp_path / "missing" / "m")


def refused(path):
    with pytest.raises(ConfigError) as caught:
        packed.read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 700
    return message


def test_missing_and_foreign_files(tmp_path):
    assert "cannot be read" in refused(tmp_path / "none")
    assert "cannot be read" in refused(tmp_path)
    for content in (b"", b"1234567", b"PK\3\4" + bytes(100), b"\xff" * 100, bytes(1000)):
        (tmp_path / "f").write_bytes(content)
        assert "no safetensors file" in refused(tmp_path / "f")
    write_tensors(tmp_path / "g", {"a": np.zeros(3, np.float32)}, {})
    assert "not a packed model" in refused(tmp_path / "g")


def test_every_bit_of_the_file_counts(file):
    """200 of them, one after another, anywhere: each is met. So is each length that is not all."""
    content = file.read_bytes()
    random = np.random.default_rng(3)
    for bit in random.integers(0, 8 * len(content), 200):
        flipped(file, int(bit))
        refused(file)
        file.write_bytes(content)
    for length in random.integers(0, len(content), 30):
        file.write_bytes(content[:length])
        refused(file)
    file.write_bytes(content + b"\0")
    refused(file)


def changed(file, change):
    """The file with its document changed and sealed again, as one would who means harm."""
    tensors, metadata = read_tensors(file)
    tensors = {name: np.array(array) for name, array in tensors.items()}
    document = json.loads(metadata[packed.ENTRY])
    change(document, tensors)
    document["arrays"] = {name: packed._digest(array) for name, array in tensors.items()}
    write_tensors(file, tensors, {packed.ENTRY: json.dumps(sealed(document))})


def setting(*keys, to):
    def change(document, tensors):
        place = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return change


def a_code(value):
    def change(document, tensors):
        tensors["blocks.mlp.up.codes"][3] = value

    return change


@pytest.mark.parametrize(
    "change,message",
    [
        (a_code(243), "blocks.mlp.up: byte 3 is 243; 5 codes of 3 levels give at most 242"),
        (setting("version", to=2), "version=2: this code reads packed models up to version 1"),
        (setting("version", to="new"), "version 'new'"),
        (setting("config", "layers", to=10**9), "layers=1000000000: from 1 to"),
        (setting("config", "vocab_size", to=2**24), "embedding"),
        (setting("config", "width", to=2**24), "no model has this shape"),
        (setting("config", "width", to=-16), "width=-16"),
        (setting("config", "width", to=True), "width=True"),
        (setting("config", "heads", to=5), "heads=5: they do not divide"),
        (setting("config", "kv_heads", to=3), "kv_heads=3"),
        (setting("config", "activation", to="__import__('os')"), "activation=.* is unknown"),
        (setting("config", "rope_theta", to=0.0), "rope_theta=0.0"),
        (setting("precision", "weights", to="none"), "precision.weights='none'"),
        (setting("precision", "weights", to=["x"]), "unhashable"),
        (setting("precision", "weights", to="int2_absmax"), "4 levels"),
        (setting("precision", "compute_dtype", to="object"), "precision.compute_dtype='object'"),
        (setting("precision", "granularity", to={"kind": "group", "size": 5}), "no model has this"),
        (setting("precision", "granularity", to={"kind": "channel", "size": 1}), "scale"),
        (setting("packing", to="2bit"), "codes take"),
        (setting("floats", to="float16"), "float16"),
        (setting("tokenizer", to=[]), "not a packed model"),
        (setting("provenance", to={"a": 1}), "provenance"),
        (setting("context_length", to=-1), "context_length=-1"),
        (setting("shapes", "blocks.mlp.up", to=[1]), "another shape"),
        (lambda d, t: t.pop("embedding"), "embedding.*missing"),
        (lambda d, t: t.update(more=np.zeros(1, np.float32)), "more.*too many"),
        (lambda d, t: d.pop("config"), "config"),
        (lambda d, t: t["blocks.mlp.up.scale"].fill(np.inf), "it must be finite"),
    ],
)  # fmt: skip
def test_documents_that_are_sealed_and_wrong(file, change, message):
    changed(file, change)
    assert re.search(message, refused(file))


def header(path, entries, size):
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry(offsets=(0, 8))},  # more than its shape
        {"a": entry(shape=(2**61,), offsets=(0, 2**63))},
        {"a": entry(shape=(-1,), offsets=(4, 0))},
        {"a": entry(offsets=(4, 8))},  # a hole
        {"a": entry(), "b": entry()},  # shared
        {"a": entry(dtype="O")},
        {"a": entry(dtype=["F32"])},
        {"a": entry(shape=(1.0,))},
        {"a": entry(shape=(1,) * 40)},
        {"a": []},
        {"a": {}},
        {"__metadata__": [], "a": entry()},
        {"__metadata__": {"k": 1}, "a": entry()},
        [],
        {},  # four bytes that are nobody's
    ],
)
def test_headers_that_lie(tmp_path, entries):
    header(tmp_path / "f", entries, 4)
    assert "its header says" in refused(tmp_path / "f")


def test_a_deep_header_and_a_key_twice(tmp_path):
    for text in (b"[" * 10**5, b'{"a": 1, "a": 2}', b"{" + b" " * 100):
        (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text)
        assert "its header says" in refused(tmp_path / "f")
