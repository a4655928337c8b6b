"""The question that a definition answers: "X is a ..." -> "What is X?", in 23 languages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import NamedTuple

import regex

from ..corpus.text import UNSPACED, word_count

MAX_TERM_WORDS = 5
"""Longest term that is asked about."""

_ASIDE = regex.compile(r"\s*[(（][^()（）]*[)）]")
_UNSPACED = regex.compile(rf"(?V1){UNSPACED}")
_NO_TERM = regex.compile(r"[,;:.!?\"“”„«»()\[\]{}=*、，。；：]")


class _Rule(NamedTuple):
    """How a language defines, and asks for a definition; see definitions.json."""

    pattern: regex.Pattern[str]
    ask: str
    not_first: frozenset[str]
    """Words, and characters where blanks do not separate words, with which no term begins."""
    articles: frozenset[str]


def definition_question(sentence: str, language: str) -> str | None:
    """The question "What is X?" if the sentence defines X.

    Args:
        sentence: one sentence.
        language: its ISO 639-1 code.

    Returns:
        None if it is no definition, or the language has no rule.
    """
    rule = _rules().get(language)
    if rule is None:
        return None
    match = rule.pattern.match(_ASIDE.sub("", sentence.strip(" \"'“”*")))
    if match is None:
        return None
    subject = match["subject"].strip()
    words = subject.split()
    if (
        not words
        or _NO_TERM.search(subject)
        or not subject[0].isalpha()
        or words[0].lower() in rule.not_first
        or (_UNSPACED.match(subject) and subject.startswith(tuple(rule.not_first)))
        or word_count(subject) > MAX_TERM_WORDS
        or len(subject) < 2
    ):
        return None
    if words[0].lower() in rule.articles:
        subject = f"{subject[0].lower()}{subject[1:]}"
    return rule.ask.format(subject=subject, verb=match["verb"])


@cache
def _rules() -> Mapping[str, _Rule]:
    """Language -> its rule.

    In definitions.json, is: the verb, or what else joins a term to its definition; what: how the
    definition begins; ask: the question; not_first: see ``_Rule``; articles: words that are written
    small within a question.
    """
    source = resources.files(__package__) / "definitions.json"
    rules = {}
    for language, own in json.loads(source.read_text(encoding="utf-8")).items():
        # Blanks around the verb where the language has them; the term is the shortest there is.
        blank = r"\s+" if own["is"][0] not in "是と" and language not in ("th", "ko") else r"\s*"
        end = r"(?!\w)" if own["what"] and blank == r"\s+" else ""
        joined = rf"(?P<verb>{own['is']}){blank}{own['what']}{end}\s*\S"
        rules[language] = _Rule(
            regex.compile(rf"(?P<subject>.{{2,60}}?){blank if language != 'ko' else ''}{joined}"),
            own["ask"],
            frozenset(own["not_first"].split()),
            frozenset(own["articles"].split()),
        )
    return rules
