"""What depends on the language of a text: which language it is, and what a question looks like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources

import regex

from ...corpus.language import identifier
from ...corpus.text import normalized_words

PASSAGE_CERTAIN = 0.8
"""From this probability on, the language of a passage is known."""

QUERY_UNLIKELY = 0.005
"""Below this probability for the passage's language, a query is in another one.

Of 6,472 human questions (SQuAD, COVID-QA) none gets less than 0.006 for English; most texts of
three words in a sister language do.
"""

PASSAGE_LIKELY = 0.5
"""From this probability on, a language's own question words decide what a question is. Sister
languages share a passage's probability, so certainty would leave Chinese out."""

_QUESTION_MARKS = ("?", "？", "؟", "՞", "፧", ";", "⸮", "꘏")

_AFTER_A_MARK = " .!\"'”’»)\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""What may follow a question mark; the last are marks of the direction of writing."""


def other_language(text: str, passage: str) -> bool:
    """Whether the passage's language is certain and the text is hardly in it.

    Names say nothing about a language: a text is not judged if it is very short, or if it takes
    half of its words from the passage.
    """
    if len(text) < 12 and text.isascii():
        return False
    found = set(normalized_words(text).split())
    if 2 * len(found & set(normalized_words(passage).split())) >= len(found):
        return False
    language, certainty = identify(passage)[0]
    return certainty >= PASSAGE_CERTAIN and dict(identify(text))[language] < QUERY_UNLIKELY


def is_question(text: str, passage: str) -> bool | None:
    """Whether the text asks something.

    A question ends with a question mark of any script, whatever quotes or stops follow, or has a
    question word where the passage's language puts it. Languages without a list in
    question_words.json cannot be judged that way.

    Returns:
        None if neither can be told.
    """
    if text.rstrip(_AFTER_A_MARK).endswith(_QUESTION_MARKS) or text.lstrip().startswith("¿"):
        return True
    language, probability = identify(passage)[0]
    patterns = _question_patterns()
    if probability >= PASSAGE_LIKELY:
        pattern = patterns.get(language)
        return pattern.search(text) is not None if pattern else None
    return True if any(pattern.search(text) for pattern in patterns.values()) else None


@lru_cache(maxsize=64)  # the candidates of a passage follow one another
def identify(text: str) -> Sequence[tuple[str, float]]:
    """(ISO 639 code, probability) of every language that py3langid knows, the most probable first.

    The first 1,000 characters decide.
    """
    return _identifier().rank(text[:1000])


_identifier = cache(identifier)


@cache
def _question_patterns() -> Mapping[str, regex.Pattern[str]]:
    """Language -> the pattern of its questions, from question_words.json.

    begins: the text's first words; early: among its first three words; words: whole words anywhere;
    contains: anywhere, within words too; ends: the text's last letters; ends_word: the last
    letters of its first word.
    """
    places = {
        "begins": r"\A\W*(?:{})\b",
        "early": r"\A\W*(?:[\w'’-]+\W+){{0,2}}(?:{})\b",
        "words": r"\b(?:{})\b",
        "contains": r"(?:{})",
        "ends": r"(?:{})\W*\Z",
        "ends_word": r"\A\W*\w+(?:{})\b",
    }
    source = resources.files(__package__) / "question_words.json"
    return {
        language: regex.compile(
            "|".join(
                places[place].format("|".join(map(regex.escape, found)))
                for place, found in lists.items()
            ),
            regex.IGNORECASE,
        )
        for language, lists in json.loads(source.read_text(encoding="utf-8")).items()
    }
