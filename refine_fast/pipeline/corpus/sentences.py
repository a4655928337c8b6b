"""Cuts a text into sentences, by the rules of its language."""

from __future__ import annotations

import regex

from .text import words

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
