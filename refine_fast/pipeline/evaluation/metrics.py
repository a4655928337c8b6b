"""Retrieval metrics, equal to trec_eval's and so to BEIR's.

A passage is relevant if its grade is above 0. recall@k is the share of the relevant passages found
in the first k; nDCG@10 takes the grade as the gain (linear, as trec_eval's ndcg_cut); MAP@100 is
trec_eval's map_cut; MRR@10 is BEIR's. A query without a relevant passage scores 0 and counts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from .scores import Scores

DEPTH = 100
"""No metric looks further down a ranking."""

RECALL_AT = (1, 3, 5, 10, 100)

METRICS = (*(f"recall@{k}" for k in RECALL_AT), "ndcg@10", "mrr@10", "map@100")


def score_ranking(
    ranked: Sequence[Sequence[Hashable]], qrels: Sequence[Mapping[Any, float]]
) -> Scores:
    """Scores rankings against judgements.

    Args:
        ranked: Per query the passages found, best first, at most 100; None stands for no passage.
        qrels: Per query: passage -> grade.

    Returns:
        The value of each of ``METRICS`` for every query.
    """
    grades = np.zeros((len(qrels), DEPTH))
    ideal = np.zeros((len(qrels), 10))
    total = np.zeros(len(qrels))
    for i, (row, judged) in enumerate(zip(ranked, qrels, strict=True)):
        best = sorted((grade for grade in judged.values() if grade > 0), reverse=True)
        total[i] = len(best)
        ideal[i, : len(best)] = best[:10]
        grades[i, : len(row)] = [max(judged.get(passage, 0), 0) for passage in row]
    hits = grades > 0
    rank = np.arange(1, DEPTH + 1)
    discount = 1 / np.log2(rank[:10] + 1)
    precision = hits.cumsum(1) / rank
    some = np.maximum(total, 1)  # without a relevant passage, the numerator is 0
    per_query = {f"recall@{k}": hits[:, :k].sum(1) / some for k in RECALL_AT}
    best_dcg = ideal @ discount
    per_query["ndcg@10"] = grades[:, :10] @ discount / np.where(total > 0, best_dcg, 1)
    per_query["mrr@10"] = (hits[:, :10] / rank[:10]).max(1)
    per_query["map@100"] = (hits * precision).sum(1) / some
    return Scores(per_query)
