"""What ``--engine ray`` costs beside one process with as many threads; results/engine.csv.

    python benchmarks/bench_engine.py search [--documents 1000000] [--queries 1000]
    python benchmarks/bench_engine.py encode [--texts 4096]
    python benchmarks/bench_engine.py run DOCS [FLAGS]

each with [--workers 2 4] [--rounds 2] [--work FOLDER]. Every worker has one thread; the one process
has as many as there are workers, up to the number of cores.

search: hard negatives among seeded random unit vectors of 384 dimensions in a .npy file.
encode: passages of Python's documentation by the bundled encoder, in shards of 512 texts.

Before the measured rounds, Ray and the workers start ("start_seconds") and do one round, in which
the files come into the page cache and the workers load the encoder ("first_seconds"). Each round
then measures the one process and the workers, in turn; "ratio" is the median of the rounds' ratios
of wall time. After them a worker is killed with SIGKILL when its pool has done a first shard:
"killed_seconds" and "killed_shards_redone". "equal" is the share of ids or embeddings that are the
same bits in every round, that of the killed worker included; embeddings are compared with those of
one process with one thread, since torch rounds otherwise with more.

"peak_anonymous_mb" is the largest sum of RssAnon and RssShmem of /proc/self/status in the process
that drives the workers, read every 10 ms while they start and work: all it holds but the pages of
mapped files. "peak_mb" is its VmHWM, with these pages.

run: whole runs of the pipeline, in one process and over the workers, all with one thread, with the
flags of ``refine-fast run``. Prints which files are equal, byte for byte. It fails if a file
differs, other than those that hold times, paths or the name of the engine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import psutil
import ray
import torch
from keyed_table import save

import refine_fast as rf
from refine_fast.bench.machine import commit, device_name
from refine_fast.pipeline.cluster.ray_cluster import OBJECT_STORE
from refine_fast.pipeline.cluster.ray_workers import RayWorkers
from refine_fast.pipeline.encoder import encode
from refine_fast.pipeline.encoder.load import encoder_folder, load_encoder
from refine_fast.pipeline.sharded_search import search_in_shards
from refine_fast.pipeline.workers import Spread, Work

RESULTS = Path(__file__).parent / "results" / "engine.csv"
COMMIT = commit()
KEY = ("job", "items", "queries", "workers", "metric", "device")
COLUMNS = (*KEY, "value", "unit", "commit")
UNITS = {"seconds": "s", "mb": "MB"}
D = 384
RULE: dict[str, Any] = {"k": 8, "band": (0.05, 0.18), "skip": 5}
"""Of a million random vectors some 160,000 are in the band of a query, and 200 above it."""
TIMED = re.compile(r"manifest\.json|report\.(md|html)|config\.yaml")
"""Files that hold times, paths or the name of the engine."""

Values = dict[str, float]


def unit_rows(path: Path, n: int, seed: int) -> np.ndarray:
    """A map of the file, which is written if it is missing: (n, D) float32 of unit length."""
    if not path.exists():
        temporary = path.with_suffix(".partial")
        rows = np.lib.format.open_memmap(temporary, "w+", np.float32, (n, D))
        rng = np.random.default_rng(seed)
        for start in range(0, n, 1 << 14):
            block = rng.standard_normal((min(1 << 14, n - start), D), np.float32)
            rows[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
        del rows
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


@contextmanager
def watched(values: Values) -> Iterator[None]:
    """Adds the peaks of this process's memory."""
    ended, peak = threading.Event(), 0

    def status(name: str) -> int:
        found = re.search(rf"^{name}:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)
        return int(found[1]) if found else 0

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.01):
            peak = max(peak, status("RssAnon") + status("RssShmem"))

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        values["peak_anonymous_mb"], values["peak_mb"] = peak / 1024, status("VmHWM") / 1024


def start_ray(workers: int) -> None:
    """A Ray of this machine with a core for each worker, of whatever number of real cores."""
    ray.init(
        address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", object_store_memory=OBJECT_STORE,
    )  # fmt: skip


