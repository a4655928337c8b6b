"""What is no prose: borders of tables, markup, code, references. No query is made of it."""

from __future__ import annotations

from collections.abc import Iterator

import regex

MIN_LETTERS = 0.5
"""Smallest share of letters and their marks among a text's visible characters."""

_LETTER = regex.compile(r"[\p{L}\p{M}]")
_BORDER = regex.compile(r"[-=+|*~#^]{4,}|[─-╿]{2}|^\s*\||\|[^|]*\|[^|]*\|")
_MARKUP = regex.compile(r"</?[a-zA-Z][^<>]*>|\{\{|\}\}|\]\(https?:")
_CODE = regex.compile(
    r"^\s*(?:>>>|\$ |#include|import \w+$|from [\w.]+ import |def \w+\(|class \w+[(:])"
    r"|[{}]\s*$|(?<!\p{Greek}.*);\s*$"  # a Greek question ends with a semicolon
)
_GRAMMAR = regex.compile(r"::=")
_REFERENCE = regex.compile(
    r"\b(?:doi|PMID|arXiv)\s?[:/]|\b(?:Accessed|Retrieved) (?:on |from )?(?:\d|http|\p{Lu})"
    r"|(?:19|20)\d\d\s?;\s?\d+\s?(?:\(\d+\))?\s?:\s?\w*\d"  # J Virol. 2004;78:9499
    # Kash JC, Basler CF, but not RP, BPP, PP,
    r"|(?:\b\p{Lu}[\p{L}'-]*\p{Ll}[\p{L}'-]*,? (?:\p{Lu}\.? ?){1,3}(?:[,;]|,? and) ){2}"
)
_OPERATOR = regex.compile(r"\w\(\)\s*[.;{]|[!=]=|&&|->\s*\w|=>|\w\s=\s\w+[(\[]")
_NOT_PROSE = (
    ("line of a table", _BORDER),
    ("markup", _MARKUP),
    ("code", _CODE),
    ("code", _GRAMMAR),
    ("reference", _REFERENCE),
    ("code", _OPERATOR),
)
_NAMED_IN_QUESTIONS = (_MARKUP, _OPERATOR)
_QUESTION = regex.compile(r"[?？؟]\W*$")
_CUT = regex.compile(r"(?:\bet al|\b[Ff]igs?|\bvs|\be\.g|\bi\.e|\bcf|\bNo)\.,?$|^[\d.,;)\]]+\W*\s")
"""A sentence that ends at an abbreviation, or begins with a number of the sentence before it."""

LIST_MARK = regex.compile(r"^(?:[*•·‣▪–—-]|\(?\d{1,2}[.)])\s+(?=\p{L})")
"""What stands before an entry of a list."""

_SIGNS_ALONE = regex.compile(r"(?m)^[^\S\n]*[^\w\s](?:[^\w\n]*[^\w\s])?[^\S\n]*$")


def not_prose(text: str, *, may_name_code: bool = False) -> str | None:
    """Why a text is no prose: "no letters", "line of a table", "markup", "code", "reference" (to
    literature) or "mostly signs".

    Args:
        text: a sentence or a query.
        may_name_code: whether it may name tags and operators, as every question may ("What does
            <table> do?").

    Returns:
        None where it is prose.
    """
    visible = sum(not c.isspace() for c in text)
    letters = len(_LETTER.findall(text))
    if not letters:
        return "no letters"
    allowed = _NAMED_IN_QUESTIONS if may_name_code or _QUESTION.search(text) else ()
    for reason, pattern in _NOT_PROSE:
        if pattern not in allowed and pattern.search(text):
            return reason
    return "mostly signs" if letters < MIN_LETTERS * visible else None


def is_whole(sentence: str) -> bool:
    """Whether a text may be a whole sentence: it does not begin in small letters or in the middle
    of brackets, and closes those that it opens.

    A cut in the wrong place, such as after "et al.", leaves less.
    """
    opened = sum(sentence.count(mark) for mark in "([（")
    closed = sum(sentence.count(mark) for mark in ")]）")
    first = sentence.lstrip("\"'“”«»*¿¡")[:1]
    return opened == closed and not first.islower() and not _CUT.search(sentence)


def paragraphs(text: str) -> Iterator[str]:
    """The parts of a text between lines of signs alone, such as the line under a heading."""
    return (part for part in _SIGNS_ALONE.split(text) if part.strip())
