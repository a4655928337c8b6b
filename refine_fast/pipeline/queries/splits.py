"""The queries that are not trained on: whole documents at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ...errors import RefineFastError
from ..corpus.beir import RetrievalSet
from ..corpus.chunk import Chunk
from .query import Query


def without(queries: Sequence[Query], texts: Sequence[str]) -> list[Query]:
    """The queries whose words, case and spacing aside, are not among ``texts``: what may be trained on when those are the test queries."""

    def plain(text: str) -> str:
        return " ".join(text.casefold().split())

    taken = {plain(text) for text in texts}
    return [query for query in queries if plain(query.text) not in taken]


def held_out_set(
    chunks: Sequence[Chunk], queries: Sequence[Query], name: str = "held-out"
) -> RetrievalSet:
    """All chunks as the corpus, ``queries`` (of ``split_by_document``) against it: each is answered by the chunk that it was made from."""
    return RetrievalSet(
        name,
        [chunk.id for chunk in chunks],
        [chunk.passage for chunk in chunks],
        # Unlike any chunk's id: a passage with the query's id would be left out of the ranking.
        [f"query {i} on {query.chunk_id}" for i, query in enumerate(queries)],
        [query.text for query in queries],
        [{query.chunk_id: 1.0} for query in queries],
    )


def split_by_document(
    queries: Sequence[Query], chunks: Sequence[Chunk], shares: dict[str, float], *, seed: int
) -> dict[str, list[Query]]:
    """{"train": ..., **{name: held out for it}}: whole documents at a time, so that no text that was trained on is asked about again.

    A document is a chunk's ``source``; where fewer than 20 sources have queries (one long file, say), it is the chunk. Documents are drawn
    in the order of a hash of (seed, source) and fill the parts in turn, until each has its share of the queries; the rest is "train". A
    training query with the very words of a held-out one is dropped.
    """
    source_of = {chunk.id: chunk.source for chunk in chunks}
    by_chunk = len({source_of[query.chunk_id] for query in queries}) < 20
    groups: dict[str, list[Query]] = {}
    for query in queries:
        groups.setdefault(query.chunk_id if by_chunk else source_of[query.chunk_id], []).append(
            query
        )
    drawn = iter(sorted(groups, key=lambda key: hashlib.blake2b(f"{seed}:{key}".encode()).digest()))
    parts: dict[str, list[Query]] = {}
    for name, share in shares.items():
        part = parts[name] = []
        while len(part) < share * len(queries) and (key := next(drawn, None)):
            part += groups[key]
    held_out = [query.text for part in parts.values() for query in part]
    return {"train": without([query for key in drawn for query in groups[key]], held_out), **parts}


def require_enough(queries: Sequence[Query]) -> None:
    """Raises RefineFastError if there are fewer than two queries to train on: in-batch negatives
    need a second document."""
    if len(queries) < 2:
        raise RefineFastError(
            f"queries: {len(queries)} left to train on, too few to learn from; "
            "give more documents or --queries."
        )
