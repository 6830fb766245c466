"""A model in one file, its trits five to a byte: the smallest that computes what the run computed.

A safetensors file. `blocks.attention.q.codes` and so on hold the codes of a projection in all
blocks, [L, I, d, F] in row-major order (`packing.to_bytes`); `.scale` their float32 scales; the
rest are the parameters that nothing quantizes. The metadata's one entry is a sealed JSON document:
version, shape, arm, packing, tokenizer, provenance, and each array's SHA-256.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.attention import IMPLEMENTATIONS
from bitnet_jax.data.readers import sha256_of
from bitnet_jax.deployed import Deployed, deploy, deployed_logits, without_kernels
from bitnet_jax.errors import ConfigError, choose, one_line, require
from bitnet_jax.estimators import ESTIMATORS
from bitnet_jax.export.model import TrainedModel
from bitnet_jax.export.tensors import read_tensors, write_tensors
from bitnet_jax.files import DamagedFile, sealed, unsealed
from bitnet_jax.granularity import GRANULARITIES, Granularity
from bitnet_jax.initializers import INITIALIZERS
from bitnet_jax.model import ACTIVATIONS, NORMS, TransformerConfig, init_params
from bitnet_jax.packing import PACKINGS, code_counts, entropy, fits, from_bytes, to_bytes
from bitnet_jax.precision import Precision
from bitnet_jax.quantize import QUANTIZERS, TOKEN_QUANTIZERS, Quantized

VERSION = 1
ENTRY = "bitnet_jax_packed"  # of the metadata
FLOATS = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}
OPTIONS = {"packing": tuple(PACKINGS), "floats": tuple(FLOATS)}
LARGEST = 2**24  # of any number of a shape
CHECKED_TOKENS = 128  # a row, of two
DTYPES = {str(jnp.dtype(d)): d for d in (jnp.bfloat16, jnp.float16, jnp.float32)}


class Different(ConfigError):
    """A file does not hold the model that it was written from."""


class Layout(NamedTuple):
    """How a file holds a model; the arguments of `write`, whose choices are `OPTIONS`."""

    packing: str | None = None
    floats: str = "float32"


class Sizes(NamedTuple):
    """What a file weighs, and what of it is the quantized weights. Bytes, unless said otherwise.

    entropy: of the codes, bits a weight, as if they were drawn independently; an entropy coder
      would take `entropy_coded` bytes for them, plus its table.
    """

    file: int
    weights: int  # how many are quantized
    codes: int
    scales: int
    floats: int
    entropy: float

    @property
    def bits_a_weight(self) -> float:
        """Of the quantized ones, scales included."""
        return 8 * (self.codes + self.scales) / self.weights

    @property
    def entropy_coded(self) -> int:
        return math.ceil(self.weights * self.entropy / 8)


@dataclasses.dataclass(frozen=True)
class PackedModel:
    """What a file holds.

    model: float32 parameters and int8 codes, as `deployed_logits` and `generate` take them.
    floats: the type that the parameters were written in; below float32 they are rounded.
    tokenizer: name and, where it is a file, its sha256.
    """

    config: TransformerConfig
    precision: Precision
    model: Deployed
    packing: str
    floats: str
    context_length: int
    tokenizer: Mapping[str, str | None]
    end_of_text: int | None
    provenance: Mapping[str, str]
    sizes: Sizes


# ---- Writing -----------------------------------------------------------------------------------


def write(
    model: TrainedModel, path: Path, packing: str | None = None, floats: str = "float32"
) -> Sizes:
    """Write the file, whole or not at all.

    packing: `base3` or `2bit`; None takes the smaller one that the arm's codes fit.
    floats: the type of embedding, head and norms; in 16 bits the logits are no longer the run's.

    Raises:
      ConfigError: an arm whose weights are not codes of up to four levels, scales that are not
        finite, an unknown choice, or a path that cannot be written.
    """
    packing = _choose_packing(model.precision, packing)
    choose("floats", floats, FLOATS)
    deployed = deploy(model.params, model.precision)
    tensors: dict[str, np.ndarray] = {}
    shapes: dict[str, list[int]] = {}
    quantizer = model.precision.weight_quantizer
    for name, q in _kernels(deployed).items():
        codes, scale = np.asarray(q.codes), np.asarray(q.scale)
        if not np.isfinite(scale).all():
            raise ConfigError(f"{name}: a scale is not finite; the run's weights are not, either")
        shapes[name] = list(codes.shape)
        tensors[f"{name}.codes"] = to_bytes(codes, quantizer, PACKINGS[packing], name)
        tensors[f"{name}.scale"] = scale
    for name, value in _named(deployed.params).items():
        tensors[name] = np.asarray(value, FLOATS[floats])
    document = _document(model, packing, floats, shapes, tensors)
    try:
        write_tensors(path, tensors, {ENTRY: json.dumps(document)})
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{path}: cannot write there ({reason})") from error
    return _sizes(path, tensors, deployed)


def _choose_packing(precision: Precision, packing: str | None) -> str:
    if not precision.quantized:
        raise ConfigError(
            f"precision={precision.name!r}: its weights are not quantized, so there are no codes "
            "to pack; --format=hf and --format=gguf keep them as they are"
        )
    fitting = [n for n in ("base3", "2bit") if fits(precision.weight_quantizer, PACKINGS[n])]
    levels = precision.weight_quantizer.levels
    if not fitting:
        raise ConfigError(
            f"precision={precision.name!r}: its weights have {levels} levels; 2 bits hold 4 of "
            "them; --format=hf and --format=gguf keep them as floats"
        )
    if packing is None:
        return fitting[0]
    choose("packing", packing, PACKINGS)
    require(packing in fitting, "packing", packing, f"{levels} levels; choose {fitting[-1]}")
    return packing


# How a product is computed and its operands travel: equal bit for bit, so no part of a model.
_NOT_THE_MODEL = ("carrier", "wire")


def _document(
    model: TrainedModel, packing: str, floats: str, shapes: dict, tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
    precision = {
        field.name: getattr(model.precision, field.name)
        for field in dataclasses.fields(model.precision)
        if field.name not in _NOT_THE_MODEL
    }
    tokenizer = model.tokenizer
    return sealed(
        {
            "version": VERSION,
            "config": dataclasses.asdict(model.config),
            "precision": {
                **precision,
                "granularity": dataclasses.asdict(model.precision.granularity),
                "compute_dtype": str(jnp.dtype(model.precision.compute_dtype)),
            },
            "packing": packing,
            "floats": floats,
            "shapes": shapes,
            "context_length": model.context_length,
            "tokenizer": {
                "name": tokenizer.name if tokenizer else model.symbols or "bytes",
                "sha256": sha256_of(tokenizer) if tokenizer else None,
            },
            "end_of_text": model.end_of_text,
            "provenance": dict(model.provenance),
            "arrays": {name: _digest(array) for name, array in tensors.items()},
        }
    )


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(_as_bytes(array).data).hexdigest()


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _kernels(model: Deployed) -> dict[str, Quantized]:
    return {
        f"blocks.{group}.{name}": kernel["kernel"]
        for group, layers in model.codes["blocks"].items()
        for name, kernel in layers.items()
    }


def _named(tree: dict, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, by their keys with points between."""
    named = {}
    for key, value in tree.items():
        inside = isinstance(value, dict)
        named.update(_named(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value})
    return named


