"""Built-in corpora by name, made on first use and kept in the user's cache."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from bitnet_jax.data import corpus, synthetic, wikitext
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.prepare import build
from bitnet_jax.data.tokenizers import ByteTokenizer

_LONGEST = 300  # characters of a name that an error quotes
BUILT_IN = (wikitext.NAME, synthetic.NAME)

_logger = logging.getLogger(__name__)


def resolve(name_or_path: str | Path, cache_dir: Path | None = None) -> Path:
    """The directory of a built-in corpus, made if need be, or of one the user prepared.

    Two processes may ask at once: both get the directory of the one that finished first.

    Raises:
      DataError: neither a built-in name nor a prepared directory, or a text that cannot be had.
    """
    name = str(name_or_path)
    if name in BUILT_IN:
        return _built_in(name, cache_dir or wikitext.cache_dir())
    path = Path(name)
    # os.path's answer of a name that is too long, or behind a closed folder, is no; pathlib raises.
    if os.path.isfile(path):
        raise DataError(
            f"data {name!r}: a file, not a prepared corpus: run "
            f"`python -m bitnet_jax.data prepare --source={name} --tokenizer=bytes --out=DIR`"
        )
    if not os.path.isfile(path / "manifest.json"):
        shown = repr(name) if len(name) <= _LONGEST else f"{name[:_LONGEST]!r}..."
        raise DataError(
            f"data {shown}: neither a built-in corpus ({', '.join(BUILT_IN)}) nor a directory "
            "made by `python -m bitnet_jax.data prepare`"
        )
    return path


def _built_in(name: str, cache: Path) -> Path:
    # A new schema gets a new folder, so that an old cache is never in the way.
    out = cache / f"v{corpus.SCHEMA}" / name
    if out.is_dir():
        return out
    _logger.info("preparing %s in %s", name, out)
    try:
        if name == synthetic.NAME:
            synthetic.prepare_synthetic(out)
        else:
            train, valid = (wikitext.source(split, cache) for split in corpus.SPLITS)
            build(out, ByteTokenizer(), [train], [valid])
    except DataError:
        if not out.is_dir():  # else another process was first, with the same content
            raise
    return out
