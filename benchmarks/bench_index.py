"""The index of many passages: time to build, disk, memory, latency, recall; serving_scale.csv.

    python benchmarks/bench_index.py --vectors FILE.npy [--passages 100000] [--sentences 2]
        [--type auto] [--work FOLDER]

The vectors are synthetic: real ones of --vectors, (n, d) float32 of unit length, each repeated with
noise that keeps a cosine of about 0.8 to its origin, so that they are clustered as real ones are.
Texts are 20 words drawn by Zipf's law. Every passage has --sentences sentences. The time to encode
texts is not counted, neither for passages nor for queries. recall: the share of the blend's exact
first 10 that a search finds, over 100 queries.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from keyed_table import save

from refine_fast.bench.machine import commit, device_name
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.serving import ann
from refine_fast.pipeline.serving.blend import Blend
from refine_fast.pipeline.serving.search import Index
from refine_fast.pipeline.serving.segment import Segment, finish_segment, write_segment

RESULTS = Path(__file__).parent / "results"
COMMIT = commit()
KEY = ("passages", "type", "metric", "device")
COLUMNS = (*KEY, "value", "unit", "sentences", "d", "commit")
QUERIES = 100
BLEND = Blend(0.7, 0.35)
WORDS = 20


def noisy(source: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors at a cosine of about 0.8 to rows of ``source``."""
    noise = rng.standard_normal((len(rows), source.shape[1]), np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    mixed = source[rows] + 0.75 * noise
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def build(folder: Path, given: argparse.Namespace) -> dict[str, float]:
    """Writes the segment; seconds of its parts."""
    source, rng = np.load(given.vectors), np.random.default_rng(0)
    vocabulary = np.array([f"word{i}" for i in range(50_000)])
    n, per = given.passages, given.sentences
    chunks = []
    for start in range(0, n, 10_000):
        drawn = np.minimum(rng.zipf(1.2, (min(10_000, n - start), WORDS)), len(vocabulary)) - 1
        for i, words in enumerate(vocabulary[drawn]):
            text = " ".join(words)
            chunks.append(Chunk(f"d{start + i}", text, "", f"d{start + i}", 0, len(text)))

    def write(name: str, texts: Sequence[str], out: Path) -> None:
        rows = np.lib.format.open_memmap(out, "w+", np.float32, (len(texts), source.shape[1]))
        for start in range(0, len(texts), 1 << 16):
            which = np.arange(start, min(start + (1 << 16), len(texts)))
            origin = which // per if name == "sentences" else which
            rows[which] = noisy(source, origin % len(source), rng)

    spans = [
        [(len(c.text) * i // per, len(c.text) * (i + 1) // per) for i in range(per)] for c in chunks
    ]
    start = time.perf_counter()
    write_segment(folder, chunks, spans, write, base=False)
    texts = time.perf_counter() - start
    start = time.perf_counter()
    finish_segment(folder, None if given.type == "auto" else given.type)
    return {"write_seconds": texts, "index_seconds": time.perf_counter() - start}


def measure(folder: Path, given: argparse.Namespace) -> dict[str, float]:
    """Latency, memory and recall of a segment."""
    start = time.perf_counter()
    index = Index([Segment(folder)])
    opened = time.perf_counter() - start
    rng = np.random.default_rng(1)
    source = np.load(given.vectors)
    vectors = noisy(source, rng.integers(0, min(given.passages, len(source)), QUERIES), rng)
    drawn = rng.zipf(1.3, (QUERIES, 4)) % 50_000
    queries = [" ".join(f"word{i}" for i in words) for words in drawn]
    times, found = [], []
    for _ in range(2):  # the first one warms the page cache
        times, found = [], []
        for query, vector in zip(queries, vectors, strict=True):
            begin = time.perf_counter()
            parts = index.components(query, vector)
            places = parts.top(BLEND(parts), 10)
            index.hits(parts.rows[places], places.astype(float), vector)
            times.append(time.perf_counter() - begin)
            found.append(set(parts.rows[places].tolist()))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    segment = index.segments[0]
    kept, segment.indexes = segment.indexes, {}
    hits = exact_ms = 0.0
    for query, vector, got in zip(queries, vectors, found, strict=True):
        begin = time.perf_counter()
        parts = index.components(query, vector)
        hits += len(got & set(parts.rows[parts.top(BLEND(parts), 10)].tolist()))
        exact_ms += 1000 * (time.perf_counter() - begin)
    segment.indexes = kept
    return {
        "open_seconds": opened,
        "p50_ms": 1000 * float(np.percentile(times, 50)),
        "p99_ms": 1000 * float(np.percentile(times, 99)),
        "exact_ms": exact_ms / QUERIES,
        "recall@10": hits / (10 * QUERIES),
        "peak_mb": memory,
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
    parser.add_argument("--step", choices=("build", "measure"))
    given = parser.parse_args()
    folder = given.work / f"{given.passages}-{given.type}"
    if given.step is None:  # each in a process of its own, for its peak of memory
        for step in ("build", "measure"):
            subprocess.run([sys.executable, *sys.argv, "--step", step], check=True)
        shutil.rmtree(folder)
        return
    if given.step == "build":
        if (folder / "segment.json").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        values = build(folder, given)
        values["build_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    else:
        values = measure(folder, given)
        facts = Segment(folder).facts
        values["disk_mb"] = facts["bytes"] / 1e6
        for name, about in facts["indexes"].items():
            values[f"{name}_faiss_mb"] = about.get("bytes", 0) / 1e6
            values[f"{name}_recall@10"] = about["recall@10"]
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
            "unit": metric.rpartition("_")[2] if "_" in metric else "share",
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
