"""``refine-fast search``: one query, the systems side by side."""

from __future__ import annotations

from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from ...errors import RefineFastError
from ..console import Console
from ..corpus.text import whole_characters
from ..serving.search import Hit, Searcher
from .index import refuse_older, serving_encoders

SHOWN = 300
"""Characters of a passage in the table, around the sentence that matches."""


def open_searcher(out: Path, console: Console) -> Searcher:
    """The index of a run, ready to search.

    Raises:
        RefineFastError: if there is none, or if it was made with other passages or another encoder
            than the run's present ones.
    """
    _, encoders = serving_encoders(out, console)
    refuse_older("search", out, encoders.folders)
    return Searcher(out, encoders)


def search(out: Path, query: str, k: int, console: Console) -> None:
    """Prints the best passages by each system.

    Args:
        out: the run folder, with an index.
        query: its text.
        k: passages per system.
        console: where they go.

    Raises:
        RefineFastError: an empty query, or no index.
    """
    query = whole_characters(query)  # the shell's bytes may not be UTF-8
    if not query.strip():
        raise RefineFastError("search: the query is empty; give some words.")
    searcher = open_searcher(out, console)
    found = searcher.search(query, k)
    facts = {name: [hit.facts() for hit in hits] for name, hits in found.items()}
    blend = searcher.blend
    console.result(
        {
            "query": query,
            "blend": {"sentences": blend.sentences, "lexical": blend.lexical},
            "systems": facts,
        },
        _ranks(found),
        _passages(found["blend"]),
    )


def _ranks(found: dict[str, list[Hit]]) -> Table:
    """The ids side by side."""
    table = Table("", *(Column(name, overflow="fold") for name in found))
    for rank in range(max(map(len, found.values()))):
        table.add_row(
            str(rank + 1),
            *(
                printable(hits[rank].chunk.id) if rank < len(hits) else ""
                for hits in found.values()
            ),
        )
    return table


def _passages(hits: list[Hit]) -> Table:
    """The blend's passages with the sentence that matches in bold."""
    table = Table("", "blend", show_lines=True)
    for rank, hit in enumerate(hits, 1):
        chunk, (start, end) = hit.chunk, hit.sentence
        left = max(0, start - SHOWN // 3)
        right = min(len(chunk.text), max(end, left + SHOWN))
        before, match, after = chunk.text[left:start], chunk.text[start:end], chunk.text[end:right]
        title = f"{printable(chunk.title)}\n" if chunk.title else ""
        place = f"{chunk.source}, characters {chunk.start + start} to {chunk.start + end}"
        table.add_row(
            str(rank),
            Text.assemble(
                (title, "dim"),
                f"{'…' if left else ''}{printable(before)}",
                (printable(match), "bold reverse"),
                f"{printable(after)}{'…' if right < len(chunk.text) else ''}\n",
                (printable(place), "dim"),
            ),
        )
    return table


def printable(text: str) -> str:
    """Text of a document without control characters, which could move a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text)
