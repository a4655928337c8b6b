"""query: training queries from the user or from the documents alone, and their split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...files import read_json
from ..artifacts import CHUNKS, DEV, HELD_OUT, QUERIES, TWINS
from ..corpus.beir import dev_split, load_beir
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records, write_records
from ..queries.python_questions import python_questions, python_training_queries
from ..queries.query import Query
from ..queries.splits import MOST_DEV, split_by_document, without
from ..queries.synthetic import synthesize_queries
from ..queries.user import load_dev_queries, load_queries, say_left_out, texts_of_other_splits

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
    queries, dev = offline_queries(context, chunks, twins), dev_queries(context, chunks, twins)
    write_split(context, folder, chunks, queries, dev, added_queries(context, chunks))


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
        load = partial(load_queries, encoding=config.encoding, say=context.console.say)
        return _of_kept(partial(load, config.queries), chunks, twins)
    if context.written_beforehand:
        return python_training_queries(chunks)
    return made_queries(context, chunks, config.made_kinds)


def dev_queries(
    context: RunContext, chunks: Sequence[Chunk], twins: Mapping[str, str]
) -> list[Query]:
    """Those that the user set aside: the split ``dev`` of a BEIR folder that ``--queries`` names,
    or as ``dev_split`` finds it; none elsewhere. ``twins``: as of ``offline_queries``."""
    if context.config.queries is None:
        return []
    load = partial(load_dev_queries, context.config.queries, say=context.console.say)
    return _of_kept(load, chunks, twins)


def added_queries(context: RunContext, chunks: Sequence[Chunk]) -> list[Query]:
    """Those made from the chunks beside the user's, to train on; none that the user set aside."""
    config = context.config
    if config.queries is None:
        return []
    made = made_queries(context, chunks, config.made_kinds)
    return without(made, texts_of_other_splits(config.queries, ["train"]))


def _of_kept(
    load: Callable[[Sequence[Chunk]], list[Query]],
    chunks: Sequence[Chunk],
    twins: Mapping[str, str],
) -> list[Query]:
    """The user's queries as ``load`` finds them, those of removed duplicates of the kept ones."""
    by_id = {chunk.id: chunk for chunk in chunks}
    removed = [replace(by_id[twin], id=id) for id, twin in twins.items() if twin in by_id]
    queries = load([*chunks, *removed])
    moved = (replace(q, chunk_id=twins.get(q.chunk_id, q.chunk_id)) for q in queries)
    return list(dict.fromkeys(moved))


def made_queries(
    context: RunContext, chunks: Sequence[Chunk], kinds: Sequence[str], per_chunk: int | None = None
) -> list[Query]:
    """Queries of these kinds in turn, as many of each chunk as the configuration says, or
    ``per_chunk``; none of no kinds."""
    if not kinds:
        return []
    config = context.config
    per_chunk = per_chunk or config.made_per_chunk
    return synthesize_queries(chunks, seed=config.seed, per_chunk=per_chunk, kinds=kinds)


def split_queries(
    context: RunContext,
    chunks: Sequence[Chunk],
    queries: Sequence[Query],
    dev: Sequence[Query] = (),
    added: Sequence[Query] = (),
) -> dict[str, list[Query]]:
    """{"train": ..., "dev": ..., "held_out": ...}, the last one unless the documents have test
    queries of their own.

    None of the queries is a judged test query. "dev" is ``dev``, which the user set aside, unless
    those are fewer than would be held out and scored; else the split is by whole documents.
    ``added`` are trained on alone.
    """
    shares = {}
    tested: Sequence[str] = ()
    if context.judged_corpus:
        tested = load_beir(context.judged_corpus).queries
    elif context.built_in:
        tested = python_questions(chunks).queries
    given = queries
    queries, dev, added = (without(each, tested) for each in (queries, dev, added))
    if context.judged_corpus and context.config.queries is not None:
        who = "the documents' split test asks"
        say_left_out(given, queries, "", who, context.console.say)
    if not context.has_test_queries:
        shares["held_out"] = context.config.held_out
    low, high = DEV_SHARES
    share = min(high, max(low, DEV_QUERIES / max(len(queries), 1)))
    asked, set_aside = (len({query.text for query in each}) for each in (queries, dev))
    if set_aside < min(share * asked, MOST_DEV):
        if dev and context.config.queries is not None:
            name = dev_split(context.config.queries)
            context.console.say(
                f"  the split {name} has {set_aside:,} queries, too few to choose the weight by; "
                f"{share:.0%} of train is held out instead"
            )
        shares["dev"], dev = share, []
    parts = split_by_document(queries, chunks, shares, seed=context.config.seed, added=added)
    return {"dev": list(dev), **parts}


def write_split(
    context: RunContext,
    folder: Path,
    chunks: Sequence[Chunk],
    queries: Sequence[Query],
    dev: Sequence[Query] = (),
    added: Sequence[Query] = (),
) -> None:
    """Splits the queries, writes one file for each part, and shows some of them. The arguments are
    those of ``split_queries``."""
    parts = split_queries(context, chunks, queries, dev, added)
    for part, name in (("train", QUERIES), ("dev", DEV), ("held_out", HELD_OUT)):
        write_records(folder / name, parts.get(part, []))
    made = parts["train"]
    for query in made[:: max(1, len(made) // EXAMPLES)][:EXAMPLES]:
        context.console.say(f"  {query.kind}: {query.text}")
