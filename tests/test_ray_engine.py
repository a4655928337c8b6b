"""A run on a local Ray of two workers leaves the very bytes of a run in one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from banded import assert_same, unit_rows
from document_files import bad_folder, pdf
from safetensors.torch import load_file
from shard_work import done_by, doubling
from small_runs import SMALL, results

import refine_fast as rf
from refine_fast.cli import main
from refine_fast.errors import RefineFastError, RefineFastWarning
from refine_fast.mine import mine
from refine_fast.pipeline import RunConfig, run, sharded_search
from refine_fast.pipeline.cluster import ray_cluster, ray_ranks, ray_workers
from refine_fast.pipeline.cluster.exchange import FolderExchange
from refine_fast.pipeline.cluster.ray_workers import RayWorkers
from refine_fast.pipeline.cluster.shards import FolderShards
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.context import RunContext
from refine_fast.pipeline.corpus import chunking, extraction, near_duplicates
from refine_fast.pipeline.corpus.documents import load_documents
from refine_fast.pipeline.encoder import encode
from refine_fast.pipeline.stages import chunk
from refine_fast.pipeline.workers import Spread, Work

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
pytestmark = pytest.mark.usefixtures("one_thread")  # as the workers, of one core each


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, object_store_memory=200 << 20, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def workers(cluster: None) -> Iterator[RayWorkers]:
    """Starting them takes most of the time of these tests."""
    made = RayWorkers("ray", lambda line: None)
    yield made
    made.close()


@pytest.fixture
def free_cores(workers: RayWorkers) -> None:
    """The workers of the tests before have ended."""
    workers.close()


def test_a_busy_cluster_is_waited_for(
    free_cores: None, workers: RayWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the user is told, once."""
    monkeypatch.setattr(workers, "_patience", 0.1)
    holder = ray.remote(num_cpus=2)(SimpleNamespace).remote()
    ray.get(holder.__ray_ready__.remote())
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "no worker" in line:
            ray.kill(holder)

    monkeypatch.setattr(workers, "_say", say)
    assert done_by(workers, tmp_path / "shards", doubling(tmp_path / "log"), 2) == {0: "0", 1: "2"}
    assert [line for line in said if "engine" not in line] == [
        "  no worker has started yet: the cluster is busy with other work, or has no node with "
        "1 core to spare; waiting"
    ]


def test_a_killed_worker_costs_its_shard_and_a_rerun_only_what_is_missing(
    workers: RayWorkers, tmp_path: Path
) -> None:
    log, folder = tmp_path / "log", tmp_path / "shards"
    doubled = {i: str(2 * i) for i in range(8)}
    assert done_by(workers, folder, doubling(log, dies_at=3)) == doubled
    assert sorted(log.read_text().split()) == list("012334567")  # 3 twice
    log.unlink()
    (folder / "000002").unlink()  # missing; cut short; changed
    (folder / "000004").write_text("")
    (folder / "000005").write_text("99")
    assert done_by(workers, folder, doubling(log)) == doubled
    assert sorted(log.read_text().split()) == ["2", "4", "5"]
    log.unlink()
    assert done_by(workers, folder, doubling(log), 2, "other") == {0: "0", 1: "2"}
    assert sorted(log.read_text().split()) == ["0", "1"]  # another input


def test_steps_of_a_stage_may_share_a_key(workers: RayWorkers, tmp_path: Path) -> None:
    def naming(step: str) -> Callable[[], Work]:
        return lambda: lambda item, path: path.write_text(f"{step} {item}")

    for step in ("sketch", "compare"):
        shards = workers.map(tmp_path / step, "the key", naming(step), 3, lambda i: i)
        assert {path.read_text() for _, path in shards} == {f"{step} {i}" for i in range(3)}


