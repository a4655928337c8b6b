"""What is no prose: borders of tables, markup, code. No query is made of it, in any language."""

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
_OPERATOR = regex.compile(r"\w\(\)\s*[.;{]|[!=]=|&&|->\s*\w|=>|\w\s=\s\w+[(\[]")
_QUESTION = regex.compile(r"[?？؟]\W*$")
_SIGNS_ALONE = regex.compile(r"(?m)^[^\S\n]*[^\w\s](?:[^\w\n]*[^\w\s])?[^\S\n]*$")


def not_prose(text: str) -> str | None:
    """Why a text is no prose: "no letters", "line of a table", "markup", "code" or "mostly signs".

    None where it is prose.
    """
    visible = sum(not c.isspace() for c in text)
    letters = len(_LETTER.findall(text))
    if not letters:
        return "no letters"
    for reason, pattern in (("line of a table", _BORDER), ("markup", _MARKUP), ("code", _CODE)):
        if pattern.search(text):
            return reason
    if _OPERATOR.search(text) and not _QUESTION.search(text):  # a question may name an operator
        return "code"
    return "mostly signs" if letters < MIN_LETTERS * visible else None


def paragraphs(text: str) -> Iterator[str]:
    """The parts of a text between lines of signs alone, such as the line under a heading."""
    return (part for part in _SIGNS_ALONE.split(text) if part.strip())
