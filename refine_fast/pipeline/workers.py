"""The seam between a stage and the processes that share its work.

A stage cuts its work into shards: item i of ``count`` gives file i. Where the shards are done is
not part of a stage's key, since it does not change a byte of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Work = Callable[[Any, Path], None]
"""Called with (item, file): writes the result of one item into the file."""


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

    def share_loader(self, load: partial[Any]) -> Callable[[], Any]:
        """Makes what loads an encoder here load it in every worker; picklable.

        Args:
            load: its arguments of type ``Path`` are folders of this machine.
        """
        ...


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
