"""Shards on disk: a file and beside it its record, so that a rerun redoes only those that are
missing, cut short or of another input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files import atomic, read_json, write_json
from ..workers import Work


def digest_of(key: Any, item: Any) -> str:
    """SHA-256 of a shard's input."""
    return hashlib.sha256(json.dumps([key, item], default=str).encode()).hexdigest()


def is_complete(path: Path, digest: str) -> bool:
    """Whether the file holds the result of the input with this digest, unchanged."""
    record = read_json(_record(path))
    if record is None or record["input"] != digest or not path.is_file():
        return False
    return path.stat().st_size == record["bytes"] and _sha256(path) == record["sha256"]


class ShardWorker:
    """One process that does shards. It prepares once for each key."""

    def __init__(self, threads: int) -> None:
        """Uses ``threads`` threads: their number decides how torch rounds."""
        import torch

        torch.set_num_threads(threads)
        self._key: str | None = None

    def do(self, key: str, prepare: Callable[[], Work], item: Any, path: Path, digest: str) -> None:
        """Writes the shard, all of it or nothing, then its record."""
        if is_complete(path, digest):  # by a process that died before it could say so
            return
        if self._key != key:
            self._work, self._key = prepare(), key
        with atomic(path) as temporary:
            self._work(item, temporary)
        facts = {"input": digest, "bytes": path.stat().st_size, "sha256": _sha256(path)}
        write_json(_record(path), facts)


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
