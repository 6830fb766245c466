"""A GGUF file for llama.cpp or bitnet.cpp.

llama.cpp multiplies a product by an optional tensor `.scale`, so that trits stay -1, 0 and 1 in
every type and their scale stays float32. bitnet.cpp refuses such tensors: there the scale is in the
matrix. Norms are float32.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from bitnet_jax.errors import ConfigError
from bitnet_jax.export import blocks
from bitnet_jax.export.clients import (
    BITNET_CPP,
    LLAMA_CPP,
    family,
    keeps_codes,
    require_multiples,
)
from bitnet_jax.export.forward import (
    as_float16,
    forward,
    int8_by_32,
    int8_by_256,
    unchanged,
)
from bitnet_jax.export.model import Linear, TrainedModel, linears
from bitnet_jax.export.packages import installed, package
from bitnet_jax.export.parts import Matrix, Stored, parts, values
from bitnet_jax.export.verify import (
    Check,
    content,
    evaluate,
    exact_logits,
    long_rows,
    median_logits,
    short_rows,
)
from bitnet_jax.export.vocabulary import Vocabulary, vocabulary


class Type(NamedTuple):
    """What projections are stored in.

    number: of the type in a tensor's header. file_type: in the file's. multiple: of inputs that a
    row must have.
    """

    number: int
    file_type: int
    client: str
    multiple: int = 1

    @property
    def trits_only(self) -> bool:
        return self.multiple > 1


TYPES = {
    "TQ2_0": Type(35, 37, LLAMA_CPP, blocks.TQ_BLOCK),
    "TQ1_0": Type(34, 36, LLAMA_CPP, blocks.TQ_BLOCK),
    "F16": Type(1, 1, LLAMA_CPP),
    "F32": Type(0, 0, LLAMA_CPP),
    "I2_S": Type(36, 40, BITNET_CPP, blocks.I2_S_BLOCK),
}
EMBEDDINGS = {"F32": 0, "F16": 1, "Q8_0": 8}
OPTIONS = {"type": tuple(TYPES), "embedding": tuple(EMBEDDINGS)}
Q8_0_BLOCK = 32
# What half of the positions differ by at most, in deviations of the logits: where few inputs are
# rounded to another number than here, and where hardly a position has none that is.
MEDIAN, FLIPPING = 1e-5, 0.02
# What llama.cpp makes of the inputs of a matrix of a type.
_INPUTS = {
    "F32": unchanged,
    "F16": as_float16,
    "Q8_0": int8_by_32,
    "TQ1_0": int8_by_256,
    "TQ2_0": int8_by_256,
}

_NAMES = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attention/sub_norm": "attn_sub_norm",
    "mlp/sub_norm": "ffn_sub_norm",
    "attention/q": "attn_q",
    "attention/k": "attn_k",
    "attention/v": "attn_v",
    "attention/out": "attn_output",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
}
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # kinds of tokens


class Layout(NamedTuple):
    """type: of the projections, in `TYPES`. embedding: of embedding and head, in `EMBEDDINGS`."""

    type: str = "TQ2_0"
    embedding: str = "F32"


def check(model: TrainedModel, layout: Layout) -> None:
    """Refuse what the type's client would not compute, or the type cannot hold.

    Raises:
      ConfigError: says what can.
    """
    kind = TYPES[layout.type]
    family(model, kind.client)
    if kind.trits_only and not keeps_codes(model):
        raise ConfigError(
            f"type={layout.type!r}: it holds trits with one scale a matrix, and this run has "
            f"weights {model.precision.weights}, scales by {model.precision.granularity.kind}; "
            "take --type=F16"
        )
    if kind.trits_only:
        instead = "--format=hf" if kind.client == BITNET_CPP else "--type=F16"
        what = f"type {layout.type}"
        require_multiples(model.config, what, kind.multiple, f"{instead} holds it as it is")
    if layout.embedding == "Q8_0" and model.config.width % Q8_0_BLOCK:
        raise ConfigError(
            f"model.width={model.config.width}: an embedding in Q8_0 needs a multiple of "
            f"{Q8_0_BLOCK}; take --embedding=F16"
        )


def write(model: TrainedModel, path: Path, layout: Layout) -> None:
    """Write one file.

    Raises:
      ConfigError: what `check` refuses, a tokenizer that the file cannot describe, or a package is
        missing.
    """
    check(model, layout)
    kind = TYPES[layout.type]
    words = vocabulary(model)
    architecture = family(model, kind.client).architecture
    writer = package("gguf").GGUFWriter(path, architecture)
    _add_shape(writer, model, kind)
    _add_vocabulary(writer, model, words)
    for key, value in model.provenance.items():
        writer.add_string(f"bitnet_jax.{key}", value)
    for part in parts(model):
        _add_part(writer, part.name, part.block, part.values, layout)
    for linear in linears(model):
        _add_linear(writer, model, linear, layout.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, model: TrainedModel, kind: Type) -> None:
    c = model.config
    writer.add_name(model.provenance.get("run_id", "model"))
    writer.add_file_type(kind.file_type)
    writer.add_quantization_version(2)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ff_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_epsilon)
    writer.add_rope_freq_base(c.rope_theta)  # left out, it would be 10,000
    writer.add_rope_dimension_count(c.head_size)
    writer.add_vocab_size(c.vocab_size)


def _add_vocabulary(writer: Any, model: TrainedModel, words: Vocabulary) -> None:
    kinds = [_NORMAL] * len(words.tokens)
    for ids, kind in ((words.unused, _UNUSED), (words.special, _CONTROL)):
        for token in ids:
            kinds[token] = kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words.tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(words.merges)
    writer.add_bos_token_id(model.end_of_text)
    writer.add_eos_token_id(model.end_of_text)
    writer.add_add_bos_token(False)


def _add_part(writer: Any, name: str, block: int | None, array: np.ndarray, layout: Layout) -> None:
    tensor = f"{_name(name, block)}.weight"
    if name not in ("embedding", "head") or layout.embedding == "F32":
        writer.add_tensor(tensor, np.ascontiguousarray(array, np.float32))
    elif layout.embedding == "F16":
        writer.add_tensor(tensor, array.astype(np.float16))
    else:
        kind = package("gguf").GGMLQuantizationType.Q8_0
        data = package("gguf.quants").quantize(array, kind)
        writer.add_tensor(tensor, data, raw_dtype=kind)


def _add_linear(writer: Any, model: TrainedModel, linear: Linear, name: str) -> None:
    tensor, rows = _name(linear.name, linear.block), _row_order(model, linear.name)
    if not keeps_codes(model):
        dtype = np.float16 if name == "F16" else np.float32
        writer.add_tensor(f"{tensor}.weight", values(linear)[rows].astype(dtype))
        return
    assert linear.codes is not None and linear.scale is not None
    codes, scale = linear.codes[rows], linear.scale.reshape(1).astype(np.float32)
    if name == "I2_S":
        data = blocks.encode_i2_s(codes, scale[0]).view(np.int8)
        number = TYPES[name].number
        writer.add_tensor(f"{tensor}.weight", data, raw_shape=codes.shape, raw_dtype=number)
        return
    if name in ("F16", "F32"):
        writer.add_tensor(f"{tensor}.weight", codes.astype(f"float{name[1:]}"))
    else:
        encode = blocks.encode_tq2_0 if name == "TQ2_0" else blocks.encode_tq1_0
        kind = package("gguf").GGMLQuantizationType(TYPES[name].number)
        writer.add_tensor(f"{tensor}.weight", encode(codes), raw_dtype=kind)
    writer.add_tensor(f"{tensor}.scale", scale)


def _row_order(model: TrainedModel, name: str) -> np.ndarray | slice:
    """llama.cpp's `llama` rotates neighbouring pairs of a head, where we rotate its halves."""
    heads = {"attention/q": model.config.heads, "attention/k": model.config.kv_heads}
    if model.config.norms != "pre" or name not in heads:
        return slice(None)
    size = heads[name] * model.config.head_size
    return np.arange(size).reshape(heads[name], 2, -1).swapaxes(1, 2).reshape(-1)


