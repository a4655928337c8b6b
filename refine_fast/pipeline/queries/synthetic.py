"""Training queries made from the chunks without a language model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import regex

from ..corpus.chunk import Chunk
from ..corpus.language import languages_of
from ..corpus.sentences import MORE_BOUNDARIES
from ..corpus.text import word_count
from .definitions import definition_question
from .english import english_questions
from .prose import LIST_MARK, is_whole, not_prose, paragraphs
from .query import KINDS_IN_TURN, MADE_KINDS, Query
from .salient import Rarity, content_words, phrase_splitter, salient_terms

MIN_SENTENCE_WORDS, MAX_SENTENCE_WORDS = 6, 60

CROP_WORDS = 4, 10
"""Words of a crop: as many as most questions that people ask have."""

MAX_KEYWORDS = 5

BOILERPLATE = 3
"""A sentence in so many documents says nothing about one of them."""

NAMED = 0.5
"""Share of the queries that name their chunk's title where other chunks have it too. On travel
(DSTC11) training gains 10.8 points of recall@3 [9.0, 12.7] with them, 0.0 [-2.0, 2.0] without."""

_CROP_LENGTH = 24
"""Longest crop of a script without blanks, as for ``phrase_splitter``."""

_TRIES = 12
"""Spans or crops that are drawn until one is specific."""

_RULES = {"my": "en"}
"""sentencex's rules for Burmese end a sentence at the genitive mark."""

_BY_RULE = ("question", "definition")
"""Kinds that many chunks do not offer."""

_EDGES = regex.compile(r"^[^\w]+|[^\w%)]+$")


@dataclass(frozen=True)
class _Source:
    """A chunk, and what queries are made of."""

    chunk: Chunk
    sentences: list[str]
    """Its prose; without boilerplate and fragments, if it has other sentences."""
    language: str
    terms: list[str]
    """Its salient terms, the best first, without the words of a title that other chunks have."""
    title_is_shared: bool
    rarity: Rarity

    def is_specific(self, text: str) -> bool:
        return self.rarity.is_specific(text, self.chunk.text)

    def named(self, text: str) -> str:
        """The text, after a title that other chunks have too unless it holds the title's words."""
        title = self.chunk.title
        if not self.title_is_shared or set(content_words(title)) <= set(content_words(text)):
            return text
        return f"{title}: {text}"


def synthesize_queries(
    chunks: Sequence[Chunk],
    *,
    seed: int,
    per_chunk: int = 2,
    kinds: Sequence[str] = KINDS_IN_TURN,
) -> list[Query]:
    """Makes queries without a language model, in any script.

    Kinds:
        "cloze": a sentence of the chunk, which stays whole, since finding a question's words in
            the passage is part of the task (inverse cloze task, Lee et al. 2019, arXiv 1906.00300).
        "title": the title; where several chunks share it, with the chunk's own best term.
        "span": 2 to 4 of the chunk's terms with the highest tf-idf, in the order of the text, as
            typed into a search box. Where blanks do not separate words, a term is a short phrase
            cut at word boundaries.
        "question": a sentence turned into a question by rules of English grammar.
        "definition": "What is X?" where a sentence defines X, in 23 languages.
        "keywords": the rarest words of one sentence, in its order.
        "crop": 4 to 10 words in a row (Izacard et al. 2022, arXiv 2112.09118).

    All but the first two are specific: their words would hardly meet in another passage by chance.
    Where a chunk offers no question or definition, the next of the other kinds is made instead;
    where it offers no specific span, as in a collection of a few passages, one that is not.

    Where chunks share a title, half of the queries name it first, as people do who ask about one
    hotel of many ("Alpha Lodge: free parking"). Similar passages, of which a batch has several,
    mostly share their title, and queries that never name it teach to overlook it.

    These queries teach the collection's words, not how people ask; a language model writes better
    ones.

    Args:
        chunks: the chunks.
        seed: draws are seeded per chunk, so that they do not depend on the other chunks.
        per_chunk: most queries of one chunk; fewer are made where a chunk does not offer enough.
        kinds: the kinds in turn; one that occurs twice is made twice as often.
    """
    queries = []
    for source in _sources(chunks):
        rng = random.Random(f"{seed}:{source.chunk.id}")
        first = rng.randrange(len(kinds))
        count = Counter(islice(cycle(kinds), first, first + per_chunk))
        in_turn = islice(cycle(kinds), first, first + len(kinds))
        others = [kind for kind in in_turn if kind not in _BY_RULE]
        made: dict[str, list[str]] = {}
        for kind in sorted(MADE_KINDS, key=_BY_RULE.__contains__, reverse=True):
            made[kind] = _MAKERS[kind](source, count[kind], rng)
            if kind in _BY_RULE and (instead := next(iter(others), None)):
                count[instead] += count[kind] - len(made[kind])
        queries += [
            Query(source.named(text) if rng.random() < NAMED else text, source.chunk.id, kind)
            for kind in MADE_KINDS
            for text in dict.fromkeys(made[kind])
        ]
    return queries


def mostly_made(kinds: Sequence[str]) -> bool:
    """Whether most of some queries, of these kinds, were made by ``synthesize_queries``, and so
    share their words with the passages."""
    return 2 * sum(kind in MADE_KINDS for kind in kinds) > len(kinds)


