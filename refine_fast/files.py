"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def name_of(path: str | os.PathLike[str]) -> str:
    """The path as text that can be written: bytes in it that are no UTF-8 become ``\\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def walk(root: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[Path, str]]:
    """(file, its path relative to ``root``) of all that is in a folder, in a fixed order: links followed, hidden files and folders left
    out, each real folder and each real file once, so that a loop of links ends. ``onerror`` is told of a folder that cannot be read."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=onerror):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            if (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                yield path, name_of(path.relative_to(root))


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


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as JSON, all of the file or nothing."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The JSON value in the file; None if the file is missing or incomplete."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
