"""Ray actors as the workers of a run, of its shards and of its training.

Each actor takes as many cores as this process has threads, because their number decides how torch
rounds: the files of a run are then the very bytes of a run without an engine on such cores. On a
cluster with GPUs each actor takes one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...errors import RefineFastError
from ..workers import Hear, SharedRows, Work
from .exchange import Exchange, FolderExchange
from .object_exchange import ObjectExchange
from .object_path import ObjectPath
from .ray_cluster import (
    connect,
    line_of,
    needs_in_words,
    raised_by,
    room_for,
    size,
    threads_for,
)
from .ray_ranks import train_on_ranks
from .shards import Shards, ShardWorker, digest_of

LOCAL = "local"
"""The engine that is none: one process does everything."""
RETRIES = 3
"""How often a shard is given to another actor after its actor died, and how many actors in a row
may die while they start."""
AHEAD = 2
"""Shards that are sent to an actor at a time: one waits while one is done."""
PATIENCE = 60.0
"""Seconds without any actor after which the user is told what is waited for."""


@contextmanager
def open_workers(
    engine: str,
    say: Callable[[str], None],
    shards: str | None = None,
    root: Path = Path(),
    trainers: int | Literal["auto"] = "auto",
) -> Iterator[RayWorkers | None]:
    """The workers of an engine, until the context ends; None for "local".

    Args:
        engine: "local"; "ray", which joins the cluster on this machine or starts one; or the
            address of a cluster, "ray://HOST:PORT".
        say: is told what cluster was found.
        shards: the URL under which driver and workers exchange files; None: they see the same
            folders.
        root: the folder that holds the stages' folders.
        trainers: how many workers train; "auto": one for each GPU of the cluster.

    Raises:
        RefineFastError: if Ray is not installed, or the URL cannot be used.
    """
    if engine == LOCAL:
        yield None
        return
    if find_spec("ray") is None:
        raise RefineFastError("engine: needs Ray; pip install 'refine-fast[ray]'.")
    exchange: Exchange = FolderExchange()
    if shards is not None:
        place = ObjectPath(shards)
        place.check()
        exchange = ObjectExchange(place, root)
    workers = RayWorkers(engine, say, exchange, trainers)
    try:
        yield workers
        exchange.close()
    finally:
        workers.close()


@dataclass(eq=False)
class _Shard:
    """A shard that is to be done."""

    i: int
    item: Any
    digest: str
    deaths: int = 0
    """How many workers died while they had it."""

    @property
    def name(self) -> str:
        """Its name among the shards."""
        return f"{self.i:06d}"


class RayShardWorker(ShardWorker):
    """A worker in an actor."""

    def start(self) -> str:
        """The id of its node, once it can do shards."""
        import ray

        return ray.get_runtime_context().get_node_id()


class RayWorkers:
    """A pool of actors, which connects and starts when the first shard needs it."""

    def __init__(
        self,
        engine: str,
        say: Callable[[str], None],
        exchange: Exchange | None = None,
        trainers: int | Literal["auto"] = "auto",
    ) -> None:
        self._engine, self._say, self._trainers = engine, say, trainers
        self._exchange = exchange or FolderExchange()
        self._actors: dict[Any, str] = {}  # actor -> its node
        self._starting: dict[Any, Any] = {}  # reference to the node -> actor
        self._failures = 0  # actors in a row that died before they had started
        self._patience: float | None = PATIENCE  # None: the user was told
        self._ours: bool | None = None  # whether this connected the process; None: not yet

    def map(
        self,
        folder: Path,
        key: Any,
        prepare: Callable[[], Work],
        count: int,
        item: Callable[[int], Any],
    ) -> Iterator[tuple[int, Path]]:
        """See ``Workers.map``. The shards of an actor that dies are given to others; nodes that
        join are used from the next shard on."""
        shards = self._exchange.shards(folder)
        shared: Any = None
        unsent = _items(key, count, item)
        again: list[_Shard] = []
        running: dict[Any, tuple[_Shard, Any]] = {}
        while (shard := again.pop() if again else next(unsent, None)) or running:
            if shard is None:
                yield from self._next(shards, running, again, count)
                continue
            with shards.found(shard.name, shard.digest) as path:
                if path is not None:
                    yield shard.i, path
                    continue
            if shared is None:
                import ray

                self._connect()
                shared = ray.put(prepare)
            while (actor := self._free(running, count - shard.i + len(running))) is None:
                yield from self._next(shards, running, again, count)
            prepared = digest_of([folder.name, key], None)  # steps of a stage may share a key
            ref = actor.do.remote(prepared, shared, shard.item, shards, shard.name, shard.digest)
            running[ref] = shard, actor

    def share_rows(
        self, folder: Path, rows: np.ndarray, spans: Sequence[tuple[int, int]]
    ) -> SharedRows:
        """See ``Workers.share_rows``."""
        return self._exchange.share_rows(folder, rows, spans)

    def share_loader(self, load: partial[Any]) -> Callable[..., Any]:
        """See ``Workers.share_loader``."""
        return self._exchange.share_loader(load)

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
        """See ``Workers.train``."""
        import torch

        if (count := self._count_trainers(most)) == 0:
            return False
        self._end_actors()  # they hold the cores and GPUs that the ranks need
        shared = self._exchange.share_folder(folder, key)
        there = self._exchange.share_loader(work)
        train_on_ranks(there, shared, threads_for(torch.get_num_threads()), count, hear)
        shared.fetch(outputs, folder)
        return True

    def discard(self, folder: Path) -> None:
        """Deletes the shards of a stage that is done, or was stopped and is not wanted any more.
        See ``Exchange.discard``."""
        self._exchange.discard(folder)

    def close(self) -> None:
        """Ends the actors, and the cluster if it was started here."""
        if self._ours is None:
            return
        import ray

        self._end_actors()
        if self._ours:
            ray.shutdown()
        self._ours = None

    def _end_actors(self) -> None:
        import ray

        for actor in [*self._actors, *self._starting.values()]:
            ray.kill(actor)
        self._actors, self._starting = {}, {}

    def _count_trainers(self, most: int) -> int:
        """How many ranks train; 0: this process does."""
        import ray
        import torch

        if self._trainers == 0:
            return 0
        self._connect()
        if self._trainers == "auto":
            return min(most, int(ray.cluster_resources().get("GPU", 0)))
        needs, room = room_for(torch.get_num_threads())
        if self._trainers > room:
            fewer = "" if "num_gpus" in needs else ", or set OMP_NUM_THREADS to less"
            raise RefineFastError(
                f"train_workers: the cluster has room for {room} training processes of "
                f"{needs_in_words(needs)} each (got {self._trainers}); give --train-workers "
                f"{room}{fewer}."
            )
        return self._trainers

    def _free(self, running: dict[Any, tuple[_Shard, Any]], shards: int) -> Any:
        """The actor with the fewest shards; None if that has enough."""
        self._grow(shards)
        load = Counter(actor for _, actor in running.values())
        actor = min(self._actors, key=load.__getitem__, default=None)
        most = 1 if self._starting else AHEAD  # leaves some to those that start
        return actor if actor is not None and load[actor] < most else None

    def _next(
        self,
        shards: Shards,
        running: dict[Any, tuple[_Shard, Any]],
        again: list[_Shard],
        count: int,
    ) -> Iterator[tuple[int, Path]]:
        """Waits until a shard is done, or an actor has started or died."""
        import ray
        import torch
        from ray.exceptions import RayError, RayTaskError

        timeout = None if self._actors else self._patience
        ready, _ = ray.wait([*running, *self._starting], num_returns=1, timeout=timeout)
        if not ready:
            self._patience = None
            self._say(
                "  no worker has started yet: the cluster is busy with other work, or has "
                f"no node with {needs_in_words(room_for(torch.get_num_threads())[0])} to spare; "
                "waiting"
            )
            return
        [ref] = ready
        if actor := self._starting.pop(ref, None):
            try:
                self._actors[actor] = ray.get(ref)
                self._failures = 0
            except RayError as error:
                self._failures += 1
                if self._failures > RETRIES:
                    raise RefineFastError(
                        f"engine: {self._failures} workers in a row died while they started "
                        f"({line_of(error)}); install what this process has on every node, and "
                        "give the workers enough memory."
                    ) from None
            return
        shard, actor = running.pop(ref)
        where = shards.where(shard.name)
        try:
            ray.get(ref)
        except RayTaskError as error:
            raise raised_by(error) from None
        except RayError as error:
            self._drop(actor)
            shard.deaths += 1
            if shard.deaths > RETRIES:
                raise RefineFastError(
                    f"engine: the worker of shard {shard.i + 1} of {count} ({where}) died "
                    f"{shard.deaths} times ({line_of(error)}); give the workers more memory, then "
                    "run the same command again: finished shards are kept."
                ) from None
            again.append(shard)
            return
        with shards.found(shard.name, shard.digest) as path:
            if path is None:
                raise RefineFastError(
                    f"engine: {where} is missing or is not what its worker wrote; share the folder "
                    "of the run with every node, or add --shards with a URL that no other run "
                    "uses, then run the same command again: finished shards are kept."
                )
            yield shard.i, path

    def _connect(self) -> None:
        if self._ours is not None:
            return
        self._ours = connect(self._engine)
        self._say(f"engine: Ray with {size()}")

    def _grow(self, shards: int) -> None:
        """Starts the actors that the cluster has room for, as many as there are shards, and drops
        those whose node has left."""
        import ray
        import torch

        threads = torch.get_num_threads()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for actor in [actor for actor, node in self._actors.items() if node not in alive]:
            self._drop(actor)
        needs, room = room_for(threads)
        own_threads = threads_for(threads)
        actor_class = ray.remote(RayShardWorker).options(**needs)
        while len(self._actors) + len(self._starting) < min(room, shards):
            started: Any = actor_class.remote(own_threads)
            self._starting[started.start.remote()] = started

    def _drop(self, actor: Any) -> None:
        """Gives it no more shards, and ends it, since it may be alive where the network failed."""
        import ray

        if self._actors.pop(actor, None):
            ray.kill(actor)


def _items(key: Any, count: int, item: Callable[[int], Any]) -> Iterator[_Shard]:
    for i in range(count):
        asked = item(i)
        yield _Shard(i, asked, digest_of(key, asked))
