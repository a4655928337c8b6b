"""The index of many passages: time to build, disk, memory, latency, recall; serving_scale.csv.

    python benchmarks/bench_index.py --vectors FILE.npy [--passages 100000] [--sentences 2]
        [--type auto] [--work FOLDER]

The vectors are synthetic: real ones of --vectors, (n, d) float32 of unit length, each repeated with
noise that keeps a cosine of about 0.8 to its origin, so that they are clustered as real ones are.
Texts are 20 words drawn by Zipf's law. Every passage has --sentences sentences. Product and base
have vectors of their own. The time to encode texts is not counted.

    write_seconds      texts, postings and vectors, the time to make the vectors included
    index_seconds      faiss indexes with their recall, moments; index_cpu_seconds: processor time
    write_peak_mb      peak of memory, with the pages of files; likewise index_peak_mb
    p50_ms, p99_ms     ``Searcher.search``, 10 passages from each of the four systems, of queries
                       that were not asked before; cpu_ms: the processor time of one
    encode_ms          one query through MiniLM-L6, p50; a search has one each of product and base;
                       encode_cpu_ms: its processor time
    exact_cpu_ms       processor time of a search that scores every vector
    recall@10          the share of the exact first 10 of the blend that a search finds;
                       fused_recall@10: of passage vectors alone; base_recall@10: of the base's
    product_faiss_recall@10: what the index of the product's vectors states when it is built;
                       likewise of base and sentences
    anonymous_mb       memory of the process after the searches that is its own
    mapped_mb          memory that is pages of the index's files, which the system may drop
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from keyed_table import save

from refine_fast.bench.machine import commit, device_name
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.encoder.load import DEFAULT_ENCODER, encoder_folder
from refine_fast.pipeline.serving import ann
from refine_fast.pipeline.serving.encoders import Encoders, Side
from refine_fast.pipeline.serving.search import Searcher
from refine_fast.pipeline.serving.segment import finish_segment, write_segment
from refine_fast.pipeline.serving.storage import IndexFolder, Manifest

RESULTS = Path(__file__).parent / "results"
COMMIT = commit()
KEY = ("passages", "type", "metric", "device")
COLUMNS = (*KEY, "value", "unit", "sentences", "d", "commit")
WARM_UP, QUERIES, COMPARED = 30, 150, 40
"""Queries that are asked before any is timed; timed; compared with an exact search."""
BLEND = {"sentences": 0.7, "lexical": 0.35}
VOCABULARY = 50_000
STEPS = ("write", "index", "search", "compare")
WORDS = 20


def noisy(source: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors at a cosine of about 0.8 to rows of ``source``."""
    noise = rng.standard_normal((len(rows), source.shape[1]), np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    mixed = source[rows] + 0.75 * noise
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def write(folder: Path, given: argparse.Namespace) -> dict[str, float]:
    """Writes a segment, all but its faiss indexes."""
    source, rng = np.load(given.vectors), np.random.default_rng(0)
    vocabulary = np.array([f"word{i}" for i in range(VOCABULARY)])
    n, per = given.passages, given.sentences
    chunks = []
    for start in range(0, n, 10_000):
        drawn = np.minimum(rng.zipf(1.2, (min(10_000, n - start), WORDS)), VOCABULARY) - 1
        for i, words in enumerate(vocabulary[drawn]):
            text = " ".join(words)
            chunks.append(Chunk(f"d{start + i}", text, "", f"d{start + i}", 0, len(text)))

    def encode(name: str, texts: Sequence[str], out: Path) -> None:
        rows = np.lib.format.open_memmap(out, "w+", np.float32, (len(texts), source.shape[1]))
        for start in range(0, len(texts), 1 << 16):
            which = np.arange(start, min(start + (1 << 16), len(texts)))
            origin = which // per if name == "sentences" else which
            rows[which] = noisy(source, origin % len(source), rng)

    spans = [
        [(len(c.text) * i // per, len(c.text) * (i + 1) // per) for i in range(per)] for c in chunks
    ]
    start = time.perf_counter()
    write_segment(folder, chunks, spans, encode, base=True)
    return {"write_seconds": time.perf_counter() - start}


def build(folder: Path, given: argparse.Namespace) -> dict[str, float]:
    """Finishes the segment."""
    start, cpu = time.perf_counter(), time.process_time()
    facts = finish_segment(folder, None if given.type == "auto" else given.type)
    values = {
        "index_seconds": time.perf_counter() - start,
        "index_cpu_seconds": time.process_time() - cpu,
        "disk_mb": facts["bytes"] / 1e6,
    }
    for name, about in facts["indexes"].items():
        values[f"{name}_faiss_mb"] = about.get("bytes", 0) / 1e6
        values[f"{name}_faiss_recall@10"] = about["recall@10"]
    return values


class KnownVectors(Encoders):
    """Gives each query a vector that was made before."""

    def __init__(self, vectors: Mapping[str, np.ndarray]) -> None:
        super().__init__({})
        self.vectors = vectors

    def queries(self, side: Side, texts: Sequence[str]) -> np.ndarray:
        """The vectors, the same for both sides."""
        return np.stack([self.vectors[text] for text in texts])


def searcher_and_queries(run: Path, given: argparse.Namespace) -> tuple[Searcher, list[str]]:
    """The index of a run and queries near its passages."""
    rng = np.random.default_rng(1)
    source = np.load(given.vectors)
    origins = rng.integers(0, min(given.passages, len(source)), WARM_UP + QUERIES)
    vectors = noisy(source, origins, rng)
    drawn = rng.zipf(1.3, (len(vectors), 4)) % VOCABULARY
    queries = [" ".join(f"word{i}" for i in words) for words in drawn]
    return Searcher(run, KnownVectors(dict(zip(queries, vectors, strict=True)))), queries


def search(run: Path, given: argparse.Namespace) -> dict[str, float]:
    """Latency and memory."""
    before = process_memory()
    start = time.perf_counter()
    searcher, queries = searcher_and_queries(run, given)
    searcher.search(queries[0])
    first = time.perf_counter() - start
    for query in queries[:WARM_UP]:
        searcher.search(query)
    times = []
    cpu = time.process_time()
    for query in queries[WARM_UP:]:
        begin = time.perf_counter()
        searcher.search(query)
        times.append(time.perf_counter() - begin)
    cpu = time.process_time() - cpu
    memory = process_memory()
    return {
        "open_and_first_seconds": first,
        "p50_ms": 1000 * float(np.percentile(times, 50)),
        "p99_ms": 1000 * float(np.percentile(times, 99)),
        "cpu_ms": 1000 * cpu / QUERIES,
        **{name: memory[name] - before[name] for name in memory},
        **encoding_time(),
    }


def compare(run: Path, given: argparse.Namespace) -> dict[str, float]:
    """The shares of the exact first 10 that are found, and the time of an exact search."""
    searcher, queries = searcher_and_queries(run, given)
    found = [searcher.search(query) for query in queries[:COMPARED]]
    (segment,) = searcher.index.segments
    segment.indexes.clear()
    cpu = time.process_time()
    exact = [searcher.search(query) for query in queries[:COMPARED]]
    seconds = time.process_time() - cpu

    def share(system: str) -> float:
        hits = 0
        for one, other in zip(found, exact, strict=True):
            ids, wanted = ({hit.chunk.id for hit in each[system]} for each in (one, other))
            hits += len(ids & wanted)
        return hits / (10 * COMPARED)

    return {
        "recall@10": share("blend"),
        "fused_recall@10": share("fused"),
        "base_recall@10": share("base"),
        "exact_cpu_ms": 1000 * seconds / COMPARED,
    }


def encoding_time() -> dict[str, float]:
    """Milliseconds of MiniLM-L6 for one query."""
    encoders = Encoders({"product": encoder_folder(DEFAULT_ENCODER)})
    times, cpu = [], 0.0
    for i in range(40):
        if i == 10:  # warm
            times, cpu = [], time.process_time()
        begin = time.perf_counter()
        encoders.queries("product", [f"how long does it take to encode query number {i}"])
        times.append(time.perf_counter() - begin)
    return {
        "encode_ms": 1000 * float(np.median(times)),
        "encode_cpu_ms": 1000 * (time.process_time() - cpu) / len(times),
    }


def process_memory() -> dict[str, float]:
    """Megabytes of this process: its own, and pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return {
        "anonymous_mb": kb["RssAnon"] * 1024 / 1e6,
        "mapped_mb": (kb["RssFile"] + kb["RssShmem"]) * 1024 / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--sentences", type=int, default=2)
    parser.add_argument("--type", default="auto", choices=("auto", "flat", "sq8", "hnsw", "ivfpq"))
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("bench-index"))
    parser.add_argument("--step", choices=STEPS)
    given = parser.parse_args()
    run = given.work / f"{given.passages}-{given.type}"
    if given.step is None:  # each in a process of its own, for its peak of memory
        for step in STEPS:
            subprocess.run([sys.executable, *sys.argv, "--step", step], check=True)
        shutil.rmtree(run)
        return
    index = IndexFolder(run)
    segment = index.path / "s1"
    if given.step == "write":
        shutil.rmtree(run, ignore_errors=True)
        segment.mkdir(parents=True)
        values = write(segment, given)
    elif given.step == "index":
        values = build(segment, given)
        index.commit(Manifest({}, (segment.name,), blend=BLEND))
    elif given.step == "search":
        values = search(run, given)
    else:
        values = compare(run, given)
    if given.step in ("write", "index"):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        values[f"{given.step}_peak_mb"] = peak
    d = np.load(given.vectors, mmap_mode="r").shape[1]
    about = {"device": device_name(), "sentences": given.sentences * given.passages, "d": d}
    kind = given.type
    if kind == "auto":
        kind = f"auto ({ann.kind_for(given.passages)}, {ann.kind_for(about['sentences'])})"
    rows = [
        {
            "passages": given.passages,
            "type": kind,
            "metric": metric,
            "value": round(value, 4),
            "unit": "share" if "@" in metric else metric.rpartition("_")[2],
            "commit": COMMIT,
            **about,
        }
        for metric, value in values.items()
    ]
    save(RESULTS / "serving_scale.csv", KEY, COLUMNS, rows)
    for row in rows:
        print(row["passages"], row["type"], row["metric"], row["value"], flush=True)


if __name__ == "__main__":
    main()
