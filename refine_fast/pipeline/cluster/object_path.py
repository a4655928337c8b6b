"""Objects on object storage, by their URL. The only module that imports fsspec, and only when it is
used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from ...errors import RefineFastError

PATIENCE = {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "10"}
"""How botocore asks a store that answers 503 or does not answer, unless the environment says
otherwise: 10 times within about a minute. gcsfs asks 6 times by itself."""
DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}
"""Protocols of common stores, with the package that fsspec needs for each."""
_OPTIONS: dict[str, dict[str, Any]] = {"file": {"auto_mkdir": True}}


@dataclass(frozen=True)
class ObjectPath:
    """The URL of an object or of a prefix: of any store that fsspec knows, or a local path.

    Raises:
        RefineFastError: every method, if the store cannot be used or does not answer in time; the
            message names the URL, the reason and the remedy.
    """

    url: str

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.url.rstrip('/')}/{name}")

    def check(self) -> None:
        """Writes, reads and deletes a small object under this prefix."""
        probe = self / f"probe-{uuid4().hex}"
        probe.write(b"refine_fast")
        if probe.read() != b"refine_fast":
            raise RefineFastError(
                f"shards: {self.url} does not return what was just written there; give a store "
                "with consistent reads."
            )
        probe.remove()

    def read(self) -> bytes | None:
        """The content; None if there is no such object."""
        with self._opened("read") as (files, path), suppress(FileNotFoundError):
            return bytes(files.cat_file(path))
        return None

    def write(self, content: bytes) -> None:
        """Writes the object, all of it or nothing."""
        with self._opened("written") as (files, path):
            files.pipe_file(path, content)

    def download(self, target: Path) -> bool:
        """Copies the object into a file; returns whether there is such an object."""
        with self._opened("read") as (files, path), suppress(FileNotFoundError):
            files.get_file(path, str(target))
            return True
        return False

    def upload(self, source: Path) -> None:
        """Copies a file into the object, all of it or nothing."""
        with self._opened("written") as (files, path):
            files.put_file(str(source), path)

    def size(self) -> int | None:
        """Bytes; None if there is no such object."""
        with self._opened("read") as (files, path), suppress(FileNotFoundError):
            return int(files.info(path)["size"])
        return None

    def remove(self) -> None:
        """Deletes the object and everything under its URL, if there is anything."""
        with self._opened("deleted") as (files, path), suppress(FileNotFoundError):
            files.rm(path, recursive=True)

    @contextmanager
    def _opened(self, done: str) -> Iterator[tuple[Any, str]]:
        """The file system and the path in it; ``done`` is what may fail, for the message."""
        files, path = self._file_system()
        try:
            yield files, path
        except Exception as error:  # of fsspec, of the store's own library or of its HTTP client
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split())[:300] or type(cause).__name__
            raise RefineFastError(
                f"shards: {self.url} cannot be {done} ({reason}); check the store and its "
                "credentials, then run the same command again: finished shards are kept."
            ) from None

    def _file_system(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        protocol = self.url.partition("://")[0] if "://" in self.url else "file"
        try:
            files, path = url_to_fs(self.url, **_OPTIONS.get(protocol, {}))
        except ImportError as error:
            package = DRIVERS.get(protocol)
            remedy = f"pip install {package} on every node" if package else str(error)
            raise RefineFastError(
                f"shards: {protocol}:// needs a package that is not installed; {remedy}."
            ) from None
        except Exception as error:
            raise RefineFastError(
                f"shards: {self.url} cannot be opened ({' '.join(str(error).split())[:300]}); give "
                "a URL such as s3://BUCKET/PREFIX."
            ) from None
        return files, path


def found_drivers() -> tuple[bool, str]:
    """Whether a package for object storage is installed, and which URLs work, in words."""
    found, missing = [], []
    for protocol, package in DRIVERS.items():
        try:
            found.append(f"{protocol}:// by {package} {version(package)}")
        except PackageNotFoundError:
            missing.append(f"{protocol}:// needs {package}")
    return bool(found), "; ".join(found + missing)
