"""How the driver and the workers exchange files: in folders that all of them see, unless
``--shards`` names object storage (``object_exchange``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..reserve import save_rows
from ..workers import Part, SharedRows
from .shards import FolderShards, Shards


class SharedFolder(Protocol):
    """A folder in which workers work; picklable."""

    def opened(self) -> AbstractContextManager[Path]:
        """Of a worker: the folder with what was saved last, until the context ends."""
        ...

    def save(self, folder: Path) -> None:
        """Of a worker: keeps what the opened ``folder`` holds now, all of it or what was saved
        before."""
        ...

    def fetch(self, names: Sequence[str], folder: Path) -> None:
        """Of the driver: copies what was saved under these names into ``folder``."""
        ...


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

    def share_loader(self, load: partial[Any]) -> Callable[..., Any]:
        """See ``Workers.share_loader``."""
        ...

    def share_folder(self, folder: Path, key: str) -> SharedFolder:
        """Makes a folder of the driver one in which workers work.

        Args:
            folder: the stage's folder.
            key: what was saved under another is not seen.
        """
        ...

    def discard(self, folder: Path) -> None:
        """Deletes the shards of a stage, if there are any, where the run folder does not hold them.

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
        save_rows(folder / "rows.npy", rows)
        return RowsOfFile(folder / "rows.npy")

    def share_loader(self, load: partial[Any]) -> Callable[..., Any]:
        """See ``Workers.share_loader``."""

        def whole(value: Any) -> Any:
            return value.folder if isinstance(value, Part) else value

        options = {name: whole(value) for name, value in load.keywords.items()}
        return partial(load.func, *map(whole, load.args), **options)

    def share_folder(self, folder: Path, key: str) -> SharedFolder:
        """See ``Exchange.share_folder``."""
        return SameFolder(folder)

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


@dataclass(frozen=True)
class SameFolder:
    """A folder that driver and workers see under the same path."""

    folder: Path

    def opened(self) -> AbstractContextManager[Path]:
        """See ``SharedFolder.opened``."""
        return nullcontext(self.folder)

    def save(self, folder: Path) -> None:
        """See ``SharedFolder.save``: it is there."""

    def fetch(self, names: Sequence[str], folder: Path) -> None:
        """See ``SharedFolder.fetch``: it is there."""
