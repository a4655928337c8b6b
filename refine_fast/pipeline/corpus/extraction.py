"""Text out of PDF, Word, PowerPoint and HTML files by the workers of a run.

The process that runs the command reads the files, so that the workers need not see them, and sends
their bytes; parsing takes far longer than that (PDF: about a second per MB).
"""

from __future__ import annotations

import warnings
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...errors import RefineFastWarning
from ..progress import Progress
from ..workers import Spread, Work, shard_starts
from .formats.content import Content, Unreadable
from .formats.files import parse, read_bytes
from .jsonl import read_records, write_records

BYTES_PER_SHARD = 1 << 20
"""Bytes from which a shard of files is complete."""


@dataclass(frozen=True)
class Extracted:
    """What became of one file."""

    path: str
    content: Sequence[str] | None
    """Title, text and markup; None if it is unreadable."""
    reason: str = ""
    """Why it is unreadable."""
    warned: Sequence[str] = ()
    """The warnings about it."""

    @classmethod
    def of(cls, path: str, data: bytes, encoding: str | None) -> Extracted:
        """What ``parse`` makes of a file."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RefineFastWarning)
            try:
                content, reason = parse(Path(path), data, encoding), ""
            except Unreadable as error:
                content, reason = None, str(error)
        ours = [str(each.message) for each in caught if each.category is RefineFastWarning]
        return cls(path, content, reason, ours)

    def get(self) -> Content:
        """The content, after the warnings about it.

        Raises:
            Unreadable: if there is none.
        """
        for message in self.warned:
            warnings.warn(message, RefineFastWarning, stacklevel=2)
        if self.content is None:
            raise Unreadable(self.reason)
        return Content(*self.content)  # type: ignore[arg-type]


def extract_in_shards(
    spread: Spread, paths: Sequence[Path], encoding: str | None, progress: Progress | None = None
) -> dict[Path, Extracted]:
    """What became of each of ``paths``, files of a suffix in ``EXTRACTED``.

    Args:
        spread: the workers.
        paths: the files.
        encoding: of HTML files; None: find it.
        progress: counts files.
    """
    found: dict[Path, Extracted] = {}

    def item(i: int) -> list[tuple[str, str]]:
        files = []
        for path in paths[cuts[i] : cuts[i + 1]]:
            try:
                files.append((str(path), b64encode(read_bytes(path)).decode()))
            except Unreadable as error:
                found[path] = Extracted(str(path), None, str(error))
        return files

    cuts = shard_starts(map(_size, paths), BYTES_PER_SHARD)
    shards = spread.workers.map(
        spread.folder / "extract", encoding, partial(_extractor, encoding), len(cuts) - 1, item
    )
    for _, file in shards:
        found |= {Path(each.path): each for each in read_records(file, Extracted)}
        if progress is not None:
            progress(len(found), len(paths))
    return found


def _size(path: Path) -> int:
    """Bytes of a file; 0 if that is not known, which reading it will explain."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _extractor(encoding: str | None) -> Work:
    def work(item: list[tuple[str, str]], path: Path) -> None:
        write_records(path, (Extracted.of(name, b64decode(data), encoding) for name, data in item))

    return work
