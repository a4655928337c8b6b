"""Shards: files, each with a record beside it, so that a rerun redoes only those that are missing,
cut short or of another input."""

from __future__ import annotations

import hashlib
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ...files import atomic, read_json, write_json
from ..workers import Work


def digest_of(key: Any, item: Any) -> str:
    """SHA-256 of a shard's input."""
    return hashlib.sha256(json.dumps([key, item], default=str).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Shards(ABC):
    """A place for shards; picklable."""

    @contextmanager
    def found(self, name: str, digest: str) -> Iterator[Path | None]:
        """A file with the result of the input with this digest, unchanged, until the context ends;
        None if there is none."""
        record = self._record(name)
        if record is None or record["input"] != digest:
            yield None
            return
        with self._existing(name) as path:
            same = path is not None and _facts(digest, path) == record
            yield path if same else None

    def write(self, name: str, digest: str, work: Callable[[Path], None]) -> None:
        """Writes a shard, all of it or nothing, then its record.

        Args:
            name: the shard.
            digest: of its input.
            work: writes the result into the file that it is called with.
        """
        with self._new(name) as path:
            work(path)
            facts = _facts(digest, path)
        self._write_record(name, facts)

    @abstractmethod
    def where(self, name: str) -> str:
        """The path or URL of a shard, for messages."""

    @abstractmethod
    def _record(self, name: str) -> Any: ...

    @abstractmethod
    def _write_record(self, name: str, facts: dict[str, Any]) -> None: ...

    @abstractmethod
    def _existing(self, name: str) -> AbstractContextManager[Path | None]: ...

    @abstractmethod
    def _new(self, name: str) -> AbstractContextManager[Path]: ...


class FolderShards(Shards):
    """Shards in a folder that the driver and every worker see under the same path."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def where(self, name: str) -> str:
        """See ``Shards.where``."""
        return str(self._folder / name)

    def _record(self, name: str) -> Any:
        return read_json(self._folder / f"{name}.json")

    def _write_record(self, name: str, facts: dict[str, Any]) -> None:
        write_json(self._folder / f"{name}.json", facts, _this_writer())

    def _existing(self, name: str) -> AbstractContextManager[Path | None]:
        path = self._folder / name
        return nullcontext(path if path.is_file() else None)

    def _new(self, name: str) -> AbstractContextManager[Path]:
        return atomic(self._folder / name, _this_writer())


class ShardWorker:
    """One process that does shards. It prepares once for each key."""

    def __init__(self, threads: int) -> None:
        """Uses ``threads`` threads: their number decides how torch rounds."""
        import torch

        torch.set_num_threads(threads)
        self._key: str | None = None

    def do(
        self,
        key: str,
        prepare: Callable[[], Work],
        item: Any,
        shards: Shards,
        name: str,
        digest: str,
    ) -> None:
        """Does one item and writes its shard."""
        with shards.found(name, digest) as path:
            if path is not None:  # by a process that died before it could say so
                return
        if self._key != key:
            self._work, self._key = prepare(), key
        shards.write(name, digest, lambda path: self._work(item, path))


def _this_writer() -> str:
    """A worker that was given up may still be alive, and write the same bytes as its successor."""
    return f".{uuid.uuid4().hex}"


def _facts(digest: str, path: Path) -> dict[str, Any]:
    """The record of a shard."""
    return {"input": digest, "bytes": path.stat().st_size, "sha256": sha256(path)}
