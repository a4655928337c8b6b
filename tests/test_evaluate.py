"""Metrics against values worked out by hand and against sentence-transformers' own evaluator;
encoding, splits and intervals, on real sets too."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from math import log2
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_sets import SMALL, folder_of

from refine_fast.pipeline.artifacts import (
    CHUNKS,
    DEV,
    HELD_OUT,
    QUERIES,
    relevant_rows,
    training_view,
)
from refine_fast.pipeline.corpus.beir import RetrievalSet, load_beir
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.jsonl import write_records
from refine_fast.pipeline.encoder.encode import encode
from refine_fast.pipeline.evaluation.bm25 import score_bm25
from refine_fast.pipeline.evaluation.evaluate import evaluate_models, rank, score
from refine_fast.pipeline.evaluation.metrics import METRICS, score_ranking
from refine_fast.pipeline.evaluation.significance import BLOCK, Gain, gain
from refine_fast.pipeline.queries.query import Query
from refine_fast.pipeline.queries.splits import held_out_set, split_by_document


@pytest.fixture(scope="module")
def model(minilm: Path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu")
    model.max_seq_length = 64  # real vectors at a quarter of the time
    return model


@pytest.fixture(scope="module", params=[SMALL, "squad"])
def data(request: pytest.FixtureRequest) -> RetrievalSet:
    return load_beir(folder_of(request.param)).sample(queries=20, docs=40, seed=1)


# ── metrics ──


def test_metrics_by_hand() -> None:
    ranked = [
        [7, 3, 9, 1, 0, 2, 4, 5, 6, 8, 40],
        [0, 1, 2, None, None],
        [5, 6, 7, 8, 9, 10, 11, 12, 13, 2],
        [0],
    ]
    qrels = [{3: 1, 1: 1, 40: 1, 7: 0, 9: -1}, {9: 1}, {2: 1}, {0: 0}]
    scores = score_ranking(ranked, qrels).per_query
    assert scores["recall@1"].tolist() == [0, 0, 0, 0]
    assert scores["recall@3"] == pytest.approx([1 / 3, 0, 0, 0])
    assert scores["recall@5"] == pytest.approx([2 / 3, 0, 0, 0])
    assert scores["recall@10"] == pytest.approx([2 / 3, 0, 1, 0])
    assert scores["recall@100"] == pytest.approx([1, 0, 1, 0])
    assert scores["mrr@10"] == pytest.approx([1 / 2, 0, 1 / 10, 0])
    assert scores["map@100"] == pytest.approx([(1 / 2 + 2 / 4 + 3 / 11) / 3, 0, 1 / 10, 0])
    ideal = 1 + 1 / log2(3) + 1 / log2(4)  # three relevant passages, all at the top
    expected = [(1 / log2(3) + 1 / log2(5)) / ideal, 0, 1 / log2(11), 0]
    assert scores["ndcg@10"] == pytest.approx(expected)


def test_the_grade_is_the_gain() -> None:
    qrels = [{"a": 1, "b": 3, "c": 0.5}] * 3
    ranked = [["b", "a", "c"], ["a", "b", "c"], ["c", "x", "b"]]
    ideal = 3 + 1 / log2(3) + 0.5 / 2
    expected = [1, (1 + 3 / log2(3) + 0.5 / 2) / ideal, (0.5 + 3 / 2) / ideal]
    assert score_ranking(ranked, qrels).per_query["ndcg@10"] == pytest.approx(expected)


def test_more_relevant_than_the_ranking_is_deep() -> None:
    scores = score_ranking([range(100)], [dict.fromkeys(range(200), 1)]).metrics
    assert scores == pytest.approx(
        {
            "recall@1": 0.005,
            "recall@3": 0.015,
            "recall@5": 0.025,
            "recall@10": 0.05,
            "recall@100": 0.5,
            "ndcg@10": 1,
            "mrr@10": 1,
            "map@100": 0.5,
        }
    )


# One relevant passage or several; one each; several.
@pytest.mark.parametrize("name", [SMALL, "covidqa", "dstc11_travel"])
def test_metrics_equal_sentence_transformers(model, name: str) -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    data = load_beir(folder_of(name)).sample(queries=30, docs=150, seed=3)
    theirs = InformationRetrievalEvaluator(
        dict(zip(data.query_ids, data.queries, strict=True)),
        dict(zip(data.doc_ids, data.docs, strict=True)),
        {key: set(judged) for key, judged in zip(data.query_ids, data.qrels, strict=True)},
        precision_recall_at_k=[1, 3, 5, 10, 100],
    )
    expected = theirs(model)
    # in bf16 the two would differ by their batches
    ours = score(model, [data], bf16=False)[0].metrics
    assert 0.1 < ours["recall@1"] < 0.95  # neither trivial nor hopeless: every metric can differ
    for metric in METRICS:
        assert ours[metric] == pytest.approx(expected[f"cosine_{metric}"], abs=1e-9), metric


def test_score_encodes_ranks_and_counts(model, data: RetrievalSet) -> None:
    calls: list[tuple[int, int]] = []
    # the same texts in two sets are encoded once
    scores, again = score(
        model, [data, data], bf16=False, batch_size=4, progress=lambda *c: calls.append(c)
    )
    assert again.metrics == scores.metrics
    docs, queries = (
        encode(model, texts, role=role, bf16=False)
        for texts, role in ((data.docs, "document"), (data.queries, "query"))
    )
    ranked = data.ids_at(rank(queries, docs))
    assert scores.metrics == score_ranking(ranked, data.qrels).metrics
    assert scores.metrics["recall@10"] > 0.8
    assert calls == [(40, 60), (60, 60)]


def test_what_is_known_is_not_encoded(model, data: RetrievalSet) -> None:
    calls: list[tuple[int, int]] = []
    passages = data.docs[:30]
    known = dict(zip(passages, encode(model, passages, role="document", bf16=False), strict=True))
    encoded, looked_up = (
        score(model, [data], bf16=False, known=given, progress=lambda *c: calls.append(c))[0]
        for given in (None, known)
    )
    assert looked_up.metrics == encoded.metrics
    assert [total for _, total in calls] == [60, 60, 30, 30]
    others = dict(zip(passages, reversed(known.values()), strict=True))
    (wrong,) = score(model, [data], bf16=False, known=others)
    assert wrong.metrics["recall@10"] < encoded.metrics["recall@10"]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 140), st.integers(1, 6))
def test_rank_is_exact_with_ties_by_lower_row(seed: int, n: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    queries, docs = (
        rng.integers(-2, 3, (rows, d)).astype(np.float32) for rows in (3, n)
    )  # small integers: many exact ties
    ranked = rank(queries, docs)
    for row, scores in zip(ranked, queries.astype(float) @ docs.T.astype(float), strict=True):
        expected = sorted(range(n), key=lambda doc: (-scores[doc], doc))[:100]
        assert row.tolist() == expected + [-1] * (100 - len(expected))


@pytest.mark.parametrize(("name", "recall"), [("squad", 0.911), ("pubmedqa", 0.980)])
def test_bm25_reproduces_the_published_recall(name: str, recall: float) -> None:
    """The figures come from another run of BM25 over the same sets."""
    assert score_bm25(load_beir(folder_of(name))).metrics["recall@3"] == pytest.approx(
        recall, abs=0.005
    )


def test_bm25_finds_nothing_without_a_shared_term() -> None:
    docs = ["red apples", "green pears", "blue plums"]
    # Found by its stem; row 0 shares no term; no row does; nothing but stop words.
    asked = {"pear": "b", "plums": "a", "zebra": "a", "of the": "a"}
    qrels = [{doc: 1.0} for doc in asked.values()]
    data = RetrievalSet("three", list("abc"), docs, list("1234"), list(asked), qrels)
    assert score_bm25(data).per_query["mrr@10"].tolist() == [1, 0, 0, 0]
    stop_words = replace(data, docs=["of", "the", "and"])
    assert score_bm25(stop_words).per_query["mrr@10"].tolist() == [0, 0, 0, 0]


# ── intervals and the fusion weight ──


def test_gain_covers_the_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(400):
        before = rng.binomial(1, 0.6, 300).astype(float)
        after = np.where(
            rng.random(300) < 0.1, 1.0, before
        )  # 4% of the queries gain in expectation
        interval = gain(before, after, resamples=1000, seed=trial)
        covered += interval.low <= 0.04 <= interval.high
    # binomial(400, .95) has a standard deviation of 1.1%; the percentile bootstrap is known to fall
    # a point or two short with few changes.
    assert 0.90 <= covered / 400 <= 0.985


def test_a_handful_of_queries_shows_nothing() -> None:
    before = np.zeros(6)
    assert gain(before, before + 0.3).verdict == "improved"
    few = gain(before[:5], before[:5] + 0.3)
    assert (round(few.mean, 9), few.verdict) == (0.3, "no measurable change")
    assert gain(before[:1], before[:1] - 0.3).verdict == "no measurable change"
    assert gain(before[:0], before[:0]) == Gain(0.0, -1.0, 1.0)


@pytest.mark.parametrize("queries", [6, 20, 500])
@pytest.mark.parametrize("sign", [1, -1])
def test_unchanged_queries_are_no_evidence(queries: int, sign: int) -> None:
    change = np.zeros(queries)
    change[:5] = sign * 0.5
    found = gain(np.zeros(queries), change)
    assert (found.mean, found.verdict) == (change.mean(), "no measurable change")
    assert found.high - found.low < 1.0  # and still says how large the change may be
    change[5] = sign * 0.5
    assert gain(np.zeros(queries), change).verdict != "no measurable change"


def test_gain_is_paired_and_seeded() -> None:
    before = np.random.default_rng(0).random(500)
    shifted = gain(before, before + 0.01)
    assert (shifted.low, shifted.high) == pytest.approx(
        (0.01, 0.01)
    )  # unpaired, the interval would be +-0.036
    after = np.random.default_rng(1).random(500)
    assert gain(before, after, seed=4) == gain(before, after, seed=4) != gain(before, after, seed=5)


def test_gain_takes_little_memory_for_many_queries() -> None:
    change = np.random.default_rng(0).random(1001)
    tracemalloc.start()
    try:
        found = gain(np.zeros(1001), change, resamples=8000)
        assert tracemalloc.get_traced_memory()[1] < 3 * 8 * BLOCK  # all at once: 128 MB
    finally:
        tracemalloc.stop()
    draws = np.random.default_rng(0).multinomial(1001, np.full(1001, 1 / 1001), size=8000)
    means = draws @ np.sort(change) / 1001
    assert (found.low, found.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-12)


@pytest.mark.parametrize(
    ("change", "verdict"), [(0.1, "improved"), (0.0, "no measurable change"), (-0.1, "got worse")]
)
def test_verdict(change: float, verdict: str) -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, 400)
    assert gain(np.zeros(400), noise - noise.mean() + change).verdict == verdict


@pytest.mark.parametrize("name", [SMALL, "dstc11_travel"])
def test_evaluate_models(minilm: Path, name: str, tmp_path: Path) -> None:
    data = load_beir(folder_of(name)).sample(queries=10, docs=30, seed=0)
    (tmp_path / "qrels").mkdir()
    for stem, ids, texts in (
        ("corpus", data.doc_ids, data.docs),
        ("queries", data.query_ids, data.queries),
    ):
        (tmp_path / f"{stem}.jsonl").write_text(
            "\n".join(json.dumps({"_id": i, "text": t}) for i, t in zip(ids, texts, strict=True))
        )
    pairs = [
        f"{q}\t{data.doc_ids[row]}\t1"
        for q, rows in zip(data.query_ids, data.relevant, strict=True)
        for row in rows
    ]
    (tmp_path / "qrels" / "dev.tsv").write_text("\n".join(pairs))
    bm25, first, second = evaluate_models([str(minilm), "minilm"], tmp_path, "dev")
    assert bm25["system"] == "BM25"
    assert {key: first[key] for key in ("split", "passages", "queries")} == {
        "split": "dev",
        "passages": 30,
        "queries": 10,
    }
    assert first["recall@10"] > 0.5
    assert "gain" not in bm25 | first
    assert second["gain"]["ndcg@10"] == {"mean": 0, "low": 0, "high": 0}


# ── encoding ──


def test_encode(model, data: RetrievalSet, tmp_path: Path) -> None:
    """Order, unit length, bf16, the memmap and the progress. 19 texts one by one are two blocks,
    the second of them ragged."""
    texts = data.docs[:19]
    expected = model.encode(texts, normalize_embeddings=True)
    exact = encode(model, texts, role="document", batch_size=1, bf16=False)
    assert exact.dtype == np.float32
    assert np.abs(exact - expected).max() < 2e-6  # float32 sums of 384 terms, in other batches
    calls: list[tuple[int, int]] = []
    fast = encode(
        model,
        texts,
        role="document",
        batch_size=1,
        bf16=True,
        out=tmp_path / "v.npy",
        progress=lambda *c: calls.append(c),
    )
    assert (exact * fast).sum(1).min() > 0.9999
    assert np.abs(np.linalg.norm(fast, axis=1) - 1).max() < 1e-6
    assert calls == [(16, 19), (19, 19)]
    assert isinstance(fast, np.memmap)
    assert np.array_equal(np.load(tmp_path / "v.npy"), fast)
    assert [p.name for p in tmp_path.iterdir()] == ["v.npy"]
    assert encode(model, [], role="query").shape == (0, 384)


def test_encode_uses_the_prompts_of_the_model(minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(minilm), device="cpu", prompts={"query": "find: ", "document": "text: "}
    )
    plain = SentenceTransformer(str(minilm), device="cpu")
    for role, prompt in (("query", "find: "), ("document", "text: ")):
        assert np.allclose(
            encode(model, ["oil"], role=role), encode(plain, [prompt + "oil"], role=role), atol=1e-6
        )


def test_encode_leaves_nothing_half_written(model, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(model, ["a", "b"], role="query", out=tmp_path / "v.npy", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


# ── held-out queries ──


def pieces(sources: int) -> tuple[list[Chunk], list[Query]]:
    chunks = [Chunk(f"c{i}", f"text {i}", "T", f"s{i % sources}", 0, 9) for i in range(120)]
    return chunks, [Query(f"query {i} {j}", f"c{i}", "cloze") for i in range(120) for j in range(2)]


@pytest.mark.parametrize(
    "sources", [40, 1]
)  # many documents; one long one, which is split by chunk
def test_nothing_leaks_from_held_out_documents(sources: int) -> None:
    chunks, queries = pieces(sources)
    queries[-1] = replace(queries[-1], text="  QUERY 0 0")
    parts = split_by_document(queries, chunks, {"dev": 0.1, "test": 0.2}, seed=1)
    assert parts == split_by_document(queries, chunks, {"dev": 0.1, "test": 0.2}, seed=1)
    assert parts != split_by_document(queries, chunks, {"dev": 0.1, "test": 0.2}, seed=2)
    source = {chunk.id: chunk.source if sources > 1 else chunk.id for chunk in chunks}
    documents = {name: {source[q.chunk_id] for q in part} for name, part in parts.items()}
    assert sum(map(len, documents.values())) == len(set().union(*documents.values()))
    held_out = {
        " ".join(q.text.casefold().split()) for name in ("dev", "test") for q in parts[name]
    }
    assert held_out.isdisjoint({" ".join(q.text.casefold().split()) for q in parts["train"]})
    assert 239 <= sum(map(len, parts.values())) <= 240
    assert 24 <= len(parts["dev"]) <= 24 + 6
    assert 48 <= len(parts["test"]) <= 48 + 6
    data = held_out_set(chunks, parts["test"])
    assert len(data.docs) == 120
    assert [data.docs[row] for rows in data.relevant for row in rows] == [
        f"T text {q.chunk_id[1:]}" for q in parts["test"]
    ]


@pytest.mark.parametrize("sources", [40, 1])
@pytest.mark.parametrize("again", ["question {}", " Question  {}"])
def test_a_held_out_question_keeps_its_answers_in_all_documents(
    tmp_path: Path, sources: int, again: str
) -> None:
    """Also those in a document that is trained on, whose own questions keep their passages."""
    chunks = [Chunk(f"c{i}", f"text {i}", "T", f"s{i % sources}", 0, 9) for i in range(40)]
    queries = [
        Query(text.format(i), f"c{(i + k) % 40}", "user")
        for i in range(40)
        for k, text in enumerate(("question {}", again))
    ]
    parts = split_by_document(queries, chunks, {"dev": 0.1, "test": 0.2}, seed=0)
    for name in ("dev", "test"):
        data = held_out_set(chunks, parts[name])
        for text, rows in zip(data.queries, data.relevant, strict=True):
            number = int(text.split()[1])
            assert set(rows) == {number, (number + 1) % 40}
    write_records(tmp_path / CHUNKS, chunks)
    for file, name in ((QUERIES, "train"), (DEV, "dev"), (HELD_OUT, "test")):
        write_records(tmp_path / file, parts[name])
    seen, asked = training_view(tmp_path)
    assert asked == parts["train"]
    relevant = relevant_rows(seen, asked)
    assert sum(map(len, relevant.values())) == len(asked)
    answers = {query.chunk_id for name in ("dev", "test") for query in parts[name]}
    trained = {query.chunk_id for query in asked}
    assert {chunk.id for chunk in seen} == trained | ({chunk.id for chunk in chunks} - answers)


def test_one_answer_each_is_split_as_ever() -> None:
    chunks, queries = pieces(40)
    parts = split_by_document(queries, chunks, {"dev": 0.1, "test": 0.2}, seed=0)
    assert sorted((q.text, q.chunk_id) for part in parts.values() for q in part) == sorted(
        (q.text, q.chunk_id) for q in queries
    )


def test_a_question_with_several_answers() -> None:
    """It is one query, and in one part only: what chooses must not be what is reported."""
    chunks, queries = pieces(40)
    held = [Query(text, f"c{i}", "user") for text, i in (("a", 3), ("b", 4), ("a", 5))]
    data = held_out_set(chunks, held)
    assert data.queries == ["a", "b"]
    assert data.qrels == [{"c3": 1.0, "c5": 1.0}, {"c4": 1.0}]
    assert len(set(data.query_ids)) == 2
    often = [replace(query, text=f"Question {i % 7}") for i, query in enumerate(queries[:160])]
    parts = split_by_document(often + queries[160:], chunks, {"dev": 0.2, "test": 0.2}, seed=0)
    texts = [{query.text for query in part} for part in parts.values()]
    assert sum(map(len, texts)) == len(set().union(*texts))
    assert {query.text for query in parts["dev"]} & {f"Question {i}" for i in range(7)}


def test_added_queries_are_trained_on_unless_their_document_is_held_out() -> None:
    """By source, and by chunk where there are few sources. A held-out query's text never is."""
    for sources in (40, 1):
        chunks, queries = pieces(sources)
        added = [replace(query, text=f"made {query.text}", kind="span") for query in queries]
        copies = [replace(query, kind="span") for query in queries]
        shares = {"dev": 0.1, "test": 0.2}
        alone = split_by_document(queries, chunks, shares, seed=0)
        parts = split_by_document(queries, chunks, shares, seed=0, added=added + copies)
        assert {name: parts[name] for name in shares} == {name: alone[name] for name in shares}
        of = {chunk.id: chunk.source if sources > 1 else chunk.id for chunk in chunks}
        unseen = {of[query.chunk_id] for name in shares for query in parts[name]}
        trained = [query for query in added if of[query.chunk_id] not in unseen]
        assert 0 < len(trained) < len(added)
        assert parts["train"][: len(alone["train"])] == alone["train"]
        assert [query for query in parts["train"] if query.text.startswith("made ")] == trained
        held_out = {query.text for name in shares for query in parts[name]}
        assert not held_out & {query.text for query in parts["train"]}


def test_all_queries_on_one_document() -> None:
    """The first part takes them all and leaves nothing for the others."""
    chunks, queries = pieces(1)
    parts = split_by_document(
        [query for query in queries if query.chunk_id == "c0"],
        chunks,
        {"test": 0.2, "dev": 0.1},
        seed=0,
    )
    assert {name: len(part) for name, part in parts.items()} == {"train": 0, "test": 2, "dev": 0}
