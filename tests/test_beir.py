"""Retrieval sets: reading BEIR's and TREC's files, and BEIR's rules, compared with pytrec_eval."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_sets import SMALL, folder_of

from refine_fast.cli import main
from refine_fast.errors import RefineFastError, RefineFastWarning
from refine_fast.pipeline.corpus.beir import RetrievalSet, load_beir
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.documents import Reading, load_documents
from refine_fast.pipeline.evaluation import evaluate
from refine_fast.pipeline.evaluation.bm25 import score_bm25
from refine_fast.pipeline.evaluation.metrics import METRICS
from refine_fast.pipeline.queries.user import load_queries
from refine_fast.pipeline.queries.user_formats import query_files


@pytest.fixture(scope="module", params=[SMALL, "squad"])
def data(request: pytest.FixtureRequest) -> RetrievalSet:
    return load_beir(folder_of(request.param)).sample(queries=20, docs=40, seed=1)


# ── reading ──


def tiny_set(folder: Path) -> Path:
    (folder / "qrels").mkdir()
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        file.write(
            '{"_id": "d1", "title": "Oil", "text": "Crude."}\n\n{"_id": "d2", "text": "Gas."}\n'
        )
    texts = {"q1": "what?", "q2": "which?", "q3": "who?"}
    (folder / "queries.jsonl").write_text(
        "\n".join(json.dumps({"_id": key, "text": text}) for key, text in texts.items())
    )
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq3\td2\t2\nq3\td1\t1\nq1\td1\t1\nq2\td1\t0\n"
    )
    return folder


def test_load_beir(tmp_path: Path) -> None:
    data = load_beir(tiny_set(tmp_path))
    assert (data.doc_ids, data.docs) == (["d1", "d2"], ["Oil Crude.", "Gas."])
    assert (data.query_ids, data.queries) == (["q3", "q1", "q2"], ["who?", "what?", "which?"])
    assert data.qrels == [{"d2": 2, "d1": 1}, {"d1": 1}, {"d1": 0}]
    assert data.relevant == [{0, 1}, {0}, set()]


HEADER = "query-id\tcorpus-id\tscore\n"


@pytest.mark.parametrize(
    ("text", "qrels"),
    [
        (HEADER + "q1\td1\t3\nq1\td2\t1\n", {"q1": {"d1": 3, "d2": 1}}),
        (HEADER + "q1\td1\t1.0\nq1\td2\t0.5 \n", {"q1": {"d1": 1, "d2": 0.5}}),
        (HEADER.replace("\n", "\r\n") + "q1\td1\t1\r\n", {"q1": {"d1": 1}}),
        ("qid\tpid\trel\nq1\td1\t1\n", {"q1": {"d1": 1}}),
        ("\ufeffqid\tpid\trel\n\nq1\td1\t1", {"q1": {"d1": 1}}),
        ("q1\td1\t1\n", {"q1": {"d1": 1}}),  # no header
        ("q1 0 d1 3\nq2 Q0 d2 1\n", {"q1": {"d1": 3}, "q2": {"d2": 1}}),  # TREC's
        ("q1\t0\td1\t3\nq1\t0\td2\t-1\n", {"q1": {"d1": 3, "d2": -1}}),
        ("qid iter docid rel\nq1  0\td1   1.0\n", {"q1": {"d1": 1}}),
        ("q1\td1\t1\nq1\td1\t2\n", {"q1": {"d1": 2}}),  # the last one wins
        (HEADER + "q1\td 1\t1\n", {"q1": {"d 1": 1}}),  # an id with a blank
    ],
)
def test_forms_of_qrels(tmp_path: Path, text: str, qrels: dict[str, dict[str, float]]) -> None:
    folder = tiny_set(tmp_path)
    with gzip.open(folder / "corpus.jsonl.gz", "at") as file:
        file.write('{"_id": "d 1", "text": "Coal."}\n')
    (folder / "qrels" / "test.tsv").write_text(text, encoding="utf-8", newline="")
    data = load_beir(folder)
    assert dict(zip(data.query_ids, data.qrels, strict=True)) == qrels


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "queries.jsonl",
            None,
            r"has no queries\.jsonl or queries\.jsonl\.gz; give a folder in BEIR layout",
        ),
        (
            "queries.jsonl",
            b'{"_id": "q1"\n',
            r"queries\.jsonl:1 is not JSON .* write one JSON object a line",
        ),
        (
            "queries.jsonl",
            b"[1]\n",
            r"queries\.jsonl:1 holds a JSON list; each line must be an object",
        ),
        (
            "queries.jsonl",
            b'{"_id": "q1", "text": null}\n',
            r'queries\.jsonl:1: the field "text" is null; it must be a string',
        ),
        (
            "queries.jsonl",
            b'{"_id": "q1", "text": [7]}\n',
            r'queries\.jsonl:1: the field "text" is \[7\]; it must be a string',
        ),
        (
            "queries.jsonl",
            b'{"_id": "q1", "text": "x"}\n{"_id": "q1", "text": "y"}\n',
            r"queries\.jsonl:2: duplicate _id 'q1'; ids must be unique",
        ),
        (
            "queries.jsonl",
            b'{"_id": "q1", "text": "\xff"}\n',
            r"queries\.jsonl:1 is not UTF-8 \(inv",
        ),
        (
            "corpus.jsonl.gz",
            b"not gzip",
            r"corpus\.jsonl\.gz cannot be read after line 0 \(Not a gzipped file",
        ),
        (
            "corpus.jsonl.gz",
            gzip.compress(b'{"_id": "d1", "text": "x"}\n' * 9, mtime=0)[:-12],
            r"corpus\.jsonl\.gz cannot be read after line \d+",
        ),
        ("qrels/test.tsv", None, r"test\.tsv does not exist; the splits of this set are: none"),
        (
            "qrels/test.tsv",
            b"q1 d1 1\n",
            r"test\.tsv:1 is 'q1 d1 1'; it must be query-id, corpus-id and score, separated",
        ),
        (
            "qrels/test.tsv",
            b"q1\td1\thigh\n",
            r"test\.tsv:1: the score must be a number \(got 'high'\)",
        ),
        ("qrels/test.tsv", b"q1\td1\tnan\n", r"test\.tsv:1: the score must be .* \(got 'nan'\)"),
        ("qrels/test.tsv", b"q1\td1\t1\n\nq\td\tr\n", r"test\.tsv:3: the score must be a number"),
        ("qrels/test.tsv", b"q1\t0\td1\t1\t9\n", r"test\.tsv:1 is .*; it must be query-id"),
        ("qrels/test.tsv", b"q1\td1\t\xff\n", r"test\.tsv cannot be read as UTF-8"),
        ("qrels/test.tsv", b"q9\td1\t1\n", r"test\.tsv:1: the query id 'q9' is not in"),
        (
            "qrels/test.tsv",
            b"q1\td9\t1\n",
            r"test\.tsv: the corpus has none of the 1 relevant passages, such as 'd9'; check",
        ),
        ("qrels/test.tsv", b"q1\td1\t0\n", r"test\.tsv names no relevant passage"),
    ],
)
def test_load_beir_names_what_is_wrong(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    tiny_set(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RefineFastError, match=message):
        load_beir(tmp_path)


def test_load_beir_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RefineFastError, match="is not a folder"):
        load_beir(tmp_path / "absent")


def test_documents_around_a_retrieval_set_are_refused(tmp_path: Path) -> None:
    """Its queries would be documents; with ``--queries`` they are none, and its passages are."""
    (folder := tmp_path / "my docs").mkdir()
    (tmp_path / "note.md").write_text("Besides.")
    tiny_set(folder)
    with pytest.raises(RefineFastError, match=rf"holds one, {folder}, .* give '{folder}' instead"):
        load_documents(tmp_path)
    assert len(load_documents(tmp_path, reading=Reading(exclude=query_files(folder)))) == 3
    (folder / "queries.jsonl").unlink()
    shutil.rmtree(folder / "qrels")
    assert len(load_documents(tmp_path)) == 3  # a table


def test_sample_keeps_every_answer(data: RetrievalSet) -> None:
    small = data.sample(queries=7, docs=20, seed=3)
    assert (len(small.queries), len(small.docs)) == (7, 20)
    for key, text, rows in zip(small.query_ids, small.queries, small.relevant, strict=True):
        whole = data.query_ids.index(key)
        assert text == data.queries[whole]
        assert {small.docs[row] for row in rows} == {data.docs[row] for row in data.relevant[whole]}


# ── BEIR's rules ──


def graded_set(
    rng: np.random.Generator, docs: int, queries: int, *, own: bool
) -> tuple[RetrievalSet, dict[str, np.ndarray]]:
    """A set with grades from -1 to 4, queries judged 0 alone, judged passages that the corpus
    lacks and, with ``own``, queries that are passages; and a vector for each text.

    The vectors hold small integers, so many similarities tie. trec_eval orders ties by descending
    document id, and the ids descend with the row: the same order as ours.
    """
    doc_ids = [f"{999 - row:03}" for row in range(docs)]
    query_ids = [doc_ids[i % docs] if own and i < docs else f"q{i}" for i in range(queries)]
    judgeable = [*doc_ids, "gone", "lost"]
    qrels = []
    for _ in query_ids:
        drawn = rng.permutation(judgeable)[: rng.integers(1, 30)].tolist()
        highest = rng.choice([0, 1, 4])
        qrels.append({doc: float(rng.integers(-1, highest + 1)) for doc in drawn})
    texts = [f"query {i}" for i in range(queries)]
    vectors = {text: rng.integers(-2, 3, 4).astype(np.float32) for text in [*doc_ids, *texts]}
    return RetrievalSet("graded", doc_ids, doc_ids, query_ids, texts, qrels), vectors


def beir_scores(
    data: RetrievalSet, similarities: np.ndarray, *, minimum: float = -np.inf
) -> dict[str, np.ndarray]:
    """Per query, as BEIR's EvaluateRetrieval computes them: identical ids are taken out of the
    results, pytrec_eval scores the rest, and MRR is the rank of the first relevant passage."""
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="needs pip install '.[test]'")
    qrels = {
        query: {doc: int(grade) for doc, grade in judged.items()}
        for query, judged in zip(data.query_ids, data.qrels, strict=True)
    }
    run = {
        query: {
            doc: float(value)
            for doc, value in zip(data.doc_ids, row, strict=True)
            if doc != query and value > minimum
        }
        for query, row in zip(data.query_ids, similarities, strict=True)
    }
    measures = {"recall.1,3,5,10,100", "ndcg_cut.10", "map_cut.100"}
    found = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    scores: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for query, results in run.items():
        theirs = found.get(query, {})  # a query without results scores 0, as with trec_eval -c
        for k in (1, 3, 5, 10, 100):
            scores[f"recall@{k}"].append(theirs.get(f"recall_{k}", 0))
        scores["ndcg@10"].append(theirs.get("ndcg_cut_10", 0))
        scores["map@100"].append(theirs.get("map_cut_100", 0))
        first = sorted(results, key=lambda doc: (results[doc], doc), reverse=True)[:10]
        ranks = [rank for rank, doc in enumerate(first, 1) if qrels[query].get(doc, 0) > 0]
        scores["mrr@10"].append(1 / ranks[0] if ranks else 0)
    return {metric: np.array(values) for metric, values in scores.items()}


def ranked_scores(
    data: RetrievalSet, vectors: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> dict[str, np.ndarray]:
    """Per query: the scores of an encoder that gives these vectors."""

    def encode(model: Any, texts: list[str], **options: Any) -> np.ndarray:
        return np.stack([vectors[text] for text in texts])

    monkeypatch.setattr(evaluate, "encode", encode)
    return evaluate.score(None, [data])[0].per_query  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 150), st.integers(1, 8), st.booleans())
def test_scores_equal_those_of_beir(seed: int, docs: int, queries: int, own: bool) -> None:
    data, vectors = graded_set(np.random.default_rng(seed), docs, queries, own=own)
    with pytest.MonkeyPatch.context() as monkeypatch:
        ours = ranked_scores(data, vectors, monkeypatch)
    d, q = (np.stack([vectors[text] for text in texts]) for texts in (data.docs, data.queries))
    theirs = beir_scores(data, q @ d.T)
    for metric in METRICS:
        assert ours[metric] == pytest.approx(theirs[metric], abs=1e-9), metric


def test_bm25_follows_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.array(["oil", "gas", "coal", "wind", "sun", "rain", "snow", "river", "lake", "sea"])
    rng = np.random.default_rng(0)
    data, _ = graded_set(rng, 60, 12, own=True)
    docs, queries = (
        [" ".join(words[rng.integers(len(words), size=size)]) for _ in range(count)]
        for count, size in ((60, 6), (12, 2))
    )
    data = RetrievalSet("words", data.doc_ids, docs, data.query_ids, queries, data.qrels)
    import bm25s

    kept: list[np.ndarray] = []
    get_scores = bm25s.BM25.get_scores

    def keep(self: bm25s.BM25, terms: list[str]) -> np.ndarray:
        scores = get_scores(self, terms)
        kept.append(scores.copy())
        return scores

    monkeypatch.setattr(bm25s.BM25, "get_scores", keep)
    ours = score_bm25(data).per_query
    theirs = beir_scores(data, np.stack(kept), minimum=0)
    for metric in METRICS:
        assert ours[metric] == pytest.approx(theirs[metric], abs=1e-9), metric


def test_a_query_is_not_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """ArguAna and Quora: each query is a passage, whose best match is itself."""
    ids = [f"d{i}" for i in range(6)]
    qrels = [{"d1": 1.0}, {"d0": 1.0}]
    data = RetrievalSet("pairs", ids, ids, ids[:2], ["first", "second"], qrels)
    vectors = {doc: np.array([1, i], np.float32) for i, doc in enumerate(ids)}
    vectors |= {"first": np.array([9, -1], np.float32), "second": np.array([9, -1], np.float32)}
    assert ranked_scores(data, vectors, monkeypatch)["mrr@10"].tolist() == [1, 1]
    other = RetrievalSet("pairs", ids, ids, ["x", "y"], ["first", "second"], qrels)
    assert ranked_scores(other, vectors, monkeypatch)["mrr@10"].tolist() == [1 / 2, 1]


def test_what_lowers_the_scores_is_named(tmp_path: Path) -> None:
    folder = tiny_set(tmp_path)
    assert list(load_beir(folder).remarks()) == [
        f"{tmp_path.name}: 1 of 3 queries, such as 'q2', have no relevant passage; they score 0, as"
        " in trec_eval."
    ]
    (folder / "queries.jsonl").write_text('{"_id": "d1", "text": "a"}\n{"_id": "q", "text": "b"}\n')
    (folder / "qrels" / "test.tsv").write_text("d1\td1\t1\nd1\tgone\t1\nq\td2\t1\nq\tno\t0\n")
    missing, own = load_beir(folder).remarks()
    assert "1 relevant passages, such as 'gone', are not in the corpus" in missing
    assert "1 queries, such as 'd1', have the id of their own relevant passage" in own


def test_missing_training_passages_are_counted(tmp_path: Path) -> None:
    folder = tiny_set(tmp_path)
    (folder / "qrels" / "train.tsv").write_text("q1\td1\t1\nq1\tgone\t2\nq2\td2\t0\n")
    (folder / "qrels" / "test.tsv").unlink()
    chunks = [Chunk("d1", "Crude.", "Oil", "corpus", 0, 1)]
    with pytest.warns(RefineFastWarning, match='1 of 2 queries are skipped .* the first "gone"'):
        queries = load_queries(folder, chunks)
    assert [(query.text, query.chunk_id) for query in queries] == [("what?", "d1")]


def test_eval_names_precision_and_remarks(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(tiny), "--data", str(tiny_set(tmp_path))]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "precision fp32" in " ".join(shown.out.split())
    assert "warning:" in shown.err
    assert "have no relevant passage" in shown.err
    assert main([*command, "--json", "--precision", "bf16"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["precision"] for row in rows] == [None, "bf16"]
    assert rows[0].keys() == rows[1].keys() >= {*METRICS, "data", "split", "passages", "queries"}
    assert {row["queries"] for row in rows} == {3}
