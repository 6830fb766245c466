"""From text sources to a corpus directory, in one pass over the text and in bounded memory."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bitnet_jax.data import corpus, wikitext
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.readers import Document, Source, open_sources
from bitnet_jax.data.tokenizers import Tokenizer, open_tokenizer

_BATCH_BYTES = 1 << 22  # text that is tokenized at once, in parallel by `tokenizers`
_PROGRESS_BYTES = 100_000_000

_logger = logging.getLogger(__name__)


def prepare(
    sources: Sequence[str],
    tokenizer: str,
    out: str | Path,
    *,
    valid_fraction: float = 0.01,
    seed: int = 0,
    valid_sources: Sequence[str] | None = None,
    text_field: str = "text",
    most_bytes: int | None = None,
    keep_duplicates: bool = False,
) -> dict[str, Any]:
    """Tokenizes text into a corpus directory and returns its manifest.

    Whole documents go to training or to validation, by a hash of their text and `seed`. A document
    that was there before, but for white space, is left out, as is one of training that validates: a
    loss on text that was trained on says nothing, and what is repeated is no new token to a law.
    An end-of-text token stands between two documents. The source `wikitext-2` alone comes with its
    own validation text. The directory appears at once and complete, or not at all.

    Args:
      sources: paths, directories, globs, `hf:NAME[:CONFIG[:SPLIT]]`, or `wikitext-2`.
      tokenizer: `bytes`, or a file of the `tokenizers` library.
      out: the directory to make. One with the same content is left as it is.
      valid_fraction: the expected part of the documents that validates; unused with
        `valid_sources`.
      valid_sources: the validation text, if it is not to be split off.
      most_bytes: of the sources' text, up to the end of the document that passes it; None for all.
      keep_duplicates: equal documents stay, on the same side of a split; those of `valid_sources`
        are left out of training all the same.

    Raises:
      DataError: sources that cannot be read, an empty split, an `out` with other content.
    """
    encoder = open_tokenizer(tokenizer)
    if valid_sources is None and list(sources) == [wikitext.NAME]:
        valid_sources = sources
    return build(
        Path(out),
        encoder,
        _open(sources, "train", text_field),
        _open(valid_sources or [], "valid", text_field),
        valid_fraction=valid_fraction,
        seed=seed,
        text_field=text_field,
        most_bytes=most_bytes,
        keep_duplicates=keep_duplicates,
    )


def build(
    out: Path,
    encoder: Tokenizer,
    train: list[Source],
    valid: list[Source],
    *,
    valid_fraction: float = 0.01,
    seed: int = 0,
    text_field: str = "text",
    most_bytes: int | None = None,
    keep_duplicates: bool = False,
) -> dict[str, Any]:
    """`prepare` behind the names: the same, of opened sources. Without `valid` it splits."""
    _check_disjoint(train, valid)
    if not valid and not 0 < valid_fraction < 1:
        raise DataError(f"valid_fraction={valid_fraction}: must lie between 0 and 1")
    if not -(2**63) <= seed < 2**63:  # it is a hash's key, of at most 64 bytes
        raise DataError("seed: a whole number of 64 bits")
    if most_bytes is not None and most_bytes < 1:
        raise DataError(f"most_bytes={most_bytes}: must be positive")
    name = out.resolve().name
    if not name or not name.isprintable():
        raise DataError(f"out {str(out)!r}: name a directory; its name is the corpus's")
    files = [("train", source) for source in train] + [("valid", source) for source in valid]
    # What is known beforehand, and makes two corpora the same.
    request = {
        "schema": corpus.SCHEMA,
        "name": name,
        "tokenizer": {"name": encoder.name, "sha256": encoder.sha256},
        "vocab_size": encoder.vocab_size,
        "dtype": corpus.token_dtype(encoder.vocab_size).name,
        "eot_token": encoder.eot_token,
        "valid_fraction": None if valid else valid_fraction,
        "seed": None if valid else seed,
        "text_field": text_field,
        "most_bytes": most_bytes,
        "keep_duplicates": keep_duplicates,
        "sources": [{"split": s, "name": f.name, "sha256": f.sha256} for s, f in files],
    }
    existing = _existing(out, request)
    if existing is not None:
        return existing
    choose = (lambda text: "train") if valid else _hash_split(valid_fraction, seed)
    with corpus.building(out) as partial:
        seen = _Seen(keep_duplicates)
        counts = _write(partial, encoder, train, valid, choose, most_bytes, seen)
        if encoder.path is not None:
            shutil.copyfile(encoder.path, partial / "tokenizer.json")
        corpus.write_manifest(partial, {**request, "splits": counts})
    return {**request, "splits": counts}


def _open(names: Sequence[str], split: str, text_field: str) -> list[Source]:
    files = open_sources([name for name in names if name != wikitext.NAME], text_field)
    return ([wikitext.source(split)] if wikitext.NAME in names else []) + files


def _check_disjoint(train: list[Source], valid: list[Source]) -> None:
    known = {source.sha256: source.name for source in train if source.sha256 is not None}
    for source in valid:
        if source.sha256 in known:
            raise DataError(
                f"valid {source.name}: the same content is the source {known[source.sha256]}: "
                "validation would see training text"
            )


def _existing(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of an identical corpus at `out`, or None where there is nothing yet."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise DataError(f"out {str(out)!r}: is a file; name a directory")
    if not any(out.iterdir()):
        return None
    try:
        manifest = corpus.load(out).manifest
    except DataError:
        manifest = {}
    before = {"keep_duplicates": True}  # when there was no choice
    if {key: (before | manifest).get(key) for key in request} != request:
        raise DataError(f"out {str(out)!r}: has other content; remove it or name another")
    _logger.info("%s: already prepared from the same sources", out)
    return manifest


def _hash_split(valid_fraction: float, seed: int) -> Callable[[bytes], str]:
    threshold = int(valid_fraction * 2**64)

    def split(text: bytes) -> str:
        digest = hashlib.blake2b(text, digest_size=8, key=str(seed).encode()).digest()
        return "valid" if int.from_bytes(digest, "little") < threshold else "train"

    return split


class _Seen:
    """Documents by a hash of their words, which takes some hundred bytes for each.

    keep: equal ones stay, but for training's that validate.
    """

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._digests: set[bytes] = set()

    def new(self, document: Document, split: str) -> bool:
        """Whether it was not there before; `valid` is asked for first. What follows in a running
        text always is."""
        if not document.separated or (self._keep and split == "train" and not self._digests):
            return True
        words = b" ".join(document.text.split())
        digest = hashlib.blake2b(words, digest_size=16).digest()
        known, validates = digest in self._digests, split == "valid"
        if validates or not self._keep:
            self._digests.add(digest)
        return not known or (validates and self._keep)


def _write(
    partial: Path,
    encoder: Tokenizer,
    train: list[Source],
    valid: list[Source],
    choose: Callable[[bytes], str],
    most_bytes: int | None,
    seen: _Seen,
) -> dict[str, Any]:
    """Writes both splits, `choose` dividing the documents of `train`; returns their counts.

    What validates comes first, so that it is training's that is left out.
    """
    writers = {
        name: corpus.SplitWriter(partial, name, encoder.vocab_size, encoder.eot_token)
        for name in corpus.SPLITS
    }
    dropped = dict.fromkeys(corpus.SPLITS, 0)
    try:
        for split, sources, most, split_of in (
            ("valid", valid, None, lambda text: "valid"),
            ("train", train, most_bytes, choose),
        ):
            for batch in _batches(_documents(sources, most)):
                kept = [document for document in batch if seen.new(document, split)]
                dropped[split] += len(batch) - len(kept)
                for document, ids in zip(kept, encoder.encode(kept), strict=True):
                    writer = writers[split_of(document.text)]
                    writer.add(ids, len(document.text), document.separated)
        documents = sum(writer.documents for writer in writers.values())
        for name, writer in writers.items():
            if not writer.documents:
                raise DataError(
                    f"the {name} split is empty ({documents} documents in all, "
                    f"{sum(dropped.values())} duplicates left out): change valid_fraction or seed, "
                    "or give the validation text as --valid=PATH"
                )
        return {
            name: writer.finish() | {"duplicates": dropped[name]}
            for name, writer in writers.items()
        }
    finally:
        for writer in writers.values():
            writer.close()


def _documents(sources: list[Source], most_bytes: int | None) -> Iterator[Document]:
    """Of all sources in turn, until so many bytes are there."""
    left = math.inf if most_bytes is None else most_bytes
    for source in sources:
        for document in source.documents():
            yield document
            left -= len(document.text)
            if left <= 0:
                return


def _batches(source: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of some megabytes; says how far it is at every 100 MB."""
    batch: list[Document] = []
    size = done = documents = 0
    for document in source:
        batch.append(document)
        size += len(document.text)
        if size < _BATCH_BYTES:
            continue
        yield batch
        documents += len(batch)
        if (done + size) // _PROGRESS_BYTES > done // _PROGRESS_BYTES:
            _logger.info("%d MB, %d documents", (done + size) // 1_000_000, documents)
        done += size
        batch, size = [], 0
    if batch:
        yield batch