def test_what_cannot_be_done_is_named(
    workers: RayWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "RETRIES", 1)

    def fails() -> Work:
        def work(item: int, path: Path) -> None:
            raise ValueError(f"row {item} of docs holds NaN or Inf")

        return work

    with pytest.raises(ValueError, match=r"^row 0 of docs holds NaN or Inf$"):
        done_by(workers, tmp_path / "a", fails, 1, "fails")

    class Unshared(FolderShards):
        """The workers see another folder under this path."""

        def __reduce__(self) -> Any:
            return FolderShards, (self._folder.with_name("elsewhere"),)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "_exchange", SimpleNamespace(shards=Unshared))
        missing = (
            r"d.000000 is missing or .*; share the folder of the run .* or add --shards .* again"
        )
        with pytest.raises(RefineFastError, match=missing):
            done_by(workers, tmp_path / "d", doubling(tmp_path / "log"), 1)

    class Uninstalled:
        def __reduce__(self) -> Any:
            return __import__, ("elsewhere_only",)

    with pytest.raises(RefineFastError, match=r"load its work \(.*'elsewhere_only'\); install"):
        done_by(workers, tmp_path / "e", Uninstalled(), 1)

    def dies() -> Work:
        def work(item: int, path: Path) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        return work

    with pytest.raises(RefineFastError, match=r"shard 1 of 1 \(.*000000\) died 2 times .* again"):
        done_by(workers, tmp_path / "b", dies, 1, "dies")
    torch.set_num_threads(3)
    try:
        with pytest.raises(RefineFastError, match=r"the largest has 2\); set OMP_NUM_THREADS"):
            done_by(RayWorkers("ray", lambda line: None), tmp_path / "c", dies, 1)
    finally:
        torch.set_num_threads(1)


def test_a_sharded_search_is_the_search(
    workers: RayWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_search, "ROWS_PER_SHARD", 300)
    np.save(tmp_path / "docs.npy", unit_rows(1000, 24, 1).numpy())
    docs = np.load(tmp_path / "docs.npy", mmap_mode="r")
    queries, exclude = unit_rows(30, 24, 0), [[i, 999 - i] for i in range(30)]
    spread, seen = Spread(workers, tmp_path), []

    def search(*arguments: Any, **rule: Any) -> rf.BandTopK:
        return sharded_search.search_in_shards(spread, *arguments, **rule)

    for select in ("hardest", "random"):
        rule: dict[str, Any] = {"band": (0.1, 0.4), "select": select, "exclude": exclude}
        found = search(
            queries, docs, 5, progress=lambda done, total: seen.append((done, total)), **rule
        )
        assert_same(found, rf.band_topk(queries, docs, 5, **rule))
    margin: dict[str, Any] = {"k": 5, "band": "auto", "relative_margin": 0.5, "skip": 0}
    pairs = [[i, 99 - i] for i in range(30)]
    for positives, groups in ((exclude, None), (pairs, np.arange(0, 1001, 10))):
        for ours, gold in zip(
            mine(queries, docs, positives, search=search, groups=groups, **margin),
            mine(queries, docs, positives, groups=groups, **margin),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, gold)
    assert seen[3] == seen[-1] == (30_000, 30_000)


class Killing(FolderExchange):
    """Workers of which one is killed as soon as the first of the shards called ``name`` is
    there."""

    def __init__(self, workers: RayWorkers, name: str) -> None:
        self._workers, self._name = workers, name
        self.done: dict[str, int] = {}

    def map(self, folder: Path, *rest: Any) -> Iterator[tuple[int, Path]]:
        for i, path in self._workers.map(folder, *rest):
            if folder.name == self._name not in self.done:
                kill_a_worker()
            self.done[folder.name] = self.done.get(folder.name, 0) + 1
            yield i, path


def kill_a_worker() -> None:
    actors = actors_of("RayShardWo")
    assert actors
    actors[0].kill()


