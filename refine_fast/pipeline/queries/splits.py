"""Splits queries by document into train, dev and held-out sets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import RefineFastError
from ..corpus.beir import RetrievalSet, load_beir
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records
from ..corpus.text import normalize
from .python_questions import python_questions
from .query import Query

MOST_DEV = 1000
"""The most queries that are scored at each fusion weight: of more, a sample decides."""

MIN_SOURCES = 20
"""With fewer sources than this (one long file, say), the chunks are split instead."""


def without(queries: Sequence[Query], texts: Sequence[str]) -> list[Query]:
    """The queries whose text is not among ``texts``, compared after ``normalize``.

    Where ``texts`` are the test queries, the rest may be trained on.
    """
    excluded = {normalize(text) for text in texts}
    return [query for query in queries if normalize(query.text) not in excluded]


def in_domain_set(
    judged: Path | None, chunks: Path, held_out: Path, *, built_in: bool = False
) -> RetrievalSet:
    """What a run is evaluated on: the judged collection with its own test queries if the documents
    are one, else the chunks with the held-out queries, or with those about Python.

    Args:
        judged: folder of the collection.
        chunks: file of the chunks.
        held_out: file of the held-out queries.
        built_in: whether the documents are Python's own, which come with questions.
    """
    if built_in:
        return python_questions(read_records(chunks, Chunk))
    if judged is not None:
        return load_beir(judged)
    return held_out_set(read_records(chunks, Chunk), read_records(held_out, Query))


def held_out_set(
    chunks: Sequence[Chunk], queries: Sequence[Query], name: str = "held-out"
) -> RetrievalSet:
    """All chunks as the corpus, and ``queries`` (of ``split_by_document``) against it.

    Relevant to a query are the chunks that it was made from: a question with several answers is one
    query.
    """
    answers: dict[str, dict[str, float]] = {}
    for query in queries:
        answers.setdefault(query.text, {})[query.chunk_id] = 1.0
    return RetrievalSet(
        name,
        [chunk.id for chunk in chunks],
        [chunk.passage for chunk in chunks],
        # Unlike any chunk's id: a passage with the query's id would be left out of the ranking.
        [f"query {i} on {next(iter(chunk_ids))}" for i, chunk_ids in enumerate(answers.values())],
        list(answers),
        list(answers.values()),
        [chunk.title for chunk in chunks],
    )


def split_by_document(
    queries: Sequence[Query],
    chunks: Sequence[Chunk],
    shares: dict[str, float],
    *,
    seed: int,
    added: Sequence[Query] = (),
) -> dict[str, list[Query]]:
    """Splits whole documents, so that no query is of a text that was trained on; other answers of
    it may be.

    A document is a chunk's ``source``, or the chunk where fewer than ``MIN_SOURCES`` sources have
    queries. Documents are drawn in the order of a hash of (seed, source) and fill the parts in
    turn, until each has its share of the queries. No text is in two parts: an earlier part keeps
    it, with its answers in documents of other parts, and the training queries come last.

    Args:
        queries: all queries.
        chunks: all chunks.
        shares: name of a held-out part -> its share of the queries.
        seed: seed of the order.
        added: queries that are only trained on, unless their document is held out.

    Returns:
        {"train": the rest, **{name: the part held out}}.
    """
    source_of = {chunk.id: chunk.source for chunk in chunks}
    if len({source_of[query.chunk_id] for query in queries}) < MIN_SOURCES:
        source_of = {chunk.id: chunk.id for chunk in chunks}
    groups: dict[str, list[Query]] = {}
    for query in queries:
        groups.setdefault(source_of[query.chunk_id], []).append(query)
    drawn = iter(sorted(groups, key=lambda key: hashlib.blake2b(f"{seed}:{key}".encode()).digest()))
    answers: dict[str, list[str]] = {}
    for query in queries:
        answers.setdefault(normalize(query.text), []).append(query.chunk_id)
    parts: dict[str, list[Query]] = {}
    held_out: list[str] = []
    unseen: set[str] = set()
    for name, share in shares.items():
        part: list[Query] = []
        while len(part) < share * len(queries) and (key := next(drawn, None)):
            part += groups[key]
            unseen.add(key)
        parts[name] = _with_all_answers(without(part, held_out), answers)
        held_out += [query.text for query in part]
    train = [query for key in drawn for query in groups[key]]
    train += [query for query in added if source_of[query.chunk_id] not in unseen]
    return {"train": without(train, held_out), **parts}


def _with_all_answers(part: Sequence[Query], answers: Mapping[str, Sequence[str]]) -> list[Query]:
    """The queries, and each again for every other chunk that answers it: one that is not known as
    an answer would count as a mistake of the model that finds it."""
    every = {
        (query.text, chunk_id): replace(query, chunk_id=chunk_id)
        for query in part
        for chunk_id in answers[normalize(query.text)]
    }
    known = {(query.text, query.chunk_id) for query in part}
    return [*part, *(query for pair, query in every.items() if pair not in known)]


def require_enough(queries: Sequence[Query]) -> None:
    """Refuses fewer than two queries to train on: in-batch negatives need a second document.

    Raises:
        RefineFastError: with the number and the remedy.
    """
    if len(queries) < 2:
        raise RefineFastError(
            f"queries: {len(queries)} left to train on, too few to learn from; "
            "give more documents or --queries."
        )
