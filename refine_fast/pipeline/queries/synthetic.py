"""Training queries made from the chunks without a language model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import cycle, islice, pairwise
from typing import TYPE_CHECKING

import regex

from ..corpus.chunk import Chunk
from ..corpus.sentences import MORE_BOUNDARIES
from ..corpus.text import CJK, UNSPACED, word_count
from .prose import not_prose, paragraphs
from .query import Query

if TYPE_CHECKING:
    from semantic_text_splitter import TextSplitter

KINDS_IN_TURN = ("cloze", "span", "cloze", "title")
"""Kinds rotate; each chunk starts at a random position."""

MIN_SENTENCE_WORDS, MAX_SENTENCE_WORDS = 6, 60

BOILERPLATE = 3
"""A sentence in so many documents says nothing about one of them."""

_RUN = regex.compile(
    rf"(?V1)(?P<unspaced>[\w&&{UNSPACED}][[\w&&{UNSPACED}]\p{{M}}]*)"
    rf"|(?P<word>(?<!\w)[[\w--_]--{UNSPACED}][\w--{UNSPACED}]+)"
)
_CJK = regex.compile(rf"(?V1){CJK}")
_HIRAGANA = regex.compile(r"\p{Hiragana}+")

_PHRASE_LENGTH = 12
"""Longest phrase of a script without blanks; a Chinese or Japanese character counts twice."""


def synthesize_queries(chunks: Sequence[Chunk], *, seed: int, per_chunk: int = 2) -> list[Query]:
    """Makes queries without a language model, in any script.

    Kinds:
        "cloze": a sentence of the chunk, which stays whole, since finding a question's words in
            the passage is part of the task (inverse cloze task, Lee et al. 2019, arXiv 1906.00300).
        "title": the title; where several chunks share it, with the chunk's own best term.
        "span": 2 to 4 of the chunk's terms with the highest tf-idf, in the order of the text, as
            typed into a search box. Where blanks do not separate words, a term is a short phrase
            cut at word boundaries.

    These queries teach the collection's words, not how people ask; a language model writes better
    ones.

    Args:
        chunks: the chunks.
        seed: draws are seeded per chunk, so that they do not depend on the other chunks.
        per_chunk: most queries of one chunk; fewer are made where a chunk does not offer enough.
    """
    terms = _salient_terms(chunks)
    boilerplate = _boilerplate(chunks)
    sharing = Counter(chunk.title for chunk in chunks)
    queries = []
    for chunk, best in zip(chunks, terms, strict=True):
        rng = random.Random(f"{seed}:{chunk.id}")
        first = rng.randrange(len(KINDS_IN_TURN))
        count = Counter(islice(cycle(KINDS_IN_TURN), first, first + per_chunk))
        made = {
            "cloze": _cloze(chunk, boilerplate, count["cloze"], rng),
            "title": _title(chunk, best, sharing[chunk.title] > 1, count["title"], rng),
            "span": _span(chunk, best, count["span"], rng),
        }
        queries += [
            Query(text, chunk.id, kind)
            for kind, texts in made.items()
            for text in dict.fromkeys(texts)
        ]
    return queries


def mostly_made(queries: Sequence[Query]) -> bool:
    """Whether most of the queries were made by ``synthesize_queries``, and so share their words
    with the passages."""
    return 2 * sum(query.kind in KINDS_IN_TURN for query in queries) > len(queries)


def _boilerplate(chunks: Sequence[Chunk]) -> frozenset[str]:
    """Sentences that ``BOILERPLATE`` documents or more share."""
    sources: dict[str, set[str]] = {}
    for chunk in chunks:
        for sentence in _sentences(chunk.text):
            sources.setdefault(sentence, set()).add(chunk.source)
    return frozenset(text for text, found in sources.items() if len(found) >= BOILERPLATE)


def _cloze(chunk: Chunk, boilerplate: frozenset[str], count: int, rng: random.Random) -> list[str]:
    found = _sentences(chunk.text)
    sentences = [text for text in found if text not in boilerplate] or found
    return rng.sample(sentences, min(count, len(sentences)))


def _title(
    chunk: Chunk, best: list[str], shared: bool, count: int, rng: random.Random
) -> list[str]:
    if not chunk.title:
        return []
    if not shared:
        return [chunk.title][:count]
    return [f"{chunk.title} {term}" for term in rng.sample(best, min(count, len(best)))]


def _span(chunk: Chunk, best: list[str], count: int, rng: random.Random) -> list[str]:
    if len(best) < 3:
        return []
    text = chunk.text.lower()
    return [
        " ".join(sorted(rng.sample(best, rng.randint(2, min(4, len(best)))), key=text.find))
        for _ in range(count)
    ]


def _sentences(text: str) -> list[str]:
    """The sentences of 6 to 60 words that are prose, without line breaks."""
    from sentencex import segment

    found = (
        " ".join(part.split())
        for paragraph in paragraphs(text)
        for sentence in segment("en", paragraph)
        for part in MORE_BOUNDARIES.split(sentence)
    )
    return [
        sentence
        for sentence in found
        if MIN_SENTENCE_WORDS <= word_count(sentence) <= MAX_SENTENCE_WORDS
        and not not_prose(sentence)
    ]


def _salient_terms(chunks: Sequence[Chunk], limit: int = 8) -> list[list[str]]:
    """For each chunk, at most ``limit`` terms with the highest tf-idf, best first.

    No word occurs twice among a chunk's terms.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=_terms, sublinear_tf=True)
    try:
        table = vectorizer.fit_transform(chunk.text for chunk in chunks)
    except ValueError:  # no text has a term
        return [[] for _ in chunks]
    names = vectorizer.get_feature_names_out()
    best = []
    for row in table:
        terms: list[str] = []
        for at in row.data.argsort(kind="stable")[::-1]:
            term = names[row.indices[at]]
            if not set(term.split()) & set(" ".join(terms).split()):
                terms.append(term)
            if len(terms) == limit:
                break
        best.append(terms)
    return best


def _terms(text: str) -> list[str]:
    """Words and pairs of words without English stop words, and phrases of scripts without blanks.

    Args:
        text: any text; terms are in lower case.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    words: list[str] = []
    phrases: list[str] = []
    for run in _RUN.finditer(text.lower()):
        if run["unspaced"]:
            phrases += _phrases(run["unspaced"])
        elif run["word"] not in ENGLISH_STOP_WORDS:
            words.append(run["word"])
    return words + [" ".join(pair) for pair in pairwise(words)] + phrases


def _phrases(run: str) -> Iterator[str]:
    """Phrases of at most ``_PHRASE_LENGTH``, cut at word boundaries by the splitter's dictionary.

    Hiragana alone, and single characters, carry no content.
    """
    for phrase in _phrase_splitter().chunks(run):
        if len(phrase) > 1 and not _HIRAGANA.fullmatch(phrase):
            yield phrase


@cache
def _phrase_splitter() -> TextSplitter:
    from semantic_text_splitter import TextSplitter

    return TextSplitter.from_callback(
        lambda text: len(text) + len(_CJK.findall(text)), _PHRASE_LENGTH
    )
