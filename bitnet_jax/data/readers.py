"""Text sources: files of several kinds, directories and globs of them, and hub datasets.

A source is read as a stream of documents, so that no file is ever held in memory whole (a single
document is). Readable are

    .txt      documents that are separated by lines `<|endoftext|>`; without any, one document
    .jsonl    a JSON object a line, the document under `text_field`
    .parquet  a row a document, in the column `text_field`

and .txt and .jsonl also with a further .gz, .xz or .zst. A directory stands for the readable files
directly in it, in the order of their names; `hf:NAME[:CONFIG[:SPLIT]]` for a dataset of the
Hugging Face hub (split `train` unless given). Documents without any text are skipped.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from bitnet_jax.data.errors import DataError, one_line

END_OF_TEXT = "<|endoftext|>"
INSTALL_EXTRA = "pip install 'bitnet_jax[data]'"
_TEXT_SUFFIXES = tuple(
    kind + packing for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".xz", ".zst")
)
_LONGEST_DOCUMENT = 1 << 30  # bytes
_PACKED_BYTES = 1 << 10  # decompressed at once; zstd can unfold each into some 30,000
_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet")


class Document(NamedTuple):
    """One document: its text as UTF-8 and where it stands, to name it in an error.

    `separated` is False for a document that follows the one before it in one running text, such
    as an article of WikiText: no end-of-text token goes between the two.
    """

    text: bytes
    where: str
    separated: bool = True


@dataclass(frozen=True)
class Source:
    """A stream of documents. `sha256` is None where the content cannot be known beforehand."""

    name: str
    sha256: str | None
    documents: Callable[[], Iterator[Document]]


def open_sources(names: Sequence[str], text_field: str = "text") -> list[Source]:
    """The sources behind paths, directories, globs and `hf:` names, one for each file.

    Raises:
      DataError: a name that matches nothing, a file of an unknown kind, a file given twice.
    """
    sources: list[Source] = []
    seen: set[Path] = set()
    for name in names:
        if name.startswith("hf:"):
            sources.append(Source(name, None, partial(_hub, name, text_field)))
            continue
        for path in _expand(name):
            if path.resolve() in seen:
                raise DataError(f"source {path}: the file is given twice")
            seen.add(path.resolve())
            read = partial(_read_file, path, text_field)
            sources.append(Source(path.name, sha256_of(path), read))
    return sources


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if os.path.isdir(path):  # pathlib raises where a name is too long
        found = sorted(p for p in path.iterdir() if p.name.endswith(_SUFFIXES))
    elif os.path.exists(path):
        found = [path]
    else:
        found = sorted(Path(match) for match in glob.glob(name, recursive=True))
        if not found:
            raise DataError(f"source {name!r}: no such file, directory or match of a glob")
    if not found:
        raise DataError(f"source {name!r}: the directory has no file {', '.join(_SUFFIXES)}")
    for file in found:
        if not file.is_file():  # a pipe would be waited for
            raise DataError(f"source {file}: not a regular file")
    for file in found:
        if not file.name.endswith(_SUFFIXES):
            raise DataError(
                f"source {file}: unknown kind of file; readable are .txt and .jsonl "
                "(also with .gz, .xz, .zst) and .parquet"
            )
    return found


def _read_file(path: Path, text_field: str) -> Iterator[Document]:
    if path.name.endswith(".parquet"):
        documents = _read_parquet(path, text_field)
    elif ".jsonl" in path.suffixes:
        documents = _read_jsonl(path, text_field)
    else:
        documents = _read_text(path)
    empty = True
    for document in documents:
        if document.text.strip():
            empty = False
            yield document
    if empty:
        raise DataError(f"{path}: the file is empty: it has no text")


def _read_text(path: Path) -> Iterator[Document]:
    lines: list[bytes] = []
    first, size = 1, 0
    for number, line in enumerate(_lines(path), 1):
        if line.rstrip(b"\r\n") == END_OF_TEXT.encode():
            yield _text_document(path, first, lines)
            lines, first, size = [], number + 1, 0
        else:
            lines.append(line)
            size += len(line)
            _check_length(f"{path}, line {first}", size)
    yield _text_document(path, first, lines)


def _check_length(where: str, size: int) -> None:
    """A document is held in memory: a small packed file may not unfold into all of it."""
    if size > _LONGEST_DOCUMENT:
        raise DataError(
            f"{where}: a document of more than {_LONGEST_DOCUMENT:,} bytes; separate documents by "
            f"lines {END_OF_TEXT} in .txt, or give each a line of .jsonl"
        )


def _text_document(path: Path, first: int, lines: list[bytes]) -> Document:
    text = b"".join(lines)
    try:
        text.decode()
    except UnicodeDecodeError as error:
        line = first + text.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{text[error.start]:02x}); convert the file"
        ) from error
    return Document(text, f"{path}, line {first}")


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        _check_length(where, len(line))
        try:
            # Given bytes, json.loads takes UTF-16, too, and halves of characters.
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except RecursionError as error:
            raise DataError(f"{where}: not JSON: it is nested too deeply") from error
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both of this kind
            raise DataError(f"{where}: not JSON: {one_line(error)}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON {type(row).__name__}, not an object")
        yield _field_document(row, text_field, where)


def _field_document(row: dict[str, Any], text_field: str, where: str) -> Document:
    if text_field not in row:
        have = ", ".join(map(repr, itertools.islice(row, 20)))
        raise DataError(f"{where}: no field {text_field!r}; it has {have:.300}")
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} is {type(text).__name__}, not a string")
    try:
        return Document(text.encode(), where)
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DataError(f"{where}: field {text_field!r} is not Unicode text: {error}") from error


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: .parquet needs pyarrow: {INSTALL_EXTRA}") from error
    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        columns = file.schema_arrow.names
        if text_field not in columns:
            have = ", ".join(columns).encode("unicode_escape").decode()
            raise DataError(f"{path}: no column {text_field!r}; it has {have:.300}")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
            for text in batch.column(text_field):
                number += 1
                row = {text_field: text.as_py()}
                yield _field_document(row, text_field, f"{path}, row {number}")
    except DataError:
        raise
    # A ValueError where text is not UTF-8, a KeyError where two columns have the name.
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {one_line(error)}") from error


def _hub(name: str, text_field: str) -> Iterator[Document]:
    _, dataset, config, split = (*name.split(":", 3), "", "")[:4]
    for number, row in enumerate(hub_rows(dataset, config or None, split or "train"), 1):
        document = _field_document(row, text_field, f"{name}, row {number}")
        if document.text.strip():
            yield document


def hub_rows(dataset: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    """Streams the rows of a Hugging Face dataset.

    Raises:
      DataError: `datasets` is not installed, or the hub or the dataset cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"hf:{dataset}: needs the package datasets: {INSTALL_EXTRA}") from error
    try:
        yield from datasets.load_dataset(dataset, config, split=split, streaming=True)
    # The library raises its own errors, requests', fsspec's and plain ones: no narrower net exists.
    except Exception as error:
        raise DataError(f"hf:{dataset}: cannot be read: {one_line(error)}") from error


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their ends, decompressed; carriage returns are kept as they are."""
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "rb"))
            unpacked = stack.enter_context(_decompressed(path, file))
            # One more than is allowed, for the reader to see that it is too long.
            yield from iter(lambda: unpacked.readline(_LONGEST_DOCUMENT + 1), b"")
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, MemoryError) as error:
        raise DataError(f"{path}: cannot be decompressed: {one_line(error)}") from error


def _decompressed(path: Path, file: IO[bytes]) -> AbstractContextManager[Any]:
    match path.suffix:
        case ".gz":
            return gzip.open(file)
        case ".xz":
            return lzma.open(file)
        case ".zst":
            return io.BufferedReader(_ZstdReader(path, file), buffer_size=1 << 20)
    return file


class _ZstdReader(io.RawIOBase):
    """zstandard's own reader ends a truncated file without a word; this one raises EOFError."""

    def __init__(self, path: Path, file: IO[bytes]):
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path}: .zst needs zstandard: {INSTALL_EXTRA}") from error
        self._zstandard = zstandard
        self._file = file
        self._frame: Any = None
        self._unread = b""  # compressed, behind the end of a frame
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            packed = self._unread or self._file.read(_PACKED_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._decompress(packed)
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _decompress(self, packed: bytes) -> None:
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(packed))
        except self._zstandard.ZstdError as error:
            raise EOFError(one_line(error)) from error
        self._unread = b""
        if self._frame.eof:
            self._unread, self._frame = self._frame.unused_data, None