def read(model: TrainedModel, path: Path) -> Stored:
    """What a file holds, whatever types its headers name."""
    found = _tensors(path)
    stored = Stored({}, {})
    for part in parts(model):
        array = found[f"{_name(part.name, part.block)}.weight"]
        stored.parts[part.block, part.name] = _decoded(*array)[0]
    for linear in linears(model):
        name = _name(linear.name, linear.block)
        matrix, scale = _decoded(*found[f"{name}.weight"])
        if f"{name}.scale" in found:
            scale = (1.0 if scale is None else scale) * float(
                _decoded(*found[f"{name}.scale"])[0][0]
            )
        order = _row_order(model, linear.name)
        back = order if isinstance(order, slice) else np.argsort(order)
        stored.matrices[linear.block, linear.name] = Matrix(matrix[back], scale)
    return stored


def _decoded(
    number: int, shape: tuple[int, ...], data: np.ndarray
) -> tuple[np.ndarray, float | None]:
    """Numbers or codes of a tensor, and the scale inside it, where its type has one."""
    if number == TYPES["I2_S"].number:
        return blocks.decode_i2_s(data, (shape[0], shape[1]))
    if number in (TYPES["TQ1_0"].number, TYPES["TQ2_0"].number):
        two = number == TYPES["TQ2_0"].number
        decode = blocks.decode_tq2_0 if two else blocks.decode_tq1_0
        codes, scales = decode(data.reshape(shape[0], -1))
        if (scales != 1).any():  # as nothing written here has it: numbers, for the comparison
            return codes * np.repeat(scales, blocks.TQ_BLOCK, axis=1), None
        return codes, 1.0
    if number == EMBEDDINGS["Q8_0"]:
        kind = package("gguf").GGMLQuantizationType(number)
        return package("gguf.quants").dequantize(data.reshape(shape[0], -1), kind), None
    dtype = {0: "<f4", 1: "<f2"}[number]
    return data.view(dtype).reshape(shape).astype(np.float32), None