def _sizes(path: Path, tensors: Mapping[str, np.ndarray], model: Deployed) -> Sizes:
    kernels = _kernels(model)
    codes = sum(tensors[f"{name}.codes"].nbytes for name in kernels)
    scales = sum(tensors[f"{name}.scale"].nbytes for name in kernels)
    counts = sum(code_counts(np.asarray(q.codes)) for q in kernels.values())
    rest = sum(array.nbytes for array in tensors.values()) - codes - scales
    weights = sum(q.codes.size for q in kernels.values())
    return Sizes(path.stat().st_size, weights, codes, scales, rest, entropy(counts))  # type: ignore


# ---- Reading -----------------------------------------------------------------------------------


def read(path: Path) -> PackedModel:
    """The model of a file.

    Raises:
      ConfigError: no such file, one of something else, a damaged one, or one of a later version.
    """
    try:
        tensors, metadata = read_tensors(path)
    except DamagedFile:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    document = _read_document(path, metadata)
    try:
        _check_digests(document["arrays"], tensors)
        config, precision = _config(document["config"]), _precision(document["precision"])
        choose("packing", document["packing"], PACKINGS)
        choose("floats", document["floats"], FLOATS)
        _check_words(document)
        end = document["end_of_text"]
        require(end is None or end < config.vocab_size, "end_of_text", "", "no token")
        params, codes = _like(config, precision)
        _check_arrays(document, tensors, params, codes)
        model = _model(document, precision, tensors, params, codes)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise DamagedFile(path, one_line(f"it is not a packed model: {error}")[:300]) from error
    return PackedModel(
        config,
        precision,
        model,
        document["packing"],
        document["floats"],
        document["context_length"],
        document["tokenizer"],
        document["end_of_text"],
        document["provenance"],
        _sizes(path, tensors, model),
    )


