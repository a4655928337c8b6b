"""The folder of an index: segments that never change, and one file that says which of them count.

    index.json          which segments count, in order; their dead passages; the blend
    s<number>/          a segment
    dead-<number>.npy   rows of dead passages, over all segments

index.json is replaced by a rename, after everything that it names is on the disk: a kill leaves the
old index or the new. What it does not name is deleted by the next writer, before it writes.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import RefineFastError
from ...files import as_argument, atomic, fsync, fsync_all, read_json, write_json
from ..reserve import save_rows

INDEX = "index"
"""Folder in the run folder."""

FORMAT = 2


@dataclass(frozen=True)
class Manifest:
    """The content of index.json."""

    key: dict[str, Any]
    """What the first segment was built from; another one means a rebuild."""
    segments: tuple[str, ...]
    """Names, the run's own passages first, if it has any left, then added ones."""
    dead: str | None = None
    edited: Mapping[str, str | None] = field(default_factory=dict)
    """Ids of the documents that were added, changed or removed, with a digest of what the run had
    of each at that time; None: not known."""
    blend: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Names an index that is damaged, or that cannot be read for want of permission, memory or the
    like, in place of what numpy, Arrow or faiss raise while they read it.

    Args:
        path: a file or a segment in the folder of the index.

    Raises:
        RefineFastError: in place of the exception.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise RefineFastError(
                f"index: {path} cannot be read ({error.strerror or error}); fix this and run the "
                "same command again."
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise RefineFastError(
            f"index: {path} is damaged ({type(error).__name__}: {reason}); delete {path.parent}, "
            f"run refine-fast index {as_argument(path.parent.parent)}, and add again what you had "
            "added."
        ) from None


class IndexFolder:
    """Reads and replaces an index. Writers must hold the lock of the run folder."""

    def __init__(self, run: Path) -> None:
        self.path = run / INDEX

    def manifest(self) -> Manifest | None:
        """What index.json says; None without an index, or if index.json is no JSON object.

        Raises:
            RefineFastError: if another version of refine_fast wrote it, or it is damaged.
        """
        found = read_json(self.path / "index.json")
        if not isinstance(found, dict):
            return None
        if found.get("format") != FORMAT:
            raise RefineFastError(
                f"{self.path} has format {found.get('format')}, and this version reads {FORMAT}; "
                f"delete it and run refine-fast index {as_argument(self.path.parent)}."
            )
        with readable(self.path / "index.json"):
            edited = found["edited"]
            if isinstance(edited, list):  # as it was before digests were kept
                edited = dict.fromkeys(edited)
            values = {"segments": tuple(found["segments"]), "edited": dict(edited)}
            return Manifest(**{**found, **values})

    def stamp(self) -> tuple[int, int, int] | None:
        """Differs once a writer has replaced the index, even by one that index.json describes in
        the same words; None without an index."""
        try:
            found = (self.path / "index.json").stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    @contextmanager
    def new_segment(self) -> Iterator[Path]:
        """Yields an empty folder for a segment, which is on the disk when the block ends. It
        counts once a manifest names it."""
        self.path.mkdir(parents=True, exist_ok=True)
        folder = self.path / f"s{self._next('s')}"
        folder.mkdir()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        fsync_all(folder)

    def write_dead(self, rows: np.ndarray) -> str:
        """Writes the dead rows; returns the name for the manifest."""
        name = f"dead-{self._next('dead-')}.npy"
        with atomic(self.path / name) as temporary:
            save_rows(temporary, rows)
        return name

    def commit(self, manifest: Manifest) -> None:
        """Makes ``manifest`` the index, and deletes what it does not name."""
        fsync(self.path)
        write_json(self.path / "index.json", asdict(manifest))
        fsync(self.path)
        self.sweep(manifest)

    def sweep(self, manifest: Manifest | None) -> None:
        """Deletes what ``manifest``, the index, does not name: what a killed writer has left takes
        the space that the next one needs."""
        named = () if manifest is None else (*manifest.segments, manifest.dead)
        kept = {"index.json", *named}
        for item in self.path.iterdir() if self.path.is_dir() else ():
            if item.name not in kept:
                shutil.rmtree(item) if item.is_dir() else item.unlink()

    def _next(self, prefix: str) -> int:
        """The first free number, above every one that is there: of a killed writer too."""
        stems = (item.stem.removeprefix(prefix) for item in self.path.glob(f"{prefix}*"))
        return max((int(stem) for stem in stems if stem.isdigit()), default=0) + 1
