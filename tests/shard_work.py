"""Work for the tests of workers: it doubles its items and keeps a log of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from refine_fast.pipeline.cluster.ray_workers import RayWorkers
from refine_fast.pipeline.workers import Work


def doubling(log: Path, dies_at: int | None = None) -> Callable[[], Work]:
    """Work that writes twice its item, and a line into the log; the first process that gets the
    item ``dies_at`` is killed by it. Functions within this one travel by value."""

    def prepare() -> Work:
        def work(item: int, path: Path) -> None:
            with log.open("a") as file:
                file.write(f"{item}\n")
            if item == dies_at and log.read_text().split().count(str(item)) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            path.write_text(str(2 * item))

        return work

    return prepare


def done_by(
    workers: RayWorkers,
    folder: Path,
    prepare: Callable[[], Work],
    count: int = 8,
    key: str = "doubling",
) -> dict[int, str]:
    """Item -> what its shard holds. Workers keep what they prepared for a key, and its log."""
    shards = workers.map(folder, [key, folder], prepare, count, lambda i: i)
    return {i: path.read_text() for i, path in shards}
