"""The seam between a stage and the processes that share its work.

A stage cuts its work into shards: item i of ``count`` gives file i. Where the shards are done is
not part of a stage's key, since it does not change a byte of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Work = Callable[[Any, Path], None]
"""Called with (item, file): writes the result of one item into the file."""


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
            folder: where the files go; every worker must see it under this path.
            key: what ``prepare`` depends on, as JSON; a file of another key is redone.
            prepare: makes what does an item; called once in each process, and picklable.
            count: how many items there are.
            item: i -> item, as JSON; asked for when it is sent.

        Yields:
            (i, its file), in the order in which they are done.

        Raises:
            RefineFastError: a shard that cannot be done; the message names it and the remedy.
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
