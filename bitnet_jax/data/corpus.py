"""A prepared corpus on disk: a directory of token files and the manifest that describes them.

    manifest.json         schema, name, tokenizer, vocab_size, dtype, eot_token, splits, sources
    train.bin, valid.bin  the ids, little-endian, nothing else
    train_documents.npy, valid_documents.npy   int64, the index of each document's first token
    tokenizer.json        where the tokenizer was a file, its copy

`load` reads such a directory; `building` and `SplitWriter` make one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt

from bitnet_jax.data.errors import DataError

SCHEMA = 1
SPLITS = ("train", "valid")
_READ_AT_MOST = 1 << 32  # bytes of a token file
_READ_AT_ONCE = 1 << 20  # tokens


@dataclass(frozen=True)
class Corpus:
    """A loaded corpus. The tokens are memory-mapped: nothing is read before it is used.

    `valid_documents` holds the index of each validation document's first token, for standard
    errors that are clustered by document; an end-of-text token belongs to the document before it.
    """

    name: str
    vocab_size: int
    train: UInt[np.ndarray, " train_tokens"]
    valid: UInt[np.ndarray, " valid_tokens"]
    valid_documents: Int64[np.ndarray, " documents"]
    valid_bytes_per_token: float
    manifest: dict[str, Any]
    path: Path


def load(path: str | Path) -> Corpus:
    """Opens a prepared corpus.

    Token files of up to 4 GiB are read once, to see that they are what the manifest says (some
    seconds for the largest); of larger ones only the length is.

    Raises:
      DataError: no manifest, one of another schema, or files that do not agree with it.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    dtype = token_dtype(manifest["vocab_size"])
    if dtype.name != manifest["dtype"]:
        raise DataError(
            f"{path}: dtype {manifest['dtype']!r} does not fit "
            f"vocab_size={manifest['vocab_size']}: it should be {dtype.name}"
        )
    tokens = {split: _map_tokens(path, split, manifest, dtype) for split in SPLITS}
    for split in SPLITS:
        if tokens[split].nbytes <= _READ_AT_MOST:
            _verify(path / f"{split}.bin", tokens[split], manifest, split)
    return Corpus(
        name=manifest["name"],
        vocab_size=manifest["vocab_size"],
        train=tokens["train"],
        valid=tokens["valid"],
        valid_documents=_load_documents(path, "valid", manifest),
        valid_bytes_per_token=(
            manifest["splits"]["valid"]["bytes"] / manifest["splits"]["valid"]["tokens"]
        ),
        manifest=manifest,
        path=path,
    )


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian unsigned type that holds every id: uint8, uint16 or uint32."""
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: not a prepared corpus: it has no manifest.json") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: prepare the corpus again") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise DataError(
            f"{file}: schema {schema!r:.40}, this version reads {SCHEMA}: prepare it again"
        )
    needed = {"name", "tokenizer", "vocab_size", "dtype", "splits"} - manifest.keys()
    if needed:
        raise DataError(f"{file}: lacks {', '.join(sorted(needed))}: prepare the corpus again")
    for key, value, right in _oddities(manifest):
        raise DataError(f"{file}: {key} is {value!r:.80}, not {right}: prepare the corpus again")
    return manifest


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _oddities(manifest: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Entries of a manifest that are not what they should be: name, value, and what is right."""

    def is_count(value: Any, least: int, most: int = 2**63) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < most

    def is_word(value: Any) -> bool:
        return isinstance(value, str) and value.isprintable() and value != ""

    if not is_word(manifest["name"]):
        yield "name", manifest["name"], "a word"
    tokenizer = manifest["tokenizer"]
    if not (isinstance(tokenizer, dict) and is_word(tokenizer.get("name"))):
        yield "tokenizer", tokenizer, "an object with a name"
    if not is_count(manifest["vocab_size"], 1, 2**32 + 1):
        yield "vocab_size", manifest["vocab_size"], "a whole number up to 2^32"
    entropy = manifest.get("entropy_rate_nats", 0.0)
    if not (isinstance(entropy, float | int) and 0 <= entropy < 100):
        yield "entropy_rate_nats", entropy, "a number of nats"
    splits = manifest["splits"]
    if not (isinstance(splits, dict) and all(isinstance(splits.get(s), dict) for s in SPLITS)):
        yield "splits", splits, f"an object of {' and '.join(SPLITS)}"
    for split in SPLITS:
        for key, least in (("tokens", 0), ("bytes", 1), ("documents", 0)):
            if not is_count(splits[split].get(key), least):
                yield f"splits.{split}.{key}", splits[split].get(key), "a count"
        digest = splits[split].get("sha256")
        if not (isinstance(digest, str) and len(digest) == 64):
            yield f"splits.{split}.sha256", digest, "a SHA-256"
    if tokenizer["name"] == "bytes":
        yield from _odd_bytes(manifest)


