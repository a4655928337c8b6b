"""Documents cut in chunks that the encoder reads whole, and duplicates removed."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ..errors import RefineFastError
from .documents import Document
from .embed import Progress, passage_text
from .readers import markdown_headings

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter
    from transformers import PreTrainedTokenizerBase

# The splitter's time grows with the square of a text that has no paragraphs (2 MB: minutes); in windows it is linear.
_WINDOW = 20_000


@dataclass(frozen=True)
class Chunk:
    """``document.text[start:end]`` with its title: the document's and, under a heading, that heading's.

    id: the document's where it is the document's only chunk, else "<document id>#<number from 0>". source: the document's.
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


@dataclass(frozen=True)
class Duplicates:
    """How many chunks ``deduplicate`` removed."""

    exact: int
    near: int


def chunk_documents(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, progress: Progress | None = None
) -> list[Chunk]:
    """Chunks of at most ``max_tokens`` of the encoder's own tokens, special tokens and title included (a title takes at most half).

    Cut at the highest of heading, paragraph, line, sentence and word that keeps a chunk within the limit, neighbours merged while they fit.
    Leading and trailing blanks belong to no chunk, and a piece without a letter or digit makes none. A "passage" is one chunk, whole,
    whatever its length. ``progress`` counts characters.
    """
    count = _token_counter(tokenizer)
    room = max_tokens - tokenizer.num_special_tokens_to_add()
    if room < 16:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least {16 + max_tokens - room}, 16 besides the special tokens")
    splitter = cache(lambda markdown, capacity: _splitter(tokenizer, markdown, capacity))
    total, before = sum(len(document.text) for document in documents), 0
    chunks = []
    for document in documents:
        if document.markup == "passage":
            chunks.append(Chunk(document.id, document.text, document.title, document.source, 0, len(document.text)))
            continue
        headings = markdown_headings(document.text) if document.markup == "markdown" else []
        starts = [start for start, _ in headings]
        titles = [document.title, *(f"{document.title}: {heading}" if heading != document.title else heading for _, heading in headings)]
        capacity = max(room - max(map(count, titles)), room // 2)
        pieces: list[tuple[int, str]] = []
        for begin, window in _windows(document.text):
            pieces += _pieces(splitter(document.markup == "markdown", capacity), begin, window)
            if progress is not None:
                progress(before + begin + len(window), total)
        before += len(document.text)
        for number, (start, piece) in enumerate(pieces):
            id = document.id if len(pieces) == 1 else f"{document.id}#{number}"
            chunks.append(Chunk(id, piece, titles[bisect_right(starts, start)], document.source, start, start + len(piece)))
    seen: set[str] = set()
    for chunk in chunks:
        if chunk.id in seen:
            raise RefineFastError(f'docs: the id "{chunk.id}" is a document\'s and means a part of another one; give the first another id.')
        seen.add(chunk.id)
    return chunks


def _pieces(splitter: TextSplitter | MarkdownSplitter, begin: int, window: str) -> Iterator[tuple[int, str]]:
    for offset, piece in splitter.chunk_indices(window):
        if re.search(r"\w", piece):
            yield begin + offset, piece


def _windows(text: str) -> Iterator[tuple[int, str]]:
    """(offset, part) of at most _WINDOW characters, cut at the last paragraph, line or word that lies in the window's second half."""
    begin = 0
    while len(text) - begin > _WINDOW:
        half, end = begin + _WINDOW // 2, begin + _WINDOW
        cut = next((at for mark in ("\n\n", "\n", " ") if (at := text.rfind(mark, half, end)) >= 0), end)
        yield begin, text[begin:cut]
        begin = cut
    yield begin, text[begin:]


def _token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    # verbose=False: the piece that is measured may be longer than the encoder reads; that is why it is measured.
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _splitter(tokenizer: PreTrainedTokenizerBase, markdown: bool, capacity: int) -> TextSplitter | MarkdownSplitter:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    return (MarkdownSplitter if markdown else TextSplitter).from_callback(_token_counter(tokenizer), capacity)


def deduplicate(chunks: Sequence[Chunk], *, threshold: float = 0.8, progress: Progress | None = None) -> tuple[list[Chunk], Duplicates]:
    """The chunks without those that repeat an earlier one, and how many were removed.

    exact: the same text after NFKC, case folding and blanks made one. near: ``len(A & B) / len(A | B) >= threshold`` over the sets of five
    words in a row (Lee et al. 2022, arXiv 2107.06499); candidates by MinHash (``datasketch``), each decided by the sets themselves.
    """
    from datasketch import MinHash, MinHashLSH

    # A lower threshold for candidates than for the decision: at equal ones the index would miss every other pair near it.
    index = MinHashLSH(threshold=max(threshold - 0.15, 0.1), num_perm=128)
    kept: list[Chunk] = []
    seen = set()
    exact = near = 0
    for number, chunk in enumerate(chunks):
        if progress is not None:
            progress(number, len(chunks))
        digest = hashlib.blake2b(_normalize(chunk.text).encode(), digest_size=16).digest()
        if digest in seen:
            exact += 1
            continue
        seen.add(digest)
        shingles = _shingles(chunk.text)
        sketch = MinHash(num_perm=128)
        sketch.update_batch([shingle.encode() for shingle in shingles])
        if any(_jaccard(shingles, _shingles(kept[at].text)) >= threshold for at in index.query(sketch)):
            near += 1
            continue
        index.insert(len(kept), sketch)
        kept.append(chunk)
    return kept, Duplicates(exact, near)


def words(text: str) -> list[str]:
    """In scripts written without blanks (Chinese, Japanese, Thai) a character is a word."""
    return re.findall(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|\w+?(?=[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|\b)", text)


def _normalize(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _shingles(text: str) -> set[str]:
    """Every five words in a row."""
    found = words(_normalize(text))
    return {" ".join(found[at : at + 5]) for at in range(max(len(found) - 4, 1))}


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)
