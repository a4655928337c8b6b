"""Queries to train with: made from the chunks without an LLM, or the user's own."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import cycle, islice

from ..corpus.chunk import Chunk
from ..corpus.text import words
from .query import Query

# The kinds are dealt in turn, each chunk from a place of its own drawing.
TURNS = ("cloze", "span", "cloze", "title")


def synthesize_queries(chunks: Sequence[Chunk], *, seed: int, per_chunk: int = 2) -> list[Query]:
    """At most ``per_chunk`` queries of each chunk without an LLM, of the kinds of TURNS, fewer where the chunk has not enough to offer:

    - "cloze": a sentence of the chunk (the inverse cloze task of Lee et al. 2019, arXiv 1906.00300; the chunk stays whole, since finding
      the words of a question in the passage is part of the task);
    - "title": the title, and where several chunks share it, their own best term with it;
    - "span": a few of the chunk's terms with the highest tf-idf, in the order of the text, as one types into a search box.

    Seeded per chunk, so that a chunk's queries do not depend on the other chunks' draws. An LLM writes better ones: these teach the
    collection's words, not how people ask.
    """
    terms = _salient_terms(chunks)
    sharing = Counter(chunk.title for chunk in chunks)
    queries = []
    for chunk, best in zip(chunks, terms, strict=True):
        rng = random.Random(f"{seed}:{chunk.id}")
        first = rng.randrange(len(TURNS))
        count = Counter(islice(cycle(TURNS), first, first + per_chunk))
        made = {
            "cloze": _cloze(chunk, count["cloze"], rng),
            "title": _title(chunk, best, sharing[chunk.title] > 1, count["title"], rng),
            "span": _span(chunk, best, count["span"], rng),
        }
        queries += [
            Query(text, chunk.id, kind)
            for kind, texts in made.items()
            for text in dict.fromkeys(texts)
        ]
    return queries


def _cloze(chunk: Chunk, count: int, rng: random.Random) -> list[str]:
    sentences = _sentences(chunk.text)
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
    text = chunk.text.casefold()
    return [
        " ".join(sorted(rng.sample(best, rng.randint(2, min(4, len(best)))), key=text.find))
        for _ in range(count)
    ]


def _sentences(text: str) -> list[str]:
    """The sentences of 6 to 60 words, line breaks taken out."""
    from sentencex import segment

    sentences = (" ".join(sentence.split()) for sentence in segment("en", text))
    return [sentence for sentence in sentences if 6 <= len(words(sentence)) <= 60]


def _salient_terms(chunks: Sequence[Chunk], most: int = 8) -> list[list[str]]:
    """Of each chunk the words and pairs of words with the highest tf-idf, best first, no word twice."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2),
        stop_words="english",
        token_pattern=r"(?u)\b[^\W_]\w+\b",
        sublinear_tf=True,
    )
    try:
        table = vectorizer.fit_transform(chunk.text for chunk in chunks)
    except ValueError:  # no text has a word that is no stop word
        return [[] for _ in chunks]
    names = vectorizer.get_feature_names_out()
    best = []
    for row in table:
        terms: list[str] = []
        for at in row.data.argsort(kind="stable")[::-1]:
            term = names[row.indices[at]]
            if not set(term.split()) & set(" ".join(terms).split()):
                terms.append(term)
            if len(terms) == most:
                break
        best.append(terms)
    return best