def _read_document(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if ENTRY not in metadata:
        raise ConfigError(
            f"{path}: a safetensors file, but not a packed model; its metadata lack {ENTRY!r}"
        )
    try:
        document = unsealed(json.loads(metadata[ENTRY]), path)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, one_line(error)) from error
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise DamagedFile(path, f"version {version!r:.40}")
    if version > VERSION:
        raise ConfigError(
            f"{path}: version={version}: this code reads packed models up to version {VERSION}; "
            "use the version that wrote it, or a later one"
        )
    return document


def _check_digests(digests: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> None:
    differing = sorted(digests.keys() ^ tensors.keys())
    require(not differing, "arrays", differing[:3], "missing, or too many")
    for name, array in tensors.items():
        if digests[name] != _digest(array):
            raise ValueError(f"{name} has another SHA-256 than the file says")


def _config(values: dict[str, Any]) -> TransformerConfig:
    """A shape whose every number is bounded, so that what is made of it is."""
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    require(values.keys() == fields.keys(), "config", sorted(values), "other keys")
    for name, field in fields.items():
        value = values[name]
        require(type(value) is field.type, name, value, f"it must be {field.type}")
        if field.type is int:
            require(1 <= value <= LARGEST, name, value, f"from 1 to {LARGEST}")
        if field.type is float:
            require(math.isfinite(value) and value > 0, name, value, "it must be positive")
    config = TransformerConfig(**values)
    for name, known in (
        ("activation", ACTIVATIONS),
        ("norms", NORMS),
        ("init", INITIALIZERS),
        ("attention", IMPLEMENTATIONS),
    ):
        choose(name, getattr(config, name), known)
    heads, kv_heads = config.heads, config.kv_heads
    require(config.width % (2 * heads) == 0, "heads", heads, "they do not divide the width")
    require(heads % kv_heads == 0, "kv_heads", kv_heads, "they do not divide the heads")
    return dataclasses.replace(config, attention="blocks")


def _precision(values: dict[str, Any]) -> Precision:
    kind, size = values["granularity"]["kind"], values["granularity"]["size"]
    checks: dict[str, Callable[[Any], bool]] = {
        "name": lambda v: isinstance(v, str) and v.isprintable() and len(v) < 500,
        "weights": lambda v: v in QUANTIZERS and v != "none",
        "activations": lambda v: v in TOKEN_QUANTIZERS,
        "granularity": lambda v: kind in GRANULARITIES and type(size) is int and size > 0,
        "estimator": lambda v: v in ESTIMATORS,
        "activation_estimator": lambda v: v in ESTIMATORS,
        "rotate": lambda v: isinstance(v, bool),
        "compute_dtype": lambda v: v in DTYPES,
        "loss_scaling": lambda v: isinstance(v, bool),
    }
    require(values.keys() == checks.keys(), "precision", sorted(values), "other keys")
    for key, holds in checks.items():
        require(holds(values[key]), f"precision.{key}", values[key], "unknown")
    changed = {"granularity": Granularity(kind, size)}
    return Precision(**{**values, **changed, "compute_dtype": DTYPES[values["compute_dtype"]]})


def _check_words(document: dict[str, Any]) -> None:
    """What is for people and for the tokenizer."""
    tokenizer, provenance = document["tokenizer"], document["provenance"]
    require(tokenizer.keys() == {"name", "sha256"}, "tokenizer", tokenizer, "other keys")
    name = tokenizer["name"]
    words = [name, *provenance, *provenance.values()]
    require(all(isinstance(word, str) for word in words), "provenance", provenance, "not words")
    digest = tokenizer["sha256"]
    require(digest is None or isinstance(digest, str), "tokenizer", tokenizer, "not a digest")
    for key in ("context_length", "end_of_text"):
        value = document[key]
        none = value is None and key == "end_of_text" and digest is None and name != "bytes"
        number = type(value) is int and 0 <= value < 2**31
        require(none or number, key, value, "it must be a number")


def _like(config: TransformerConfig, precision: Precision) -> tuple[dict, dict[str, Quantized]]:
    """Shapes of the parameters and of the codes and scales that such a model has."""

    def make() -> Deployed:
        return deploy(init_params(config, precision, jax.random.key(0)), precision)

    try:
        shapes = jax.eval_shape(make)
    except Exception as error:  # JAX's own kinds, where shapes do not go together
        raise ValueError(f"no model has this shape: {str(error).splitlines()[0]}") from error
    return shapes.params, _kernels(shapes)


def _check_arrays(
    document: dict[str, Any],
    tensors: Mapping[str, np.ndarray],
    params: dict,
    kernels: dict[str, Quantized],
) -> None:
    expected: dict[str, tuple] = {
        name: (like.shape, np.dtype(FLOATS[document["floats"]]))
        for name, like in _named(params).items()
    }
    for name, like in kernels.items():
        require(document["shapes"].get(name) == list(like.codes.shape), name, name, "another shape")
        expected[f"{name}.scale"] = (like.scale.shape, np.dtype(np.float32))
        expected[f"{name}.codes"] = (tensors[f"{name}.codes"].shape, np.dtype(np.uint8))
    differing = sorted(expected.keys() ^ tensors.keys())
    require(not differing, "arrays", differing[:3], "missing, or too many")
    for name, (shape, dtype) in expected.items():
        array = tensors[name]
        right = f"{dtype}{list(shape)}"
        require((array.shape, array.dtype) == (shape, dtype), name, str(array.shape), right)


def _model(
    document: dict[str, Any],
    precision: Precision,
    tensors: Mapping[str, np.ndarray],
    params: dict,
    kernels: dict[str, Quantized],
) -> Deployed:
    packing, quantizer = PACKINGS[document["packing"]], precision.weight_quantizer
    codes: dict[str, dict] = {}
    for name, like in kernels.items():
        shape = like.codes.shape
        values = from_bytes(tensors[f"{name}.codes"], shape, quantizer, packing, name)
        scale = np.array(tensors[f"{name}.scale"])
        require(bool(np.isfinite(scale).all()), name, "scale", "it must be finite")
        _, group, projection = name.split(".")
        own = {"kernel": Quantized(values, scale)}  # type: ignore[arg-type]
        codes.setdefault(group, {})[projection] = own

    def restore(path: tuple, _: Any) -> np.ndarray:
        return tensors[".".join(entry.key for entry in path)].astype(np.float32)

    return Deployed(jax.tree_util.tree_map_with_path(restore, params), {"blocks": codes})


# ---- Verification ------------------------------------------------------------------------------


def verify(model: TrainedModel, path: Path) -> dict[str, Any]:
    """Read a file back and hold it against the model that it was written from.

    Codes and scales must be equal; so must embedding, norms and head, and all logits of two rows of
    random tokens, to the bit, unless the file holds them in 16 bits.

    Returns: weights, bits_a_weight, entropy, file (bytes), exact, and the largest difference of the
      logits, as a share of their standard deviation.

    Raises:
      Different: what is in it is not the model; it says what differs first.
      ConfigError: it cannot be read.
    """
    found = read(path)
    own = deploy(model.params, model.precision)
    for name, q in _kernels(own).items():
        other = _kernels(found.model)[name]
        for what, a, b in (("codes", q.codes, other.codes), ("scales", q.scale, other.scale)):
            _require_equal(path, f"{what} of {name}", np.asarray(a), np.asarray(b))
    exact = found.floats == "float32"
    if exact:
        others = _named(found.model.params)
        for name, value in _named(without_kernels(model.params)).items():
            _require_equal(path, name, np.asarray(value), others[name])
    length = min(model.context_length, CHECKED_TOKENS)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, length), np.int32)
    arm = model.precision, found.precision
    run, file = (
        np.asarray(deployed_logits(config, precision, deployed, tokens))
        for config, precision, deployed in (
            (dataclasses.replace(model.config, attention="blocks"), arm[0], own),
            (found.config, arm[1], found.model),
        )
    )
    if exact:
        _require_equal(path, "logits", run, file)
    return {
        "weights": found.sizes.weights,
        "bits_a_weight": found.sizes.bits_a_weight,
        "entropy": found.sizes.entropy,
        "file": found.sizes.file,
        "exact": exact,
        "logit_difference": float(np.abs(run - file).max() / run.std()),
    }


def _require_equal(path: Path, what: str, mine: np.ndarray, other: np.ndarray) -> None:
    if mine.shape != other.shape or mine.dtype != other.dtype:
        raise Different(f"{path}: {what}: {other.dtype}{list(other.shape)}, not {mine.dtype}")
    if not np.array_equal(_as_bytes(mine), _as_bytes(other)):
        raise Different(f"{path}: the {what} are not those of the run")
