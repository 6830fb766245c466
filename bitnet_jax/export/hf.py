"""A directory that `transformers` loads with AutoModelForCausalLM.from_pretrained.

Of trits under int8 activations it keeps packed codes and their scales, or the float32 masters, from
which transformers makes codes at every step and can train on. Of any other arm it keeps the numbers
that the model multiplies with. Everything that is not a code is float32.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from bitnet_jax.cost import linear_shapes
from bitnet_jax.errors import ConfigError
from bitnet_jax.export import blocks
from bitnet_jax.export.card import card
from bitnet_jax.export.clients import HUGGING_FACE, family
from bitnet_jax.export.model import TrainedModel, linears
from bitnet_jax.export.packages import INSTALL_EXTRA, installed, package
from bitnet_jax.export.parts import Matrix, Stored, parts, values
from bitnet_jax.export.verify import (
    TOO_LARGE,
    Check,
    content,
    evaluate,
    exact_logits,
    long_rows,
    mostly_equal_logits,
    short_rows,
    tiny,
)
from bitnet_jax.export.vocabulary import end_of_text, tokenizer_document

# Masters that transformers quantizes itself must be quantized as they were in training.
ONLINE_WEIGHTS = "ternary_absmean"
_NAMES = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention/sub_norm": "self_attn.attn_sub_norm",
    "mlp/sub_norm": "mlp.ffn_sub_norm",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_ACTIVATIONS = {"relu2": "relu2", "silu": "silu", "gelu": "gelu_pytorch_tanh"}
_CLASSES = {"bitnet": "BitNetForCausalLM", "llama": "LlamaForCausalLM"}


OPTIONS = {"weights": ("packed", "master"), "scale": ("multiplies", "divides")}
PACKAGES = ("torch", "transformers", "accelerate")
INVERSE_ROUNDING = 2.0**-22  # of a scale that is stored as its inverse
NEAR_THRESHOLD = 1e-6  # of the scale: where a master may be rounded either way


class Layout(NamedTuple):
    """How the projections of an arm with quantized activations are stored; None for the first.

    weights: `packed` codes, or the float32 `master`.
    scale: of packed codes, whether transformers `multiplies` by it (its class autobitlinear) or
      `divides` (bitlinear, its default and the only one of older releases).
    """

    weights: str | None = None
    scale: str | None = None

    @property
    def online(self) -> bool:
        return self.weights == "master"

    @property
    def divides(self) -> bool:
        return self.scale == "divides"


def check(model: TrainedModel, layout: Layout) -> None:
    """Refuse what transformers would not compute, or not load.

    Raises:
      ConfigError: says what would work.
    """
    family(model, HUGGING_FACE)
    for option, value in layout._asdict().items():
        if value and not quantizes(model):
            raise ConfigError(
                f"{option}={value!r}: it is for trits under int8 activations, and this run's "
                f"{model.precision.name} leaves as float32 numbers; leave --{option} out"
            )
    if layout.online:
        _check_online(model, layout)
        return
    for name, (_, outputs) in linear_shapes(model.config).items():
        if quantizes(model) and outputs % blocks.ROWS:
            raise ConfigError(
                f"weights='packed': four output rows share a byte, and the projection {name} has "
                f"{outputs}; take --weights=master"
            )


def _check_online(model: TrainedModel, layout: Layout) -> None:
    if model.precision.weights != ONLINE_WEIGHTS:
        raise ConfigError(
            f"weights='master': transformers makes trits of masters by {ONLINE_WEIGHTS}, and this "
            f"run did by {model.precision.weights}; take --weights=packed"
        )
    if layout.scale:
        raise ConfigError(
            f"scale={layout.scale!r}: masters have no scale that is stored; leave --scale out"
        )


def quantizes(model: TrainedModel) -> bool:
    """Whether the client quantizes: activations, and multiplies codes."""
    return model.precision.quantized and model.precision.activations != "none"


def write(model: TrainedModel, directory: Path, layout: Layout) -> None:
    """Write everything into an existing, empty directory.

    Raises:
      ConfigError: what `check` refuses, or a package is missing.
    """
    check(model, layout)
    numpy = package("safetensors.numpy")
    numpy.save_file(tensors(model, layout), directory / "model.safetensors", {"format": "pt"})
    end = end_of_text(model)
    documents = {
        "config.json": config(model, layout),
        "generation_config.json": _ends(model),
        "tokenizer.json": tokenizer_document(model),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **({} if end is None else {"bos_token": end, "eos_token": end}),
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.context_length,
        },
    }
    for name, document in documents.items():
        text = json.dumps(document, indent=2, ensure_ascii=name == "tokenizer_config.json")
        (directory / name).write_text(text + "\n", encoding="utf-8")
    (directory / "README.md").write_text(card(model), encoding="utf-8")
    # The library lets nobody else read its file.
    shutil.copymode(directory / "README.md", directory / "model.safetensors")


def config(model: TrainedModel, layout: Layout) -> dict[str, Any]:
    """The content of config.json."""
    c = model.config
    architecture = family(model, HUGGING_FACE).architecture
    document = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.ff_width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "hidden_act": _ACTIVATIONS[c.activation],
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": c.norm_epsilon,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tied_embeddings,
        "attention_bias": False,
        **_ends(model),
        "dtype": "float32",
    }
    if quantizes(model):
        document["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "bitlinear" if layout.divides else "autobitlinear",
            "quantization_mode": "online" if layout.online else "offline",
        }
    return document


def tensors(model: TrainedModel, layout: Layout) -> dict[str, np.ndarray]:
    """Every tensor by transformers' name, float32 or uint8."""
    found = {f"{_name(part.name, part.block)}.weight": part.values for part in parts(model)}
    for linear in linears(model):
        name = _name(linear.name, linear.block)
        if not quantizes(model):
            found[f"{name}.weight"] = values(linear)
        elif layout.online:
            found[f"{name}.weight"] = linear.master
        else:
            assert linear.codes is not None and linear.scale is not None
            scale = linear.scale.reshape(1).astype(np.float32)
            found[f"{name}.weight"] = blocks.pack_rows(linear.codes)
            found[f"{name}.weight_scale"] = np.float32(1) / scale if layout.divides else scale
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def read(model: TrainedModel, directory: Path) -> Stored:
    """What a directory holds, by what its own config.json says of it."""
    document = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    rule = document.get("quantization_config", {})
    found = package("safetensors.numpy").load_file(directory / "model.safetensors")
    stored = Stored({}, {})
    for part in parts(model):
        stored.parts[part.block, part.name] = found[f"{_name(part.name, part.block)}.weight"]
    for linear in linears(model):
        name = _name(linear.name, linear.block)
        matrix, scale = found[f"{name}.weight"], None
        if rule.get("quantization_mode") == "offline":
            matrix, scale = blocks.unpack_rows(matrix), float(found[f"{name}.weight_scale"][0])
            scale = 1 / scale if rule["linear_class"] == "bitlinear" else scale
        stored.matrices[linear.block, linear.name] = Matrix(matrix, scale)
    return stored


