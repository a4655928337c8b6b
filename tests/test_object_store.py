"""Shards on object storage: driver and workers share no folder. moto serves S3."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banded import assert_same, unit_rows
from shard_work import done_by, doubling
from small_runs import SMALL, results

import refine_fast as rf
from refine_fast.cli import main
from refine_fast.errors import RefineFastError
from refine_fast.pipeline import RunConfig, run, sharded_search
from refine_fast.pipeline.cluster import ray_ranks, ray_workers
from refine_fast.pipeline.cluster.object_exchange import ObjectExchange
from refine_fast.pipeline.cluster.object_path import ObjectPath, found_drivers
from refine_fast.pipeline.cluster.ray_workers import RayWorkers, open_workers
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.corpus import chunking
from refine_fast.pipeline.encoder import encode
from refine_fast.pipeline.workers import Spread

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install '.[test]'")
moto = pytest.importorskip("moto.server", reason="needs moto and flask: pip install '.[test]'")
pytestmark = pytest.mark.usefixtures("one_thread")  # as the workers, of one core each

BUSY = b"<Error><Code>ServiceUnavailable</Code><Message>Service is unable</Message></Error>"


class Store:
    """S3 of moto, which answers 503 where it is told to."""

    def __init__(self) -> None:
        self._s3 = moto.DomainDispatcherApplication(moto.create_backend_app)
        self.busy: Callable[[str], bool] = lambda asked: False
        """Whether to answer 503; called with a method and a path."""
        self.asked: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.asked.append(asked)
        if not self.busy(asked):
            return self._s3(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
        return [BUSY]

    def count(self, method: str, part: str) -> int:
        """How many requests had this method and this part of a path."""
        return sum(asked.startswith(f"{method} ") and part in asked for asked in self.asked)


@pytest.fixture(scope="module")
def served() -> Iterator[Store]:
    """The server, and a Ray of two cores whose workers know it."""
    from werkzeug.serving import make_server

    store = Store()
    server = make_server("127.0.0.1", 0, store, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "3",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem().mkdir("bucket")
        ray.init(
            address="local", num_cpus=2, object_store_memory=200 << 20, include_dashboard=False,
            log_to_driver=False, logging_level="ERROR",
        )  # fmt: skip
        yield store
        ray.shutdown()
    server.shutdown()
    thread.join()
    server.server_close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def store(served: Store) -> Iterator[Store]:
    served.asked.clear()
    yield served
    served.busy = lambda asked: False


@pytest.fixture
def place(store: Store, tmp_path: Path) -> ObjectPath:
    """Where the objects of the folder ``tmp_path`` are."""
    return ObjectPath(f"s3://bucket/{tmp_path.name}")


def objects_of(place: ObjectPath) -> list[str]:
    """The names of all objects there."""
    return list(s3fs.S3FileSystem(skip_instance_cache=True).find(place.url))


@pytest.fixture(scope="module")
def workers(served: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayWorkers]:
    """Starting them takes most of the time of these tests."""
    exchange = ObjectExchange(ObjectPath("s3://bucket"), tmp_path_factory.getbasetemp())
    made = RayWorkers("ray", lambda line: None, exchange)
    yield made
    made.close()


def test_a_killed_worker_costs_its_shard_and_a_rerun_only_what_is_missing(
    workers: RayWorkers, place: ObjectPath, tmp_path: Path
) -> None:
    log, folder = tmp_path / "log", tmp_path / "score base" / "doc"
    shards = place / "score_base/doc"
    doubled = {i: str(2 * i) for i in range(8)}
    assert done_by(workers, folder, doubling(log, dies_at=3)) == doubled
    assert sorted(log.read_text().split()) == list("012334567")  # 3 twice
    log.unlink()
    (shards / "000002").remove()  # missing; cut short; changed; without its record
    (shards / "000004").write(b"")
    (shards / "000005").write(b"99")
    (shards / "000006.json").write(b"{")
    assert done_by(workers, folder, doubling(log)) == doubled
    assert sorted(log.read_text().split()) == ["2", "4", "5", "6"]
    log.unlink()
    assert done_by(workers, folder, doubling(log), 2, "other") == {0: "0", 1: "2"}
    assert sorted(log.read_text().split()) == ["0", "1"]  # another input
    assert list(tmp_path.iterdir()) == [log]
    workers.discard(tmp_path / "score base")
    assert (shards / "000001").read() is None


def test_a_store_that_is_busy_for_a_moment_is_asked_again(
    workers: RayWorkers, store: Store, tmp_path: Path
) -> None:
    refused: list[str] = []

    def busy(asked: str) -> bool:
        refuse = "000001" in asked and refused.count(asked) < 2
        refused.extend([asked] * refuse)
        return refuse

    store.busy = busy
    done = done_by(workers, tmp_path / "embed", doubling(tmp_path / "log"), 3)
    assert done == {0: "0", 1: "2", 2: "4"}
    assert {asked.split()[0] for asked in refused} == {"GET", "PUT", "HEAD"} & {
        asked.split()[0] for asked in store.asked if "000001" in asked
    }


def test_a_store_that_stays_busy_ends_the_run_and_keeps_what_is_done(
    workers: RayWorkers, store: Store, place: ObjectPath, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert done_by(workers, tmp_path / "embed", doubling(log), 2) == {0: "0", 1: "2"}
    store.busy = lambda asked: asked.startswith("PUT ") and "000003" in asked
    with pytest.raises(RefineFastError) as raised:
        done_by(workers, tmp_path / "embed", doubling(log), 4)
    message = str(raised.value)
    assert message.startswith(f"shards: {place.url}/embed/000003 cannot be written (")
    assert "Service" in message
    assert message.endswith(
        "); check the store and its credentials, then run the same command again: finished shards "
        "are kept."
    )
    store.busy = lambda asked: False
    log.unlink()
    done_by(workers, tmp_path / "embed", doubling(log), 4)
    assert "3" in log.read_text().split()
    assert {"0", "1"}.isdisjoint(log.read_text().split())


def test_a_sharded_search_is_the_search_and_publishes_each_slice_once(
    workers: RayWorkers, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_search, "ROWS_PER_SHARD", 300)
    np.save(tmp_path / "docs.npy", unit_rows(1000, 24, 1).numpy())
    docs = np.load(tmp_path / "docs.npy", mmap_mode="r")
    queries, exclude = unit_rows(30, 24, 0), [[i, 999 - i] for i in range(30)]
    spread = Spread(workers, tmp_path / "mine")
    for select in ("hardest", "random"):
        rule: dict[str, Any] = {"band": (0.1, 0.4), "select": select, "exclude": exclude}
        found = sharded_search.search_in_shards(spread, queries, docs, 5, **rule)
        assert_same(found, rf.band_topk(queries, docs, 5, **rule))
    assert store.count("PUT", "/shared/") == 4 + 1  # slices and queries
    spans = [(0, 300), (300, 600), (600, 900), (900, 1000)]
    rows = workers.share_rows(tmp_path / "mine", docs, spans)
    np.testing.assert_array_equal(rows.read(300, 600), docs[300:600])
    np.testing.assert_array_equal(rows.read(900, 1000), docs[900:])
    damaged = rows.spans[900]
    damaged.write(b"cut short")
    with pytest.raises(RefineFastError, match=rf"{damaged.url} is missing or damaged; .* again"):
        rows.read(900, 1000)
    np.testing.assert_array_equal(
        workers.share_rows(tmp_path / "mine", docs, spans).read(900, 1000), docs[900:]
    )


def test_a_loader_brings_its_folders(workers: RayWorkers, tmp_path: Path) -> None:
    (tmp_path / "encoder" / "module").mkdir(parents=True)
    (tmp_path / "encoder" / "module" / "weights").write_text("w")
    (tmp_path / "encoder" / "config").write_text("c")

    def contents(weight: float, folder: Path, *, other: Path) -> list[Any]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        texts = {str(path.relative_to(folder)): path.read_text() for path in files}
        return [weight, texts, (other / "config").read_text(), folder]

    encoder = tmp_path / "encoder"
    load = workers.share_loader(partial(contents, 0.5, encoder, other=encoder))
    *loaded, folder = load()
    assert loaded == [0.5, {"config": "c", "module/weights": "w"}, "c"]
    assert folder != encoder
    assert not folder.exists()


def test_the_bytes_of_a_run(
    workers: RayWorkers,
    whole: Path,
    tiny: Path,
    docs: Path,
    place: ObjectPath,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is sent to the workers names no folder of the driver."""
    monkeypatch.setattr(chunking, "CHARACTERS_PER_SHARD", 4000)
    monkeypatch.setattr(encode, "BATCHES_PER_BLOCK", 1)
    monkeypatch.setattr(encode, "BLOCKS_PER_SHARD", 16)
    monkeypatch.setattr(sharded_search, "ROWS_PER_SHARD", 20)
    workers.close()  # they have the cores that those of the run need
    stages: set[str] = set()
    map_of = RayWorkers.map

    def watched(
        self: RayWorkers, folder: Path, key: Any, prepare: Any, *rest: Any
    ) -> Iterator[tuple[int, Path]]:
        sent = ray.cloudpickle.dumps([key, prepare])
        assert os.fsencode(tmp_path) not in sent
        assert os.fsencode(tiny) not in sent
        stages.add(folder.relative_to(tmp_path).parts[2])
        yield from map_of(self, folder, key, prepare, *rest)

    monkeypatch.setattr(RayWorkers, "map", watched)
    config = RunConfig(
        out=tmp_path / "run", docs=docs, model=str(tiny), engine="ray", shards=place.url, **SMALL
    )
    run(config, console=Console(quiet=True))
    assert results(tmp_path / "run") == results(whole)
    assert stages >= {"chunk", "embed", "mine", "curve 0.35", "score base", "score fused"}
    assert store.count("PUT", "/embed/") > 0
    assert objects_of(place) == []


