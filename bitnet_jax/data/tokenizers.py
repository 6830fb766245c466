"""Tokenizers: plain bytes, or a file of the Hugging Face `tokenizers` library.

Both turn UTF-8 documents into ids and lose nothing: what they give decodes to the very bytes, so
that bits per byte mean the same whatever the tokenizer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt

from bitnet_jax.data.errors import DataError, one_line
from bitnet_jax.data.readers import (
    END_OF_TEXT,
    INSTALL_EXTRA,
    Document,
    open_sources,
    sha256_of,
)

# A long document is encoded in pieces: an encoding takes some hundred bytes of memory a token.
_PIECE_CHARACTERS = 1 << 18


class Tokenizer(Protocol):
    """What `prepare` needs of a tokenizer. `path` and `sha256` are None for built-in ones."""

    name: str
    vocab_size: int
    eot_token: int
    path: Path | None
    sha256: str | None

    def encode(self, documents: Sequence[Document]) -> list[UInt[np.ndarray, " tokens"]]:
        """The ids of each document, without an end-of-text token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of any ids; where their bytes are no UTF-8, replacement characters."""
        ...


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `bytes`, or the one of a file.

    Raises:
      DataError: no such file, not a tokenizer file, or one without `<|endoftext|>`.
    """
    return ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name))


class ByteTokenizer:
    """A token is a byte of UTF-8. End of text is the byte 0, which prose never has."""

    name = "bytes"
    vocab_size = 256
    eot_token = 0
    path: Path | None = None
    sha256: str | None = None

    def encode(self, documents: Sequence[Document]) -> list[UInt[np.ndarray, " tokens"]]:
        for document in documents:
            if b"\0" in document.text:
                raise DataError(
                    f"{document.where}: the document has a NUL byte, which is the end of text of "
                    "the tokenizer bytes; remove it"
                )
        return [np.frombuffer(document.text, np.uint8) for document in documents]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


@contextlib.contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """The Rust library raises plain Exception; its panics are not even that."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DataError(f"{what}: {one_line(error):.300}") from error
        raise


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library that is lossless on the text."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise DataError(f"tokenizer {str(path)!r}: no such file; give 'bytes' or a file")
        library = _library()
        with _errors_of(f"tokenizer {path}: not a tokenizer file"):
            self._tokenizer = library.Tokenizer.from_file(str(path))
        eot_token = self._tokenizer.token_to_id(END_OF_TEXT)
        if eot_token is None:
            raise DataError(f"tokenizer {path}: has no token {END_OF_TEXT} to end a document with")
        ids = self._tokenizer.get_vocab().values()
        if len(set(ids)) < len(ids):  # whose text such an id decodes to would be a matter of luck
            raise DataError(f"tokenizer {path}: two of its tokens have the same id")
        # Text that spells a special token is text: only `prepare` writes end-of-text tokens.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = path.name
        self.path: Path | None = path
        self.sha256: str | None = sha256_of(path)
        self.vocab_size = max(ids) + 1
        self.eot_token: int = eot_token

    def encode(self, documents: Sequence[Document]) -> list[UInt[np.ndarray, " tokens"]]:
        """Raises DataError where the ids do not decode to the text's very bytes."""
        pieces = [list(_pieces(document.text.decode())) for document in documents]
        flat = [piece for group in pieces for piece in group]
        with _errors_of(
            f"tokenizer {self.path}: cannot encode {documents[0].where} and what follows"
        ):
            encoded = self._tokenizer.encode_batch_fast(flat, add_special_tokens=False)
            ids = [encoding.ids for encoding in encoded]
            decoded = iter(self._tokenizer.decode_batch(ids, skip_special_tokens=False))
        arrays = iter(np.asarray(row, np.uint32) for row in ids)
        result = []
        for document, group in zip(documents, pieces, strict=True):
            if any(next(decoded) != piece for piece in group):
                raise DataError(
                    f"tokenizer {self.path}: its tokens of {document.where} do not decode to the "
                    "same text; use a byte-level one without normalization and prefix space"
                )
            result.append(np.concatenate([next(arrays) for _ in group]))
        return result

    def decode(self, ids: Sequence[int]) -> str:
        with _errors_of(f"tokenizer {self.path}: cannot decode"):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long text after line ends, where byte-level pre-tokenizers cut as well."""
    start = 0
    while start < len(text):
        stop = start + _PIECE_CHARACTERS
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def train_tokenizer(
    sources: Sequence[str],
    vocab_size: int,
    out: str | Path,
    characters: int = 24_000_000,
    text_field: str = "text",
) -> None:
    """Trains a byte-level BPE with `<|endoftext|>` on the first `characters` of the sources.

    Raises:
      DataError: `vocab_size` below 257 (256 bytes and end of text), more than the text gives,
        or an `out` that exists.
    """
    if vocab_size < 257:
        raise DataError(f"vocab_size={vocab_size}: at least 257, the bytes and {END_OF_TEXT}")
    if vocab_size > 2**24:
        raise DataError(f"vocab_size={vocab_size}: at most 2^24")
    out = Path(out)
    if out.exists():
        raise DataError(f"out {str(out)!r}: the file exists; remove it or name another")
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_head(sources, characters, text_field), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"vocab_size={vocab_size}: the text gives only {tokenizer.get_vocab_size()} entries; "
            "ask for fewer or give more text"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    tokenizer.save(str(partial))
    os.replace(partial, out)


def _head(sources: Sequence[str], characters: int, text_field: str) -> Iterator[str]:
    left = characters
    for source in open_sources(sources, text_field):
        for document in source.documents():
            for piece in _pieces(document.text.decode()):
                yield piece[:left]
                left -= len(piece)
                if left <= 0:
                    return


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(f"a tokenizer file needs tokenizers: {INSTALL_EXTRA}") from error
    return tokenizers
