"""Workers in this process, for tests: shards in any order, and no file outlives its turn."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from refine_fast.pipeline.cluster.exchange import FolderExchange
from refine_fast.pipeline.workers import Work


class ScrambledWorkers(FolderExchange):
    """Does every shard anew. ``done`` has the most that a folder of each name held."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.done: dict[str, int] = {}

    def map(
        self,
        folder: Path,
        key: Any,
        prepare: Callable[[], Work],
        count: int,
        item: Callable[[int], Any],
    ) -> Iterator[tuple[int, Path]]:
        """See ``Workers.map``."""
        folder.mkdir(parents=True, exist_ok=True)
        json.dumps(key)
        work = pickle.loads(pickle.dumps(prepare))()
        self.done[folder.name] = max(count, self.done.get(folder.name, 0))
        for i in self._random.sample(range(count), count):
            path = folder / f"{i:06d}"
            work(json.loads(json.dumps(item(i))), path)
            yield i, path
            path.unlink()
