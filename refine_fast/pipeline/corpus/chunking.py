"""Cuts documents into chunks that the encoder reads whole."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

from ...errors import RefineFastError
from ..progress import Progress
from .chunk import Chunk
from .documents import Document
from .formats.markdown import markdown_headings
from .text import passage_text

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter
    from transformers import PreTrainedTokenizerBase


_WINDOW = 20_000
"""Characters that are split at a time. The splitter's time grows with the square of a text without
paragraphs (2 MB: minutes); in windows it is linear."""

_BATCH = 1000
"""Passages that are tokenized at a time."""


def chunk_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    progress: Progress | None = None,
) -> list[Chunk]:
    """Cuts every document into chunks of at most ``max_tokens``.

    A cut is made at the highest of heading, paragraph, line, sentence and word that keeps the chunk
    within the limit; neighbours are merged while they fit. Chunks are stripped, and pieces without
    a letter or digit are dropped. A "passage" is one chunk, whatever its length.

    Args:
        documents: with distinct ids.
        tokenizer: of the encoder.
        max_tokens: special tokens and title included; a title takes at most half.
        progress: counts characters.

    Raises:
        RefineFastError: if the id of a document is also that of a chunk of another one.
        ValueError: if ``max_tokens`` leaves fewer than 16 tokens for the text.
    """
    count = _token_counter(tokenizer)
    room = max_tokens - tokenizer.num_special_tokens_to_add()
    if room < 16:
        raise ValueError(
            f"max_tokens is {max_tokens}; it must be at least {16 + max_tokens - room}, "
            "16 besides the special tokens"
        )
    splitter = cache(lambda markdown, capacity: _splitter(tokenizer, markdown, capacity))
    total, before = sum(len(document.text) for document in documents), 0
    chunks: list[Chunk] = []
    for document in documents:
        if document.markup == "passage":
            chunks.append(_chunk(document, document.id, document.title, 0, document.text))
            continue
        headings = markdown_headings(document.text) if document.markup == "markdown" else []
        starts = [start for start, _ in headings]
        titles = [document.title, *(_under(document.title, heading) for _, heading in headings)]
        capacity = max(room - max(map(count, titles)), room // 2)
        pieces: list[tuple[int, str]] = []
        for begin, window in _windows(document.text):
            pieces += _pieces(splitter(document.markup == "markdown", capacity), begin, window)
            if progress is not None:
                progress(before + begin + len(window), total)
        before += len(document.text)
        for number, (start, piece) in enumerate(pieces):
            id = document.id if len(pieces) == 1 else f"{document.id}#{number}"
            chunks.append(_chunk(document, id, titles[bisect_right(starts, start)], start, piece))
    seen: set[str] = set()
    for chunk in chunks:
        if chunk.id in seen:
            raise RefineFastError(
                f'docs: the id "{chunk.id}" is a document\'s and means a part of another one; '
                "give the first another id."
            )
        seen.add(chunk.id)
    return chunks


def truncated_passages(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """The number of passages of more than ``max_tokens``, special tokens included, and the tokens
    of the longest. ``progress`` counts documents."""
    lengths: list[int] = []
    for begin in range(0, len(documents), _BATCH):
        batch = [d for d in documents[begin : begin + _BATCH] if d.markup == "passage"]
        texts = [passage_text(document.title, document.text) for document in batch]
        if texts:
            lengths += map(len, tokenizer(texts, verbose=False)["input_ids"])
        if progress is not None:
            progress(begin + len(batch), len(documents))
    return sum(length > max_tokens for length in lengths), max(lengths, default=0)


def _chunk(document: Document, id: str, title: str, start: int, text: str) -> Chunk:
    return Chunk(id, text, title, document.source, start, start + len(text))


def _under(title: str, heading: str) -> str:
    return heading if heading == title else f"{title}: {heading}"


def _pieces(
    splitter: TextSplitter | MarkdownSplitter, begin: int, window: str
) -> Iterator[tuple[int, str]]:
    for offset, piece in splitter.chunk_indices(window):
        if re.search(r"\w", piece):
            yield begin + offset, piece


def _windows(text: str) -> Iterator[tuple[int, str]]:
    """(offset, part) of at most _WINDOW characters, cut at the last paragraph, line or word in the
    window's second half."""
    begin = 0
    while len(text) - begin > _WINDOW:
        half, end = begin + _WINDOW // 2, begin + _WINDOW
        cut = next(
            (at for mark in ("\n\n", "\n", " ") if (at := text.rfind(mark, half, end)) >= 0), end
        )
        yield begin, text[begin:cut]
        begin = cut
    yield begin, text[begin:]


def _token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    # verbose=False: no warning about a piece that is longer than the encoder reads.
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _splitter(
    tokenizer: PreTrainedTokenizerBase, markdown: bool, capacity: int
) -> TextSplitter | MarkdownSplitter:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    return (MarkdownSplitter if markdown else TextSplitter).from_callback(
        _token_counter(tokenizer), capacity
    )
