"""A query and the chunk that answers it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Query:
    """A query that the chunk ``chunk_id`` answers."""

    text: str
    chunk_id: str
    kind: str
    """"cloze", "title" or "span" (``synthesize_queries``), "user", or "llm:<kind>"."""
