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

    Raises:
      DataError: no manifest, one of another schema, or files that do not agree with it.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    dtype = token_dtype(manifest["vocab_size"])
    if dtype.name != manifest["dtype"]:
        raise DataError(
            f"{path}: dtype {manifest['dtype']} does not fit vocab_size={manifest['vocab_size']}: "
            f"it should be {dtype.name}"
        )
    tokens = {split: _map_tokens(path, split, manifest, dtype) for split in SPLITS}
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
        manifest = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path}: not a prepared corpus: it has no manifest.json") from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON: prepare the corpus again") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{file}: schema {schema}, this version reads {SCHEMA}: prepare it again")
    needed = {"name", "vocab_size", "dtype", "splits"} - manifest.keys()
    if needed:
        raise DataError(f"{file}: lacks {', '.join(sorted(needed))}: prepare the corpus again")
    return manifest


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
    return np.memmap(file, dtype, mode="r")


def _load_documents(path: Path, split: str, manifest: dict[str, Any]) -> np.ndarray:
    file = path / f"{split}_documents.npy"
    expected = manifest["splits"][split]["documents"]
    try:
        starts = np.load(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: missing or damaged: prepare the corpus again") from error
    if len(starts) != expected:
        raise DataError(f"{file}: {len(starts)} documents, where the manifest says {expected}")
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
        np.save(f"{self._stem}_documents.npy", np.array(self._starts, np.int64))
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "sha256": self._hash.hexdigest(),
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
