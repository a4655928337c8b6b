"""Documents cut in chunks that the encoder reads whole, and duplicates removed."""

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
from .file_formats import markdown_headings

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter
    from transformers import PreTrainedTokenizerBase


# The splitter's time grows with the square of a text that has no paragraphs (2 MB: minutes); in windows it is linear.
_WINDOW = 20_000


def chunk_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    progress: Progress | None = None,
) -> list[Chunk]:
    """Chunks of at most ``max_tokens`` of the encoder's own tokens, special tokens and title included (a title takes at most half).

    Cut at the highest of heading, paragraph, line, sentence and word that keeps a chunk within the limit, neighbours merged while they fit.
    Leading and trailing blanks belong to no chunk, and a piece without a letter or digit makes none. A "passage" is one chunk, whole,
    whatever its length. ``progress`` counts characters.
    """
    count = _token_counter(tokenizer)
    room = max_tokens - tokenizer.num_special_tokens_to_add()
    if room < 16:
        raise ValueError(
            f"max_tokens is {max_tokens}; it must be at least {16 + max_tokens - room}, 16 besides the special tokens"
        )
    splitter = cache(lambda markdown, capacity: _splitter(tokenizer, markdown, capacity))
    total, before = sum(len(document.text) for document in documents), 0
    chunks = []
    for document in documents:
        if document.markup == "passage":
            chunks.append(
                Chunk(
                    document.id,
                    document.text,
                    document.title,
                    document.source,
                    0,
                    len(document.text),
                )
            )
            continue
        headings = markdown_headings(document.text) if document.markup == "markdown" else []
        starts = [start for start, _ in headings]
        titles = [
            document.title,
            *(
                f"{document.title}: {heading}" if heading != document.title else heading
                for _, heading in headings
            ),
        ]
        capacity = max(room - max(map(count, titles)), room // 2)
        pieces: list[tuple[int, str]] = []
        for begin, window in _windows(document.text):
            pieces += _pieces(splitter(document.markup == "markdown", capacity), begin, window)
            if progress is not None:
                progress(before + begin + len(window), total)
        before += len(document.text)
        for number, (start, piece) in enumerate(pieces):
            id = document.id if len(pieces) == 1 else f"{document.id}#{number}"
            chunks.append(
                Chunk(
                    id,
                    piece,
                    titles[bisect_right(starts, start)],
                    document.source,
                    start,
                    start + len(piece),
                )
            )
    seen: set[str] = set()
    for chunk in chunks:
        if chunk.id in seen:
            raise RefineFastError(
                f'docs: the id "{chunk.id}" is a document\'s and means a part of another one; give the first another id.'
            )
        seen.add(chunk.id)
    return chunks


def _pieces(
    splitter: TextSplitter | MarkdownSplitter, begin: int, window: str
) -> Iterator[tuple[int, str]]:
    for offset, piece in splitter.chunk_indices(window):
        if re.search(r"\w", piece):
            yield begin + offset, piece


def _windows(text: str) -> Iterator[tuple[int, str]]:
    """(offset, part) of at most _WINDOW characters, cut at the last paragraph, line or word that lies in the window's second half."""
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
    # verbose=False: the piece that is measured may be longer than the encoder reads; that is why it is measured.
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _splitter(
    tokenizer: PreTrainedTokenizerBase, markdown: bool, capacity: int
) -> TextSplitter | MarkdownSplitter:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    return (MarkdownSplitter if markdown else TextSplitter).from_callback(
        _token_counter(tokenizer), capacity
    )
