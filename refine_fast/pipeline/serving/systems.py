"""Scores of systems, not only of models: passage vectors, sentences, BM25 and their blends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...ops.best_of_groups import best_of_groups
from ..corpus.beir import RetrievalSet
from ..corpus.chunk import Chunk
from ..corpus.language import languages_of
from ..corpus.sentences import sentence_spans
from ..corpus.text import passage_text
from ..evaluation.bm25 import score_bm25
from ..evaluation.scores import Scores
from ..queries.splits import held_out_set
from ..queries.synthetic import mostly_made, synthesize_queries
from .blend import (
    Blend,
    BlendChoice,
    Choosing,
    Components,
    choose_blend,
    choose_by_made,
    score_blend,
    standard,
)
from .dense import Moments
from .lexical import Lexical, Postings

SERVED = "blend"
"""The system that ``search`` and ``serve`` put first."""

SYSTEM_NAMES = ("passages", "sentences", "BM25", "hybrid", SERVED)
"""Passage vectors alone; with the best sentence; BM25 alone; passages and BM25; all three."""

QUERIES_AT_A_TIME = 64

OF_SEVERAL_SENTENCES = ("span",)
"""Kinds of query with words from all over the passage; what people ask is about one sentence."""

Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts to float32 vectors."""


class Remembered:
    """An ``Encode`` that gives every text to another one once."""

    def __init__(self, encode: Encode, known: Mapping[str, np.ndarray] | None = None) -> None:
        """Takes the encoder.

        Args:
            encode: sees each new text once.
            known: texts with their vectors, (d,) float32.
        """
        self._encode = encode
        self._known = dict(known or {})

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._encode(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def sentences_of(data: RetrievalSet) -> tuple[list[str], np.ndarray]:
    """What is encoded of every sentence of a set, and the offsets of each passage's."""
    titles, texts = _titles_and_texts(data)
    sentences: list[str] = []
    offsets = [0]
    for title, text, language in zip(titles, texts, languages_of(texts), strict=True):
        spans = sentence_spans(text, language) or [(0, len(text))]
        sentences += [passage_text(title, text[start:end]) for start, end in spans]
        offsets.append(len(sentences))
    return sentences, np.array(offsets, np.int64)


def made_set(data: RetrievalSet, most: int) -> tuple[RetrievalSet, list[str]]:
    """At most so many queries that are made from the passages of a set, against those, and the kind
    of each, for ``choose``: where the set has no other queries than those that are scored."""
    chunks = [
        Chunk(id, text, title, id, 0, len(text))
        for id, title, text in zip(data.doc_ids, *_titles_and_texts(data), strict=True)
    ]
    made = synthesize_queries(chunks, seed=0, per_chunk=1)
    rows = np.sort(np.random.default_rng(0).permutation(len(made))[:most])
    drawn = [made[i] for i in rows]
    kind_of = {query.text: query.kind for query in drawn}
    # The set's own texts, which are encoded to score it, whatever blanks they have.
    found = replace(held_out_set(chunks, drawn, data.name), docs=data.docs)
    return found, [kind_of[text] for text in found.queries]


def _titles_and_texts(data: RetrievalSet) -> tuple[list[str], list[str]]:
    """Of each passage."""
    titles = [title.strip() for title in data.titles] or [""] * len(data.docs)
    texts = [doc[len(title) :].strip() for doc, title in zip(data.docs, titles, strict=True)]
    return titles, texts


def components_of(data: RetrievalSet, documents: Encode, queries: Encode) -> list[Components]:
    """The standard scores of the best passages of each query, as ``Components.trimmed``.

    As in BEIR, a query's own document is left out of its ranking.

    Args:
        data: the set; without queries there is nothing to encode.
        documents: encodes passages and sentences.
        queries: encodes queries.
    """
    if not data.queries:
        return []
    sentences, offsets = sentences_of(data)
    passages, best_rows = documents(data.docs), documents(sentences)
    vectors = queries(data.queries)
    moments = Moments.of(passages)
    lexical = Lexical([Postings.of(data.docs)], np.ones(len(data.docs), bool))
    found = []
    for first in range(0, len(vectors), QUERIES_AT_A_TIME):
        block = slice(first, first + QUERIES_AT_A_TIME)
        q = vectors[block]
        mean, spread = (values[:, None] for values in moments.standard(q))
        own = (q @ passages.T - mean) / spread
        best = (best_of_groups(q, best_rows, offsets).numpy() - mean) / spread
        for i, query in enumerate(data.queries[block]):
            bm25 = lexical.scores(query)
            rows = np.delete(np.arange(len(data.docs)), data.own_rows[first + i])
            whole = Components(
                rows, own[i][rows], best[i][rows], standard(bm25, len(bm25))[rows], bm25[rows] > 0
            )
            found.append(whole.trimmed())
    return found


def relevant_of(data: RetrievalSet) -> list[dict[int, float]]:
    """Per query: row of a passage -> grade. A passage that the corpus lacks has a negative row, so
    that it counts as not found."""
    row = {id: i for i, id in enumerate(data.doc_ids)}
    return [
        {row.get(id, -1 - i): grade for i, (id, grade) in enumerate(grades.items())}
        for grades in data.qrels
    ]


def choose(held: Choosing, kinds: Sequence[str]) -> BlendChoice:
    """The blend for what people will ask, from held-out queries.

    Args:
        held: the held-out queries.
        kinds: the kind of each (``Query.kind``). Queries that were made from the documents without
            a language model choose by ``choose_by_made``, those of several sentences left out.
    """
    if not mostly_made(kinds):
        return choose_blend(held)
    of_one = [i for i, kind in enumerate(kinds) if kind not in OF_SEVERAL_SENTENCES]
    return choose_by_made(held.drawn(of_one) if of_one else held)


def score_systems(
    data: RetrievalSet, parts: Sequence[Components], choice: BlendChoice
) -> dict[str, Scores]:
    """System of ``SYSTEM_NAMES`` -> scores, at the weights that were chosen on other queries."""
    relevant = relevant_of(data)
    blends = {
        "passages": Blend(),
        "sentences": choice.without.get("lexical", Blend()),
        "hybrid": choice.without.get("sentences", Blend()),
        SERVED: choice.blend,
    }
    scores = {name: score_blend(parts, relevant, blend) for name, blend in blends.items()}
    scores["BM25"] = score_bm25(data)
    return {name: scores[name] for name in SYSTEM_NAMES}
