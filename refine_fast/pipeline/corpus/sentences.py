"""Cuts a text into sentences, by the rules of its language."""

from __future__ import annotations

from collections.abc import Sequence

import regex

from .chunk import Chunk
from .language import languages_of
from .text import passage_text, words

Spans = list[tuple[int, int]]
"""Where the sentences of a passage are in its text; at least one."""

# Khmer and Tibetan stops, which sentencex does not split at. Thai and Lao have none, so that
# blanks separate their clauses.
MORE_BOUNDARIES = regex.compile(r"(?<=[។៕།༎])\s*|(?<=[\p{Thai}\p{Lao}])\s+(?=[\p{Thai}\p{Lao}])")
"""Where a sentence ends that sentencex does not cut."""

MIN_WORDS = 4
"""A shorter piece, such as a heading or a number, is joined to the sentence after it."""


def sentence_spans(text: str, language: str = "en") -> list[tuple[int, int]]:
    """The sentences of a text.

    Args:
        text: any text.
        language: its ISO 639-1 code, as from ``languages_of``.

    Returns:
        (start, end) of each sentence in ``text``, without surrounding blanks, in order. A sentence
        has at least ``MIN_WORDS`` words unless the text has fewer.
    """
    from sentencex import get_sentence_boundaries

    spans: list[tuple[int, int]] = []
    pending: int | None = None
    for start, end in _pieces(text, get_sentence_boundaries(language, text)):
        start = start if pending is None else pending
        if len(words(text[start:end])) < MIN_WORDS:
            pending = start
        else:
            spans.append((start, end))
            pending = None
    if pending is not None:
        start = pending if not spans else spans.pop()[0]
        spans.append((start, len(text.rstrip())))
    return spans


def _pieces(text: str, boundaries: list[dict[str, int]]) -> list[tuple[int, int]]:
    """(start, end) of every piece that is not blank, stripped."""
    pieces = []
    for boundary in boundaries:
        begin, end = boundary["start_index"], boundary["end_index"]
        cuts = [match.end() for match in MORE_BOUNDARIES.finditer(text, begin, end)]
        for start, stop in zip([begin, *cuts], [*cuts, end], strict=True):
            piece = text[start:stop]
            if piece.strip():
                left = start + len(piece) - len(piece.lstrip())
                pieces.append((left, left + len(piece.strip())))
    return pieces


def split_passages(chunks: Sequence[Chunk]) -> list[Spans]:
    """The sentences of each passage. A passage without words is one sentence."""
    languages = languages_of([chunk.text for chunk in chunks])
    return [
        sentence_spans(chunk.text, language) or [(0, len(chunk.text))]
        for chunk, language in zip(chunks, languages, strict=True)
    ]


def sentence_texts(chunks: Sequence[Chunk], spans: Sequence[Spans]) -> list[str]:
    """What is encoded of each sentence: the title and the sentence."""
    return [
        passage_text(chunk.title, chunk.text[start:end])
        for chunk, own in zip(chunks, spans, strict=True)
        for start, end in own
    ]
