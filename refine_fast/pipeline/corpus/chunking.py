"""Cuts documents into chunks that the encoder reads whole."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RefineFastError
from ..progress import Progress
from ..workers import Spread, Work, shard_starts
from .chunk import Chunk
from .documents import Document
from .formats.markdown import markdown_headings
from .jsonl import read_records, write_records
from .text import passage_text

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter
    from transformers import PreTrainedTokenizerBase


_WINDOW = 20_000
"""Characters that are split at a time. The splitter's time grows with the square of a text without
paragraphs (2 MB: minutes); in windows it is linear."""

_BATCH = 1000
"""Passages that are tokenized at a time."""

CHARACTERS_PER_SHARD = 4_000_000
"""Characters from which a shard of documents is complete."""


def chunk_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    progress: Progress | None = None,
    spread: Spread | None = None,
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
        spread: the workers that cut in shards of whole documents, with the loader of this
            tokenizer; None: this process. The chunks are the same.

    Raises:
        RefineFastError: if the id of a document is also that of a chunk of another one.
        ValueError: if ``max_tokens`` leaves fewer than 16 tokens for the text.
    """
    room = max_tokens - tokenizer.num_special_tokens_to_add()
    if room < 16:
        raise ValueError(
            f"max_tokens is {max_tokens}; it must be at least {16 + max_tokens - room}, "
            "16 besides the special tokens"
        )
    if spread is None or all(document.markup == "passage" for document in documents):
        chunks = _Cutter(tokenizer, room).cut(documents, progress)
    else:
        chunks = _cut_in_shards(spread, documents, room, progress)
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
    spread: Spread | None = None,
) -> tuple[int, int]:
    """The number of passages of more than ``max_tokens``, special tokens included, and the tokens
    of the longest. ``progress`` counts passages, and ``spread`` is that of ``chunk_documents``."""
    passages = [document for document in documents if document.markup == "passage"]
    if spread is None or not passages:
        return _truncated(passages, tokenizer, max_tokens, progress)
    done = count = longest = 0
    for _, shard, path in _in_shards(spread, "measure", max_tokens, _measurer, passages):
        more, longest_there = json.loads(path.read_text())
        count, longest, done = count + more, max(longest, longest_there), done + len(shard)
        if progress is not None:
            progress(done, len(passages))
    return count, longest


def _truncated(
    passages: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    progress: Progress | None = None,
) -> tuple[int, int]:
    lengths: list[int] = []
    for begin in range(0, len(passages), _BATCH):
        batch = passages[begin : begin + _BATCH]
        texts = [passage_text(document.title, document.text) for document in batch]
        lengths += map(len, tokenizer(texts, verbose=False)["input_ids"])
        if progress is not None:
            progress(len(lengths), len(passages))
    return sum(length > max_tokens for length in lengths), max(lengths, default=0)


class _Cutter:
    """Cuts documents with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int) -> None:
        self._count, self._room = _token_counter(tokenizer), room
        self._splitter = cache(lambda markdown, capacity: _splitter(tokenizer, markdown, capacity))

    def cut(self, documents: Sequence[Document], progress: Progress | None = None) -> list[Chunk]:
        """The chunks of every document, in order; ``progress`` counts characters."""
        total, before = sum(len(document.text) for document in documents), 0
        chunks: list[Chunk] = []
        for document in documents:
            if document.markup == "passage":
                chunks.append(_chunk(document, document.id, document.title, 0, document.text))
                continue
            headings = markdown_headings(document.text) if document.markup == "markdown" else []
            starts = [start for start, _ in headings]
            titles = [document.title, *(_under(document.title, heading) for _, heading in headings)]
            titles = list(map(self._shortened, titles))
            capacity = self._room - max(map(self._count, titles))
            splitter = self._splitter(document.markup == "markdown", capacity)
            pieces: list[tuple[int, str]] = []
            for begin, window in _windows(document.text):
                pieces += _pieces(splitter, begin, window)
                if progress is not None:
                    progress(before + begin + len(window), total)
            before += len(document.text)
            for number, (start, piece) in enumerate(pieces):
                id = document.id if len(pieces) == 1 else f"{document.id}#{number}"
                title = titles[bisect_right(starts, start)]
                chunks.append(_chunk(document, id, title, start, piece))
        return chunks

    def _shortened(self, title: str) -> str:
        """The title's first words, as many as half of the room holds."""
        half = self._room // 2
        if self._count(title) <= half:
            return title
        return str(self._splitter(False, half).chunks(title[:_WINDOW])[0])


def _cut_in_shards(
    spread: Spread, documents: Sequence[Document], room: int, progress: Progress | None
) -> list[Chunk]:
    total, done = sum(len(document.text) for document in documents), 0
    parts: dict[int, list[Chunk]] = {}
    for i, shard, path in _in_shards(spread, "cut", room, _cutter, documents):
        parts[i] = read_records(path, Chunk)
        done += sum(len(document.text) for document in shard)
        if progress is not None:
            progress(done, total)
    return [chunk for _, part in sorted(parts.items()) for chunk in part]


def _in_shards(
    spread: Spread,
    name: str,
    limit: int,
    prepare: Callable[[Callable[[], Any], int], Work],
    documents: Sequence[Document],
) -> Iterator[tuple[int, Sequence[Document], Path]]:
    """(i, shard i, its file) of every shard of whole documents, in the order in which they are
    done."""
    assert spread.load is not None
    cuts = shard_starts((len(document.text) for document in documents), CHARACTERS_PER_SHARD)
    shards = spread.workers.map(
        spread.folder / name,
        [spread.name, limit],
        partial(prepare, spread.load, limit),
        len(cuts) - 1,
        lambda i: [astuple(document) for document in documents[cuts[i] : cuts[i + 1]]],
    )
    for i, path in shards:
        yield i, documents[cuts[i] : cuts[i + 1]], path


def _cutter(load: Callable[[], PreTrainedTokenizerBase], room: int) -> Work:
    cutter = _Cutter(load(), room)

    def work(item: list[Any], path: Path) -> None:
        write_records(path, cutter.cut([Document(*row) for row in item]))

    return work


def _measurer(load: Callable[[], PreTrainedTokenizerBase], max_tokens: int) -> Work:
    tokenizer = load()

    def work(item: list[Any], path: Path) -> None:
        measured = _truncated([Document(*row) for row in item], tokenizer, max_tokens)
        path.write_text(json.dumps(measured))

    return work


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
