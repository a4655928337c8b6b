"""Ray actors as the workers of a run. The only module that imports ray, and only when it is used.

Each actor takes as many cores as this process has threads, because their number decides how torch
rounds: the files of a run are then the very bytes of a run without an engine on such cores. On a
cluster with GPUs each actor takes one.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import RefineFastError
from ..workers import Work
from .shards import ShardWorker, digest_of, is_complete

LOCAL = "local"
"""The engine that is none: one process does everything."""
RETRIES = 3
"""How often a shard is given out again after its actor died."""
AHEAD = 2
"""Shards that are sent to an actor at a time: one waits while one is done."""
OBJECT_STORE = 512 << 20
"""Bytes of shared memory of a Ray that is started here; it holds the shards' texts on their way."""


@contextmanager
def open_workers(engine: str, say: Callable[[str], None]) -> Iterator[RayWorkers | None]:
    """The workers of an engine, until the context ends; None for "local".

    Args:
        engine: "local"; "ray", which joins the cluster on this machine or starts one; or the
            address of a cluster, "ray://HOST:PORT".
        say: is told what cluster was found.

    Raises:
        RefineFastError: if Ray is not installed.
    """
    if engine == LOCAL:
        yield None
        return
    if find_spec("ray") is None:
        raise RefineFastError("engine: needs Ray; pip install 'refine-fast[ray]'.")
    workers = RayWorkers(engine, say)
    try:
        yield workers
    finally:
        workers.close()


class RayWorkers:
    """A pool of actors, which connects and starts when the first shard needs it."""

    def __init__(self, engine: str, say: Callable[[str], None]) -> None:
        self._engine, self._say = engine, say
        self._actors: list[Any] = []
        self._ours = False

    def map(
        self,
        folder: Path,
        key: Any,
        prepare: Callable[[], Work],
        count: int,
        item: Callable[[int], Any],
    ) -> Iterator[tuple[int, Path]]:
        """See ``Workers.map``. A shard whose actor dies is done again by the restarted actor; nodes
        that join are used from the next shard on."""
        folder.mkdir(parents=True, exist_ok=True)
        shared: Any = None
        running: dict[Any, tuple[int, Path, Any]] = {}
        load: Counter[Any] = Counter()
        for i in range(count):
            asked, path = item(i), folder / f"{i:06d}"
            digest = digest_of(key, asked)
            if is_complete(path, digest):
                yield i, path
                continue
            import ray

            if shared is None:
                self._connect()
                shared = ray.put(prepare)
            self._grow(count - i + len(running))
            while len(running) >= AHEAD * len(self._actors):
                yield self._next(running, load, count)
            actor = min(self._actors, key=lambda actor: load[actor])
            load[actor] += 1
            ref = actor.do.remote(digest_of(key, None), shared, asked, path, digest)
            running[ref] = i, path, actor
        while running:
            yield self._next(running, load, count)

    def close(self) -> None:
        """Ends the actors, and the cluster if it was started here."""
        if not self._actors and not self._ours:
            return
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._ours:
            ray.shutdown()

    def _next(
        self, running: dict[Any, tuple[int, Path, Any]], load: Counter[Any], count: int
    ) -> tuple[int, Path]:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        [done], _ = ray.wait(list(running), num_returns=1)
        i, path, actor = running.pop(done)
        load[actor] -= 1
        try:
            ray.get(done)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise RefineFastError(
                f"engine: the worker of shard {i + 1} of {count} ({path}) died {RETRIES + 1} times "
                f"({' '.join(str(error).split())[:200]}); give the workers more memory, then run "
                "the same command again: finished shards are kept."
            ) from None
        return i, path

    def _connect(self) -> None:
        if self._actors:
            return
        self._ours = connect(self._engine)
        self._say(f"engine: Ray with {_size()}")

    def _grow(self, shards: int) -> None:
        """Starts the actors that the cluster has room for, as many as there are shards."""
        import ray
        import torch

        threads = torch.get_num_threads()
        having = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs: dict[str, int] = {"num_cpus": threads}
        room = sum(int(node.get("CPU", 0)) // threads for node in having)
        if gpus := sum(int(node.get("GPU", 0)) for node in having):
            needs, room = {"num_cpus": 1, "num_gpus": 1}, gpus
        if room == 0:
            cores = max((int(node.get("CPU", 0)) for node in having), default=0)
            raise RefineFastError(
                f"engine: no node of the cluster has {threads} cores, the threads of this process "
                f"that each worker needs too (the largest has {cores}); set OMP_NUM_THREADS to at "
                "most that."
            )
        actor = ray.remote(ShardWorker).options(max_restarts=-1, max_task_retries=RETRIES, **needs)
        while len(self._actors) < min(room, shards):
            self._actors.append(actor.remote(threads))


def connect(engine: str) -> bool:
    """Connects this process to Ray: to the given address, else to the cluster that runs on this
    machine, else to one that is started here.

    Returns:
        Whether this call connected; False if the process was connected already.

    Raises:
        RefineFastError: if there is no cluster at the address.
    """
    import ray

    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if "://" in engine:
        try:
            ray.init(address=engine, **quiet)
        except Exception as error:
            raise RefineFastError(
                f"engine: no Ray cluster answers at {engine} ({type(error).__name__}); check the "
                "address and its port, 10001 unless it was changed."
            ) from None
        return True
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init(
            address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet
        )
    return True


def found_cluster() -> str:
    """The cluster that ``--engine ray`` would use, in words; starts none."""
    import ray

    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        return (
            f"Ray {ray.__version__}; no cluster runs here, --engine ray starts one with "
            f"{os.cpu_count()} cores"
        )
    try:
        return f"Ray {ray.__version__}; a cluster with {_size()}"
    finally:
        if ours:
            ray.shutdown()


def _size() -> str:
    """What the cluster that this process is connected to has."""
    import ray

    resources, nodes = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
    return (
        f"{nodes} node{'s' * (nodes != 1)}, {resources.get('CPU', 0):g} cores and "
        f"{resources.get('GPU', 0):g} GPUs"
    )
