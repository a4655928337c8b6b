"""The Ray cluster of a run: the connection to it, and what it has. The only modules that import ray
are this one, ``ray_workers`` and ``ray_ranks``, and only when it is used.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import RefineFastError

OBJECT_STORE = 512 << 20
"""Bytes of shared memory of a Ray that is started here; it holds the shards' texts on their way."""

CONNECTIONS = 3
"""How often a connection is tried to a cluster that answers."""


def room_for(threads: int) -> tuple[dict[str, int], int]:
    """What a worker takes: a GPU if the cluster has any, else as many cores as it has threads; and
    how many workers find room in the cluster, were nothing else there.

    Raises:
        RefineFastError: if there is none.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus := sum(int(node.get("GPU", 0)) for node in nodes):
        return {"num_cpus": 1, "num_gpus": 1}, gpus
    room = sum(int(node.get("CPU", 0)) // threads for node in nodes)
    if room == 0:
        cores = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        raise RefineFastError(
            f"engine: no node of the cluster has {threads} cores, the threads of this process "
            f"that each worker needs too (the largest has {cores}); set OMP_NUM_THREADS to at "
            "most that."
        )
    return {"num_cpus": threads}, room


def threads_for(threads: int) -> int:
    """The threads of a worker: ``threads``, but on a GPU no more than its share of the cores."""
    import ray

    with_gpus = [
        node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")
    ]
    if not with_gpus:
        return threads
    cores, gpus = (sum(int(node.get(kind, 0)) for node in with_gpus) for kind in ("CPU", "GPU"))
    return max(1, min(threads, cores // gpus))


def needs_in_words(needs: dict[str, int]) -> str:
    """What ``room_for`` says that a worker takes: "1 GPU", "2 cores"."""
    cores = needs["num_cpus"]
    return "1 GPU" if "num_gpus" in needs else f"{cores} core{'s' if cores > 1 else ''}"


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keeps what SIGTERM does in this process: Ray's own handlers abort it, and nothing is cleaned
    up."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@_sigterm_kept()
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
        _connect_to(engine, quiet)
        return True
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init(
            address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet
        )
    return True


def _connect_to(address: str, options: dict[str, Any]) -> None:
    """Connects to a cluster, whose head starts a process for each client. Now and then that process
    dies as it is forked (by gRPC's threads, in Ray 2.x), so that is tried again."""
    import ray

    for attempt in range(CONNECTIONS):
        try:
            ray.init(address=address, **options)
            return
        except ConnectionAbortedError as error:
            if attempt + 1 == CONNECTIONS:
                raise RefineFastError(
                    f"engine: the Ray cluster at {address} answers, but starts no server for this "
                    f"client ({_last_line(error)}); look into that log on the cluster's head node."
                ) from None
        except Exception as error:
            raise RefineFastError(
                f"engine: no Ray cluster answers at {address} ({type(error).__name__}: "
                f"{_last_line(error)}); check the address and its port, 10001 unless it was "
                "changed."
            ) from None


@_sigterm_kept()
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
        return f"Ray {ray.__version__}; a cluster with {size()}"
    finally:
        if ours:
            ray.shutdown()


def size() -> str:
    """What the cluster that this process is connected to has, in words."""
    import ray

    resources, nodes = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
    return (
        f"{nodes} node{'s' * (nodes != 1)}, {resources.get('CPU', 0):g} cores and "
        f"{resources.get('GPU', 0):g} GPUs"
    )


def raised_by(error: Any) -> Exception:
    """What a task raised, by its RayTaskError; where its process could not load the task, a
    RefineFastError."""
    from ray.exceptions import RaySystemError

    if not isinstance(error.cause, RaySystemError):
        cause: Exception = error.cause
        return cause
    return RefineFastError(
        f"engine: a worker cannot load its work ({_last_line(error.cause)}); install the packages "
        "of this process on every node, in the same versions, and start the command in a folder "
        "without Python files of their names."
    )


def line_of(error: Exception) -> str:
    """The beginning of an error's message."""
    return " ".join(str(error).split())[:200]


def _last_line(error: Exception) -> str:
    """Of an error whose text may be a traceback."""
    return str(error).strip().rpartition("\n")[2][:200]
