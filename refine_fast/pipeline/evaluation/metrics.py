"""Retrieval metrics with binary relevance, as BEIR defines them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .scores import Scores

DEPTH = 10
"""No metric looks further down a ranking."""


RECALL_AT = (1, 3, 5, 10)


METRICS = (*(f"recall@{k}" for k in RECALL_AT), f"ndcg@{DEPTH}", f"mrr@{DEPTH}")


def score_ranking(ranked: np.ndarray, relevant: Sequence[set[int]]) -> Scores:
    """``ranked`` (Q, 10): per query the rows of the documents found, best first, -1 where there is none."""
    hits = np.array(
        [
            [doc in found for doc in row]
            for row, found in zip(ranked.tolist(), relevant, strict=True)
        ],
        float,
    ).reshape(-1, DEPTH)
    total = np.array([len(found) for found in relevant])
    discount = 1 / np.log2(np.arange(2, DEPTH + 2))
    ideal = np.concatenate([[0], discount.cumsum()])[np.minimum(total, DEPTH)]
    per_query = {f"recall@{k}": hits[:, :k].sum(1) / total for k in RECALL_AT}
    per_query[f"ndcg@{DEPTH}"] = hits @ discount / ideal
    per_query[f"mrr@{DEPTH}"] = (hits / np.arange(1, DEPTH + 1)).max(1)
    return Scores(per_query)