class CountingWorkers(RayWorkers):
    """Counts the shards that are begun; may kill a worker after the first one that is done."""

    def __init__(self, log: Path) -> None:
        super().__init__("ray", lambda line: None)
        self.log, self.kills = log, False

    def start(self, workers: int, folder: Path) -> None:
        """Waits until every worker has started."""
        meet = partial(_meeting, folder / "met", workers)
        for _ in super().map(folder, "meet", meet, workers, lambda i: i):
            pass

    def map(
        self,
        folder: Path,
        key: Any,
        prepare: Callable[[], Work],
        count: int,
        item: Callable[[int], Any],
    ) -> Iterator[tuple[int, Path]]:
        """As RayWorkers does."""
        self.log.write_text("")
        logged = partial(_logged, prepare, self.log)
        for i, path in super().map(folder, key, logged, count, item):
            if self.kills:
                self.kills = False
                family = psutil.Process().children(recursive=True)
                workers = [p for p in family if "ShardWorker" in " ".join(p.cmdline())]
                workers[0].kill()
            yield i, path
        self.redone = len(self.log.read_text().splitlines()) - count


def _meeting(folder: Path, count: int) -> Work:
    def work(item: int, path: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / str(item)).touch()
        while len(list(folder.iterdir())) < count:
            time.sleep(0.01)
        path.touch()

    return work


def _logged(prepare: Callable[[], Work], log: Path) -> Work:
    plain = prepare()

    def work(item: Any, path: Path) -> None:
        with log.open("a") as file:
            file.write("begun\n")
        plain(item, path)

    return work


class Job(NamedTuple):
    """What is measured."""

    here: Callable[[int], tuple[float, np.ndarray]]
    """Threads -> (seconds, result), in another process; picklable."""
    spread: Callable[[Spread], np.ndarray]
    """The result, by the workers."""
    load: Callable[[], Any] | None = None
    name: Any = None


def measure(job: Job, workers: int, work: Path, rounds: int) -> Values:
    """One process beside the workers."""
    values, scratch = Values(), Path(tempfile.mkdtemp(dir=work))
    pool = CountingWorkers(scratch / "log")
    here_times, spread_times, results = [], [], []
    threads = min(workers, os.cpu_count() or 1)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one, watched(values):
        _, gold = one.submit(job.here, 1).result()
        start = time.perf_counter()
        start_ray(workers)
        pool.start(workers, scratch)
        values["start_seconds"] = time.perf_counter() - start
        for i in range(rounds + 2):
            if measured := 0 < i <= rounds:
                here_times.append(one.submit(job.here, threads).result()[0])
            pool.kills = i > rounds
            spread = Spread(pool, scratch / f"round-{i}", job.load, job.name)
            start = time.perf_counter()
            results.append(job.spread(spread))
            seconds = time.perf_counter() - start
            if measured:
                spread_times.append(seconds)
            else:
                values["killed_seconds" if i else "first_seconds"] = seconds
        pool.close()
        ray.shutdown()
    shutil.rmtree(scratch)
    return values | {
        "killed_shards_redone": pool.redone,
        "one_process_seconds": statistics.median(here_times),
        "workers_seconds": statistics.median(spread_times),
        "ratio": statistics.median(s / h for s, h in zip(spread_times, here_times, strict=True)),
        "equal": min(float((result == gold).mean()) for result in results),
    }


def _search_here(queries: Path, docs: Path, threads: int) -> tuple[float, np.ndarray]:
    torch.set_num_threads(threads)
    asked, every = np.load(queries), np.load(docs, mmap_mode="r")
    start = time.perf_counter()
    ids = rf.band_topk(asked, every, **RULE).ids
    return time.perf_counter() - start, ids.numpy()


def search_job(work: Path, documents: int, queries: int) -> Job:
    """Mining."""
    paths = work / f"queries-{queries}.npy", work / f"documents-{documents}.npy"
    asked, docs = unit_rows(paths[0], queries, 1), unit_rows(paths[1], documents, 0)

    def spread(given: Spread) -> np.ndarray:
        exclude: list[list[int]] = [[]] * queries
        return search_in_shards(given, asked, docs, exclude=exclude, **RULE).ids.numpy()

    return Job(partial(_search_here, *paths), spread)


def _load() -> Any:
    return load_encoder(encoder_folder("minilm"))


_model = cache(_load)


def _encode_here(texts: list[str], threads: int) -> tuple[float, np.ndarray]:
    torch.set_num_threads(threads)
    model = _model()
    start = time.perf_counter()
    rows = encode.encode(model, texts, role="document")
    return time.perf_counter() - start, rows