def _tensors(path: Path) -> dict[str, tuple[int, tuple[int, ...], np.ndarray]]:
    """Type, shape [out, in] and bytes of every tensor, by the library's reader.

    The library does not know the type I2_S, and only what it makes of a tensor's header is changed.
    """
    library = package("gguf")
    found = {}

    class Reader(library.GGUFReader):  # type: ignore[name-defined, misc]
        def _build_tensors(self, start: int, fields: list) -> None:
            for field in fields:
                _, name, _, sizes, number, offset = field.parts
                shape = tuple(int(n) for n in reversed(sizes.tolist()))
                data = self.data[start + int(offset[0]) :]
                size = _bytes(library, int(number[0]), shape)
                found[bytes(name).decode()] = int(number[0]), shape, np.array(data[:size])
            self.tensors: list = []

    Reader(path)
    return found


def verify(
    model: TrainedModel, path: Path, layout: Layout, rows: Int32[np.ndarray, "R T"]
) -> Iterator[Check]:
    """What was written against the run; its logits where llama.cpp is installed.

    Where llama.cpp rounds the inputs of products, its logits are held against the same rounding
    here; where it does not, against the run's own. rows: of held-out text.
    """
    stored = read(model, path)
    in_type, in_embedding = (functools.partial(rounding, name) for name in layout)
    yield from content(model, stored, in_type, in_embedding)
    what = "logits in llama.cpp"
    if TYPES[layout.type].client == BITNET_CPP:
        yield Check(what, {}, {}, None, "not compared: bitnet.cpp is no Python package")
    elif not installed("llama_cpp"):
        note = "not compared: llama_cpp not installed; pip install llama-cpp-python builds it"
        yield Check(what, {}, {}, None, note)
    elif set(layout) == {"F32"}:
        tokens = long_rows(rows)
        own = evaluate(model, tokens, quantized=False)
        what = f"{what}, activations not quantized"
        yield exact_logits(what, own, logits(path, tokens))
    else:
        tokens = short_rows(rows)
        inputs, head_inputs = _INPUTS[layout.type], _INPUTS[layout.embedding]
        own = forward(model, stored, tokens, inputs, head_inputs)
        what = f"{what}, inputs {inputs.__name__}, head's {head_inputs.__name__}"
        allowed = FLIPPING if layout.type == "F16" else MEDIAN
        yield median_logits(what.replace("_", " "), own, logits(path, tokens), allowed)


def rounding(type_name: str, x: Float32[np.ndarray, "F D"]) -> Float32[np.ndarray, "F D"]:
    """How far each number may be from what is stored in F32, F16 or Q8_0."""
    if type_name == "F16":
        return np.maximum(np.abs(x) * 2.0**-11, 2.0**-25)
    if type_name == "Q8_0":  # half a step, and the float16 scale's own rounding
        largest = np.abs(x).reshape(len(x), -1, Q8_0_BLOCK).max(axis=-1)
        return np.repeat(largest * (0.5 / 127 + 2.0**-10), Q8_0_BLOCK, axis=1)
    return np.zeros_like(x)


def _bytes(library: Any, number: int, shape: tuple[int, ...]) -> int:
    count = int(np.prod(shape))
    if number == TYPES["I2_S"].number:
        return count // 4 + 32
    block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType(number)]
    return count // block * size


def logits(path: Path, tokens: Int32[np.ndarray, "B T"]) -> Float32[np.ndarray, "B T V"]:
    """llama.cpp's logits, row by row, with keys and values kept in float32.

    Raises:
      ConfigError: the package is missing.
    """
    library = package("llama_cpp")
    library.llama_log_set(_silence(), None)
    engine = library.Llama(
        str(path),
        n_ctx=max(tokens.shape[1], 8),
        logits_all=True,
        verbose=False,
        type_k=library.GGML_TYPE_F32,
        type_v=library.GGML_TYPE_F32,
        flash_attn=False,
    )
    rows = []
    for row in tokens:
        engine.reset()
        engine.eval(row.tolist())
        rows.append(np.array(engine.scores[: len(row)], np.float32))
    engine.close()
    return np.stack(rows)


@functools.cache  # which llama.cpp goes on calling
def _silence() -> Any:
    return package("llama_cpp").llama_log_callback(lambda level, text, data: None)


def _name(part: str, block: int | None) -> str:
    return _NAMES[part] if block is None else f"blk.{block}.{_NAMES[part]}"
