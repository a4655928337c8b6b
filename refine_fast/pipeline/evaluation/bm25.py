"""BM25, the lexical baseline."""

from __future__ import annotations

import numpy as np

from ..corpus.beir import RetrievalSet
from ..corpus.bm25 import bm25_index
from ..corpus.terms import search_terms
from .metrics import DEPTH, score_ranking
from .scores import Scores


def score_bm25(data: RetrievalSet) -> Scores:
    """Scores BM25 (``bm25_index``).

    A passage that shares no term with the query is not retrieved.
    """
    ranked = np.full((len(data.queries), DEPTH), -1)
    index = bm25_index(data.docs)
    if index is not None:
        for row, terms, own in zip(ranked, search_terms(data.queries), data.own_rows, strict=True):
            if not terms:
                continue
            scores = index.get_scores(terms)
            scores[own] = 0
            best = np.argsort(-scores, kind="stable")[:DEPTH]
            best = best[scores[best] > 0]
            row[: len(best)] = best
    return score_ranking(data.ids_at(ranked), data.qrels)