def _sources(chunks: Sequence[Chunk]) -> Iterator[_Source]:
    languages = languages_of([chunk.text for chunk in chunks])
    sentences = [
        _sentences(chunk.text, code) for chunk, code in zip(chunks, languages, strict=True)
    ]
    boilerplate = _boilerplate(chunks, sentences)
    sharing = Counter(chunk.title for chunk in chunks)
    shared = [chunk.title if sharing[chunk.title] > 1 else "" for chunk in chunks]
    terms = salient_terms(chunks, without=shared)
    rarity = Rarity([chunk.text for chunk in chunks])
    for chunk, found, language, best in zip(chunks, sentences, languages, terms, strict=True):
        own = [text for text in found if text not in boilerplate] or found
        whole = [text for text in own if is_whole(text)] or own
        yield _Source(chunk, whole, language, best, sharing[chunk.title] > 1, rarity)


def _boilerplate(chunks: Sequence[Chunk], sentences: Sequence[Sequence[str]]) -> frozenset[str]:
    """Sentences that ``BOILERPLATE`` documents or more share."""
    sources: dict[str, set[str]] = {}
    for chunk, found in zip(chunks, sentences, strict=True):
        for sentence in found:
            sources.setdefault(sentence, set()).add(chunk.source)
    return frozenset(text for text, found in sources.items() if len(found) >= BOILERPLATE)


def _cloze(source: _Source, count: int, rng: random.Random) -> list[str]:
    sentences = source.sentences
    return rng.sample(sentences, min(count, len(sentences)))


def _title(source: _Source, count: int, rng: random.Random) -> list[str]:
    title = source.chunk.title
    if not title:
        return []
    if not source.title_is_shared:
        return [title][:count]
    chosen = rng.sample(source.terms, min(count, len(source.terms)))
    return [f"{title} {term}" for term in chosen]


def _span(source: _Source, count: int, rng: random.Random) -> list[str]:
    best = source.terms
    if len(best) < 3:
        return []
    text = source.chunk.text.lower()
    found: list[str] = []
    query = ""
    for _ in range(_TRIES * count):
        drawn = rng.sample(best, rng.randint(2, min(4, len(best))))
        query = " ".join(sorted(drawn, key=text.find))
        if query not in found and source.is_specific(query):
            found.append(query)
        if len(found) == count:
            break
    return found or [query][:count]


def _question(source: _Source, count: int, rng: random.Random) -> list[str]:
    """One question of each form in a random order, so that rare forms get their turn."""
    by_form: dict[str, list[str]] = {}
    for sentence in source.sentences if count and source.language == "en" else ():
        for form, question in english_questions(sentence).items():
            if source.is_specific(question):
                by_form.setdefault(form, []).append(question)
    found: list[str] = []
    while by_form and len(found) < count:
        form = rng.choice(list(by_form))
        found.append(by_form[form].pop(rng.randrange(len(by_form[form]))))
        if not by_form[form]:
            del by_form[form]
    return found


def _definition(source: _Source, count: int, rng: random.Random) -> list[str]:
    questions = [
        question
        for sentence in (source.sentences if count else ())
        if (question := definition_question(sentence, source.language))
        and source.is_specific(question)
    ]
    return rng.sample(questions, min(count, len(questions)))


def _keywords(source: _Source, count: int, rng: random.Random) -> list[str]:
    found: list[str] = []
    for sentence in rng.sample(source.sentences, len(source.sentences)) if count else ():
        words = list(dict.fromkeys(content_words(sentence)))
        rarest = sorted(words, key=source.rarity.of, reverse=True)[:MAX_KEYWORDS]
        text = " ".join(word for word in words if word in rarest)
        if len(rarest) > 1 and source.is_specific(text):
            found.append(text)
        if len(found) == count:
            break
    return found


def _crop(source: _Source, count: int, rng: random.Random) -> list[str]:
    found: list[str] = []
    for _ in range(_TRIES * count if source.sentences else 0):
        text = _cropped(rng.choice(source.sentences), rng)
        if text not in found and source.is_specific(text):
            found.append(text)
        if len(found) == count:
            break
    return found


def _cropped(sentence: str, rng: random.Random) -> str:
    """Words in a row that begin and end with content, or a phrase where blanks do not separate
    words."""
    words = sentence.split()
    if word_count(sentence) > 2 * len(words):
        return _EDGES.sub("", rng.choice(phrase_splitter(_CROP_LENGTH).chunks(sentence)))
    start = rng.randrange(max(1, len(words) - CROP_WORDS[0] + 1))
    cropped = words[start : start + rng.randint(*CROP_WORDS)]
    while cropped and not content_words(cropped[0]):
        cropped.pop(0)
    while cropped and not content_words(cropped[-1]):
        cropped.pop()
    return _EDGES.sub("", " ".join(cropped)) if len(cropped) > 1 else ""


_MAKERS: Mapping[str, Callable[[_Source, int, random.Random], list[str]]] = {
    "cloze": _cloze,
    "title": _title,
    "span": _span,
    "question": _question,
    "definition": _definition,
    "keywords": _keywords,
    "crop": _crop,
}


def _sentences(text: str, language: str) -> list[str]:
    """The sentences of 6 to 60 words that are prose, without line breaks and marks of lists."""
    from sentencex import segment

    found = (
        LIST_MARK.sub("", " ".join(part.split()))
        for paragraph in paragraphs(text)
        for sentence in segment(_RULES.get(language, language), paragraph)
        for part in MORE_BOUNDARIES.split(sentence)
    )
    return [
        sentence
        for sentence in found
        if MIN_SENTENCE_WORDS <= word_count(sentence) <= MAX_SENTENCE_WORDS
        and not not_prose(sentence)
    ]
