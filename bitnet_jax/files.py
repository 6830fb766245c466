"""Files that are written whole or not at all, and JSON that knows when it has been damaged."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitnet_jax.errors import ConfigError

# Of every file of a sweep. 2: digests in JSON, fingerprints in checkpoints, headers in logs.
SCHEMA_VERSION = 2
DIGEST = "sha256"

# What a process that was killed leaves of `replacing`, and of orbax's like of it.
TORN = re.compile(r"\..+\.[0-9a-f]{32}|.+\.orbax-checkpoint-tmp.*", re.DOTALL)


class DamagedFile(ConfigError):
    """A file is not what was written there. reason: what is wrong with it, in a few words."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: damaged, {reason}")
        self.reason = reason


class NewerFile(ConfigError):
    """A file of a later version of this code, which this one cannot know how to read."""

    def __init__(self, where: object, version: int):
        super().__init__(
            f"{where}: schema_version={version}: this code reads up to {SCHEMA_VERSION}; use the "
            "version that wrote it, or a later one"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; once that is done, and on disk, it is renamed over `path`.

    No other thread, process or host has the same name. After an exception nothing is left of it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def creating_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside `path` to write to; once that is done it is renamed to `path`.

    After an exception nothing is left of it. `path` must not exist.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_torn(directory: Path) -> None:
    """Remove what writers that were killed have left in a directory of what they wrote.

    For who is alone there: what somebody is about to write would go, too.
    """
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if not TORN.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, however it is laid out: keys sorted, no spaces.

    Raises:
      ValueError, TypeError: what JSON cannot hold; NaN, too.
    """
    # Through text once, so that keys which are no strings are sorted as they will be read.
    plain = json.loads(json.dumps(value, allow_nan=False))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the digest of all the rest as its last key."""
    rest = {key: item for key, item in value.items() if key != DIGEST}
    return {**rest, DIGEST: digest(rest)}


def unsealed(value: Any, where: object) -> dict[str, Any]:
    """What was sealed, without its digest, which is made alike in every version.

    What has `schema_version` 1 and no digest is from before there were digests: accepted.
    where: it is, for the message.

    Raises:
      ValueError: not an object, no digest, or that of something else.
      NewerFile: whole, and of a later version.
    """
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    rest = {key: item for key, item in value.items() if key != DIGEST}
    version = rest.get("schema_version")
    if DIGEST not in value and version != 1:
        raise ValueError("it has no digest")
    if DIGEST in value and value[DIGEST] != digest(rest):
        raise ValueError("its digest is not that of its content")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise NewerFile(where, version)
    return rest


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object whole or not at all, sealed."""
    with replacing(path) as temporary:
        text = json.dumps(sealed(value), indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object that `write_json` wrote, `unsealed`.

    Raises:
      DamagedFile: empty, cut off, no JSON, not an object, without a digest or with another.
      NewerFile: whole, and of a later version.
      OSError: it cannot be read at all.
    """
    content = path.read_bytes()
    if not content:
        raise DamagedFile(path, "it is empty")
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, "it is not JSON") from error
    try:
        return unsealed(value, path)
    except NewerFile:
        raise
    except ValueError as error:
        raise DamagedFile(path, str(error)) from error


def within(directory: Path, *paths: Path) -> None:
    """Refuse what leads out of a directory, as a symbolic link may.

    Raises:
      ConfigError: names the first of the paths that does.
    """
    root = directory.resolve()
    for path in paths:
        try:
            inside = path.resolve().is_relative_to(root)
        except (OSError, RuntimeError):  # a link that leads to itself
            inside = False
        if not inside:
            raise ConfigError(
                f"{path}: a symbolic link that leads out of {directory}; replace it with what it "
                "leads to"
            )
