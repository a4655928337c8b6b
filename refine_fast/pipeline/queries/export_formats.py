"""A mined training set in the formats of other trainers.

    triplets        sentence-transformers: {"anchor", "positive", "negative", "scores"}, one row for
                    each positive and each negative of a query. No ids: its trainer takes every
                    other column for a text.
    flagembedding   {"query", "pos", "neg", "pos_scores", "neg_scores", "prompt"}
    tevatron        {"query_id", "query", "positive_passages", "negative_passages"}, a passage being
                    {"docid", "title", "text", "score"}
    llama_index     EmbeddingQAFinetuneDataset, which holds no negatives and no scores
    beir            corpus.jsonl, queries.jsonl, qrels/, and hard-negatives.jsonl in GPL's layout
    parquet         one row for each query, with lists of ids, texts and scores

Texts are without prompts, which every trainer adds itself. A score is the similarity under the base
encoder or, where a teacher was named, its logit. ``user_formats`` reads all of them.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ..corpus.chunk import Chunk
from .query import Query

Scored = tuple[Chunk, float]
"""A passage, and its score for the query."""

BEIR_FILES = ("corpus.jsonl", "queries.jsonl", "hard-negatives.jsonl", "qrels")
"""What an exported BEIR folder holds."""

SYSTEM = "refine_fast"
"""Name of the system that found the hard negatives, in GPL's layout."""

_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""Where ``str.splitlines``, with which some read JSON lines, would cut a line."""

_ROWS = 1024  # in a batch of Parquet


@dataclass(frozen=True)
class MinedQuery:
    """A training query with the passages that answer it and its hard negatives."""

    text: str
    positives: tuple[Scored, ...]
    negatives: tuple[Scored, ...]

    @property
    def id(self) -> str:
        """The same for the same text, in every run."""
        return query_id(self.text)


@dataclass(frozen=True)
class TrainingSet:
    """What is exported."""

    passages: Sequence[Chunk]
    """Those that training may see."""
    queries: Sequence[MinedQuery]
    query_prompt: str = ""
    """What the base encoder puts before a query."""


def query_id(text: str) -> str:
    """An id for a query that depends on nothing but its text."""
    return f"q{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def with_random_negatives(
    data: TrainingSet, similarity: Callable[[int, int], float]
) -> TrainingSet:
    """The training set with one random passage as the negative of each query that has none.

    For trainers that cannot read an empty list. A query that every passage answers is left out.

    Args:
        data: the training set.
        similarity: of the query and the passage at two indices.
    """
    filled = []
    for i, query in enumerate(data.queries):
        if not query.negatives:
            row = _random_row(query, data.passages)
            if row is None:
                continue
            query = replace(query, negatives=((data.passages[row], similarity(i, row)),))
        filled.append(query)
    return replace(data, queries=filled)


def _random_row(query: MinedQuery, passages: Sequence[Chunk]) -> int | None:
    """A passage that does not answer the query, drawn by the query's text."""
    answers = {chunk.passage for chunk, _ in query.positives}
    start = int(query.id[1:], 16) % len(passages)
    rows = chain(range(start, len(passages)), range(start))
    return next((row for row in rows if passages[row].passage not in answers), None)


def triplets(data: TrainingSet) -> Iterator[str]:
    """JSON lines for sentence-transformers."""
    return _lines(
        {
            "anchor": query.text,
            "positive": positive.passage,
            "negative": negative.passage,
            "scores": [positive_score, negative_score],
        }
        for query in data.queries
        for positive, positive_score in query.positives
        for negative, negative_score in query.negatives
    )


def flagembedding(data: TrainingSet) -> Iterator[str]:
    """JSON lines for FlagEmbedding. "prompt" is always there: without it, a trainer that batches by
    dataset would put "None" before the query."""
    return _lines(
        {
            "query": query.text,
            "pos": [chunk.passage for chunk, _ in query.positives],
            "neg": [chunk.passage for chunk, _ in query.negatives],
            "pos_scores": [score for _, score in query.positives],
            "neg_scores": [score for _, score in query.negatives],
            "prompt": data.query_prompt,
            "query_id": query.id,
            "pos_ids": [chunk.id for chunk, _ in query.positives],
            "neg_ids": [chunk.id for chunk, _ in query.negatives],
        }
        for query in data.queries
    )