def encode_job(count: int) -> Job:
    """Encoding."""
    encode.BLOCKS_PER_SHARD = 1
    pages = [re.sub(r"\s+", " ", topics[name])[:500] for name in sorted(topics)]
    texts = [f"{i}. {pages[i % len(pages)]}" for i in range(count)]

    def spread(given: Spread) -> np.ndarray:
        return encode.encode(_model(), texts, role="document", spread=given)

    return Job(partial(_encode_here, texts), spread, _load, "minilm")


def _run(docs: str, out: Path, flags: list[str], workers: int) -> float:
    from refine_fast.cli import main

    torch.set_num_threads(1)
    if workers:
        start_ray(workers)
        flags = [*flags, "--engine", "ray"]
    start = time.perf_counter()
    if main(["run", docs, "--out", str(out), "--quiet", *flags]):
        raise SystemExit(f"the run with {workers} workers failed")
    return time.perf_counter() - start


def files_of(out: Path) -> dict[str, str]:
    """File -> SHA-256 of what it holds; of the report without what the stages took. Hidden files
    belong to the process that ran."""
    found = {}
    for path in sorted(path for path in out.rglob("[!.]*") if path.is_file()):
        content = path.read_bytes()
        if path == out / "report.json":
            report = json.loads(content)
            del report["stages"]
            content = json.dumps(report).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found


def compare_runs(given: argparse.Namespace) -> dict[int, Values]:
    """Runs, and prints which files differ; number of workers -> values."""
    files, values, spawn = {}, {}, multiprocessing.get_context("spawn")
    for workers in (0, *given.workers):
        out = given.work / f"run-{workers}"
        shutil.rmtree(out, ignore_errors=True)
        with ProcessPoolExecutor(1, spawn) as process:
            seconds = process.submit(_run, given.docs, out, given.flags, workers).result()
        files[workers], values[workers] = files_of(out), {"seconds": seconds}
    names = sorted(set().union(*files.values()))
    verdicts = {
        name: [
            "equal"
            if files[workers].get(name) == files[0].get(name)
            else "holds times"
            if TIMED.fullmatch(name)
            else "DIFFERENT"
            for workers in given.workers
        ]
        for name in names
    }
    print("file", *(f"{workers} workers" for workers in given.workers), sep="\t")
    for name, verdict in verdicts.items():
        print(name, *verdict, sep="\t")
    for workers, column in zip(given.workers, zip(*verdicts.values(), strict=True), strict=True):
        values[workers]["files_equal"] = column.count("equal")
        values[workers]["files_different"] = column.count("DIFFERENT")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    shared.add_argument("--rounds", type=int, default=2)
    shared.add_argument("--work", type=Path, default=Path("bench-engine"))
    jobs = parser.add_subparsers(dest="job", required=True)
    one = jobs.add_parser("search", parents=[shared])
    one.add_argument("--documents", type=int, default=1_000_000)
    one.add_argument("--queries", type=int, default=1_000)
    one = jobs.add_parser("encode", parents=[shared])
    one.add_argument("--texts", type=int, default=4096)
    one = jobs.add_parser("run", parents=[shared])
    one.add_argument("docs")
    given, given.flags = parser.parse_known_args()
    if given.flags and given.job != "run":
        parser.error(f"unknown: {' '.join(given.flags)}")
    given.work = given.work.resolve()
    given.work.mkdir(exist_ok=True)
    torch.set_num_threads(1)  # the workers take over the driver's number
    queries = 0
    if given.job == "run":
        measured, items = compare_runs(given), " ".join([Path(given.docs).name, *given.flags])
    else:
        if given.job == "search":
            items, queries = given.documents, given.queries
            job = search_job(given.work, items, queries)
        else:
            items = given.texts
            job = encode_job(items)
        measured = {n: measure(job, n, given.work, given.rounds) for n in given.workers}
    rows = [
        {
            "job": given.job,
            "items": items,
            "queries": queries,
            "workers": workers,
            "metric": metric,
            "device": device_name(),
            "value": round(value, 4),
            "unit": UNITS.get(metric.rpartition("_")[2], ""),
            "commit": COMMIT,
        }
        for workers, values in measured.items()
        for metric, value in values.items()
    ]
    save(RESULTS, KEY, COLUMNS, rows)
    for row in rows:
        print(row["job"], row["items"], row["workers"], row["metric"], row["value"], flush=True)
    if any(row["metric"] == "files_different" and row["value"] for row in rows):
        raise SystemExit("files differ")


if __name__ == "__main__":
    main()
