"""A chunk of a document: the unit that is embedded, mined and retrieved."""

from __future__ import annotations

from dataclasses import dataclass

from .text import passage_text


@dataclass(frozen=True)
class Chunk:
    """``document.text[start:end]`` with its title: the document's and, under a heading, that
    heading's.

    id: the document's if it is the document's only chunk, else "<document id>#<number from 0>".
    source: the document's.
    """

    id: str
    text: str
    title: str
    source: str
    start: int
    end: int

    @property
    def passage(self) -> str:
        """What the encoder reads: title and text."""
        return passage_text(self.title, self.text)


def document_id(chunk_id: str) -> str:
    """The id of the document that a chunk is part of, by the form of its id."""
    document, mark, number = chunk_id.rpartition("#")
    return document if mark and number.isdigit() else chunk_id