def actors_of(name: str) -> list[psutil.Process]:
    """The living ones of a class; of its name, Linux keeps ten letters."""
    family = psutil.Process().children(recursive=True)
    found = [process for process in family if process.name().startswith(f"ray::{name}")]
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def all_ranks_end() -> bool:
    """Within 20 s."""
    end = time.monotonic() + 20
    while (left := actors_of("RankActor")) and time.monotonic() < end:
        time.sleep(0.1)
    return not left


def test_the_text_of_files_whose_worker_is_killed(
    workers: RayWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documents and the warnings, in order, of files good and bad."""
    monkeypatch.setattr(extraction, "BYTES_PER_SHARD", 200)
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.pdf").write_bytes(pdf(f"Glacier {i} feeds the river."))
        (folder / f"{i}.htm").write_text(
            f"<title>Lake {i}</title><p>It is <b>deep</b>, number {i}."
        )
        (folder / f"{i}.txt").write_text(f"Pond {i} is shallow.")
    (folder / os.fsdecode(b"K\xe4se.html")).write_text("<p>Cheese, from Windows.")
    (folder / "latin.html").write_bytes("<p>Où est la rivière ? Près du château.".encode("latin-1"))
    bad = bad_folder(folder)
    killing, loaded = Killing(workers, "extract"), []
    for spread in (None, Spread(killing, tmp_path / "shards")):
        with pytest.warns(RefineFastWarning) as caught:
            documents = load_documents(folder, spread=spread)
        ours = [w.message for w in caught if w.category is RefineFastWarning]
        loaded.append((documents, [str(message) for message in ours]))
    assert loaded[0] == loaded[1]
    documents, warned = loaded[0]
    assert len(documents) == 20
    assert len(warned) == len(bad) + 1  # the encoding of latin.html
    assert killing.done["extract"] > 2
    monkeypatch.setattr(extraction, "_packages", lambda: {"pypdf": "0.1"})
    other = r"^engine: a worker has other packages .* pypdf [\d.]+ \(there 0.1\).* again\.$"
    with pytest.raises(RefineFastError, match=other):
        load_documents(folder, spread=Spread(workers, tmp_path / "other"))


@pytest.mark.filterwarnings("ignore::refine_fast.errors.RefineFastWarning")
def test_the_chunks_of_a_corpus_whose_worker_is_killed(
    workers: RayWorkers, tiny: Path, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunking, "CHARACTERS_PER_SHARD", 4000)
    monkeypatch.setattr(near_duplicates, "TEXTS_PER_SHARD", 30)
    for path in list(docs.iterdir()):
        for name, end in (("a", ""), ("b", " Again."), ("c", " Once more.")):
            text = " ".join(path.read_text().split()[:50])
            (tmp_path / "docs").mkdir(exist_ok=True)
            (tmp_path / "docs" / f"{name}-{path.name}").write_text(text + end)
    config = RunConfig(out=tmp_path, docs=tmp_path / "docs", model=str(tiny), chunk_tokens=64)
    killing, left = Killing(workers, "sketch"), []
    for shared in (None, killing):
        folder = tmp_path / type(shared).__name__
        folder.mkdir()
        chunk.run(RunContext(config, tiny, Console(quiet=True), workers=shared), folder)
        left.append({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    assert left[0] == left[1]
    assert b'"near": 0' not in left[0]["chunks.json"]
    assert killing.done.keys() == {"cut", "sketch", "shuffle", "compare"}
    assert min(killing.done.values()) > 1


def test_the_bytes_of_a_run_whose_worker_is_killed(
    free_cores: None, tiny: Path, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage in several shards; kill -9 of a worker as soon as the first vectors are there."""
    monkeypatch.setattr(encode, "BATCHES_PER_BLOCK", 1)
    monkeypatch.setattr(encode, "BLOCKS_PER_SHARD", 1)
    monkeypatch.setattr(sharded_search, "ROWS_PER_SHARD", 20)
    monkeypatch.setattr(chunking, "CHARACTERS_PER_SHARD", 4000)
    settings = {**SMALL, "docs": docs, "model": str(tiny), "band": "auto", "max_steps": 2}
    settings["queries_per_chunk"] = 4
    quiet = Console(quiet=True)
    run(RunConfig(out=tmp_path / "plain", **settings), console=quiet)
    shards, map_of = {}, RayWorkers.map

    def watched(self: RayWorkers, folder: Path, *rest: Any) -> Iterator[tuple[int, Path]]:
        for i, path in map_of(self, folder, *rest):
            stage = folder.relative_to(tmp_path).parts[2]
            if stage == "embed" and not any(stage in other.parts for other in shards):
                kill_a_worker()
            shards.setdefault(folder.relative_to(tmp_path), set()).add(i)
            yield i, path

    monkeypatch.setattr(RayWorkers, "map", watched)
    run(RunConfig(out=tmp_path / "spread", engine="ray", **settings), console=quiet)
    assert results(tmp_path / "spread") == results(tmp_path / "plain")
    stages = {folder.parts[2] for folder, done in shards.items() if len(done) > 1}
    assert stages >= {"chunk", "embed", "mine", "curve 0.35", "score base", "score fused"}
    assert not list((tmp_path / "spread").rglob("shards"))


def impatient(work: Callable[..., None], dies: dict[str, int], died: Path) -> Callable[..., None]:
    """What a rank does, with a checkpoint at every step; a rank that ``dies`` is killed at the
    step that is given for it, once. It travels by value."""

    def changed(folder: Path, hear: Callable[..., None], save: Callable[[], None]) -> None:
        from refine_fast.pipeline.training import trainer

        def heard(kind: str, *news: Any) -> None:
            hear(kind, *news)
            rank = os.environ["RANK"]
            if kind == "progress" and news[0] == dies.get(rank) and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.CHECKPOINT_SECONDS = 0.0
        work(folder, heard, save)

    return changed


def test_a_killed_rank_costs_the_step_in_progress(
    free_cores: None,
    whole: Path,
    copied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two ranks train what one process trains, although one is killed."""
    shutil.rmtree(copied / "tuned")
    heard: list[tuple[Any, ...]] = []
    train_on_ranks = ray_ranks.train_on_ranks

    def watched(
        work: Callable[..., None], shared: Any, threads: int, most: int, hear: Callable[..., None]
    ) -> None:
        def both(*news: Any) -> None:
            heard.append(news)
            hear(*news)

        work = impatient(work, {"1": 4}, tmp_path / "died")
        train_on_ranks(work, shared, threads, most, both)

    monkeypatch.setattr(ray_workers, "train_on_ranks", watched)
    train = ["train", "--out", str(copied)]
    assert main([*train, "--engine", "ray", "--train-workers", "2"]) == 0
    facts, gold = (json.loads((run / "training.json").read_text()) for run in (copied, whole))
    assert {**facts, "loss": 0} == {**gold, "loss": 0}
    losses = [[loss for _, loss in each["loss"]] for each in (facts, gold)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # float32, after 11 steps of Adam
    weights = [load_file(next((run / "tuned").rglob("*.safetensors"))) for run in (copied, whole)]
    for name, expected in weights[1].items():
        torch.testing.assert_close(weights[0][name], expected, rtol=0, atol=2e-3, msg=name)
    assert (tmp_path / "died").exists()
    steps = [news[1] for news in heard if news[0] == "progress"]
    assert steps == [*range(1, gold["steps"] + 1)]
    said = [news[1] for news in heard if news[0] == "say"]
    assert said.count("  2 processes share each batch of 8 queries") == 2
    assert "  a training process died; training resumes from its last checkpoint" in said
    assert all_ranks_end()
    assert main(train) == 0
    assert "train: up to date" in capsys.readouterr().err  # also for one process


def test_ranks_end_with_the_command(
    free_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By themselves: they leave nothing behind."""
    monkeypatch.setattr(ray_ranks, "LINGER", 100.0)  # this machine may be busy
    workers = RayWorkers("ray", lambda line: None, trainers=2)

    def waits(folder: Path, hear: Callable[..., None], save: Callable[[], None]) -> None:
        from refine_fast.pipeline.ranks import launched

        found = launched()
        assert found is not None
        hear("say", f"rank {found.rank} of {found.size}, {found.local_size} here")
        (folder / str(found.rank)).touch()
        try:
            time.sleep(100)
        finally:
            (folder / f"ended {os.environ['RANK']}").touch()

    def hear(*news: Any) -> None:
        assert news == ("say", "rank 0 of 2, 2 here")
        while not (tmp_path / "1").exists():
            time.sleep(0.02)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.train(tmp_path, "key", partial(waits), (), most=8, hear=hear)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "ended 0", "ended 1"}
    workers.close()
    assert all_ranks_end()


def test_a_training_that_cannot_be_done_is_named(
    free_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_ranks, "RETRIES", 0)
    workers = RayWorkers("ray", lambda line: None, trainers=2)

    def train(work: Callable[..., None]) -> None:
        workers.train(tmp_path, "key", partial(work), (), most=8, hear=lambda *news: None)

    def dies(folder: Path, hear: Callable[..., None], save: Callable[[], None]) -> None:
        hear("progress", 3, 5, "")
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RefineFastError, match=r"training process died 1 times, .*; give .* resume"):
        train(dies)

    def refuses(folder: Path, hear: Callable[..., None], save: Callable[[], None]) -> None:
        if os.environ["RANK"] == "1":
            raise RefineFastError("train: 2 processes cannot share a batch of 1 queries")
        raise ray_ranks.RankLostError

    with pytest.raises(RefineFastError, match=r"^train: 2 processes cannot share a batch"):
        train(refuses)
    more = RayWorkers("ray", print, trainers=3)
    room = r"^train_workers: the cluster has room for 2 .* \(got 3\); give --train-workers 2, or"
    with pytest.raises(RefineFastError, match=room):
        more.train(tmp_path, "key", partial(dies), (), most=8, hear=print)
    workers.close()


