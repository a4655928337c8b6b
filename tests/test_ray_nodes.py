"""Nodes that join and leave while shards are done, and the client of Ray: a cluster of several
nodes on this machine."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from banded import assert_same, unit_rows
from safetensors.torch import save_file
from shard_work import done_by
from small_runs import SMALL, results

import refine_fast as rf
from refine_fast.errors import RefineFastError
from refine_fast.pipeline import RunConfig, run, sharded_search
from refine_fast.pipeline.cluster import ray_cluster, ray_ranks, ray_workers
from refine_fast.pipeline.cluster.ray_workers import RayWorkers
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.encoder import encode
from refine_fast.pipeline.engine import RunFolder, Stage
from refine_fast.pipeline.reserve import save_rows
from refine_fast.pipeline.workers import Spread, Work

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
pytest.importorskip("grpc", reason="needs the client of Ray: pip install '.[ray]'")
from ray.cluster_utils import Cluster  # noqa: E402
from ray.util.client import worker as client_worker  # noqa: E402

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not see this file
pytestmark = pytest.mark.usefixtures("one_thread")  # as the workers, of one core each

SECONDS = 200
"""How long a shard waits for what it needs before it fails."""
NOTICED_SOON = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "health_check_timeout_ms": 60_000,  # a busy node answers late, a dead one refuses at once
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def address() -> str:
    return f"ray://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def cluster(address: str) -> Iterator[Cluster]:
    """One node of one core, and a client server."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as folder:
        patch.setenv("RAY_TMPDIR", folder)  # other clusters of this machine are not touched
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S", str(SECONDS))
        # With it, now and then a process that the client server forks dies.
        patch.setenv("GRPC_ENABLE_FORK_SUPPORT", "0")
        made = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "include_dashboard": False,
                "ray_client_server_port": int(address.rpartition(":")[2]),
                "_system_config": NOTICED_SOON,
            },
        )
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        made.shutdown()


@pytest.fixture
def second(cluster: Cluster) -> Iterator[Callable[..., Any]]:
    """Adds a node, which is gone after the test."""
    nodes = []

    def add(cores: int = 1, gpus: int = 0) -> Any:
        nodes.append(cluster.add_node(num_cpus=cores, num_gpus=gpus, include_dashboard=False))
        return nodes[-1]

    yield add
    for node in nodes:
        if node in cluster.worker_nodes:
            cluster.remove_node(node)


@pytest.fixture
def workers(cluster: Cluster) -> Iterator[RayWorkers]:
    made = RayWorkers("ray", lambda line: None)
    yield made
    made.close()


def wait_for(happened: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < end, "what this waits for does not happen"
        time.sleep(0.02)


def squares(first: Callable[[int, str], None]) -> Callable[[], Work]:
    """Work that calls ``first(item, its node)``, then writes the item's square and its node."""

    def prepare() -> Work:
        def work(item: int, path: Path) -> None:
            node = ray.get_runtime_context().get_node_id()
            first(item, node)
            path.write_text(f"{item * item} {node}")

        return work

    return prepare


def read(shards: Iterator[tuple[int, Path]]) -> tuple[dict[int, int], dict[int, str]]:
    """Item -> its square; item -> the node that did it."""
    done = {i: path.read_text().split() for i, path in shards}
    return {i: int(value) for i, (value, _) in done.items()}, {i: n for i, (_, n) in done.items()}


def test_a_node_that_joins_does_shards_which_others_do_when_it_leaves(
    cluster: Cluster, second: Callable[..., Any], workers: RayWorkers, tmp_path: Path
) -> None:
    """The only worker keeps shard 0 until the worker of the second node has done two shards and
    begun a third; then that node is killed."""
    began, nodes = tmp_path / "began", []

    def first(item: int, node: str) -> None:
        if item == 0:
            wait_for(began.exists)
        elif item == 4 and not began.exists():
            began.touch()
            time.sleep(SECONDS)

    def item(i: int) -> int:
        if i == 2:
            nodes.append(second())
        if i == 6:
            wait_for(began.exists)
            cluster.remove_node(nodes[0], allow_graceful=False)
        return i

    shards = workers.map(tmp_path / "shards", "nodes", squares(first), 10, item)
    done = {i: path.read_text().split() for i, path in shards}
    assert {i: int(square) for i, (square, _) in done.items()} == {i: i * i for i in range(10)}
    joined, first_node = nodes[0].node_id, cluster.head_node.node_id
    assert {i: node for i, (_, node) in done.items()} == {
        i: joined if i in (2, 3) else first_node for i in range(10)
    }


def test_a_node_that_leaves_between_two_stages_costs_no_shard(
    cluster: Cluster,
    second: Callable[..., Any],
    workers: RayWorkers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_workers, "RETRIES", 0)
    leaving, folder = second(), tmp_path / "met"
    folder.mkdir()

    def meet(item: int, node: str) -> None:
        (folder / node).touch()
        wait_for(lambda: len(list(folder.iterdir())) == 2)

    def done(key: str, first: Callable[[int, str], None]) -> dict[int, list[str]]:
        shards = workers.map(tmp_path / key, key, squares(first), 2, lambda i: i)
        return {i: path.read_text().split() for i, path in shards}

    assert len({node for _, node in done("both", meet).values()}) == 2
    cluster.remove_node(leaving, allow_graceful=False)
    wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)
    here = cluster.head_node.node_id
    assert done("one", lambda item, node: None) == {0: ["0", here], 1: ["1", here]}


