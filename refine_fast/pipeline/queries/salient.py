"""The words and phrases that tell a passage from the others of its collection, in any script."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import regex

from ..corpus.chunk import Chunk
from ..corpus.text import CJK, UNSPACED

if TYPE_CHECKING:
    from semantic_text_splitter import TextSplitter

SPECIFIC = 0.05
"""A text is specific if its words would meet by chance in fewer passages than this. Three quarters
of the questions that people asked about SQuAD's passages are."""

_RUN = regex.compile(
    rf"(?V1)(?P<unspaced>[\w&&{UNSPACED}][[\w&&{UNSPACED}]\p{{M}}]*)"
    rf"|(?P<word>(?<!\w)(?:\d+(?:[.,]\d+)+(?!\w)|[[\w--_]--{UNSPACED}][\w--{UNSPACED}]+))"
)
_CONTRACTION = regex.compile(
    r"(?<!\w)(?:(?:are|did|do|does|had|have|is|should|was|were|would)n['’]?t|"
    r"(?:ai|ca|could|has|might|must|need|sha|wo)n['’]t)(?!\w)|(?<=\w)['’](?:ll|re|ve)(?!\w)"
)
"""Of an auxiliary. Its parts may be words of their own: "won't"."""

_AUXILIARIES = frozenset({"did", "does", "doing", "having", "shall"})
"""Those that scikit-learn's stop words lack."""

_CJK = regex.compile(rf"(?V1){CJK}")
_HIRAGANA = regex.compile(r"\p{Hiragana}+")

_PHRASE_LENGTH = 12
"""Longest phrase of a script without blanks, as for ``phrase_splitter``."""


class Rarity:
    """In how many passages of a collection each word occurs.

    Args:
        texts: the passages.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._passages = len(texts)
        self._found = Counter(word for text in texts for word in set(content_words(text)))

    def of(self, word: str) -> float:
        """The logarithm of the passages per passage with the word."""
        return math.log(self._passages / max(self._found[word], 1))

    def is_specific(self, text: str, passage: str) -> bool:
        """Whether fewer than ``SPECIFIC`` passages would hold by chance, if words occurred
        independently, all words that the text shares with its passage."""
        found = set(content_words(text)) & set(content_words(passage))
        expected = math.log(max(self._passages, 1)) - math.fsum(map(self.of, found))
        return expected < math.log(SPECIFIC)


def salient_terms(
    chunks: Sequence[Chunk], limit: int = 8, without: Sequence[str] = ()
) -> list[list[str]]:
    """For each chunk, at most ``limit`` terms with the highest tf-idf, best first.

    No word occurs twice among a chunk's terms, in singular and plural either.

    Args:
        chunks: the chunks.
        limit: most terms of a chunk.
        without: for each chunk, a text whose words its terms do not have; none by default.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=_terms, sublinear_tf=True)
    try:
        table = vectorizer.fit_transform(chunk.text for chunk in chunks)
    except ValueError:  # no text has a term
        return [[] for _ in chunks]
    names = vectorizer.get_feature_names_out()
    best = []
    for row, known in zip(table, without or [""] * len(chunks), strict=True):
        terms: list[str] = []
        had = _singular(content_words(known))
        for at in row.data.argsort(kind="stable")[::-1]:
            term = names[row.indices[at]]
            words = _singular(term.split())
            if len(words) == len(term.split()) and not words & had:
                terms.append(term)
                had |= words
            if len(terms) == limit:
                break
        best.append(terms)
    return best


def _singular(words: Sequence[str]) -> set[str]:
    """The words without the ending that a plural has in English, French, Spanish or Portuguese."""
    return {word[:-1] if word.endswith("s") and len(word) > 3 else word for word in words}


def _terms(text: str) -> list[str]:
    """Words and pairs of words without English stop words, and phrases of scripts without blanks.

    Args:
        text: any text; terms are in lower case.
    """
    words, phrases = _words_and_phrases(text)
    return words + [" ".join(pair) for pair in pairwise(words)] + phrases


def content_words(text: str) -> list[str]:
    """The words of a text without English stop words, and phrases of scripts without blanks."""
    words, phrases = _words_and_phrases(text)
    return words + phrases


def _words_and_phrases(text: str) -> tuple[list[str], list[str]]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    words: list[str] = []
    phrases: list[str] = []
    for run in _RUN.finditer(_CONTRACTION.sub(" ", text.lower())):
        if run["unspaced"]:
            phrases += _phrases(run["unspaced"])
        elif run["word"] not in ENGLISH_STOP_WORDS and run["word"] not in _AUXILIARIES:
            words.append(run["word"])
    return words, phrases


def _phrases(run: str) -> Iterator[str]:
    """Phrases of at most ``_PHRASE_LENGTH``, cut at word boundaries by the splitter's dictionary.

    Hiragana alone, and single characters, carry no content.
    """
    for phrase in phrase_splitter(_PHRASE_LENGTH).chunks(run):
        if len(phrase) > 1 and not _HIRAGANA.fullmatch(phrase):
            yield phrase


@cache
def phrase_splitter(length: int) -> TextSplitter:
    """Cuts at word boundaries of scripts without blanks.

    Args:
        length: of the longest phrase; a Chinese or Japanese character counts twice.
    """
    from semantic_text_splitter import TextSplitter

    return TextSplitter.from_callback(lambda text: len(text) + len(_CJK.findall(text)), length)
