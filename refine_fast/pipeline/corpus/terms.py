"""Terms of lexical search (BM25) in any script."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import regex

from .text import UNSPACED, words

_STEMMERS = {
    "Arabic": "arabic",
    "Armenian": "armenian",
    "Cyrillic": "russian",
    "Devanagari": "hindi",
    "Greek": "greek",
    "Latin": "english",
    "Tamil": "tamil",
}
"""Script -> the Snowball stemmer of its words. English's leaves words in other scripts as they
are, so it also takes those that mix scripts or hold digits."""

_SCRIPT = regex.compile("|".join(rf"(?P<{s}>[\p{{{s}}}\p{{M}}]+)" for s in _STEMMERS))
_NGRAMS = regex.compile(
    rf"(?V1)(?:[\w&&{UNSPACED}][[\w&&{UNSPACED}]\p{{M}}\u200c\u200d]*)|\p{{Hangul}}+"
)
_NOT_ARABIC = regex.compile("[پچژگکیےںہ]")  # letters of Persian and Urdu
_FULL_WIDTH = regex.compile(r"[\uff01-\uff9f]+")
# Pointing, which readers add or leave out: Hebrew and Arabic marks, the Arabic tatweel, joiners.
_OPTIONAL = regex.compile(
    r"[\u0591-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed\u200c\u200d]"
)
# Turkish: the small letters of I and İ depend on the language.
_TURKISH_I = str.maketrans({"ı": "i", "\u0307": None})


def search_terms(texts: Sequence[str]) -> list[list[str]]:
    """The terms of each text, in order.

    Words in small letters, without English stop words and words of one letter, are stemmed by
    their script's Snowball stemmer. In scripts without blanks between words, and in Hangul, whose
    words carry their particles, a term is two characters in a row, marks included.
    """
    term = _stemmed()
    return [[t for token in _tokens(text) if (t := term(token))] for text in texts]


def _tokens(text: str) -> list[str]:
    text = text.lower()
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = _FULL_WIDTH.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
        text = _OPTIONAL.sub("", text).translate(_TURKISH_I)
    tokens: list[str] = []
    end = 0
    for match in _NGRAMS.finditer(text):
        tokens += _spaced(text[end : match.start()])
        tokens += _pairs(words(match[0]) if not regex.match(r"\p{Hangul}", match[0]) else match[0])
        end = match.end()
    return tokens + _spaced(text[end:])


def _spaced(text: str) -> list[str]:
    return [word for word in words(text) if len(word) > 1]


def _pairs(characters: Sequence[str]) -> list[str]:
    """Two in a row; one that is alone stays alone."""
    if len(characters) == 1:
        return [characters[0]]
    return [a + b for a, b in pairwise(characters)]


def _stemmed() -> Callable[[str], str]:
    """Word -> its stem; "" for a stop word."""
    import Stemmer
    from bm25s.stopwords import STOPWORDS_EN

    stemmers = {script: Stemmer.Stemmer(name) for script, name in _STEMMERS.items()}

    @cache
    def term(word: str) -> str:
        if word in STOPWORDS_EN:
            return ""
        if _NOT_ARABIC.search(word):
            return word
        script = _SCRIPT.fullmatch(word)
        return stemmers["Latin" if script is None else script.lastgroup].stemWord(word)

    return term
