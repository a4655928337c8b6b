"""The test queries that an adaptation helped and hurt most."""

from __future__ import annotations

import numpy as np

from ..corpus.beir import RetrievalSet
from ..evaluation.scores import Scores
from .data import Moved

METRIC = "mrr@10"
"""The reciprocal of the rank that the report shows."""


def moved_queries(
    data: RetrievalSet, before: Scores, after: Scores, *, most: int = 5
) -> tuple[list[Moved], list[Moved]]:
    """The queries whose first answer rose, and those whose first answer fell, by most first.

    Args:
        data: the set that was scored.
        before: scores of the base model.
        after: scores of the product.
        most: the most queries of either kind.
    """
    old, new = before.per_query[METRIC], after.per_query[METRIC]
    order = np.argsort(new - old, kind="stable")
    rose = [i for i in order[::-1][:most] if new[i] > old[i]]
    fell = [i for i in order[:most] if new[i] < old[i]]
    row = {doc: i for i, doc in enumerate(data.doc_ids)}

    def moved(i: int) -> Moved:
        grades = {doc: grade for doc, grade in data.qrels[i].items() if doc in row}
        answer = data.docs[row[max(grades, key=lambda doc: grades[doc])]]
        return Moved(data.queries[i], answer, _rank(old[i]), _rank(new[i]))

    return [moved(i) for i in rose], [moved(i) for i in fell]


def _rank(reciprocal: float) -> int | None:
    return round(1 / reciprocal) if reciprocal else None