def test_the_process_of_the_command_trains_unless_there_are_gpus(tmp_path: Path) -> None:
    for trainers in (0, "auto"):
        workers = RayWorkers("ray", lambda line: None, trainers=trainers)
        assert not workers.train(tmp_path, "key", partial(print), (), most=8, hear=print)


def test_workers_share_the_cores_of_a_node_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Resources": resources}

    nodes = [node(CPU=64.0), node(CPU=32.0, GPU=8.0), node(CPU=8.0, GPU=2.0), node(False, GPU=90.0)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert [ray_cluster.threads_for(threads) for threads in (64, 4, 2)] == [4, 4, 2]
    nodes = [node(CPU=2.0, GPU=4.0)]
    assert ray_cluster.threads_for(2) == 1
    nodes = [node(CPU=64.0)]
    assert ray_cluster.threads_for(48) == 48


def test_doctor_finds_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ray_cluster.found_cluster()
    assert found == f"Ray {ray.__version__}; a cluster with 1 node, 2 cores and 0 GPUs"

    def none(**_: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", none)
    assert "; no cluster runs here, --engine ray starts one" in ray_cluster.found_cluster()


def test_the_engine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RefineFastError, match="engine: spark must be local, ray or ray://HOST:PORT"
    ):
        RunConfig(out=tmp_path / "run", engine="spark")
    with pytest.raises(RefineFastError, match="train_workers: needs workers; add --engine ray"):
        RunConfig(out=tmp_path / "run", train_workers=2)
    with pytest.raises(
        RefineFastError, match="9 processes cannot share a batch of 8 queries; give a larger"
    ):
        RunConfig(out=tmp_path / "run", engine="ray", train_workers=9, batch_size=8)
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(RefineFastError, match=r"pip install 'refine-fast\[ray\]'"),
        ray_workers.open_workers("ray", print),
    ):
        pass
