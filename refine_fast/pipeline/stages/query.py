"""query: training queries from the user or from the documents alone, and their split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...files import read_json
from ..artifacts import CHUNKS, DEV, HELD_OUT, QUERIES, TWINS
from ..corpus.beir import load_beir
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records, write_records
from ..queries.python_questions import python_questions, python_training_queries
from ..queries.query import KINDS_IN_TURN, Query
from ..queries.splits import split_by_document, without
from ..queries.synthetic import synthesize_queries
from ..queries.user import load_queries

if TYPE_CHECKING:
    from ..context import RunContext

EXAMPLES = 10
"""Training queries that are shown, from all parts of the collection."""

DEV_QUERIES, DEV_SHARES = 100, (0.1, 0.2)
"""How many queries compare the fusion weights, and the least and the largest share of all queries
that they may be. Fewer queries would not show a gain of a few points."""


def run(context: RunContext, folder: Path) -> None:
    """Writes the queries to train on, to compare fusion weights on, and to evaluate on."""
    chunks = read_records(context.path(CHUNKS), Chunk)
    twins = read_json(context.path(TWINS))
    write_split(context, folder, chunks, offline_queries(context, chunks, twins))


def offline_queries(
    context: RunContext, chunks: Sequence[Chunk], twins: Mapping[str, str]
) -> list[Query]:
    """The user's queries, those that come with the documents, or those made from the chunks
    without a language model.

    ``twins``: id of a chunk that was removed as an exact duplicate -> id of the kept one, which
    answers its queries.
    """
    config = context.config
    if config.queries is not None:
        by_id = {chunk.id: chunk for chunk in chunks}
        removed = [replace(by_id[twin], id=id) for id, twin in twins.items() if twin in by_id]
        queries = load_queries(config.queries, [*chunks, *removed], encoding=config.encoding)
        moved = (replace(q, chunk_id=twins.get(q.chunk_id, q.chunk_id)) for q in queries)
        return list(dict.fromkeys(moved))
    if context.written_beforehand:
        return python_training_queries(chunks)
    return made_queries(context, chunks, config.made_kinds or KINDS_IN_TURN)


def made_queries(context: RunContext, chunks: Sequence[Chunk], kinds: Sequence[str]) -> list[Query]:
    """Queries of these kinds in turn, as many of each chunk as the configuration says."""
    config = context.config
    return synthesize_queries(chunks, seed=config.seed, per_chunk=config.per_chunk, kinds=kinds)


def split_queries(
    context: RunContext, chunks: Sequence[Chunk], queries: list[Query]
) -> dict[str, list[Query]]:
    """{"train": ..., "dev": ..., "held_out": ...}, the last one unless the documents have test
    queries of their own.

    The split is by whole documents, and none of the queries is a judged test query.
    """
    shares = {}
    if context.judged_corpus:
        queries = without(queries, load_beir(context.judged_corpus).queries)
    elif context.built_in:
        queries = without(queries, python_questions(chunks).queries)
    if not context.has_test_queries:
        shares["held_out"] = context.config.held_out
    low, high = DEV_SHARES
    shares["dev"] = min(high, max(low, DEV_QUERIES / max(len(queries), 1)))
    return split_by_document(queries, chunks, shares, seed=context.config.seed)


def write_split(
    context: RunContext, folder: Path, chunks: Sequence[Chunk], queries: list[Query]
) -> None:
    """Splits the queries, writes one file for each part, and shows some of them."""
    parts = split_queries(context, chunks, queries)
    for part, name in (("train", QUERIES), ("dev", DEV), ("held_out", HELD_OUT)):
        write_records(folder / name, parts.get(part, []))
    made = parts["train"]
    for query in made[:: max(1, len(made) // EXAMPLES)][:EXAMPLES]:
        context.console.say(f"  {query.kind}: {query.text}")
