"""Segments of an index and their faiss files."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_fast.errors import RefineFastError
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.serving import ann
from refine_fast.pipeline.serving.search import Index
from refine_fast.pipeline.serving.segment import (
    BATCH_ROWS,
    Segment,
    finish_segment,
    write_segment,
)

RNG = np.random.default_rng(0)


def encode_ones(name: str, texts: Sequence[str], out: Path) -> None:
    np.save(out, np.ones((len(texts), 4), np.float32))


@pytest.mark.parametrize("kind", ["sq8", "hnsw", "ivfpq"])
def test_every_kind_of_index_states_its_recall(kind: ann.Kind, tmp_path: Path) -> None:
    d = 4 if kind == "ivfpq" else 16  # a k-means of 256 centres for each dimension
    vectors = RNG.standard_normal((2000, d), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = ann.build(vectors, kind)
    found = ann.recall(index, vectors, vectors[:20])
    assert 0.5 < found <= 1
    if kind == "ivfpq":
        assert not index.do_polysemous_training
    ann.save(index, tmp_path / "x.faiss")
    again = ann.load(tmp_path / "x.faiss")
    assert ann.recall(again, vectors, vectors[:20]) == found
    exact = ann.build(vectors, "hnsw")
    exact.hnsw.efSearch = 2000
    assert ann.recall(exact, vectors, vectors[:20]) > 0.99


def test_too_few_vectors_for_product_codes_are_scanned(tmp_path: Path) -> None:
    for n, kind in ((255, "flat"), (256, "ivfpq")):
        folder = tmp_path / str(n)
        folder.mkdir()
        np.save(folder / "product.npy", RNG.standard_normal((n, 4), np.float32))
        facts = finish_segment(folder, "ivfpq")
        assert facts["indexes"]["product"]["kind"] == kind
        assert (folder / "product.faiss").exists() == (kind != "flat")


def test_the_recall_counts_the_exact_neighbours_of_every_block() -> None:
    """An exact index has recall 1, over two blocks of vectors, and with fewer vectors than 10."""
    import faiss

    for n in (70_000, 5):
        vectors = RNG.standard_normal((n, 4), np.float32)
        index = faiss.IndexFlatIP(4)
        index.add(vectors)
        assert ann.recall(index, vectors, vectors[-20:]) == 1
    half = faiss.IndexFlatIP(4)
    half.add(RNG.standard_normal((70_000, 4), np.float32))  # other vectors under the same numbers
    vectors = RNG.standard_normal((70_000, 4), np.float32)
    assert ann.recall(half, vectors, vectors[-20:]) < 0.2


@pytest.mark.parametrize(("rank", "found"), [(ann.CANDIDATES - 11, 1), (ann.CANDIDATES, 0)])
def test_the_recall_is_that_of_the_candidates_of_a_search(rank: int, found: float) -> None:
    """An index that ranks the ten nearest vectors lower, among the candidates or behind them."""
    import faiss

    vectors = np.zeros((1000, 4), np.float32)
    vectors[:, 0] = np.arange(1000)[::-1]
    moved = vectors.copy()
    moved[:10, 0] = vectors[10 + rank, 0] - 0.5
    index = faiss.IndexFlatIP(4)
    index.add(moved)
    query = np.eye(1, 4, dtype=np.float32)
    assert ann.recall(index, vectors, query) == found
    candidates = ann.nearest(index, vectors, query[0], ann.CANDIDATES)
    assert len(set(range(10)) & set(candidates.tolist())) == 10 * found


def test_dead_neighbours_lower_the_recall_little() -> None:
    """All that is near the queries is dead, and half of the rows. An index of the live ones alone
    finds .98 of the nearest; with as many lists as when all were live, this one would find .69."""
    vectors = np.random.default_rng(0).standard_normal((20_000, 16), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    live = vectors[:, 0] < np.median(vectors[:, 0])
    index, hits = ann.build(vectors, "sq8"), 0
    queries = vectors[np.argsort(-vectors[:, 0])[:50]]
    for query in queries:
        exact = np.argsort(-np.where(live, vectors @ query, -1))[:10]
        found = ann.nearest(index, vectors, query, ann.CANDIDATES, live)
        hits += len(np.intersect1d(exact, found))
    assert hits / (10 * len(queries)) > 0.85


def test_a_segment_returns_what_was_written(tmp_path: Path) -> None:
    """On both sides of the edges of its batches; a lone surrogate becomes U+FFFD."""
    n = 2 * BATCH_ROWS + 5
    chunks = [Chunk(f"d{i}#0", f"text {i}", f"title {i}", f"d{i}", i, i + 6) for i in range(n)]
    chunks[3] = replace(chunks[3], text="lone \ud800 surrogate")

    spans = [[(0, len(chunk.text))] for chunk in chunks]
    write_segment(tmp_path, chunks, spans, encode_ones, base=True)
    finish_segment(tmp_path)
    segment = Segment(tmp_path)
    assert segment.column("id") == [chunk.id for chunk in chunks]
    for row in (0, BATCH_ROWS - 1, BATCH_ROWS, 2 * BATCH_ROWS - 1, 2 * BATCH_ROWS, n - 1):
        assert segment.chunk(row) == chunks[row]
    assert segment.chunk(3).text == "lone \ufffd surrogate"


@pytest.mark.parametrize("kind", ["flat", "sq8", "hnsw"])
def test_dead_passages_do_not_take_the_places_of_live_ones(kind: ann.Kind, tmp_path: Path) -> None:
    """More dead ones near the query than an index returns, and than its lists or its paths hold."""
    n, per_passage = 4000, np.arange(4000) % 3
    vectors = np.random.default_rng(0).standard_normal((n, 16), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chunks = [Chunk(f"d{i}", f"text {i}", "", f"d{i}", 0, 6) for i in range(n)]
    spans = [[(0, 6)] * int(count) or [(0, 4)] for count in per_passage]

    def encode(name: str, texts: Sequence[str], out: Path) -> None:
        np.save(
            out, np.repeat(vectors, list(map(len, spans)), 0) if name == "sentences" else vectors
        )

    write_segment(tmp_path, chunks, spans, encode, base=True)
    finish_segment(tmp_path, kind)
    query = vectors[0]
    order = np.argsort(-(vectors @ query))
    for dead in (np.sort(order[:900]), np.sort(order[:3998])):
        index = Index([Segment(tmp_path)], dead)
        found = index.components("unknown words", query).rows
        assert not np.isin(found, dead).any()
        expected = order[len(dead) :][:10]
        nearly = 0.5 if len(dead) < 3000 else 1
        assert np.isin(expected, found).mean() >= nearly
        rows, _ = index.base(query, 10)
        assert np.isin(expected, rows).mean() >= nearly
        assert len(rows) == min(10, n - len(dead))


@pytest.mark.parametrize("suffix", [".npy", ".faiss"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_what_cannot_be_read_is_not_called_damaged(
    code: int, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody is advised to delete it; numpy's files and faiss's."""
    segment = tmp_path / "index" / "s1"
    segment.mkdir(parents=True)
    write_segment(segment, [Chunk("a", "x", "", "a", 0, 1)], [[(0, 1)]], encode_ones, base=False)
    finish_segment(segment, "hnsw")
    opened = Path.open

    def fails(path: Path | str, *given: Any, **options: Any) -> Any:
        if Path(path).suffix == suffix:
            raise OSError(code, os.strerror(code), str(path))
        return opened(Path(path), *given, **options)

    monkeypatch.setattr("builtins.open", fails)
    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(RefineFastError) as error:
        Segment(segment)
    assert f"s1 cannot be read ({os.strerror(code)})" in str(error.value)
    assert "delete" not in str(error.value)
