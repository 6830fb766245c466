"""Objects under a URL: Google Cloud Storage, S3 and what speaks its language, Azure, or a folder.

A name is relative to the URL, its parts are joined by '/'. An object is written whole or not at
all, and what was written is what is read and listed next: all of these promise both. `create` is a
conditional write (If-None-Match on S3, a generation of 0 on GCS), which one of several gets.

By obstore, which finds credentials where each provider's own tools leave them, and the address of
another server in AWS_ENDPOINT_URL and the like.
"""

import contextlib
import datetime
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from bitnet_jax.errors import ConfigError, one_line

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("gs", "s3", "az", "file")
_METADATA = ("169.254.169.254", "metadata.google.internal")  # asked where nothing else has any
PATIENCE = datetime.timedelta(seconds=30)  # with one request, retries included


class Unreachable(OSError, ConfigError):
    """The store did not answer, or not with what was asked for. What is there is not known."""


def is_url(workdir: str) -> bool:
    """Whether a workdir names objects, not a folder."""
    return "://" in workdir


def open_store(url: str) -> "Store":
    """What lies under a URL.

    Raises:
      ConfigError: obstore is missing, or the URL is none that it knows.
    """
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ConfigError(f"workdir={url!r}: unknown scheme; give a folder, or one of {known}")
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise ConfigError(
            f"workdir={url!r}: object storage needs obstore; pip install -e '.[objects]'"
        ) from error
    retries = {"max_retries": 5, "retry_timeout": PATIENCE}
    options = {"mkdir": True} if scheme == "file" else {"retry_config": retries}
    try:
        return Store(from_url(url, **options), url)
    except Exception as error:  # a ValueError, or one of obstore's, which share no base with it
        raise ConfigError(f"workdir={url!r}: {_reason(error)}") from error


class Store:
    """Each method raises Unreachable where the store does not do what was asked."""

    def __init__(self, objects: "ObjectStore", url: str):
        self._objects, self.url = objects, url.rstrip("/")

    def names(self, prefix: str = "") -> dict[str, str]:
        """Names that begin with a prefix, whole parts of it, and the version of each."""
        with self._asked("list", prefix):
            pages = self._objects.list(prefix or None)
            return {item["path"]: str(item["e_tag"]) for page in pages for item in page}

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError where there is none."""
        with self._asked("read", name, or_raise=FileNotFoundError):
            return bytes(self._objects.get(name).bytes())

    def write(self, name: str, content: bytes) -> str:
        """Whatever is there. Returns the version."""
        with self._asked("write", name):
            return str(self._objects.put(name, content)["e_tag"])

    def create(self, name: str, content: bytes) -> None:
        """Raises FileExistsError where there is one, be it since a moment ago."""
        with self._asked("create", name, or_raise=FileExistsError):
            self._objects.put(name, content, mode="create")

    def delete(self, names: Iterable[str]) -> None:
        """Those that are there."""
        for name in names:
            gone = FileNotFoundError
            with contextlib.suppress(gone), self._asked("delete", name, or_raise=gone):
                self._objects.delete(name)

    @contextlib.contextmanager
    def _asked(self, what: str, name: str, or_raise: type[OSError] | None = None) -> Iterator[None]:
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            exists = isinstance(error, AlreadyExistsError)
            kind = FileExistsError if exists else type(error)
            if or_raise is not None and issubclass(kind, or_raise):
                raise or_raise(name) from error
            raise Unreachable(f"{self.url}/{name}: cannot {what} it ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """obstore tells of every layer; the first line says what happened, mostly."""
    text = str(error)
    if "NoSuchBucket" in text:
        return "there is no such bucket"
    if any(address in text for address in _METADATA):
        return "no credentials were found here, nor a cloud's machine that has some"
    lines = text.strip().splitlines() or [type(error).__name__]
    return one_line(lines[0])[:200]
