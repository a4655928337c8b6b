"""The seam between a stage and the processes that share its work.

A stage cuts its work into shards: item i of ``count`` gives file i. Where the shards are done is
not part of a stage's key, since it does not change a byte of the result. Nor is it where training
is done, which changes no more than the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Work = Callable[[Any, Path], None]
"""Called with (item, file): writes the result of one item into the file."""


Hear = Callable[..., None]
"""Called with ("say", line), ("warn", line) or ("progress", step, steps, note)."""


@dataclass(frozen=True)
class Part:
    """A folder of which only some files and subfolders are needed."""

    folder: Path
    names: tuple[str, ...]


class SharedRows(Protocol):
    """Rows of an array that every worker can read; picklable."""

    def read(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows ``begin`` to ``end``, one of the spans in which they were shared; a read-only map.
        By default, all of rows that were shared in one span."""
        ...


class Workers(Protocol):
    """Processes that do shards."""

    def map(
        self,
        folder: Path,
        key: Any,
        prepare: Callable[[], Work],
        count: int,
        item: Callable[[int], Any],
    ) -> Iterator[tuple[int, Path]]:
        """Does every shard that ``folder`` does not hold yet.

        Args:
            folder: where the files go. Workers whose shards are on object storage keep them under
                its name there; other workers must see it under this path.
            key: what ``prepare`` depends on, as JSON; a file of another key is redone.
            prepare: makes what does an item; called once in each process, and picklable.
            count: how many items there are.
            item: i -> item, as JSON; asked for when it is sent.

        Yields:
            (i, its file), in the order in which they are done. The file may be gone when the next
            one is asked for.

        Raises:
            RefineFastError: a shard that cannot be done; the message names it and the remedy.
        """
        ...

    def share_rows(
        self, folder: Path, rows: np.ndarray, spans: Sequence[tuple[int, int]]
    ) -> SharedRows:
        """Makes rows readable in every worker.

        Args:
            folder: a folder of these rows alone, under that of the stage.
            rows: (n, d); a ``np.memmap`` is the map of a whole .npy file.
            spans: (begin, end) of what a worker reads at a time.
        """
        ...

    def share_loader(self, load: partial[Any]) -> Callable[..., Any]:
        """Makes what loads an encoder here load it in every worker; picklable.

        Args:
            load: its arguments of type ``Path`` are folders of this machine. Those of type ``Part``
                become the path of a folder that holds the part.
        """
        ...

    def train(
        self,
        folder: Path,
        key: str,
        work: partial[Any],
        outputs: Sequence[str],
        *,
        most: int,
        hear: Hear,
    ) -> bool:
        """Trains in several of the workers, unless there is none for it.

        Workers that die are replaced, as far as there is room, and training resumes from its last
        checkpoint.

        Args:
            folder: the stage's folder; or one under it.
            key: of the stage; what was saved for another is not resumed.
            work: called in each worker, in torchrun's environment, with (folder, hear, save)
                besides its own arguments, which are those of ``share_loader``: the folder to train
                in; what to call with news, which only those of rank 0 reach; what rank 0 must call
                when it has written something there that is to survive the worker.
            outputs: files and folders that rank 0 leaves in its folder.
            most: how many workers have use, at most, unless the user asked for a number.
            hear: is told the news.

        Returns:
            Whether ``folder`` holds the outputs. Otherwise this process is to train.

        Raises:
            RefineFastError: if there are fewer workers than the user asked for, or if they died
                too often; the message names the remedy.
        """
        ...


def shard_starts(sizes: Iterable[int], size: int) -> list[int]:
    """Where shards of consecutive items start, then the number of items. A shard ends once its
    items and those before it pass a multiple of ``size``."""
    before = np.cumsum([0, *sizes], dtype=np.int64)
    starts = np.flatnonzero(np.diff(before[:-1] // size, prepend=-1))
    return [*starts.tolist(), len(before) - 1]


@dataclass(frozen=True)
class Spread:
    """How a stage spreads its work."""

    workers: Workers
    folder: Path
    """Where its shards go."""
    load: Callable[[], Any] | None = None
    """Loads the encoder, or what the stage needs of it, in another process; picklable."""
    name: Any = None
    """What ``load`` loads, as JSON."""