def _odd_bytes(manifest: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Where a token is a byte, its counts follow from one another."""
    if manifest["vocab_size"] != 256:
        yield "vocab_size", manifest["vocab_size"], "256, that of bytes"
    for split in SPLITS:
        counts = manifest["splits"][split]
        separators = counts["tokens"] - counts["bytes"]
        if counts["tokens"] and not 0 <= separators < max(1, counts["documents"]):
            right = "that of its tokens, without those between documents"
            yield f"splits.{split}.bytes", counts["bytes"], right


def _map_tokens(path: Path, split: str, manifest: dict[str, Any], dtype: np.dtype) -> np.ndarray:
    file = path / f"{split}.bin"
    tokens = manifest["splits"][split]["tokens"]
    expected = tokens * dtype.itemsize
    if not file.is_file():
        raise DataError(f"{file}: the token file is missing: prepare the corpus again")
    size = file.stat().st_size
    if size == 0 or size != expected:
        raise DataError(
            f"{file}: {size} bytes, where {tokens} tokens of {dtype.name} take {expected}: "
            "prepare the corpus again"
        )
    try:
        return np.memmap(file, dtype, mode="r")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _verify(file: Path, tokens: np.ndarray, manifest: dict[str, Any], split: str) -> None:
    """An id beyond the vocabulary would be read from another's embedding, and a damaged file would
    train under the name of the whole one: a run's identity is the manifest's digests."""
    digest, highest = hashlib.sha256(), 0
    for start in range(0, len(tokens), _READ_AT_ONCE):
        part = np.asarray(tokens[start : start + _READ_AT_ONCE])
        digest.update(part.tobytes())
        highest = max(highest, int(part.max()))
    if highest >= manifest["vocab_size"]:
        raise DataError(
            f"{file}: has the token id {highest}, not below vocab_size={manifest['vocab_size']}: "
            "prepare the corpus again"
        )
    if digest.hexdigest() != manifest["splits"][split]["sha256"]:
        raise DataError(f"{file}: damaged, its SHA-256 is another: prepare the corpus again")


def _load_documents(path: Path, split: str, manifest: dict[str, Any]) -> np.ndarray:
    file = path / f"{split}_documents.npy"
    expected, tokens = (manifest["splits"][split][key] for key in ("documents", "tokens"))
    if not file.is_file():
        raise DataError(f"{file}: missing or damaged: prepare the corpus again")
    try:
        # Mapped, so that a header that promises more than the file has takes no memory.
        starts = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy evaluates the header, and raises what that raises
        raise DataError(f"{file}: missing or damaged: prepare the corpus again") from error
    if not isinstance(starts, np.ndarray) or starts.dtype != np.int64 or starts.ndim != 1:
        raise DataError(f"{file}: not a row of int64: prepare the corpus again")
    if len(starts) != expected:
        raise DataError(f"{file}: {len(starts)} documents, where the manifest says {expected}")
    starts = np.array(starts)
    # An empty document begins where the next one does.
    ordered = len(starts) and starts[0] == 0 and (np.diff(starts) >= 0).all()
    if not ordered or starts[-1] > tokens:
        raise DataError(
            f"{file}: not the ascending starts of documents in {tokens} tokens: prepare the corpus "
            "again"
        )
    digest = manifest["splits"][split].get("documents_sha256")  # older corpora have none
    if digest not in (None, hashlib.sha256(starts.astype("<i8").tobytes()).hexdigest()):
        raise DataError(f"{file}: damaged, its SHA-256 is another: prepare the corpus again")
    return starts


class SplitWriter:
    """Writes one split, document by document; `finish` gives its part of the manifest."""

    def __init__(self, directory: Path, split: str, vocab_size: int, eot_token: int | None):
        self._stem = directory / split
        self._vocab_size = vocab_size
        self._eot_token = eot_token
        self._dtype = token_dtype(vocab_size)
        self._file = open(f"{self._stem}.bin", "wb")
        self._hash = hashlib.sha256()
        self._starts: list[int] = []
        self.tokens = 0
        self.bytes = 0

    def add(self, ids: UInt[np.ndarray, " n"], text_bytes: int, separated: bool = True) -> None:
        """Appends a document, behind an end-of-text token unless it is the first or joined."""
        if ids.size and int(ids.max()) >= self._vocab_size:
            raise DataError(f"token id {ids.max()}: not below vocab_size={self._vocab_size}")
        if self._starts and separated and self._eot_token is not None:
            self._write(np.array([self._eot_token]))
        self._starts.append(self.tokens)
        self._write(ids)
        self.bytes += text_bytes

    def _write(self, ids: np.ndarray) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.tokens += len(ids)

    @property
    def documents(self) -> int:
        return len(self._starts)

    def close(self) -> None:
        self._file.close()

    def finish(self) -> dict[str, Any]:
        self.close()
        starts = np.array(self._starts, "<i8")
        np.save(f"{self._stem}_documents.npy", starts)
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "sha256": self._hash.hexdigest(),
            "documents_sha256": hashlib.sha256(starts.tobytes()).hexdigest(),
        }


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` to fill: it becomes `out` at the end, or vanishes on an error.

    Raises:
      DataError: `out` has content, made by another process in the meantime.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)  # mkdtemp's own mode shuts everybody else out
        try:
            os.replace(partial, out)
        except OSError as error:  # ENOTEMPTY on Linux, EEXIST elsewhere
            if out.exists():
                raise DataError(f"{out}: another process made it meanwhile") from error
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