SAVE: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x" * 2_000_000),
    "rows": lambda path: save_rows(path, np.zeros((1000, 300))),
    "safetensors": lambda path: save_file({"w": torch.zeros(10**6)}, path),
    "torch": lambda path: torch.save({"w": torch.zeros(10**6)}, path),
}
"""Ways to write more than a megabyte."""


@pytest.mark.parametrize("trains", [False, True])
def test_a_full_disk_of_a_worker_is_named(cluster: Cluster, tmp_path: Path, trains: bool) -> None:
    """By an OSError with a file or a folder, as that of the process of the command is."""
    workers = RayWorkers("ray", lambda line: None, trainers=1)

    def save(kind: str, path: Path) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            SAVE[kind](path)
        finally:  # Ray writes files too
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def shard(kind: str, folder: Path) -> None:
        done_by(workers, folder, lambda: lambda item, path: save(kind, path), 1, kind)

    def train(kind: str, folder: Path) -> None:
        work = partial(lambda folder, hear, saved: save(kind, folder / "file"))
        workers.train(folder, kind, work, (), most=1, hear=lambda *news: None)

    with RunFolder(tmp_path / "run") as run:
        for kind in SAVE:
            stage = Stage(kind, (), partial(train if trains else shard, kind))
            with pytest.raises(OSError, match=r"File too large|the disk may be full") as caught:
                run.do(stage)
            assert str(caught.value.filename).startswith(str(run.work / kind))
    workers.close()


def meets(waits: bool, folder: Path, hear: Callable[..., None], save: Callable[[], None]) -> None:
    """What a rank does: it says who is there; among others it waits then, to be killed."""
    from refine_fast.pipeline.ranks import launched

    found = launched()
    if found is None:
        hear("say", "alone")
        return
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    (folder / f"{found.rank}").write_text(f"{found.size} {found.local_size} {gpu}")
    if waits:
        hear("say", "together")
        time.sleep(SECONDS)


def test_training_goes_on_with_the_nodes_that_remain(
    cluster: Cluster,
    second: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_ranks, "LINGER", 1.0)  # the rank that remains ends when it is asked to
    workers, leaving = RayWorkers("ray", lambda line: None, trainers=2), second()
    heard = []

    def hear(kind: str, line: str) -> None:
        heard.append(line)
        if line == "together":
            wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
            cluster.remove_node(leaving, allow_graceful=False)

    assert workers.train(tmp_path, "key", partial(meets, True), (), most=8, hear=hear)
    died = "  a training process died; training resumes from its last checkpoint"
    assert heard == ["together", died, "alone"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"2 1 "}
    workers.close()