def tevatron(data: TrainingSet) -> Iterator[str]:
    """JSON lines for tevatron."""

    def passages(found: Iterable[Scored]) -> list[dict[str, Any]]:
        return [
            {"docid": chunk.id, "title": chunk.title, "text": chunk.text, "score": score}
            for chunk, score in found
        ]

    return _lines(
        {
            "query_id": query.id,
            "query": query.text,
            "positive_passages": passages(query.positives),
            "negative_passages": passages(query.negatives),
        }
        for query in data.queries
    )


def llama_index(data: TrainingSet) -> Iterator[str]:
    """JSON for ``EmbeddingQAFinetuneDataset.from_json``, which reads in the platform's encoding:
    the text is ASCII."""
    value = {
        "queries": {query.id: query.text for query in data.queries},
        "corpus": {chunk.id: chunk.passage for chunk in data.passages},
        "relevant_docs": {
            query.id: [chunk.id for chunk, _ in query.positives] for query in data.queries
        },
        "mode": "text",
    }
    yield json.dumps(value, indent=4) + "\n"


def write_parquet(path: Path, data: TrainingSet) -> None:
    """One row for each query, also for those without negatives."""
    import pyarrow
    import pyarrow.parquet

    texts, scores = pyarrow.list_(pyarrow.string()), pyarrow.list_(pyarrow.float64())
    columns = {"query_id": pyarrow.string(), "query": pyarrow.string()}
    for kind in ("positive", "negative"):
        columns |= {f"{kind}_ids": texts, f"{kind}s": texts, f"{kind}_scores": scores}
    schema = pyarrow.schema(columns)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(data.queries), _ROWS):
            rows = [_row(query) for query in data.queries[start : start + _ROWS]]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _row(query: MinedQuery) -> dict[str, Any]:
    row: dict[str, Any] = {"query_id": query.id, "query": query.text}
    for kind, found in (("positive", query.positives), ("negative", query.negatives)):
        row |= {
            f"{kind}_ids": [chunk.id for chunk, _ in found],
            f"{kind}s": [chunk.passage for chunk, _ in found],
            f"{kind}_scores": [score for _, score in found],
        }
    return row


def write_beir(
    folder: Path,
    data: TrainingSet,
    corpus: Sequence[Chunk],
    splits: Mapping[str, Sequence[Query]],
) -> None:
    """A BEIR folder, with the mined negatives beside it.

    Args:
        folder: an existing, empty folder.
        data: the training set, the split "train".
        corpus: every chunk, those of held-out documents too.
        splits: name of a further split -> its queries; one without queries is not written.
    """
    rows = ({"_id": c.id, "title": c.title, "text": c.text} for c in corpus)
    _write(folder / "corpus.jsonl", _lines(rows))
    held_out = [query.text for queries in splits.values() for query in queries]
    texts = dict.fromkeys([*(query.text for query in data.queries), *held_out])
    _write(
        folder / "queries.jsonl",
        _lines({"_id": query_id(text), "text": text} for text in texts),
    )
    hard = (
        {
            "qid": query.id,
            "pos": [chunk.id for chunk, _ in query.positives],
            "neg": {SYSTEM: [chunk.id for chunk, _ in query.negatives]},
            "pos_scores": [score for _, score in query.positives],
            "neg_scores": {SYSTEM: [score for _, score in query.negatives]},
        }
        for query in data.queries
    )
    _write(folder / "hard-negatives.jsonl", _lines(hard))
    (folder / "qrels").mkdir()
    train = [(query.id, chunk.id) for query in data.queries for chunk, _ in query.positives]
    _write_qrels(folder / "qrels" / "train.tsv", train)
    for name, queries in splits.items():
        if queries:
            pairs = [(query_id(query.text), query.chunk_id) for query in queries]
            _write_qrels(folder / "qrels" / f"{name}.tsv", list(dict.fromkeys(pairs)))


def _write_qrels(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")  # as BEIR reads them
        writer.writerow(("query-id", "corpus-id", "score"))
        writer.writerows((query, document, 1) for query, document in pairs)


def _write(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def _lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False).translate(_LINE_ENDS) + "\n" for row in rows)