def verify(
    model: TrainedModel, directory: Path, layout: Layout, rows: Int32[np.ndarray, "R T"]
) -> Iterator[Check]:
    """What was written against the run; its logits where transformers is installed.

    rows: of held-out text.
    """
    stored = read(model, directory)
    if layout.online:
        yield from content(model, stored, own=lambda linear: linear.master)
        yield _online_codes(model, stored)
    else:
        rounding = INVERSE_ROUNDING if layout.divides else 0.0
        yield from content(model, stored, scale=rounding)
    absent = [name for name in PACKAGES if not installed(name)]
    if absent:
        note = f"not compared: {', '.join(absent)} not installed; {INSTALL_EXTRA}"
        yield Check("logits in transformers", {}, {}, None, note)
        return
    tokens = long_rows(rows)
    what = "logits in transformers, activations not quantized"
    yield exact_logits(
        what, evaluate(model, tokens, quantized=False), logits(directory, tokens, quantized=False)
    )
    what = "logits in transformers, int8 activations"
    if quantizes(model) and tiny(model):
        tokens = short_rows(rows)
        own, client = evaluate(model, tokens), logits(directory, tokens, quantized=True)
        yield mostly_equal_logits(what, own, client)
    elif quantizes(model):
        yield Check(what, {}, {}, None, TOO_LARGE)


def _online_codes(model: TrainedModel, stored: Stored) -> Check:
    """The codes and scales that transformers makes of masters, by its own formula."""
    different, unexplained, scale_error = 0, 0, 0.0
    for linear in linears(model):
        master = stored.matrices[linear.block, linear.name].numbers
        assert linear.codes is not None and linear.scale is not None
        own = float(linear.scale.item())
        inverse = np.float32(1) / np.maximum(np.abs(master).mean(), np.float32(1e-5))
        wrong = np.clip(np.rint(master * inverse), -1, 1) != linear.codes
        near = np.abs(np.abs(master[wrong]) / own - 0.5) < NEAR_THRESHOLD
        different, unexplained = different + int(wrong.sum()), unexplained + int((~near).sum())
        scale_error = max(scale_error, abs(1 / float(inverse) / own - 1))
    found = {"different": different, "unexplained": unexplained, "scales": scale_error}
    holds = unexplained == 0 and scale_error <= NEAR_THRESHOLD
    allowed = {"unexplained": 0, "scales": NEAR_THRESHOLD}
    return Check("codes that transformers makes of the masters", found, allowed, holds)


def logits(
    directory: Path, tokens: Int32[np.ndarray, "B T"], quantized: bool
) -> Float32[np.ndarray, "B T V"]:
    """transformers' logits. quantized: whether activations are, where the model says so.

    Raises:
      ConfigError: a package is missing.
    """
    torch, transformers = package("torch"), package("transformers")
    package("accelerate")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Its functions are compiled for minutes on a CPU, to the same numbers.
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), _activations(quantized):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


@contextlib.contextmanager
def _activations(quantized: bool) -> Iterator[None]:
    """Takes the quantization of activations out of transformers' two classes for a while."""
    if quantized:
        yield
        return
    library = package("transformers.integrations.bitnet")
    kept = library.ActQuant, library.BitLinear.activation_quant

    class Nothing:
        @staticmethod
        def apply(x: Any) -> Any:
            return x

    library.ActQuant, library.BitLinear.activation_quant = Nothing, lambda self, x: (x, 1.0)
    try:
        yield
    finally:
        library.ActQuant, library.BitLinear.activation_quant = kept


def _name(part: str, block: int | None) -> str:
    return _NAMES[part] if block is None else f"model.layers.{block}.{_NAMES[part]}"


def _ends(model: TrainedModel) -> dict[str, Any]:
    return {"bos_token_id": model.end_of_text, "eos_token_id": model.end_of_text}
