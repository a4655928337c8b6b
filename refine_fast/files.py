"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to: on success it becomes ``path``, all of it or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves is overwritten by the rerun
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Puts a file, or the names in a folder, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_all(path: Path) -> None:
    """``fsync`` of a file, or of a folder and all that is in it."""
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        fsync(item)
