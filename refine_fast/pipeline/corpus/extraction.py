"""Text out of PDF, Word, PowerPoint and HTML files by the workers of a run.

The process that runs the command reads the files, so that the workers need not see them, and sends
their bytes; parsing takes far longer than that (PDF: about a second per MB).

A worker must have the packages of that process: without pypdf it would skip every PDF, and with
another version it may find another text.
"""

from __future__ import annotations

import json
import platform
import warnings
from base64 import b64decode, b64encode
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...errors import RefineFastError, RefineFastWarning
from ..progress import Progress
from ..workers import Spread, Work, shard_starts
from .formats import files
from .formats.content import Content, Unreadable

READERS = ("chardet", "pypdf", "python-docx", "python-pptx")
"""Packages by which texts may differ; Python reads HTML."""
BYTES_PER_SHARD = 1 << 20
"""Bytes from which a shard of files is complete."""


@dataclass(frozen=True)
class Extracted:
    """What became of one file."""

    content: Sequence[str] | None
    """Title, text and markup; None if it is unreadable."""
    reason: str = ""
    """Why it is unreadable."""
    warned: Sequence[str] = ()
    """The warnings about it."""

    @classmethod
    def of(cls, path: Path, data: bytes, encoding: str | None) -> Extracted:
        """What ``files.parse`` makes of a file."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RefineFastWarning)
            try:
                content, reason = files.parse(path, data, encoding), ""
            except Unreadable as error:
                content, reason = None, str(error)
        ours = [str(each.message) for each in caught if each.category is RefineFastWarning]
        return cls(content, reason, ours)

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
    """What became of each of ``paths``, files of a suffix in ``files.EXTRACTED``.

    Args:
        spread: the workers.
        paths: the files.
        encoding: of HTML files; None: find it.
        progress: counts files.

    Raises:
        RefineFastError: if a worker has other packages.
    """
    found: dict[Path, Extracted] = {}

    def item(i: int) -> list[tuple[str, str]]:
        read = []
        for path in paths[cuts[i] : cuts[i + 1]]:
            try:
                read.append((str(path), b64encode(files.read_bytes(path)).decode()))
            except Unreadable as error:
                found[path] = Extracted(None, str(error))
        return read

    packages = _packages()
    cuts = shard_starts(map(_size, paths), BYTES_PER_SHARD)
    shards = spread.workers.map(
        spread.folder / "extract",
        [encoding, packages],
        partial(_extractor, encoding, packages),
        len(cuts) - 1,
        item,
    )
    for _, file in shards:
        found |= {Path(name): Extracted(*each) for name, each in json.loads(file.read_text())}
        if progress is not None:
            progress(len(found), len(paths))
    return found


def _size(path: Path) -> int:
    """Bytes of a file; 0 if that is not known, which reading it will explain."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _packages() -> dict[str, str]:
    """The versions of what reads files in this process."""
    found = {"python": platform.python_version()}
    for name in READERS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _extractor(encoding: str | None, packages: dict[str, str]) -> Work:
    here = _packages()
    if here != packages:
        differences = (
            f"{name} {here.get(name, 'missing')} (there {packages.get(name, 'missing')})"
            for name in sorted(here | packages)
            if here.get(name) != packages.get(name)
        )
        raise RefineFastError(
            "engine: a worker has other packages to read files with than the process of the "
            f"command: {', '.join(differences)}; install the same on every node, then run the same "
            "command again."
        )

    def work(item: list[tuple[str, str]], path: Path) -> None:
        found = (Extracted.of(Path(name), b64decode(data), encoding) for name, data in item)
        # as ASCII: a path that is not UTF-8 has lone surrogates
        path.write_text(
            json.dumps([(name, astuple(each)) for (name, _), each in zip(item, found, strict=True)])
        )

    return work
