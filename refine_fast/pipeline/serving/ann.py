"""Which faiss index a number of vectors gets, and how many of the exact neighbours it finds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

Kind = Literal["flat", "sq8", "hnsw", "ivfpq"]
"""flat: no faiss file, every vector is scored. sq8: inverted lists of 8-bit vectors. hnsw: a graph.
ivfpq: inverted lists of product codes, the smallest."""

FLAT_UP_TO, SQ8_UP_TO = 50_000, 2_000_000
"""Vectors. Up to the first, a scan is quick (at 100,000 passages, p99 of a search is 142 ms with
scans of both encoders' vectors, 40 ms with inverted lists). Beyond the second, 8-bit vectors take
gigabytes of memory."""

CENTRES = 256
"""Of a product code: fewer vectors cannot train them."""

PROBES = 32
"""Inverted lists that are searched for each query."""

TRAINING_ROWS_PER_LIST, ITERATIONS = 40, 5
"""Of k-means. faiss warns below 39 rows; more iterations do not raise the recall."""

CANDIDATES = 400
"""Vectors that an index contributes to a search; they are then scored exactly."""

SAMPLE = 100
"""Vectors that the recall is measured with."""


def kind_for(vectors: int, asked: Kind | None = None) -> Kind:
    """The kind of index for so many vectors: the one that was asked for, unless there are too few
    to train it."""
    if asked is not None:
        return "flat" if asked == "ivfpq" and vectors < CENTRES else asked
    if vectors <= FLAT_UP_TO:
        return "flat"
    return "sq8" if vectors <= SQ8_UP_TO else "ivfpq"


def build(vectors: np.ndarray, kind: Kind, *, seed: int = 0) -> Any:
    """A faiss index by inner product.

    Args:
        vectors: (n, d) float32; read in blocks.
        kind: any but flat.
        seed: of k-means and of the sample that it is trained on.
    """
    import faiss

    n, d = vectors.shape
    lists = int(max(1, min(np.sqrt(n), n / TRAINING_ROWS_PER_LIST)))
    index: Any
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(d, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, 256
    else:
        pieces = next(m for m in (48, 64, 32, 16, 8, 4, 2, 1) if d % m == 0)
        # np: no polysemous training, minutes of annealing for a search that is not used here.
        codes = "SQ8" if kind == "sq8" else f"PQ{pieces}np"
        index = faiss.index_factory(d, f"IVF{lists},{codes}", faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.niter = seed, ITERATIONS
        if kind == "ivfpq":
            index.pq.cp.niter = ITERATIONS
        index.nprobe = min(PROBES, lists)
        sample = min(n, max(lists * TRAINING_ROWS_PER_LIST, 10_000))
        chosen = np.sort(np.random.default_rng(seed).permutation(n)[:sample])
        index.train(np.ascontiguousarray(vectors[chosen]))
    for start in range(0, n, 1 << 16):
        index.add(np.ascontiguousarray(vectors[start : start + (1 << 16)]))
    return index


def save(index: Any, path: Path) -> None:
    """Writes a faiss index."""
    import faiss

    faiss.write_index(index, str(path))


def load(path: Path) -> Any:
    """Reads a faiss index, memory-mapped where its kind allows."""
    import faiss

    path.open("rb").close()  # faiss's own error says only that it cannot
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def nearest(
    index: Any, vectors: np.ndarray, vector: np.ndarray, k: int, live: np.ndarray | None = None
) -> np.ndarray:
    """Rows of the ``k`` live vectors with the highest inner product, in any order; of all live ones
    where they are fewer.

    Args:
        index: of ``vectors``; None: every vector is scored.
        vectors: (n, d) float32.
        vector: (d,) float32, the query.
        k: at least 1.
        live: (n,) bool: the rows that may be found; None: all.
    """
    k = min(k, len(vectors) if live is None else int(np.count_nonzero(live)))
    if not k:
        return np.zeros(0, np.int64)
    if index is not None:
        params = None if live is None else _only(index, live)
        _, (rows,) = index.search(vector[None], k, params=params)
        if len(rows := rows[rows >= 0]) == k:
            return np.asarray(rows)
        # The lists that were searched, or the paths of a graph, hold too few live rows.
    scores = vectors @ vector
    if live is not None:
        scores[~live] = -np.inf
    return np.argpartition(scores, len(scores) - k)[len(scores) - k :]


def _only(index: Any, live: np.ndarray) -> Any:
    """The parameters of a search that finds live rows alone, among as many of them as when all were
    live: what was near the query may be dead, and what is near now in other lists."""
    import faiss as module

    faiss: Any = module  # its stubs do not know these parameters
    selector = faiss.IDSelectorBitmap(np.packbits(live, bitorder="little"))
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    probes = math.ceil(index.nprobe * len(live) / int(np.count_nonzero(live)))
    return faiss.SearchParametersIVF(sel=selector, nprobe=min(probes, index.nlist))


def recall(index: Any, vectors: np.ndarray, queries: np.ndarray, k: int = 10) -> float:
    """The share of the exact ``k`` nearest vectors that are among the ``CANDIDATES`` which the
    index contributes to a search."""
    best = np.full((len(queries), 0), 0.0, np.float32)
    ids = np.full((len(queries), 0), 0, np.int64)
    for start in range(0, len(vectors), 1 << 16):
        scores = queries @ vectors[start : start + (1 << 16)].T
        best = np.concatenate([best, scores], axis=1)
        rows = np.broadcast_to(np.arange(start, start + scores.shape[1]), scores.shape)
        ids = np.concatenate([ids, rows], axis=1)
        order = np.argpartition(-best, min(k, best.shape[1]) - 1, axis=1)[:, :k]
        best, ids = np.take_along_axis(best, order, 1), np.take_along_axis(ids, order, 1)
    _, found = index.search(np.ascontiguousarray(queries), CANDIDATES)
    hits = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(ids, found, strict=True)]
    return sum(hits) / max(ids.size, 1)