def test_a_rank_for_each_gpu(second: Callable[..., Any], address: str, tmp_path: Path) -> None:
    """Which the cluster only claims to have. It is the one that its rank sees, as if the rank were
    alone on its node."""
    second(2, gpus=2)
    workers = RayWorkers(address, lambda line: None)
    for most, ranks in ((8, {"2 1 0", "2 1 1"}), (1, set())):
        for path in tmp_path.iterdir():
            path.unlink()
        heard: list[str] = []
        assert workers.train(
            tmp_path, "key", partial(meets, False), (), most=most,
            hear=lambda kind, line, heard=heard: heard.append(line),
        )  # fmt: skip
        assert {path.read_text() for path in tmp_path.iterdir()} == ranks
        assert heard == [] if ranks else ["alone"]
    workers.close()


@pytest.mark.filterwarnings("ignore:Ray Client connection timed out")
def test_a_client_whose_server_dies_connects_again(
    cluster: Cluster, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connects, left = ray.init, 2

    def init(**options: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise ConnectionAbortedError("Initialization failure from server:\nSee x.err for logs.")
        return connects(**options)

    monkeypatch.setattr(ray, "init", init)
    assert ray_cluster.connect(address)
    ray.shutdown()
    left = 3
    with pytest.raises(RefineFastError, match=r"answers, but .* \(See x.err for logs.\); look"):
        ray_cluster.connect(address)
    monkeypatch.undo()
    monkeypatch.setattr(client_worker, "INITIAL_TIMEOUT_SEC", 0.1)
    with pytest.raises(RefineFastError, match=r"no Ray cluster answers at ray://127.0.0.1:1 \("):
        ray_cluster.connect("ray://127.0.0.1:1")


def test_the_client_gives_the_same(
    cluster: Cluster, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the one worker of one node: a killed worker, an error of a shard, a search."""
    said: list[str] = []
    workers = RayWorkers(address, said.append)

    def dies(item: int, node: str) -> None:
        if item == 1 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 3:
            raise ValueError("row 3 of docs holds NaN or Inf")

    shards = workers.map(tmp_path / "dies", "dies", squares(dies), 3, lambda i: i)
    assert {i: path.read_text().split()[0] for i, path in shards} == {0: "0", 1: "1", 2: "4"}
    assert (tmp_path / "died").exists()
    with pytest.raises(ValueError, match=r"^row 3 of docs holds NaN or Inf$"):
        list(workers.map(tmp_path / "dies", "dies", squares(dies), 4, lambda i: i))

    monkeypatch.setattr(sharded_search, "ROWS_PER_SHARD", 300)
    np.save(tmp_path / "docs.npy", unit_rows(1000, 24, 1).numpy())
    docs = np.load(tmp_path / "docs.npy", mmap_mode="r")
    queries = unit_rows(30, 24, 0)
    rule: dict[str, Any] = {"band": (0.1, 0.4), "exclude": [[i] for i in range(30)]}
    found = sharded_search.search_in_shards(Spread(workers, tmp_path), queries, docs, 5, **rule)
    assert_same(found, rf.band_topk(queries, docs, 5, **rule))

    workers.close()
    assert not ray.is_initialized()
    assert said == ["engine: Ray with 1 node, 1 cores and 0 GPUs"]


def test_the_bytes_of_a_run_with_four_workers_through_the_client(
    second: Callable[..., Any],
    address: str,
    tiny: Path,
    docs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encode, "BATCHES_PER_BLOCK", 1)
    monkeypatch.setattr(encode, "BLOCKS_PER_SHARD", 1)
    monkeypatch.setattr(sharded_search, "ROWS_PER_SHARD", 20)
    settings = {**SMALL, "docs": docs, "model": str(tiny), "band": "auto", "max_steps": 2}
    quiet = Console(quiet=True)
    run(RunConfig(out=tmp_path / "plain", **settings), console=quiet)
    second(3)
    run(RunConfig(out=tmp_path / "spread", engine=address, **settings), console=quiet)
    assert results(tmp_path / "spread") == results(tmp_path / "plain")


STOPPED = """
import os, signal, time
import ray
from refine_fast.pipeline.cluster.ray_cluster import connect
from refine_fast.termination import Terminated, terminable

with terminable():
    connect("ray")
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    except Terminated:
        print("stopped")
    ray.shutdown()
"""


def test_sigterm_does_not_abort_the_command() -> None:
    """Ray installs handlers of its own when it connects, of which one aborts the process."""
    line = [sys.executable, "-c", STOPPED]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert (ended.returncode, ended.stdout) == (0, "stopped\n"), ended.stderr
