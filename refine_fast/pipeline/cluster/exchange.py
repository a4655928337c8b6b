"""How the driver and the workers exchange files: in folders that all of them see, unless
``--shards`` names object storage (``object_exchange``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..workers import SharedRows
from .shards import FolderShards, Shards


class Exchange(Protocol):
    """Where shards are, and how workers read what the driver has."""

    def shards(self, folder: Path) -> Shards:
        """The shards that belong into a folder."""
        ...

    def share_rows(
        self, folder: Path, rows: np.ndarray, spans: Sequence[tuple[int, int]]
    ) -> SharedRows:
        """See ``Workers.share_rows``."""
        ...

    def share_loader(self, load: partial[Any]) -> Callable[[], Any]:
        """See ``Workers.share_loader``."""
        ...

    def discard(self, folder: Path) -> None:
        """Deletes the shards of a stage that is done, where the run folder does not hold them.

        Args:
            folder: the stage's folder.
        """
        ...

    def close(self) -> None:
        """Deletes what was shared for several stages, after a run that reached its end."""
        ...


class FolderExchange:
    """Driver and workers see the same folders."""

    def shards(self, folder: Path) -> Shards:
        """See ``Exchange.shards``."""
        return FolderShards(folder)

    def share_rows(
        self, folder: Path, rows: np.ndarray, spans: Sequence[tuple[int, int]]
    ) -> SharedRows:
        """See ``Workers.share_rows``. A map is read from its own file."""
        if isinstance(rows, np.memmap):
            return RowsOfFile(Path(str(rows.filename)))
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "rows.npy", rows)
        return RowsOfFile(folder / "rows.npy")

    def share_loader(self, load: partial[Any]) -> Callable[[], Any]:
        """See ``Workers.share_loader``."""
        return load

    def discard(self, folder: Path) -> None:
        """See ``Exchange.discard``: the run folder holds the shards."""

    def close(self) -> None:
        """See ``Exchange.close``: nothing was copied."""


@dataclass(frozen=True)
class RowsOfFile:
    """The rows of a .npy file."""

    path: Path

    def read(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        """See ``SharedRows.read``."""
        rows: np.ndarray = np.load(self.path, mmap_mode="r")
        return rows[begin:end]
