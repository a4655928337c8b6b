"""BM25, the lexical baseline."""

from __future__ import annotations

import numpy as np

from ..corpus.beir import RetrievalSet
from .metrics import DEPTH, Scores, score_ranking


def score_bm25(data: RetrievalSet) -> Scores:
    """BM25 (bm25s, Lucene's variant, k1 = 1.5, b = 0.75) over English stems without stop words. A document that shares no term with the
    query is not retrieved."""
    import bm25s
    import Stemmer

    def tokens(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(
            texts,
            stopwords="en",
            stemmer=Stemmer.Stemmer("english"),
            return_ids=False,
            show_progress=False,
        )

    ranked = np.full((len(data.queries), DEPTH), -1)
    docs = tokens(data.docs)
    if not any(docs):  # bm25s takes no empty vocabulary
        return score_ranking(ranked, data.relevant)
    index = bm25s.BM25()
    index.index(docs, show_progress=False)
    for row, terms in zip(ranked, tokens(data.queries), strict=True):
        if not terms:
            continue
        scores = index.get_scores(terms)
        best = np.argsort(-scores, kind="stable")[:DEPTH]
        best = best[scores[best] > 0]
        row[: len(best)] = best
    return score_ranking(ranked, data.relevant)
