"""BM25, the lexical baseline."""

from __future__ import annotations

import numpy as np

from ..corpus.beir import RetrievalSet
from ..corpus.terms import search_terms
from .metrics import DEPTH, score_ranking
from .scores import Scores


def score_bm25(data: RetrievalSet) -> Scores:
    """Scores BM25 (bm25s, Lucene's variant, k1 = 1.5, b = 0.75) over ``search_terms``.

    A passage that shares no term with the query is not retrieved.
    """
    import bm25s

    ranked = np.full((len(data.queries), DEPTH), -1)
    docs = search_terms(data.docs)
    if any(docs):  # bm25s rejects an empty vocabulary
        index = bm25s.BM25()
        index.index(docs, show_progress=False)
        for row, terms, own in zip(ranked, search_terms(data.queries), data.own_rows, strict=True):
            if not terms:
                continue
            scores = index.get_scores(terms)
            scores[own] = 0
            best = np.argsort(-scores, kind="stable")[:DEPTH]
            best = best[scores[best] > 0]
            row[: len(best)] = best
    return score_ranking(data.ids_at(ranked), data.qrels)