def test_what_a_stopped_stage_left_goes_when_the_run_ends_otherwise(
    copied: Path, place: ObjectPath
) -> None:
    """Of a stage that the run no longer has, and of one that is up to date without it. What is not
    of a stage stays."""
    for stage in ("sentences", "embed"):
        (copied / ".work" / stage).mkdir()
        (place / f"{stage}/shards/key/000000").write(b"done")
    (place / "others").write(b"mine")
    flags = ["--engine", "ray", "--shards", place.url]
    assert main(["mine", "--out", str(copied), *flags]) == 0
    assert len(objects_of(place)) == 3
    assert main(["run", "--out", str(copied), *flags]) == 0
    assert objects_of(place) == [f"bucket/{copied.parent.name}/others"]


def test_training_whose_first_rank_is_killed(
    workers: RayWorkers,
    copied: Path,
    whole: Path,
    tiny: Path,
    place: ObjectPath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its checkpoints are in the store; it leaves nothing there, and names no folder of the
    driver."""
    workers.close()
    shutil.rmtree(copied / "tuned")
    died = tmp_path / "died"
    nowhere = [os.fsencode(path) for path in (copied, tiny)]
    train_on_ranks = ray_ranks.train_on_ranks

    steps: list[int] = []

    def changed(
        work: Callable[..., None], shared: Any, threads: int, most: int, hear: Callable[..., None]
    ) -> None:
        def dying(folder: Path, hear: Callable[..., None], save: Callable[[], None]) -> None:
            from refine_fast.pipeline.training import trainer

            def saved() -> None:
                save()
                if (folder / "checkpoints" / "checkpoint-3").is_dir() and not died.exists():
                    died.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            trainer.CHECKPOINT_SECONDS = 0.0
            work(folder, hear, saved)

        sent = ray.cloudpickle.dumps([work.args[2:], shared])  # without the configuration
        assert not any(path in sent for path in nowhere)

        def heard(kind: str, *news: Any) -> None:
            hear(kind, *news)
            if kind == "progress":
                steps.append(news[0])

        train_on_ranks(dying, shared, threads, most, heard)

    monkeypatch.setattr(ray_workers, "train_on_ranks", changed)
    flags = ["--engine", "ray", "--shards", place.url, "--train-workers", "2", "--json"]
    assert main(["train", "--out", str(copied), *flags]) == 0
    facts, gold = (json.loads((run / "training.json").read_text()) for run in (copied, whole))
    assert {**facts, "loss": 0} == {**gold, "loss": 0}
    losses = [[loss for _, loss in each["loss"]] for each in (facts, gold)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert died.exists()
    assert steps == [*range(1, gold["steps"] + 1)]
    assert objects_of(place) == []


def test_what_cannot_be_used_is_said_before_any_work(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(shards: str) -> str:
        with (
            pytest.raises(RefineFastError) as raised,
            open_workers("ray", print, shards, tmp_path),
        ):
            pass
        return str(raised.value)

    message = refused("s3://nowhere/run")
    assert message.startswith("shards: s3://nowhere/run/probe-")
    assert "bucket does not exist" in message
    assert refused("gs://bucket/run") == (
        "shards: gs:// needs a package that is not installed; pip install gcsfs on every node."
    )
    assert refused("pigeon://bucket/run").startswith("shards: pigeon://bucket/run/probe-")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "Unable to locate credentials" in refused("s3://bucket/run")
    s3fs.S3FileSystem.clear_instance_cache()
    flags = ["--engine", "ray", "--shards", "s3://bucket/run", "--quiet"]
    for command in ("run", "plan"):
        assert main([command, "--out", str(tmp_path / "run"), *flags]) == 2
        assert "Unable to locate credentials" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig(out=tmp_path / "run", engine="ray", shards="shards")
    assert config.shards == str(tmp_path / "shards")
    for wrong in ("memory://run", "s3://", "://bucket"):
        with pytest.raises(
            RefineFastError, match=r"shards: .* must be a path or a URL such as s3:"
        ):
            RunConfig(out=tmp_path / "run", engine="ray", shards=wrong)
    with pytest.raises(RefineFastError, match="shards: needs workers; add --engine ray"):
        RunConfig(out=tmp_path / "run", shards="s3://bucket/run")
    works, found = found_drivers()
    assert works
    assert found.startswith(f"s3:// by s3fs {s3fs.__version__}; gs:// ")


def test_a_path_is_a_store_too(tmp_path: Path) -> None:
    place = ObjectPath(str(tmp_path / "shards"))
    place.check()
    (place / "a/b").write(b"content")
    assert (place / "a/b").size() == 7
    assert (place / "a/b").download(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"
    (place / "a").remove()
    assert (place / "a/b").read() is None
    assert (place / "a/b").size() is None
    assert not (place / "a/b").download(tmp_path / "copy")
