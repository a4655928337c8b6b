"""A query and the chunk that answers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Made = Literal["all", "some", "none"]
"""How many of a run's queries are made from the passages without a language model."""

MADE_KINDS = ("cloze", "title", "span", "question", "definition", "keywords", "crop")
"""Kinds of query that are made from the passages without a language model; ``synthesize_queries``
says how."""

KINDS_IN_TURN = ("span", "keywords", "question")
"""The default, by benchmarks/recipe.py: sentences and titles are found too easily to teach much.
Kinds rotate; each chunk starts at a random position."""


@dataclass(frozen=True)
class Query:
    """A query that the chunk ``chunk_id`` answers."""

    text: str
    chunk_id: str
    kind: str
    """One of ``MADE_KINDS``, "user", or "llm:<kind>"."""
